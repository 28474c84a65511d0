"""The mesh and its rules, rows between hosts and devices, processes that must find each other."""

import json
import os
import re
import socket
import subprocess
import sys
import textwrap
import threading

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from pgpo_jax import sharding
from pgpo_jax.errors import InputError
from pgpo_jax.models import ModelConfig, param_axes, param_shapes
from pgpo_jax.sharding import DistributedConfig, MeshConfig, hosts, make_mesh

SHAPES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_the_data_axis_takes_the_remaining_devices():
    assert dict(make_mesh(MeshConfig(fsdp=2)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert dict(make_mesh(MeshConfig(1, -1, 2)).shape) == {"data": 1, "fsdp": 4, "tensor": 2}


def test_one_process_may_use_fewer_devices_than_there_are():
    assert make_mesh(MeshConfig(2, 1, 1)).devices.flat[1] == jax.devices()[1]


@pytest.mark.parametrize("sizes", [(3, 3, 1), (-1, 3, 1), (16, 1, 1), (-1, 16, 1)])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(InputError, match=r"mesh: got .*devices"):
        make_mesh(MeshConfig(*sizes))


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (0, 1, 1), (1, 1, -2)])
def test_sizes_that_mean_nothing_are_refused(sizes):
    with pytest.raises(InputError, match="mesh: got data"):
        MeshConfig(*sizes)


def test_axes_that_do_not_divide_stay_whole():
    mesh = make_mesh(MeshConfig(2, 2, 2))
    axes = ("layer", "embed", "heads", None)
    assert sharding.spec(axes, (3, 8, 4, 5), mesh) == PartitionSpec(None, "fsdp", "tensor", None)
    assert sharding.spec(axes, (3, 7, 3, 5), mesh) == PartitionSpec(None, None, None, None)
    assert sharding.spec(("row", None), (4, 3), mesh) == PartitionSpec(("data", "fsdp"), None)
    assert sharding.spec(("row", None), (6, 3), mesh) == PartitionSpec(None, None)


QWEN3_8B = ModelConfig.from_hf(
    {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    }
)


@pytest.mark.parametrize(
    "sizes, words",
    [
        (
            (1, 3, 1),
            [
                "mesh.fsdp = 3 divides no array of the model; every device holds whole",
                "(embed 4096 over fsdp 3, ",
                " more; 30.51 GiB of parameters a device",
            ],
        ),
        (
            (1, 1, 3),
            ["every device holds whole", "embed_tokens (vocab 151936 over tensor 3, 2.32 GiB)"],
        ),
        ((1, 8, 1), []),
        ((2, 2, 2), []),
        ((8, 1, 1), []),
    ],
)
def test_what_a_mesh_does_not_split_is_said_with_the_bytes_of_a_device(sizes, words):
    axes, shapes = param_axes(QWEN3_8B), param_shapes(QWEN3_8B)
    told = sharding.describe_whole(axes, shapes, make_mesh(MeshConfig(*sizes)))
    assert len(told) == bool(words)
    for word in words:
        assert word in told[0]


def test_axes_of_size_one_leave_arrays_whole():
    mesh = make_mesh(MeshConfig(8, 1, 1))
    assert sharding.spec(("embed", "mlp"), (8, 8), mesh) == PartitionSpec(None, None)


def test_a_tree_of_axes_gives_a_tree_of_shardings():
    mesh = make_mesh(MeshConfig(1, 4, 2))
    shapes = {"a": jax.ShapeDtypeStruct((8, 2), np.float32), "b": {"c": np.zeros(4)}}
    found = sharding.shardings({"a": ("embed", "mlp"), "b": {"c": (None,)}}, shapes, mesh)
    assert found["a"].spec == PartitionSpec("fsdp", "tensor")
    assert found["b"]["c"].spec == PartitionSpec(None)


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("rows", [16, 6])
def test_rows_go_to_the_devices_and_come_back_in_order(sizes, rows):
    mesh = make_mesh(MeshConfig(*sizes))
    tree = {"x": np.arange(rows * 3).reshape(rows, 3), "y": np.arange(rows) % 2 == 0}
    placed = sharding.to_global(tree, mesh)
    parts = sizes[0] * sizes[1]
    assert placed["x"].addressable_shards[0].data.shape[0] == (
        rows // parts if rows % parts == 0 else rows
    )
    for back in (sharding.to_host(placed), sharding.fetch(placed)):
        np.testing.assert_array_equal(back["x"], tree["x"])
        np.testing.assert_array_equal(back["y"], tree["y"])


def test_hosts_share_rows_without_gap_or_overlap(monkeypatch):
    for processes in (1, 3, 4):
        monkeypatch.setattr(jax, "process_count", lambda count=processes: count)
        parts = []
        for process in range(processes):
            monkeypatch.setattr(jax, "process_index", lambda index=process: index)
            parts.append(np.arange(10)[sharding.host_rows(10)])
        np.testing.assert_array_equal(np.concatenate(parts), np.arange(10))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_one_process_needs_no_agreement_and_no_barrier():
    sharding.initialize(DistributedConfig(num_processes=1))
    assert sharding.is_main()
    assert sharding.agree_max([3, 1]) == [3, 1]
    sharding.barrier("alone", timeout=0.1)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_processes": 2}, "set all three or none"),
        ({"coordinator_address": "h:1", "num_processes": 2, "process_id": 2}, "from 0 to 1"),
        ({"coordinator_address": "h", "num_processes": 2, "process_id": 0}, "host:port"),
        ({"timeout": 0}, "must be positive"),
    ],
)
def test_incomplete_settings_of_processes_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        sharding.initialize(DistributedConfig(**settings))


def test_environment_variables_that_are_no_numbers_are_refused(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(InputError, match="JAX_NUM_PROCESSES='two'"):
        sharding.initialize()


def test_the_first_process_names_those_that_never_came():
    config = DistributedConfig(f"127.0.0.1:{free_port()}", 3, 0, timeout=1)
    with pytest.raises(TimeoutError, match=r"process 1, 2 of 3 did not come within 1 s"):
        sharding.initialize(config)


def test_the_others_name_the_first_process_when_it_never_comes():
    config = DistributedConfig(f"127.0.0.1:{free_port()}", 3, 2, timeout=1)
    with pytest.raises(TimeoutError, match=r"process 0 of 3 did not come within 1 s"):
        sharding.initialize(config)


@pytest.mark.parametrize("present, answer", [((1, 2), "go"), ((2,), "1")])
def test_all_processes_hear_the_same_answer(present, answer):
    port, answers = free_port(), []

    def report(process):
        answers.append(hosts._report("127.0.0.1", port, process, 20))

    callers = [threading.Thread(target=report, args=(process,)) for process in present]
    for caller in callers:
        caller.start()
    answers.append(hosts._gather(port, 3, 20 if len(present) == 2 else 1))
    for caller in callers:
        caller.join()
    assert answers == [answer] * (len(present) + 1)


@pytest.mark.parametrize(
    "nodes, names",
    [
        ("login", ["login"]),
        ("a,b", ["a", "b"]),
        ("gpu[008-010,7],login", ["gpu008", "gpu009", "gpu010", "gpu7", "login"]),
        ("a[1-2]-ib,10.0.0.1", ["a1-ib", "a2-ib", "10.0.0.1"]),
        ("a[1-2]b[1-2]", []),
        ("", []),
    ],
)
def test_slurms_lists_of_nodes_are_read(nodes, names):
    assert hosts._node_names(nodes) == names


def slurm(rank, count, tasks, **variables):
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_STEP_NODELIST": "127.0.0.1,node[2-3]",
        "SLURM_STEP_TASKS_PER_NODE": tasks,
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": "0",
        "JAX_COORDINATOR_PORT": str(free_port()),
        **variables,
    }


@pytest.mark.parametrize(
    "rank, tasks, more, missing",
    [
        (0, "1(x3)", {}, "process 1, 2 of 3 on node2, node3"),
        (0, "1,2", {}, "process 1, 2 of 3"),
        (1, "1(x3)", {}, "process 0 of 3 on 127.0.0.1"),
        (0, "1(x3)", {"SLURM_DISTRIBUTION": "cyclic"}, "process 1, 2 of 3"),
    ],
)
def test_tasks_of_slurm_that_never_came_are_named(rank, tasks, more, missing, monkeypatch):
    for name, value in slurm(rank, 3, tasks, **more).items():
        monkeypatch.setenv(name, value)
    line = f"distributed: {re.escape(missing)} did not come within 1 s"
    with pytest.raises(TimeoutError, match=line):
        sharding.initialize(DistributedConfig(timeout=1))


def test_the_single_task_of_a_slurm_step_sees_all_its_devices(monkeypatch):
    for name, value in slurm(0, 1, "1").items():
        monkeypatch.setenv(name, value)
    sharding.initialize()
    assert not jax.distributed.is_initialized()


PROGRAM = """
import json, os, sys
import jax, numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
from pgpo_jax import sharding
from pgpo_jax.errors import InputError
sharding.initialize(sharding.DistributedConfig(timeout=60))
rows = np.arange(48).reshape(16, 3)
own = rows[sharding.host_rows(16)]
for sizes in [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]:
    placed = sharding.to_global(own, sharding.make_mesh(sharding.MeshConfig(*sizes)))
    assert placed.shape == rows.shape
    np.testing.assert_array_equal(sharding.fetch(placed), rows)
    np.testing.assert_array_equal(sharding.to_host(placed), own)
try:
    sharding.to_global(own[:1], sharding.make_mesh(sharding.MeshConfig(8, 1, 1)))
except InputError as error:
    assert "must divide" in str(error)
agreed = sharding.agree_max([jax.process_index(), -jax.process_index()])
sharding.barrier("together", timeout=60)
missed = ""
if jax.process_index() == 0:
    try:
        sharding.barrier("apart", timeout=1)
    except TimeoutError as error:
        missed = str(error)
print(json.dumps({"agreed": agreed, "missed": missed}), flush=True)
os._exit(0)  # without the farewell, for which the other process would have to wait
"""


def stated(rank, port):
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(rank),
    }


def detected(rank, port):
    return slurm(rank, 2, "2", JAX_COORDINATOR_PORT=str(port))


@pytest.mark.slow
@pytest.mark.parametrize("how", [stated, detected])
def test_two_processes_exchange_rows_on_every_mesh(how, tmp_path):
    script, port = tmp_path / "program.py", free_port()
    script.write_text(textwrap.dedent(PROGRAM))
    started = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=os.environ | {"PYTHONPATH": os.getcwd()} | how(rank, port),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in started]
    assert [line["agreed"] for line in said] == [[1, 0], [1, 0]]
    assert "process 1 of 2 did not come within 1 s" in said[0]["missed"]
