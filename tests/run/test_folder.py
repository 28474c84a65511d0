"""The folder of a run: one process holds it, and it may be moved."""

import json
import subprocess
import sys

import pytest

from pgpo_jax import config
from pgpo_jax.errors import InputError
from pgpo_jax.run import lock_folder

HOLD = """
import sys
from pgpo_jax.run import lock_folder
with lock_folder(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def refuse(folder, line):
    with pytest.raises(InputError, match=line), lock_folder(str(folder)):
        pass


def test_a_folder_in_use_is_refused_and_says_by_whom(tmp_path):
    with lock_folder(str(tmp_path)):
        refuse(tmp_path, r"in use by process \d+ on")
    with lock_folder(str(tmp_path)):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as held:
        assert held.stdout.readline() == "held\n"
        refuse(tmp_path, f"process {held.pid} ")
        held.kill()
        held.wait()
    with lock_folder(str(tmp_path)):
        pass


def test_the_configuration_of_a_moved_run_names_the_folder_it_lies_in(tmp_path):
    (tmp_path / "config.yaml").write_text("output_dir: runs/before\n")
    assert config.load(str(tmp_path / "config.yaml")).output_dir == "runs/before"
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    assert config.load(str(tmp_path / "config.yaml")).output_dir == str(tmp_path)
    chosen = config.load(str(tmp_path / "config.yaml"), ["--output_dir", "elsewhere"])
    assert chosen.output_dir == "elsewhere"
