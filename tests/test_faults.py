"""Whatever interrupts a run, the same command goes on, and it ends as if nothing had happened."""

import contextlib
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from faulty import hit
from marks import long
from states import assert_bitwise_equal, make_state
from test_distributed import finish, start
from test_train import TINY, code, rows

from pgpo_jax import checkpoint, config, train
from pgpo_jax.checkpoint import Checkpoints, digest
from pgpo_jax.errors import InputError, RunError
from pgpo_jax.logs import Writer

# A restore that fails leaves tasks of Orbax and TensorStore behind, which complain when dropped.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]

RUN = {**TINY, "steps": 6, "checkpoint": {"every": 2}}


def write(folder, name, **changes):
    """A configuration whose run goes to `folder / name`."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**RUN, "output_dir": str(folder / name), **changes}))
    return str(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert code(train.main, write(folder, "run")) == 0
    return folder / "run"


def assert_equal_runs(run, whole):
    assert checkpoint.compare(str(whole), str(run)) is None
    steps = [row["step"] for row in rows(run / "metrics.jsonl")]
    assert steps == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert not list(run.rglob("*tmp*"))
    assert yaml.safe_load((run / "config.yaml").read_text())["steps"] == 6


# --- signals -------------------------------------------------------------------------------


def test_sigterm_in_every_phase_saves_and_the_same_command_goes_on(tmp_path, whole, capsys):
    path = write(tmp_path, "run")
    for place, times in [
        ("warm start", 2),
        ("evaluation", 1),
        ("rollout", 1),
        ("update", 1),
        ("best", 1),
        ("save", 1),
    ]:
        with hit(place, times, signal.SIGTERM) as calls:
            status = code(train.main, path)
            if len(calls) < times:  # no better student came, so none was saved
                assert (place, status) == ("best", 0)
                break
        assert status == train.STOPPED, place
        assert (
            f"stopped at step {len(rows_of_updates(tmp_path / 'run'))}" in capsys.readouterr().out
        )
    assert code(train.main, path) == 0
    assert_equal_runs(tmp_path / "run", whole)


def test_a_warm_start_and_an_evaluation_end_within_a_step_and_a_batch_and_go_on(
    tmp_path, whole, capsys
):
    path, run = write(tmp_path, "run"), tmp_path / "run"
    own = run / "checkpoints" / "warm_start"
    for place, said, kept in [
        ("warm start", "stopped at step 0, after 1 of 2 supervised steps", True),
        ("held-out batch", "stopped at step 0: ", False),
    ]:
        with hit(place, 1, signal.SIGTERM) as calls:
            assert code(train.main, path) == train.STOPPED
        assert len(calls) == 1  # and nothing was done after it
        assert said in capsys.readouterr().out
        assert own.exists() == kept
        assert (run / "metrics.jsonl").read_text() == ""
        assert (run / "checkpoints" / "last" / "0").exists() != kept
    with hit("warm start", 1, signal.SIGTERM) as calls:  # it is not done again
        assert code(train.main, path) == 0
    assert calls == []
    assert_equal_runs(run, whole)


@pytest.mark.slow
def test_a_warm_start_that_is_killed_goes_on_from_its_last_save(tmp_path, whole):
    warm = {"warm_start": {**RUN["warm_start"], "save_every": 1}}
    path = write(tmp_path, "run", **warm)
    status, out, err = command_line(FAULTY, "commit", 2, "SIGKILL", path)
    assert status == -signal.SIGKILL, (out, err)
    status, out, err = command_line("-m", "pgpo_jax.train", path)
    assert status == 0, err
    assert "resumed after 1 supervised steps" in out
    assert_equal_runs(tmp_path / "run", whole)


def rows_of_updates(run):
    return [row for row in rows(run / "metrics.jsonl") if "loss" in row]


def command_line(*arguments, **variables):
    """One command in a process of its own: exit code, stdout, stderr."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "JAX_PLATFORMS": "cpu", **variables},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


FAULTY = pathlib.Path(__file__).parent / "support" / "faulty.py"
KILLS = [
    ("warm start", 2),
    ("evaluation", 1),
    ("best", 1),
    ("commit", 1),
    ("rollout", 2),
    ("verification", 1),
    ("update", 2),
    ("save", 1),
    ("metrics", 2),
    ("samples", 2),
    ("commit", 1),
    ("deletion", 1),
    ("config", 1),
    ("cut", 1),
]


def kill_at(places, path, run, whole):
    """Kills the same run at one place after another, then lets it end, and compares it."""
    for place, times in places:
        status, out, err = command_line(FAULTY, place, times, "SIGKILL", path)
        if status == 0:  # done before the place was reached
            shutil.rmtree(run)
            continue
        assert status == -signal.SIGKILL, (place, out, err)
    status, _, err = command_line("-m", "pgpo_jax.train", path)
    assert status == 0, err
    assert_equal_runs(run, whole)


@pytest.mark.slow
def test_sigkill_costs_only_the_steps_since_the_last_checkpoint(tmp_path, whole):
    places = [("samples", 3), ("commit", 1), ("update", 2)]
    kill_at(places, write(tmp_path, "run"), tmp_path / "run", whole)


@long
@pytest.mark.slow
def test_sigkill_anywhere_costs_only_the_steps_since_the_last_checkpoint(tmp_path, whole):
    kill_at(KILLS, write(tmp_path, "run"), tmp_path / "run", whole)


def test_an_evaluation_after_a_stop_signal_is_in_the_metrics_once(tmp_path, whole):
    """It belongs to the step of the checkpoint, but was not done when that was saved."""
    path, run = write(tmp_path, "run"), tmp_path / "run"
    with hit("rollout", 4, signal.SIGTERM):  # in step 4, before whose evaluation it stops
        assert code(train.main, path) == train.STOPPED
    assert rows(run / "metrics.jsonl")[-1]["step"] == 4
    with (run / "metrics.jsonl").open("a") as file:  # evaluated, one more step, then killed
        evaluated = [row for row in rows(whole / "metrics.jsonl") if row["step"] in (4, 5)][1:]
        file.write("".join(json.dumps(row) + "\n" for row in evaluated) + '{"step": 6, "lo')
    assert code(train.main, path) == 0
    assert_equal_runs(run, whole)


# --- damage --------------------------------------------------------------------------------


def flip(file, part=2):
    content = bytearray(file.read_bytes())
    content[len(content) // part] ^= 16
    file.write_bytes(content)


DAMAGE = {
    "a flipped bit": flip,
    "a flipped bit in front": lambda file: flip(file, 5),
    "half the file": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "no file": pathlib.Path.unlink,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two checkpoints, with arrays too large to stand among the names (above 1 kB)."""
    folder = tmp_path_factory.mktemp("saved")
    states = {step: make_state(step, width=512) for step in (2, 3)}
    with Checkpoints(str(folder)) as checkpoints:
        for step, state in states.items():
            checkpoints.save(step, state, {"evaluated": step})
    return folder, states


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_any_file_is_named_or_changes_nothing(kind, saved, tmp_path, capsys):
    folder, states = saved
    newest = folder / "last" / "3"
    named = []
    for file in sorted(path for path in newest.rglob("*") if path.is_file()):
        name = file.relative_to(newest)
        copy = tmp_path / "copy"
        shutil.copytree(folder, copy)
        DAMAGE[kind](copy / "last" / "3" / name)
        with Checkpoints(str(copy)) as checkpoints:
            restored, run = checkpoints.restore(states[3])
            step = run["step"]
            assert checkpoints.latest_step() == step
        assert_bitwise_equal(restored, states[step])
        assert run == {"step": step, "evaluated": step}
        lines = [line for line in capsys.readouterr().err.splitlines() if "checkpoints: " in line]
        if step == 2:
            named.append(name)
            (line,) = lines
            assert line.startswith(f"warning: checkpoints: {copy}/last/3 cannot be read (")
            assert line.endswith(f"moved to {copy}/damaged; step 2 is used")
            assert (copy / "damaged" / "last_3" / "run").is_dir()
        else:
            assert lines == []
        shutil.rmtree(copy)
    # Orbax finds what is wrong with its own files, but not with the numbers themselves.
    arrays = [max(newest.glob(f"{tree}/*/d/*"), key=lambda p: p.stat().st_size) for tree in
              ("student", "rest")]  # fmt: skip
    assert {path.relative_to(newest) for path in arrays} <= set(named)
    for tree in ("student", "rest"):
        assert pathlib.Path(tree, "manifest.ocdbt") in named
    assert {pathlib.Path("arrays/metadata"), pathlib.Path("run/metadata")} <= set(named)


def test_where_every_checkpoint_is_damaged_nothing_is_deleted(saved, tmp_path, capsys):
    folder, states = saved
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for step in (2, 3):
        (copy / "last" / str(step) / "run" / "metadata").write_text("{}")
    files = sorted(copy.rglob("*"))
    with (
        Checkpoints(str(copy)) as checkpoints,
        pytest.raises(InputError, match=r"last/3 cannot be read .* None of 2 can be read"),
    ):
        checkpoints.restore(states[3])
    assert sorted(copy.rglob("*")) == files
    assert capsys.readouterr().err == ""


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, whole, capsys):
    shutil.copytree(whole, tmp_path / "run")
    last = tmp_path / "run" / "checkpoints" / "last"
    assert sorted(path.name for path in last.iterdir()) == ["4", "6"]
    # All of the file: parts of it, outdated names among the numbers of a tiny model, do not matter.
    file = max((last / "6" / "student").rglob("*"), key=lambda path: path.stat().st_size)
    file.write_bytes(bytes(255 - byte for byte in file.read_bytes()))
    assert code(train.main, write(tmp_path, "run")) == 0
    printed = capsys.readouterr()
    assert f"warning: checkpoints: {last}/6 cannot be read (" in printed.err
    assert "resumed at step 4" in printed.out
    assert_equal_runs(tmp_path / "run", whole)


def test_a_damaged_best_student_is_named_and_another_kept(tmp_path, capsys):
    student = make_state(3).student
    with Checkpoints(str(tmp_path)) as checkpoints:
        checkpoints.save_best(3, student, 0.5)
    (tmp_path / "best" / "3" / "run" / "metadata").write_text('{"step": 3, "value": 0.9}')
    with Checkpoints(str(tmp_path)) as checkpoints:
        assert checkpoints.save_best(2, student, 0.4)
        assert checkpoints.best() == (2, 0.4)
    assert "best/3 cannot be read" in capsys.readouterr().err


def test_a_checkpoint_of_the_first_versions_is_read_without_checksums(saved, tmp_path):
    folder, states = saved
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for item, field in (("arrays", "checksums"), ("run", "checksum")):
        path = copy / "last" / "3" / item / "metadata"
        content = json.loads(path.read_text())
        del content[field]
        path.write_text(json.dumps(content))
    with Checkpoints(str(copy)) as checkpoints:
        restored, run = checkpoints.restore(states[3])
    assert run == {"step": 3, "evaluated": 3}
    assert_bitwise_equal(restored, states[3])


# --- no space ------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path):
    """`disk(bytes)`: a file system of that size, which is really full when it is."""
    mounted = []

    def mount(size):
        path = tmp_path / "disk"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a small file system is not permitted here")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextlib.contextmanager
def files_of_at_most(size):
    """As on a full disk, writing beyond a size fails, in this process and for every user."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_is_told_and_the_run_goes_on_or_stops(tmp_path, capsys):
    state, wide = make_state(width=16), make_state(width=4096)
    with Checkpoints(str(tmp_path), on_failure="continue") as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        with files_of_at_most(60_000):
            checkpoints.save(2, wide)
            checkpoints.wait()
            line = capsys.readouterr().err
            assert f"warning: checkpoints: step 2 could not be saved to {tmp_path}/last" in line
            assert "(File too large); step 1 is the newest there" in line
            assert checkpoints.latest_step() == 1
        checkpoints.save(2, wide)
        checkpoints.wait()
        assert checkpoints.latest_step() == 2
        restored, _ = checkpoints.restore(wide)
        assert_bitwise_equal(restored, wide)
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == ["1", "2"]
    with Checkpoints(str(tmp_path), on_failure="stop") as checkpoints, files_of_at_most(60_000):
        checkpoints.save(3, wide)
        with pytest.raises(RunError, match=r"step 3 could not be saved .*File too large"):
            checkpoints.wait()
        assert checkpoints.latest_step() == 2


def test_rows_without_space_wait_and_no_line_is_torn(tmp_path, capsys):
    with Writer(tmp_path, total_steps=9) as writer:
        writer.write(1, {"loss": 1.0})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        with files_of_at_most(size + 10):
            writer.write(2, {"loss": 2.0})
            writer.write(3, {"loss": 3.0})
            assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1]
            with pytest.raises(OSError, match="too large"):
                writer.sizes()
        assert capsys.readouterr().out.count("metrics.jsonl cannot be written") == 1
        writer.write(4, {"loss": 4.0})
        assert writer.sizes()["metrics.jsonl"] == (tmp_path / "metrics.jsonl").stat().st_size
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_a_full_disk_leaves_a_run_that_goes_on_once_there_is_room(
    policy, disk, whole, tmp_path, capsys
):
    folder = disk("420k")
    path = write(folder, "run", checkpoint={"every": 2, "on_failure": policy})
    assert code(train.main, path) == 1
    printed = capsys.readouterr()
    errors = printed.err.strip().splitlines()
    assert "could not be saved" in printed.err
    assert "No space left on device" in printed.err
    assert errors[-1].startswith("error: checkpoints: ")
    assert "Traceback" not in printed.err
    ended = "6/6" in printed.out
    assert ended == (policy == "continue")
    subprocess.run(["mount", "-o", "remount,size=8m", str(folder)], check=True)
    assert code(train.main, path) == 0
    capsys.readouterr()
    assert_equal_runs(folder / "run", whole)


# --- several processes ---------------------------------------------------------------------

LIMIT = 10  # distributed.timeout and .heartbeat_timeout here, seconds


def several(folder, name, **changes):
    plain = {"steps": 4, "mesh": {}, "warm_start": {}, "evaluation": {"every": 0}}
    limits = {"distributed": {"timeout": LIMIT, "heartbeat_timeout": LIMIT}}
    return write(folder, name, **{**plain, **limits, **changes})


def lose_one(path, count, rank, place, times, number):
    """Starts `count` processes of which one is hit; the others' exit codes, stderr, and seconds."""
    processes = start(path, count, hits={rank: (place, times, number)})
    lost = processes[rank]
    while lost.poll() is None and not is_stopped(lost.pid):
        time.sleep(0.05)
    began = time.monotonic()
    others = [process for process in processes if process is not lost]
    codes, errors = finish(others, timeout=6 * LIMIT)
    seconds = time.monotonic() - began
    lost.kill()
    lost.communicate()
    return codes, errors, seconds


def is_stopped(pid):
    state = pathlib.Path(f"/proc/{pid}/stat").read_text()
    return state.rsplit(")", 1)[1].split()[0] == "T"


def assert_the_others_end_and_all_go_on(folder, count, rank, place, times, number, **changes):
    path = several(folder, f"{place}-{number}", **changes)
    codes, errors, seconds = lose_one(path, count, rank, place, times, number)
    assert 0 not in codes
    assert seconds < 4 * LIMIT
    for error in errors:
        # Whichever notices first: a broken connection of ours, or JAX, which says of process 0 that
        # "the leader task was preempted/died" and of others that they "stopped sending heartbeats".
        ours = "a process is gone: barrier 'failed'" in error
        assert ours or "leader task was preempted/died" in error or "heartbeat" in error
    codes, errors = finish(start(path, count))
    assert codes == [0] * count, errors
    assert checkpoint.compare(str(folder / "whole"), path.removesuffix(".yaml")) is None


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_both_go_on_as_if_it_had_not_been(tmp_path):
    codes, errors = finish(start(several(tmp_path, "whole"), 2))
    assert codes == [0, 0], errors
    assert_the_others_end_and_all_go_on(tmp_path, 2, 1, "rollout", 4, "SIGKILL")


@long
@pytest.mark.slow
def test_two_processes_answer_a_signal_of_one_in_a_warm_start_and_an_evaluation(tmp_path):
    names = ("warm_start", "evaluation")
    changes = {"steps": 1, **{name: RUN[name] for name in names}}
    codes, errors = finish(start(several(tmp_path, "whole", **changes), 2))
    assert codes == [0, 0], errors
    path = several(tmp_path, "run", **changes)
    for place in ("warm start", "held-out batch"):
        codes, errors = finish(start(path, 2, hits={1: (place, 1, "SIGTERM")}))
        assert codes == [train.STOPPED] * 2, (place, errors)
    codes, errors = finish(start(path, 2))
    assert codes == [0, 0], errors
    assert checkpoint.compare(str(tmp_path / "whole"), str(tmp_path / "run")) is None


@long
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("count", [2, 4])
def test_a_process_is_lost_in_every_phase_and_all_go_on(tmp_path, count):
    changes = {"steps": 5, "evaluation": RUN["evaluation"]}
    codes, errors = finish(start(several(tmp_path, "whole", **changes), count))
    assert codes == [0] * count, errors
    for rank, place, times, number in [
        (count - 1, "rollout", 2, "SIGKILL"),
        (1, "update", 3, "SIGKILL"),
        (0, "commit", 1, "SIGKILL"),
        (1, "save", 1, "SIGKILL"),
        (count - 1, "evaluation", 2, "SIGKILL"),
        (1, "rollout", 3, "SIGSTOP"),
        (0, "update", 2, "SIGSTOP"),
    ]:
        assert_the_others_end_and_all_go_on(tmp_path, count, rank, place, times, number, **changes)


# --- another machine, another configuration ---------------------------------------------------


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_devices(tmp_path):
    """Eight, then one, then four. Sums are rounded in another order: 1e-5 as for functions."""
    plain = {"warm_start": {}, "evaluation": {"every": 0}}
    for name, meshes in {
        "one": [{"data": 1}],
        "several": [{"data": 4, "fsdp": 2}, {"data": 1}, {"fsdp": 4}],
    }.items():
        for index, mesh in enumerate(meshes, start=1):
            steps = 3 if len(meshes) == 1 else index
            assert code(train.main, write(tmp_path, name, steps=steps, mesh=mesh, **plain)) == 0
    runs, arrays = [tmp_path / "one", tmp_path / "several"], []
    for run in runs:
        with Checkpoints(str(run / "checkpoints"), read_only=True) as checkpoints:
            arrays.append(checkpoints.arrays())
    one, other = arrays
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_allclose(other[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
    texts = [
        [(row["step"], row["response"]) for row in rows(run / "samples.jsonl")] for run in runs
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"optimizer": {**RUN["optimizer"], "learning_rate": 0.5}},
            "optimizer.learning_rate: got 0.5; {run} holds a run with 0.001: choose another "
            "output_dir, or delete this one to start anew",
        ),
        (
            {"seed": 3},
            "seed: got 3; {run} holds a run with 0: choose another output_dir, or delete this one "
            "to start anew",
        ),
        (
            {"model": {**RUN["model"], "dtype": "bfloat16"}},
            "model.dtype: got 'bfloat16'; {run} holds a run with 'float32': choose another "
            "output_dir, or delete this one to start anew",
        ),
        (
            {"evaluation": {**RUN["evaluation"], "num_samples": 4}},
            "evaluation.num_samples: got 4; {run} holds a run with 16: choose another output_dir, "
            "or delete this one to start anew",
        ),
    ],
)
def test_a_field_that_may_not_change_is_named_with_both_values(
    changes, line, tmp_path, whole, capsys
):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert code(train.main, write(tmp_path, "run", **changes)) == 2
    line += " (--checkpoint.accept_changes true goes on all the same)"
    assert capsys.readouterr().err == f"error: {line.format(run=run)}\n"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    changes["checkpoint"] = {**RUN["checkpoint"], "accept_changes": True}
    assert code(train.main, write(tmp_path, "run", steps=6, **changes)) == 0
    assert f"{line.partition(':')[0]} " in capsys.readouterr().out


def test_a_field_that_may_change_does_and_this_is_said(tmp_path, whole, capsys):
    shutil.copytree(whole, tmp_path / "run")
    changes = {"checkpoint": {"every": 9}, "evaluation": {**RUN["evaluation"], "every": 3}}
    assert code(train.main, write(tmp_path, "run", steps=6, **changes)) == 0
    said = capsys.readouterr().out
    assert "(changed: checkpoint.every 2 -> 9, evaluation.every 2 -> 3)" in said
    assert config.load(str(tmp_path / "run" / "config.yaml")).checkpoint.every == 9


def test_checksums_are_the_same_on_every_mesh_and_see_every_bit():
    arrays = {
        "a": jnp.arange(64, dtype=jnp.float32).reshape(8, 8),
        "b": jnp.ones(16, jnp.bfloat16),
        "c": jnp.int32(5),
        "d": jnp.array([True, False]),
    }
    plain = digest.checksums(arrays)
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"))
    spread = {
        **arrays,
        "a": jax.device_put(arrays["a"], jax.NamedSharding(mesh, jax.P("data", "fsdp"))),
    }
    assert digest.checksums({"a": spread["a"]})["a"] == plain["a"]
    for bit in range(0, 32 * 64, 37):
        bits = np.asarray(arrays["a"]).view(np.uint32).copy()
        bits.reshape(-1)[bit // 32] ^= np.uint32(1 << bit % 32)
        assert digest.checksums({"a": jnp.array(bits.view(np.float32))})["a"] != plain["a"]
    swapped = arrays["a"][::-1]
    assert digest.checksums({"a": swapped})["a"] != plain["a"]
