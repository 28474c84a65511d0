"""The paper's configuration, to the letter, at its real size but without its memory."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from pgpo_jax import config, fused, sharding
from pgpo_jax.models import decoder
from pgpo_jax.optimizer import learning_rate, make_optimizer
from pgpo_jax.plan import programs
from pgpo_jax.state import abstract_train_state, train_state_shardings
from pgpo_jax.step import make_train_step

PATH = pathlib.Path(__file__).parent.parent / "configs" / "sciknoweval_qwen3_8b.yaml"
QWEN3_8B = {  # config.json of Qwen/Qwen3-8B, where it matters
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 12_288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rope_theta": 1_000_000,
    "max_position_embeddings": 40_960,
    "tie_word_embeddings": False,
}


def test_its_settings_are_the_papers():
    c = config.load(str(PATH))
    assert (c.data.questions_per_step, c.sampling.num_samples) == (32, 8)
    assert (c.data.max_prompt_length, c.sampling.max_response_length) == (2048, 8192)
    assert c.data.template_options == {"enable_thinking": False}
    assert c.reprompt.max_length == 10_240
    assert (c.sampling.temperature, c.sampling.top_p, c.sampling.top_k) == (1.0, 1.0, None)
    assert (c.distillation.kind, c.distillation.jsd_weight) == ("jsd", 0.5)
    assert (c.distillation.top_k, c.distillation.tail) == (100, True)
    assert (c.teacher.ema_rate, c.distillation.importance_cap) == (0.05, 2.0)
    assert c.distillation.aggregation == "sequence_mean"
    optimizer = c.optimizer
    assert (optimizer.b1, optimizer.b2, optimizer.eps) == (0.9, 0.999, 1e-8)
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (0.01, 1.0)
    rates = [float(learning_rate(optimizer)(k)) for k in (0, 5, 10, 1000)]
    np.testing.assert_allclose(rates, [0, 5e-6, 1e-5, 1e-5], rtol=1e-6)
    assert c.optimizer.alpha in (0.5, 1.0, 1.5)
    evaluation = c.evaluation
    assert (evaluation.every, evaluation.num_samples) == (5, 16)
    assert (evaluation.temperature, evaluation.top_p) == (0.6, 0.95)


def test_its_update_can_be_traced_at_full_size():
    c = config.load(str(PATH))
    mesh = sharding.make_mesh(c.mesh)
    architecture = decoder.ModelConfig.from_hf(QWEN3_8B)
    shapes = decoder.param_shapes(architecture)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 8_190_735_360
    where = sharding.shardings(decoder.param_axes(architecture), shapes, mesh)
    params = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        where,
    )
    optimizer = make_optimizer(c.optimizer)
    graphdef = decoder.make_graphdef(architecture, c.model.options())
    step = make_train_step(
        graphdef,
        optimizer,
        fused.Options(c.distillation, vocab_size=151_669),
        train_state_shardings(params, optimizer),
    )
    batch = programs.abstract_batch(programs.make_setup(c, list(mesh.devices.flat)))
    state = abstract_train_state(params, optimizer)
    after, measured = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert {"loss", "information", "multiplier"} <= measured.keys()


def test_with_adapters_it_is_the_same_experiment_on_one_card():
    whole, adapters = config.load(str(PATH)), config.load(str(PATH.with_name("lora_qwen3_8b.yaml")))
    changed = {
        name
        for name, value in vars(adapters).items()
        if value != getattr(whole, name) and name != "output_dir"
    }
    assert changed == {"model", "data", "sampling", "optimizer", "mesh"}
    assert dataclasses.replace(adapters.model, lora=whole.model.lora) == whole.model
    assert adapters.optimizer == dataclasses.replace(whole.optimizer, learning_rate=1e-4)
    setup = programs.make_setup(adapters, jax.devices()[:1])
    assert sum(programs.state_bytes(setup).values()) < 17.5e9
    assert programs.state_bytes_per_parameter(setup) == pytest.approx(2.11, abs=0.01)
