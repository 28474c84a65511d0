"""Saving and restoring: bitwise, onto any mesh, and with a clear line for every bad folder."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from states import TrainState, assert_bitwise_equal, make_state, one_update

from pgpo_jax.checkpoint import CheckpointConfig, Checkpoints
from pgpo_jax.errors import InputError

# On Python 3.12 a restore that fails leaves a callback to Orbax's closed event loop behind.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def on_mesh(tree, shape):
    mesh = jax.make_mesh(shape, ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def place(leaf):
        spec = PartitionSpec("fsdp", "data") if leaf.ndim == 2 else PartitionSpec()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)


def test_a_restored_state_is_bitwise_the_saved_one(tmp_path):
    state = make_state()
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(3, state, {"skipped": 2})
    with Checkpoints(str(tmp_path)) as checkpoints:
        restored, run = checkpoints.restore(jax.tree.map(jnp.zeros_like, state))
    assert isinstance(restored, TrainState)
    assert run == {"step": 3, "skipped": 2}
    assert_bitwise_equal(restored, state)
    assert_bitwise_equal(one_update(restored), one_update(state))


@pytest.mark.parametrize(("saved", "restored"), [((8, 1), (1, 8)), ((2, 4), (1, 1))])
def test_a_state_is_restored_onto_another_mesh(tmp_path, saved, restored):
    state = make_state()
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
        on_mesh(state, restored),
    )
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(3, on_mesh(state, saved))
        found, _ = checkpoints.restore(like)
    assert_bitwise_equal(found, state)
    kernel = found.student["layers"]["kernel"]
    assert kernel.sharding == like.student["layers"]["kernel"].sharding


def test_a_state_may_be_donated_right_after_saving(tmp_path):
    state = make_state(width=4096)
    expected = jax.tree.map(lambda leaf: np.array(leaf), state)
    overwrite = jax.jit(
        lambda tree: jax.tree.map(lambda leaf: leaf * 0 + 7, tree), donate_argnums=0
    )
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(3, state)
        state = jax.block_until_ready(overwrite(state))
        found, _ = checkpoints.restore(state)
    assert_bitwise_equal(found, expected)


def test_only_the_newest_stay_and_the_best_stays_besides(tmp_path):
    with Checkpoints(str(tmp_path), keep=2) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.best() is None
        for step, value in [(1, 0.2), (2, 0.6), (3, 0.6), (4, 0.1)]:
            state = make_state(step)
            checkpoints.save(step, state)
            assert checkpoints.save_best(step, state.student, value) == (step in (1, 2))
        checkpoints.wait()
        assert checkpoints.latest_step() == 4
        assert checkpoints.best() == (2, 0.6)
        step, student = checkpoints.restore_student(state.student, "best")
        assert step == 2
        assert_bitwise_equal(student, make_state(2).student)
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == ["3", "4"]
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["2"]


def test_the_best_is_remembered_by_a_resumed_run(tmp_path):
    student = make_state().student
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.save_best(5, student, 0.5)
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert not checkpoints.save_best(6, student, 0.4)
        assert checkpoints.save_best(5, student, 0.7)
        assert checkpoints.best() == (5, 0.7)


def test_saving_a_step_twice_keeps_the_first(tmp_path):
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(3, make_state(3))
        checkpoints.save(3, make_state(9))
        found, _ = checkpoints.restore(make_state(3))
    assert_bitwise_equal(found, make_state(3))


def test_the_student_alone_is_read_without_the_rest(tmp_path):
    state = make_state()
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(3, state)
    for file in (tmp_path / "last" / "3" / "rest").rglob("*"):
        if file.is_file():
            file.unlink()
    with Checkpoints(str(tmp_path), read_only=True) as checkpoints:
        step, student = checkpoints.restore_student(jax.eval_shape(lambda: state.student))
    assert step == 3
    assert_bitwise_equal(student, state.student)


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    state = make_state()
    with Checkpoints(str(tmp_path), keep=2) as checkpoints:
        checkpoints.save(3, state)
    unfinished = tmp_path / "last" / "4.orbax-checkpoint-tmp"
    (unfinished / "student").mkdir(parents=True)
    with Checkpoints(str(tmp_path), keep=2) as checkpoints:
        assert checkpoints.latest_step() == 3
        checkpoints.save(4, state)
        checkpoints.wait()
        assert checkpoints.latest_step() == 4


def test_a_checkpoint_of_another_model_is_told_apart(tmp_path):
    state = make_state(width=16)
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(3, state)
        with pytest.raises(
            InputError, match=r"kernel is float32\[8,16\] there, float32\[8,32\] here"
        ):
            checkpoints.restore(make_state(width=32))
        with pytest.raises(InputError, match=r"scale is bfloat16.16. there, missing here"):
            checkpoints.restore_student({"layers": state.student["layers"]})
        with pytest.raises(InputError, match=r"scale is bfloat16.16. there, float32.16. here"):
            checkpoints.restore_student({**state.student, "scale": jnp.zeros(16)})
        with pytest.raises(InputError, match="of another model or optimizer: opt_state/"):
            checkpoints.restore(state._replace(opt_state=optax.sgd(0.1).init(state.student)))


def test_a_damaged_checkpoint_is_one_clear_line(tmp_path):
    state = make_state()
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save(3, state)
    for file in (tmp_path / "last" / "3" / "student").rglob("*"):
        if file.is_file() and len(file.name) == 32:
            file.write_bytes(file.read_bytes()[:20])
    with (
        Checkpoints(str(tmp_path)) as checkpoints,
        pytest.raises(
            InputError, match=r"last/3 cannot be read .*delete it, or choose another"
        ) as caught,
    ):
        checkpoints.restore(state)
    assert "\n" not in str(caught.value)


def test_a_foreign_folder_is_one_clear_line(tmp_path):
    (tmp_path / "last" / "7").mkdir(parents=True)
    (tmp_path / "last" / "7" / "pytorch_model.bin").write_bytes(b"weights")
    with (
        Checkpoints(str(tmp_path)) as checkpoints,
        pytest.raises(InputError, match="checkpoints: "),
    ):
        checkpoints.restore(make_state())


def test_a_missing_step_names_the_ones_there_are(tmp_path):
    state = make_state()
    with Checkpoints(str(tmp_path)) as checkpoints:
        with pytest.raises(InputError, match=r"does not have a step \(it has none\)"):
            checkpoints.restore(state)
        checkpoints.save(3, state)
        with pytest.raises(InputError, match=r"does not have step 9 \(it has 3\)"):
            checkpoints.restore(state, step=9)


def test_reading_does_not_create_folders(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Checkpoints(str(tmp_path / "none"), read_only=True)
    assert not (tmp_path / "none").exists()


def test_a_file_in_the_way_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be opened"):
        Checkpoints(str(tmp_path / "file"))


@pytest.mark.parametrize("bad", [{"every": -1}, {"keep": 0}])
def test_the_section_checks_its_values(bad):
    with pytest.raises(InputError, match="checkpoint"):
        CheckpointConfig(**bad)


def test_importing_the_module_does_not_import_orbax():
    code = "import sys, pgpo_jax.checkpoint; sys.exit('orbax.checkpoint' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=dict(os.environ)).returncode == 0
