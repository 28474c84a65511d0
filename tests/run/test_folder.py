"""The folder of a run: one process holds it, and it may be moved."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading

import pytest
from test_train import TINY, code, rows

from pgpo_jax import config, convert, evaluate, report, train
from pgpo_jax.config import Config
from pgpo_jax.errors import InputError
from pgpo_jax.run import claim_folder, hold_folder, lock, lock_folder

HOLD = """
import contextlib, sys
from pgpo_jax.run.lock import take_lock
with contextlib.ExitStack() as stack:
    assert take_lock(sys.argv[1], stack, beat=0.02) is None
    print("held", flush=True)
    sys.stdin.read()
"""


def refuse(folder, line):
    with pytest.raises(InputError, match=line), lock_folder(str(folder)):
        pass


@contextlib.contextmanager
def held_by_another_process(folder):
    command = [sys.executable, "-c", HOLD, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as held:
        assert held.stdout.readline() == "held\n"
        yield held
        held.kill()


def test_a_folder_in_use_is_refused_and_says_by_whom(tmp_path):
    with lock_folder(str(tmp_path)):
        refuse(tmp_path, r"in use by process \d+ on")
    with lock_folder(str(tmp_path)):
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    with held_by_another_process(tmp_path) as held:
        refuse(tmp_path, f"process {held.pid} ")
        held.kill()
        held.wait()
        with lock_folder(str(tmp_path)):
            pass


def test_a_process_that_got_the_number_of_the_holder_does_not_hold_its_lock(tmp_path):
    me = lock.this_process()
    with contextlib.ExitStack() as stack:
        assert lock.take_lock(str(tmp_path), stack, me._replace(started="1")) is None
        assert lock.take_lock(str(tmp_path), stack, me) is None


def elsewhere(name="far"):
    return lock.this_process()._replace(host=f"{name} boot namespace", process=7)


def test_a_holder_on_another_host_is_known_by_its_signs_of_life(tmp_path):
    with contextlib.ExitStack() as stack:
        assert lock.take_lock(str(tmp_path), stack, elsewhere(), beat=0.02) is None
        found = lock.take_lock(str(tmp_path), stack, stale=2)
        assert str(found).startswith("process 7 on far, since ")


def test_a_holder_on_another_host_that_is_silent_is_gone(tmp_path):
    path = tmp_path / lock.NAME
    for text in (elsewhere().text, "process 7 on far, since yesterday", ""):
        path.write_text(text)
        os.utime(path, (1e9, 1e9))
        with lock_folder(str(tmp_path)):
            assert path.read_text() != text
        assert not path.exists()


def test_a_silent_lock_is_taken_by_one_of_many(tmp_path):
    (tmp_path / lock.NAME).write_text(elsewhere().text)
    os.utime(tmp_path / lock.NAME, (1e9, 1e9))
    found, start = [], threading.Barrier(8)
    with contextlib.ExitStack() as stack:

        def take(me):
            start.wait()
            found.append(lock.take_lock(str(tmp_path), stack, me))

        threads = [threading.Thread(target=take, args=(lock.this_process(),)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found.count(None) == 1
        assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]


def test_a_process_whose_lock_was_taken_over_ends_and_says_why(tmp_path):
    with held_by_another_process(tmp_path) as held:
        fresh = tmp_path / "fresh"
        fresh.write_text(elsewhere().text)
        fresh.replace(tmp_path / lock.NAME)
        assert held.wait(timeout=60) == 1
        error = held.stderr.read()
    assert error.startswith(f"error: {tmp_path} was taken over by process 7 on far, since ")


def test_a_bucket_is_held_by_whoever_is_read_back_from_it(tmp_path):
    first, second = lock.this_process(), lock.this_process()
    file = lock._Bucket(str(tmp_path), settle=0)
    assert file.create(first)
    assert not file.create(second)
    assert not file.replace(second.text, second)  # not what was seen
    file.remove(second)
    file.renew(first)
    text, renewed, age = file.read()
    assert text == first.text
    assert renewed > 0
    assert age < 60
    assert file.replace(first.text, second)
    assert file.text() == second.text
    file.remove(second)
    assert file.text() is None


def hold(config):
    """What changed, as `hold_folder` tells it."""
    with hold_folder(config) as changes:
        return changes


def made(tmp_path, name, **sections):
    given = {"output_dir": str(tmp_path / name), "checkpoint.path": str(tmp_path / "saved")}
    arguments = [part for pair in (given | sections).items() for part in (f"--{pair[0]}", pair[1])]
    return config.load(None, arguments)


def test_two_runs_do_not_share_one_folder_of_checkpoints(tmp_path):
    one, other = made(tmp_path, "one"), made(tmp_path, "other")
    with hold_folder(one), pytest.raises(InputError, match=r"checkpoint\.path: .* in use by"):
        hold(other)
    refused = rf"output_dir: got '{other.output_dir}'; .*saved holds a run with '{one.output_dir}'"
    with pytest.raises(InputError, match=f"{refused}: choose another checkpoint.path"):
        hold(other)
    assert not (tmp_path / "other" / "config.yaml").exists()


def test_a_run_with_checkpoints_elsewhere_may_be_moved_and_may_lose_its_own_folder(tmp_path):
    assert hold(made(tmp_path, "one")) == []
    (tmp_path / "one").rename(tmp_path / "moved")
    assert hold(made(tmp_path, "moved")) == []
    shutil.rmtree(tmp_path / "moved")
    with pytest.raises(InputError, match=r"optimizer\.alpha: got 0\.5; .*saved holds a run with"):
        hold(made(tmp_path, "moved", **{"optimizer.alpha": "0.5"}))
    assert hold(made(tmp_path, "moved")) == []
    accepted = {"checkpoint.accept_changes": "true"}
    told = f"output_dir '{tmp_path / 'moved'}' -> '{tmp_path / 'third'}'"
    assert told in hold(made(tmp_path, "third", **accepted))


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output_dir: .* cannot be written \(Not a directory\)"):
        hold(Config(output_dir=str(tmp_path / "file" / "run")))
    (tmp_path / "config.yaml").mkdir()
    with pytest.raises(InputError, match=r"config\.yaml cannot be read"):
        claim_folder(Config(output_dir=str(tmp_path)))
    with pytest.raises(InputError, match=r"output_dir: got gs://b/run; .* give a local folder"):
        hold(Config(output_dir="gs://b/run"))


def test_a_run_whose_teacher_restarts_at_parts_of_its_steps_keeps_them(tmp_path):
    def claim(steps, refresh, **values):
        values = {"steps": steps, "teacher.refresh": refresh, "output_dir": str(tmp_path), **values}
        return claim_folder(config.load(None, values=values))

    assert claim(100, "restarts") == []
    with pytest.raises(InputError, match=r"^steps: got 200; .* holds a run with 100: choose"):
        claim(200, "restarts")
    assert claim(200, "restarts", **{"checkpoint.accept_changes": True})[-1] == "steps 100 -> 200"


def test_the_configuration_of_a_moved_run_names_the_folder_it_lies_in(tmp_path):
    (tmp_path / "config.yaml").write_text("output_dir: runs/before\n")
    assert config.load(str(tmp_path / "config.yaml")).output_dir == "runs/before"
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    assert config.load(str(tmp_path / "config.yaml")).output_dir == str(tmp_path)
    chosen = config.load(str(tmp_path / "config.yaml"), ["--output_dir", "elsewhere"])
    assert chosen.output_dir == "elsewhere"


@pytest.fixture
def moved(tmp_path):
    """A run of two steps that was moved after it had ended."""
    settings = {**TINY, "steps": 2, "output_dir": str(tmp_path / "before")}
    (tmp_path / "run.yaml").write_text(config.fields.dump_yaml(settings))
    assert code(train.main, str(tmp_path / "run.yaml")) == 0
    (tmp_path / "before").rename(tmp_path / "kept")
    return tmp_path / "kept"


def test_a_moved_run_is_evaluated_reported_exported_and_resumed(moved, tmp_path, capsys):
    own = str(moved / "config.yaml")
    capsys.readouterr()
    assert code(evaluate.main, own) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["step"] == 2
    assert found["eval/avg@16"] == rows(moved / "metrics.jsonl")[-1]["eval/avg@16"]
    assert code(report.main, str(moved), "-o", str(tmp_path / "page.html")) == 0
    assert code(convert.main, "export", str(moved), str(tmp_path / "model")) == 0
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert code(train.main, own, "--steps", "3") == 0
    assert [row["step"] for row in rows(moved / "metrics.jsonl")] == [0, 1, 2, 2, 3, 3]
    assert not (tmp_path / "before").exists()
    shutil.rmtree(moved / "checkpoints")
    capsys.readouterr()
    assert code(evaluate.main, own) == 2
    assert "checkpoints does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_command_twice_at_once_is_one_run_and_one_refusal(tmp_path):
    settings = {**TINY, "steps": 8, "output_dir": str(tmp_path / "run")}
    (tmp_path / "run.yaml").write_text(config.fields.dump_yaml(settings))
    command = [sys.executable, "-m", "pgpo_jax.train", str(tmp_path / "run.yaml")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in started]
    assert sorted(process.returncode for process in started) == [0, 2]
    assert any("is in use by process " in error for error in errors)
    steps = [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")]
    assert list(dict.fromkeys(steps)) == list(range(9))
    assert len(steps) == 9 + 4  # and four evaluations besides the first
