"""Training adapters: one base for student and teacher, which no update, mesh or resume touches."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from marks import long
from test_step import ARCHITECTURE, BATCHES, assert_same, numbers, place
from test_train import TINY, code, rows

from pgpo_jax import checkpoint, convert, evaluate, fused, hf, models, sharding, train
from pgpo_jax.losses import DistillationConfig
from pgpo_jax.models import LoraConfig, Options
from pgpo_jax.optimizer import OptimizerConfig, make_optimizer
from pgpo_jax.state import init_train_state, train_state_shardings
from pgpo_jax.step import make_train_step
from pgpo_jax.tasks import addition
from pgpo_jax.teacher import AVERAGE, TeacherConfig

CONFIG = models.ModelConfig.from_hf(ARCHITECTURE)
LORA = LoraConfig(rank=3, alpha=6.0)
OPTIMIZER = make_optimizer(OptimizerConfig(1.0, learning_rate=1e-2, warmup_steps=0, eps=1e-3))


def updated(mesh=(1, 1, 1), micro_batches=1, packing="never", teacher=AVERAGE, external=False):
    """First state, base, last state and the measurements of every update, all on the host."""
    mesh = sharding.make_mesh(sharding.MeshConfig(*mesh))
    options = Options(dtype=jnp.float32, lora=LORA)
    graphdef, base = models.init(CONFIG, options, jax.random.key(0), mesh, jnp.bfloat16)
    base = jax.tree.map(lambda x: 10 * x if x.ndim > 2 else x, base)
    adapters = models.init_adapters(CONFIG, LORA, jax.random.key(1), mesh)
    another = jax.tree.map(lambda x: x.astype(jnp.float32), base) if external else None
    step = make_train_step(
        graphdef,
        OPTIMIZER,
        fused.Options(DistillationConfig(top_k=None, chunk_size=8), (), 22),
        train_state_shardings(adapters, OPTIMIZER, another),
        teacher_config=teacher,
        teacher_graphdef=models.make_graphdef(CONFIG, Options(jnp.float32)) if external else None,
    )
    state = init_train_state(adapters, OPTIMIZER, another)
    (first, before), measured = jax.device_get((state, base)), []
    for batch in BATCHES[:2]:
        state, found = step(state, place(batch, mesh, micro_batches, packing), base)
        measured.append(numbers(found))
    jax.tree.map(np.testing.assert_array_equal, base, before)  # there, and not donated
    return first, jax.device_get(state), measured


@functools.cache
def single():
    return updated()


def test_student_and_teacher_are_equal_until_the_first_update_and_the_average_follows():
    first, last, measured = single()
    jax.tree.map(np.testing.assert_array_equal, first.student, first.teacher)
    (one, two) = measured
    assert one["teacher_student_distance"] > 0  # after the update: the teacher moves by 5 %
    moved = [
        np.abs(x - y).max()
        for x, y in zip(*map(jax.tree.leaves, (first.student, last.student)), strict=True)
    ]
    assert min(moved) > 0  # of every A and B: after the first update B is no longer zero
    # Gradient, update and moments are those of the adapters alone.
    size = sum(x.size for x in jax.tree.leaves(first.student))
    assert sum(x.size for x in jax.tree.leaves(last.opt_state)) < 2 * size + 10
    assert 0 < two["update_norm"] < 1e-2 * 2 * size**0.5


@pytest.mark.parametrize(
    "arrangement",
    [
        {"mesh": (2, 2, 2), "micro_batches": 2},
        pytest.param({"packing": "always", "micro_batches": 2}, marks=[pytest.mark.slow, long]),
        pytest.param({"mesh": (1, 1, 8)}, marks=[pytest.mark.slow, long]),
    ],
    ids=str,
)
def test_an_update_is_the_same_on_any_mesh_and_in_pieces(arrangement):
    _, expected, measured = single()
    _, found, others = updated(**arrangement)
    for one, other in zip(measured, others, strict=True):
        assert_same(other, one)
    for x, y in zip(*map(jax.tree.leaves, (found.student, expected.student)), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("refresh", [pytest.param("live", marks=long), "periodic", "trust_region"])
def test_every_teacher_follows_in_its_adapters(refresh):
    teacher = TeacherConfig(refresh=refresh, period=2)
    first, last, measured = updated(teacher=teacher)
    expected = first.teacher if refresh == "trust_region" else last.student
    jax.tree.map(np.testing.assert_array_equal, last.teacher, expected)
    assert all(np.isfinite(row["loss"]) for row in measured)


@pytest.mark.slow
def test_another_model_may_teach_adapters_and_has_none_itself():
    """The base as that model: before the first update it says what a frozen teacher would."""
    frozen = TeacherConfig(refresh="frozen")
    first, expected, own = updated(teacher=frozen)
    jax.tree.map(np.testing.assert_array_equal, expected.teacher, first.teacher)
    _, state, other = updated(teacher=frozen, external=True)
    for name in ("loss", "information", "grad_norm"):
        np.testing.assert_allclose([row[name] for row in other], [row[name] for row in own], 1e-4)
    assert "teacher_student_distance" not in other[0]
    assert state.teacher.keys() == {"embed_tokens", "layers", "norm"}
    assert expected.teacher.keys() == {"layers"}


# ---- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A model, a run of its adapters in one piece, and the same in two."""
    folder = tmp_path_factory.mktemp("lora")
    architecture = TINY["model"]["architecture"]
    graphdef, params = models.init(
        models.ModelConfig.from_hf(architecture), Options(), jax.random.key(7)
    )
    params = jax.tree.map(lambda x: 10 * x if x.ndim > 2 else x, params)
    hf.save(folder / "model", graphdef, params, addition.make_tokenizer())
    lora = {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "o_proj", "down_proj"]}
    model = {"path": str(folder / "model"), "dtype": "float32", "lora": lora}

    def run(name, **changes):
        path = folder / f"{name}.yaml"
        sections = {**TINY, "model": model, "steps": 2, **changes}
        for section in ("warm_start", "optimizer"):  # far enough from the base to be told from it
            sections[section] = {**TINY[section], "learning_rate": 0.02}
        sections |= {"output_dir": str(folder / name), "evaluation": {"every": 0, "questions": 4}}
        path.write_text(yaml.safe_dump(sections))
        assert code(train.main, str(path)) == 0
        return folder / name

    run("pieces", steps=1)
    run("whole")
    run("pieces")
    return folder


def test_a_resumed_run_of_adapters_is_bit_for_bit_one_in_one_piece(runs, capsys):
    assert code(checkpoint.main, "compare", str(runs / "whole"), str(runs / "pieces")) == 0
    assert capsys.readouterr().out.strip() == "equal"


def test_the_samplers_log_probs_are_those_of_the_update(runs):
    updates = [row for row in rows(runs / "whole" / "metrics.jsonl") if "loss" in row]
    assert len(updates) == 2 and max(row["sampler_mismatch"] for row in updates) < 1e-5
    assert updates[-1]["teacher_student_distance"] > 0


def test_exported_adapters_and_the_merged_model_are_what_was_trained(runs, tmp_path, capsys):
    run, adapters, merged = str(runs / "whole"), tmp_path / "adapters", tmp_path / "merged"
    assert code(convert.main, "export", run, str(adapters)) == 0
    assert code(convert.main, "export", run, str(merged), "--merge") == 0
    stated = json.loads((adapters / "adapter_config.json").read_text())
    assert stated["base_model_name_or_path"] == str(runs / "model")
    lora = LoraConfig(2, 4.0, ("q_proj", "o_proj", "down_proj"), path=str(adapters))
    section = hf.ModelSection(path=str(runs / "model"), dtype="float32", lora=lora)
    model = hf.from_section(section, None, jax.random.key(0))
    tokens = jnp.arange(12).reshape(2, 6)
    expected = models.merge(model.graphdef, model.params, model.frozen)(tokens)
    (ours, without) = (
        models.merge(*hf.load(path, dtype=jnp.float32))(tokens) for path in (merged, runs / "model")
    )
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert np.abs(without - expected).max() > 1e-2
    assert hf.load_tokenizer(adapters).get_vocab() == hf.load_tokenizer(merged).get_vocab()
    # The newest student of the run, and the adapters as a start, answer alike.
    capsys.readouterr()
    assert code(evaluate.main, f"{run}/config.yaml") == 0
    of_run = json.loads(capsys.readouterr().out.splitlines()[-1])
    start = ["--model.lora.path", str(adapters), "--evaluation.untrained", "true"]
    assert code(evaluate.main, f"{run}/config.yaml", *start) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == of_run | {"step": 0}


def test_what_cannot_be_exported_is_refused(runs, tmp_path, refused):
    config = yaml.safe_load((runs / "whole" / "config.yaml").read_text())
    folder = tmp_path / "run"
    folder.mkdir()

    def export(*arguments, **model):
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": model}))
        return "export", str(folder), str(tmp_path / "out"), *arguments

    lora = config["model"]["lora"]
    refused(
        "--merge: got a run without adapters (model.lora.rank 0 in FOLDER/run/config.yaml)",
        "convert",
        *export("--merge", path=str(runs / "model")),
    )
    refused(
        "RUN: FOLDER/run has adapters on a model without a checkpoint (model.architecture), which "
        "nothing could load them on; give --merge",
        "convert",
        *export(architecture=TINY["model"]["architecture"], lora=lora),
    )
