"""Several processes on this machine: the same run, and an end when one of them is missing."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from marks import long
from test_train import TINY, without_time


def start(config, count, ranks=None, hits=None, **variables):
    """One training process per rank, with one CPU device each.

    `hits` (rank -> place, times, signal of faulty.py) says where which of them is hit.
    """
    faulty = str(pathlib.Path(__file__).parent / "support" / "faulty.py")
    commands = {rank: [faulty, *map(str, hit)] for rank, hit in (hits or {}).items()}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        **variables,
    }
    return [
        subprocess.Popen(
            [sys.executable, *commands.get(rank, ["-m", "pgpo_jax.train"]), str(config)],
            env={**environment, "JAX_PROCESS_ID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (range(count) if ranks is None else ranks)
    ]


def finish(processes, timeout=300):
    """Exit codes and stderr of all, none of which may outlive the timeout."""
    end = time.monotonic() + timeout
    try:
        outputs = [p.communicate(timeout=max(end - time.monotonic(), 1)) for p in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], [err for _, err in outputs]


@pytest.fixture
def write(tmp_path):
    def write(name, **sections):
        path = tmp_path / f"{name}.yaml"
        folder = str(tmp_path / name)
        plain = {"steps": 2, "mesh": {}, "warm_start": {}, "output_dir": folder}
        settings = {**TINY, **plain, **sections}
        path.write_text(yaml.safe_dump(settings))
        return path

    return write


def divergences(tmp_path, name):
    """By step, question and response: what the first process wrote of its own rows."""
    rows = map(json.loads, (tmp_path / name / "samples.jsonl").read_text().splitlines())
    return {(row["step"], row["key"], row["response"]): row["divergence"] for row in rows}


def metrics(tmp_path, name):
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    return [without_time(json.loads(line)) for line in lines]


@pytest.mark.slow
def test_two_and_four_processes_give_the_losses_of_one(write, tmp_path):
    for count in (1, 2, 4):
        codes, errors = finish(start(write(f"processes-{count}"), count))
        assert codes == [0] * count, errors
    single = metrics(tmp_path, "processes-1")
    for count in (2, 4):
        for row, expected in zip(metrics(tmp_path, f"processes-{count}"), single, strict=True):
            assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)
        everything = divergences(tmp_path, "processes-1")
        mine = divergences(tmp_path, f"processes-{count}")
        assert mine
        for place, values in mine.items():
            # Up to 5e-6 in this untrained model, of which 1e-7 is float32's rounding.
            assert values == pytest.approx(everything[place], rel=0.05, abs=5e-7)


@long
@pytest.mark.slow
def test_two_processes_have_the_updates_of_one(write, tmp_path):
    changes = {
        "data": {**TINY["data"], "updates_per_rollout": 2, "passes": 2},
        "objective": {"old_log_probs": "recomputed"},
        "evaluation": {"every": 0},
    }
    for count in (1, 2):
        codes, errors = finish(start(write(f"updates-{count}", **changes), count))
        assert codes == [0] * count, errors
    one, two = (metrics(tmp_path, f"updates-{count}") for count in (1, 2))
    for row, expected in zip(two, one, strict=True):
        assert row.pop("multipliers") == pytest.approx(expected.pop("multipliers"), rel=1e-3)
        assert row == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert row["updates"] == 4


@pytest.mark.slow
def test_a_process_that_never_comes_is_named_within_the_timeout(write):
    config = write("missing", distributed={"timeout": 10})
    began = time.monotonic()
    codes, errors = finish(start(config, 3, ranks=[0, 1]), timeout=90)
    assert time.monotonic() - began < 60
    assert 0 not in codes
    for error in errors:
        assert "process 2 of 3 did not come within 10 s" in error


@pytest.mark.slow
def test_the_others_end_when_a_process_dies(write, tmp_path):
    config = write("death", steps=100_000, distributed={"heartbeat_timeout": 10})
    processes = start(config, 2)
    deadline = time.monotonic() + 240
    file = tmp_path / "death" / "metrics.jsonl"
    while time.monotonic() < deadline and not (file.exists() and file.stat().st_size):
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes, errors = finish(processes, timeout=90)
    assert time.monotonic() - began < 60
    assert codes[0] != 0
    # Whichever notices first: our barrier after a broken connection, or JAX's missed heartbeats.
    ours = "error: a process is gone: barrier 'failed': process 1 of 2 did not come"
    jax_itself = "unhealthy (stopped sending heartbeats):\n1\n"
    assert ours in errors[0] or jax_itself in errors[0]
