"""Adapters in PEFT's format: the same logits there and here, and every fault named."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import make_goldens
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pgpo_jax import hf, models, sharding
from pgpo_jax.errors import InputError
from pgpo_jax.models import LoraConfig, Options

BASE = str(make_goldens.GOLDENS / "qwen3")
LORA = LoraConfig(rank=3, alpha=6.0, base_dtype="float32", path=str(make_goldens.ADAPTERS))
CONFIG = hf.load_config(BASE)
EXPECTED = np.load(make_goldens.ADAPTERS / "expected.npz")["logits"]


@pytest.fixture
def folder(tmp_path):
    """A copy of the adapters, to be damaged."""
    return shutil.copytree(make_goldens.ADAPTERS, tmp_path / "adapters")


def logits(adapters, frozen):
    graphdef = models.make_graphdef(CONFIG, Options(jnp.float32, lora=LORA))
    tokens, mask = map(jnp.asarray, make_goldens.tokens())
    forward = jax.jit(lambda params, frozen: models.merge(graphdef, params, frozen)(tokens, mask))
    return np.where(mask[:, :, None], forward(adapters, frozen), 0)


def test_adapters_of_peft_give_its_logits():
    _, mask = make_goldens.tokens()
    found = logits(hf.load_adapters(CONFIG, LORA), hf.load(BASE)[1])
    np.testing.assert_allclose(found, np.where(mask[:, :, None], EXPECTED, 0), atol=1e-4)
    without = np.load(make_goldens.GOLDENS / "qwen3" / "expected.npz")["logits"]
    assert np.abs(EXPECTED - without)[mask].max() > 1


def test_adapters_come_back_as_they_were_from_any_mesh(tmp_path):
    mesh = sharding.make_mesh(sharding.MeshConfig(2, 2, 2))
    adapters = hf.load_adapters(CONFIG, LORA, mesh)
    hf.save_adapters(tmp_path, CONFIG, LORA, adapters, BASE)
    ours, theirs = (load_file(path / hf.TENSORS) for path in (tmp_path, make_goldens.ADAPTERS))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(ours[name], tensor)
    again = hf.load_adapters(CONFIG, dataclasses.replace(LORA, path=str(tmp_path)))
    jax.tree.map(np.testing.assert_array_equal, again, adapters)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's use of transformers
def test_peft_loads_what_is_written_with_the_same_logits(tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    del torch
    adapters = models.init_adapters(CONFIG, LORA, jax.random.key(0))
    adapters = jax.tree.map(
        lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), adapters
    )
    hf.save_adapters(tmp_path, CONFIG, LORA, adapters, BASE)
    tokens, mask = make_goldens.tokens()
    base = make_goldens.random_model(make_goldens.CONFIGS["qwen3"], tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    theirs = np.where(mask[:, :, None], make_goldens.logits(loaded, tokens, mask), 0)
    np.testing.assert_allclose(logits(adapters, hf.load(BASE)[1]), theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 4}, "model.lora.rank: got 4; the adapters in .* have 3"),
        ({"alpha": 8.0}, "model.lora.alpha: got 8.0; the adapters in .* have 6"),
        ({"targets": ("q_proj",)}, r"model.lora.targets: got \['q_proj'\]; the adapters in"),
        ({"path": "nowhere"}, "model.lora.path: got nowhere; must be a folder with adapter_config"),
    ],
)
def test_adapters_must_be_those_that_are_stated(settings, message):
    with pytest.raises(InputError, match=message):
        hf.load_adapters(CONFIG, dataclasses.replace(LORA, **settings))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 8}),
        ("init_lora_weights", "pissa"),
        ("layers_to_transform", [0]),
        ("peft_type", "IA3"),
        ("invented_since", 1),
    ],
)
def test_settings_that_would_compute_something_else_are_refused(folder, name, value):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(InputError, match=f"with {name} .* which is not supported; must be plain"):
        hf.load_adapters(CONFIG, dataclasses.replace(LORA, path=str(folder)))


def test_tensors_of_another_model_are_named(folder):
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    tensors = load_file(folder / hf.TENSORS)
    tensors[name] = tensors[name][:, 1:].copy()
    save_file({**tensors, "lm_head": tensors[name]}, folder / hf.TENSORS)
    with pytest.raises(InputError, match=f"not those of such adapters .*: lm_head, {name}"):
        hf.load_adapters(CONFIG, dataclasses.replace(LORA, path=str(folder)))
    (folder / hf.TENSORS).write_bytes(b"no")
    with pytest.raises(InputError, match=r"adapter_model.safetensors cannot be read"):
        hf.load_adapters(CONFIG, dataclasses.replace(LORA, path=str(folder)))


def test_adapters_of_a_model_with_another_name_are_told_of():
    assert hf.adapter_notes(LORA, BASE) == ()
    (note,) = hf.adapter_notes(LORA, "Qwen/Qwen3-8B")
    assert "were made for qwen3; model.path is Qwen/Qwen3-8B" in note


def test_a_section_with_adapters_has_one_base_of_its_type_and_adapters_in_float32():
    section = hf.ModelSection(path=BASE, lora=dataclasses.replace(LORA, base_dtype="bfloat16"))
    mesh = sharding.make_mesh(sharding.MeshConfig(1, 1, 1))
    _, frozen = hf.load(BASE, mesh=mesh, param_dtype=section.lora.base_dtype)
    _, exact = hf.load(BASE)
    jax.tree.map(np.testing.assert_array_equal, frozen, exact)  # the checkpoint has 16 bits
    assert {x.dtype.name for x in jax.tree.leaves(frozen)} == {"bfloat16"}
    architecture = {**make_goldens.TINY, "model_type": "qwen3", "head_dim": 8}
    drawn, plain = (
        hf.from_section(
            hf.ModelSection(architecture=architecture, lora=lora), mesh, jax.random.key(3)
        )
        for lora in (LoraConfig(rank=2), models.OFF)
    )
    assert plain.frozen is None
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), plain.params)
    jax.tree.map(np.testing.assert_array_equal, drawn.frozen, expected)
    assert {x.dtype.name for x in jax.tree.leaves(drawn.params)} == {"float32"}
