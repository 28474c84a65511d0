"""Several hosts: how they join, who handles which rows, and what they must agree on."""

import contextlib
import dataclasses
import functools
import os
import re
import socket
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pgpo_jax.errors import InputError, require


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes, one per host. On TPU pods and under Slurm nothing need be set."""

    coordinator_address: str | None = None
    """host:port of process 0 (or the environment variable JAX_COORDINATOR_ADDRESS)."""
    num_processes: int | None = None
    """Number of processes (or JAX_NUM_PROCESSES)."""
    process_id: int | None = None
    """This process, from 0 (or JAX_PROCESS_ID)."""
    timeout: int = 300
    """Seconds to wait for all processes at the start; then the run ends, naming the missing."""
    heartbeat_timeout: int = 100
    """Seconds after which a silent process counts as dead and the others end."""

    def __post_init__(self):
        require(
            "distributed",
            self,
            timeout=(self.timeout > 0, "positive (seconds)"),
            heartbeat_timeout=(self.heartbeat_timeout > 0, "positive (seconds)"),
        )


def initialize(config: DistributedConfig = DistributedConfig()) -> None:
    """Join the other processes; does nothing for a single process.

    Must run before anything else touches JAX devices. Settings win over the environment variables.
    With neither, JAX joins by itself where it finds a cluster (TPU pods, Slurm, MPI, Kubernetes).

    Raises:
      InputError: the settings are incomplete or contradict each other.
      TimeoutError: processes did not come within `config.timeout`; the message names them.
    """
    address = config.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = _setting("num_processes", config.num_processes, "JAX_NUM_PROCESSES")
    process = _setting("process_id", config.process_id, "JAX_PROCESS_ID")
    if count == 1 or jax.distributed.is_initialized():
        return
    # Gloo lets CPU devices of several processes talk; the setting does nothing elsewhere.
    join = functools.partial(
        jax.distributed.initialize,
        initialization_timeout=config.timeout,
        heartbeat_timeout_seconds=config.heartbeat_timeout,
    )
    if address is None and count is None and process is None:
        if (cluster := _cluster()) is not None and _meet_in(cluster, config.timeout):
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            join()
        return
    if address is None or count is None or process is None:
        got = f"coordinator_address={address}, num_processes={count}, process_id={process}"
        raise InputError(f"distributed: got {got}; set all three or none")
    if not 0 <= process < count:
        raise InputError(f"distributed.process_id: got {process}; must be from 0 to {count - 1}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"distributed.coordinator_address: got {address!r}; must be host:port")
    # JAX aborts without saying who is missing, so the processes first meet here on the same port.
    _roll_call(host.strip("[]"), int(port), count, process, config.timeout)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    join(address, count, process, cluster_detection_method="deactivate")


def is_main() -> bool:
    """True on the one process that writes metrics and files."""
    return jax.process_index() == 0


def host_rows(count: int) -> slice:
    """Which of `count` rows this host handles: blocks in process order, as even as can be."""
    return rows_of(jax.process_index(), count)


def gather_rows(rows: np.ndarray, count: int) -> np.ndarray:
    """The rows of all hosts in order, on every host; `count` in all, split as by `host_rows`."""
    if jax.process_count() == 1:
        return rows
    most = -(-count // jax.process_count())
    padded = np.zeros((most, *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    parts = np.asarray(multihost_utils.process_allgather(padded))
    sizes = [rows_of(process, count) for process in range(jax.process_count())]
    return np.concatenate(
        [part[: size.stop - size.start] for part, size in zip(parts, sizes, strict=True)]
    )


def agree_max(values: Sequence[int]) -> list[int]:
    """Element-wise largest over the hosts, so that all choose the same bucketed lengths."""
    if jax.process_count() == 1:
        return [int(value) for value in values]
    return np.max(multihost_utils.process_allgather(np.asarray(values, np.int32)), axis=0).tolist()


def barrier(name: str, timeout: float = 300.0) -> None:
    """Wait until every process has reached the barrier `name` (use a name once).

    Raises:
      TimeoutError: after `timeout` seconds; the message names the processes that did not come.
    """
    if jax.process_count() == 1:
        return
    # The public barrier, sync_global_devices, has no time limit.
    from jax._src.distributed import global_state

    client: Any = global_state.client
    me, count = jax.process_index(), jax.process_count()
    client.key_value_set(f"pgpo/{name}/{me}", "here", allow_overwrite=True)
    try:
        client.wait_at_barrier(f"pgpo/{name}", int(timeout * 1000))
    except Exception as error:
        here = {key.rsplit("/", 1)[-1] for key, _ in client.key_value_dir_get(f"pgpo/{name}/")}
        missing = [str(i) for i in range(count) if str(i) not in here]
        raise TimeoutError(
            f"barrier {name!r}: process {', '.join(missing) or 'unknown'} of {count} "
            f"did not come within {timeout:g} s"
        ) from error


def _setting(name: str, value: int | None, variable: str) -> int | None:
    if value is not None or variable not in os.environ:
        return value
    try:
        return int(os.environ[variable])
    except ValueError:
        got = os.environ[variable]
        raise InputError(
            f"distributed.{name}: got {variable}={got!r}; must be a whole number"
        ) from None


def _cluster() -> Any:
    """Where JAX would find the other processes by itself (TPU pod, Slurm, MPI, Kubernetes)."""
    from jax._src.clusters import ClusterEnv

    # JAX takes every Kubernetes pod for a cluster, also those that are not part of a job.
    candidates = [env for env in ClusterEnv._cluster_types if not env.opt_in_only_method]
    if "JOB_COMPLETION_INDEX" not in os.environ:
        candidates = [env for env in candidates if env.__name__ != "K8sCluster"]
    return next((env for env in candidates if env.is_env_present()), None)


def _meet_in(cluster: Any, timeout: int) -> bool:
    """The roll call of the processes that a cluster started; False where there is only one.

    JAX would give the single task of a Slurm step only the first of the devices that it may use.
    """
    try:
        count, process = cluster.get_process_count(), cluster.get_process_id()
        if count == 1:
            return False
        port = os.environ.get("JAX_COORDINATOR_PORT")
        address = cluster.get_coordinator_address(
            timeout_secs=timeout, override_coordinator_port=port
        )
        host, _, port = address.rpartition(":")
        port = int(port)
    except (AttributeError, TypeError, ValueError, KeyError):  # JAX's own, and may change
        return True
    _roll_call(host.strip("[]"), port, count, process, timeout, _slurm_nodes(count))
    return True


def _slurm_nodes(count: int) -> list[str]:
    """The node of every task of a Slurm step; empty where its variables do not say."""
    nodes = _node_names(os.environ.get("SLURM_STEP_NODELIST", ""))
    blocks = os.environ.get("SLURM_DISTRIBUTION", "block").startswith("block")
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks)
    a_node = [int(tasks) for tasks, times in counts for _ in range(int(times or 1))]
    found = [node for node, tasks in zip(nodes, a_node, strict=False) for _ in range(tasks)]
    return found if blocks and len(found) == count and len(nodes) == len(a_node) else []


def _node_names(nodes: str) -> list[str]:
    """Names in a list of Slurm's, such as `gpu[01-03,07],login`."""
    found = []
    for part in re.split(r",(?![^\[]*\])", nodes) if nodes else []:
        form = re.fullmatch(r"([^\[\]]+)(?:\[([^\[\]]*)\])?([^\[\]]*)", part)
        if form is None:
            return []
        name, ranges, end = form.groups(default="")
        if not ranges:
            found.append(name + end)
        for part in ranges.split(",") if ranges else []:
            first, _, last = part.partition("-")
            if not (first.isdigit() and (last or first).isdigit()):
                return []
            numbers = range(int(first), int(last or first) + 1)
            found += [f"{name}{number:0{len(first)}}{end}" for number in numbers]
    return found


def rows_of(process: int, count: int) -> slice:
    processes = jax.process_count()
    return slice(count * process // processes, count * (process + 1) // processes)


def _roll_call(
    host: str, port: int, count: int, process: int, timeout: float, nodes: Sequence[str] = ()
) -> None:
    """All meet at process 0's port before JAX does, or all end with the numbers of the missing.

    Process 0 listens; the others send their number and wait for an answer: "go", or the missing.
    `nodes` names the host of every process, where that is known.
    """
    answer = _report(host, port, process, timeout) if process else _gather(port, count, timeout)
    if answer != "go":
        missing = sorted({nodes[int(i)] for i in answer.split(", ")}) if nodes else []
        where = f" on {', '.join(missing)}" if missing else ""
        raise TimeoutError(
            f"distributed: process {answer} of {count}{where} did not come within {timeout:g} s "
            f"(coordinator {host}:{port})"
        )


def _gather(port: int, count: int, timeout: float) -> str:
    """Process 0's side of the roll call."""
    end = time.monotonic() + timeout
    callers: dict[int, socket.socket] = {}
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    with socket.create_server(("", port), family=family, dualstack_ipv6=dual) as server:
        while len(callers) < count - 1 and (left := end - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError):  # nobody came, or a stranger knocked
                connection, _ = server.accept()
                connection.settimeout(5)
                callers[int(connection.recv(16))] = connection
        answer = ", ".join(str(i) for i in range(1, count) if i not in callers) or "go"
        for connection in callers.values():
            with connection, contextlib.suppress(OSError):
                connection.sendall(answer.encode())
    return answer


def _report(host: str, port: int, process: int, timeout: float) -> str:
    """The other processes' side: process 0's answer, or "0" if it never came."""
    end = time.monotonic() + timeout
    while (left := end - time.monotonic()) > 0:
        with (
            contextlib.suppress(OSError, UnicodeDecodeError),
            socket.create_connection((host, port), timeout=left) as connection,
        ):
            connection.settimeout(timeout + 5)  # process 0 may have started only now
            connection.sendall(str(process).encode())
            answer = connection.recv(4096).decode("ascii")
            if answer[:1].isdigit() or answer == "go":  # else not a roll call: keep trying
                return answer
        time.sleep(0.1)
    return "0"
