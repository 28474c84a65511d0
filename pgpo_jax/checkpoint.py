"""Everything a run needs to go on, saved by Orbax and restored onto any mesh.

    <path>/last/<step>/{student, rest, arrays, run}     the whole state; the newest `keep` of them
    <path>/best/<step>/{student, arrays, run}           the best student by evaluation, one

`student` stands by itself so that evaluation and export read nothing else; `arrays` (JSON) says
what each tree holds, so that a checkpoint of another model is told apart before anything is read.
What is *not* saved: random keys and data positions, both pure functions of the seed and the step.

    python -m pgpo_jax.checkpoint compare RUN_A RUN_B     # equal bit by bit, or what differs first

Orbax is imported when a folder is opened, not before: `import pgpo_jax` stays fast.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np

from pgpo_jax.errors import InputError, command, require

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

State = TypeVar("State")
Tree = TypeVar("Tree")


@dataclass(frozen=True)
class CheckpointConfig:
    """When and where a run saves (config section `checkpoint`)."""

    every: int = 50
    """Updates between two checkpoints; 0 saves only at the end and on a stop signal."""
    keep: int = 1
    """How many of the newest checkpoints stay. The best student stays besides."""
    path: str | None = None
    """Folder or bucket (gs://...) of the checkpoints, shared by all hosts; null is
    `<output_dir>/checkpoints`."""

    def __post_init__(self) -> None:
        require(
            "checkpoint",
            self,
            every=(self.every >= 0, "0 (only at the end) or more"),
            keep=(self.keep >= 1, "at least 1"),
        )


class Best(NamedTuple):
    """The best evaluation so far."""

    step: int
    value: float


class Checkpoints:
    """The checkpoints of one run.

    All hosts of a run construct it and make the same calls in the same order. Saving goes on in the
    background after the state was copied, so the caller may donate the state at once; an error of
    such a save is raised by the next call. Usable as a context manager, which waits on leaving.
    """

    def __init__(self, path: str, *, keep: int = 1, read_only: bool = False) -> None:
        """Opens (or, unless `read_only`, creates) the checkpoints under `path`.

        Args:
          path: Folder or bucket, the same for all hosts.
          keep: How many of the newest checkpoints stay.
          read_only: For evaluation and export: creates and deletes nothing.

        Raises:
          InputError: If `path` cannot be used, or is missing and `read_only`.
        """
        import orbax.checkpoint as ocp
        from absl import logging
        from etils import epath

        logging.set_verbosity(logging.ERROR)  # Orbax warns of the options that are chosen below
        self._ocp = ocp
        # Orbax refuses relative paths, but only in the thread that saves.
        self._path = epath.Path(path if "://" in path else os.path.abspath(path))
        if read_only and not self._path.exists():
            raise InputError(f"checkpoints: {path} does not exist; give the folder of a run")

        def manager(name: str, count: int) -> ocp.CheckpointManager:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(count),
                cleanup_tmp_directories=not read_only,  # what a killed save left
                create=not read_only,
                read_only=read_only,
            )
            try:
                return ocp.CheckpointManager(self._path / name, options=options)
            except (OSError, ValueError) as error:
                raise InputError(
                    f"checkpoints: {self._path / name} cannot be opened ({_first_line(error)}); "
                    "give a folder that this user may write, or an empty one"
                ) from error

        self._last = manager("last", keep)
        self._best = manager("best", 1)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def latest_step(self) -> int | None:
        """The newest step that was saved completely, or None."""
        return self._last.latest_step()

    def save(self, step: int, state: Any, run: Mapping[str, Any] | None = None) -> None:
        """Saves `state` as `step`; does nothing where that step is saved already.

        Args:
          step: Updates done.
          state: A NamedTuple of trees of arrays with a field `student`.
          run: What else to keep, as JSON (the counters of a run, say).
        """
        if step in self._last.all_steps():
            return
        student, rest = _split(state)
        self._write(self._last, step, {"step": step, **(run or {})}, student=student, rest=rest)

    def restore(self, like: State, step: int | None = None) -> tuple[State, dict[str, Any]]:
        """Restores a whole state, bitwise, in the shapes and onto the shardings of `like`.

        Args:
          like: The state, or the same structure of `jax.ShapeDtypeStruct` with shardings (a state
            saved from one mesh is restored onto any other).
          step: Which checkpoint; the newest when None.

        Returns:
          The state and what `save` got as `run`.

        Raises:
          InputError: If there is no such checkpoint, it cannot be read, or it is another model's.
        """
        step = self._need(self._last, "last", step)
        student, rest = _split(like)
        found = self._read(self._last, step, student=student, rest=rest)
        fields = {"student": found.student, **found.rest}
        return type(like)(**fields), dict(found.run)

    def save_best(self, step: int, student: Any, value: float) -> bool:
        """Saves `student` if `value` (avg@16, say) is above the best so far; returns whether."""
        best = self.best()
        if best is not None and value <= best.value:
            return False
        if best is not None and best.step == step:
            self._best.delete(step)  # measured anew after a resume
        self._write(self._best, step, {"step": step, "value": float(value)}, student=student)
        return True

    def best(self) -> Best | None:
        """Step and value of the best student, or None before the first evaluation."""
        self._best.wait_until_finished()
        step = self._best.latest_step()
        if step is None:
            return None
        return Best(step, float(self._read(self._best, step).run["value"]))

    def restore_student(
        self, like: Tree, which: Literal["last", "best"] = "last", step: int | None = None
    ) -> tuple[int, Tree]:
        """Restores only the student, for evaluation and export.

        Args:
          like: The student's parameters, or `jax.ShapeDtypeStruct` with shardings.
          which: The newest checkpoint or the best by evaluation.
          step: A certain one of them; the newest when None.

        Returns:
          The step and the parameters.

        Raises:
          InputError: As for `restore`.
        """
        manager = {"last": self._last, "best": self._best}[which]
        step = self._need(manager, which, step)
        return step, self._read(manager, step, student=like).student

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array of the newest checkpoint by its path, as it was saved, in host memory.

        Raises:
          InputError: As for `restore`.
        """
        step = self._need(self._last, "last", None)
        folder = self._last.directory / str(step)
        try:
            with self._ocp.StandardCheckpointer() as reader:
                likes = {name: reader.metadata(folder / name) for name in ("student", "rest")}
        except Exception as error:  # as many kinds as in `_read`
            raise _unreadable(folder, error) from error
        likes = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype),
            {name: saved.item_metadata.tree for name, saved in likes.items()},
        )
        found = self._read(self._last, step, **likes)
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
            for name, tree in {"student": found.student, **found.rest}.items()
            for path, leaf in jax.tree.leaves_with_path({name: tree})
        }

    def wait(self) -> None:
        """Waits until what was saved is on the disk.

        Raises:
          OSError: Or another error of the save: a full disk, say.
        """
        self._last.wait_until_finished()
        self._best.wait_until_finished()

    def close(self) -> None:
        """Waits, then lets go of Orbax's threads."""
        self.wait()
        self._last.close()
        self._best.close()

    def _need(self, manager: ocp.CheckpointManager, which: str, step: int | None) -> int:
        manager.wait_until_finished()
        steps = sorted(manager.all_steps())
        if step is None and steps:
            return steps[-1]
        if step in steps:
            return step  # pyright: ignore[reportReturnType] - None is not among the steps
        wanted = "a step" if step is None else f"step {step}"
        raise InputError(
            f"checkpoints: {self._path / which} does not have {wanted} (it has "
            f"{', '.join(map(str, steps)) or 'none'}); give the folder of a run that saved it"
        )

    def _write(
        self, manager: ocp.CheckpointManager, step: int, run: dict[str, Any], **trees: Any
    ) -> None:
        arrays = {name: _describe(tree) for name, tree in trees.items()}
        args = {name: self._ocp.args.StandardSave(tree) for name, tree in trees.items()}
        args |= {"arrays": self._ocp.args.JsonSave(arrays), "run": self._ocp.args.JsonSave(run)}
        manager.save(step, args=self._ocp.args.Composite(**args), force=True)

    def _read(self, manager: ocp.CheckpointManager, step: int, **likes: Any) -> Any:
        folder = manager.directory / str(step)

        def restore(**args: Any) -> Any:
            try:
                return manager.restore(step, args=self._ocp.args.Composite(**args))
            except Exception as error:  # Orbax and TensorStore raise many kinds, with one remedy
                raise _unreadable(folder, error) from error

        json_item = self._ocp.args.JsonRestore()
        found = restore(arrays=json_item, run=json_item)
        if differences := [
            line
            for name, like in likes.items()
            for line in _differences(found.arrays.get(name, {}), _describe(like))
        ]:
            more = f", and {len(differences) - 5} more" if len(differences) > 5 else ""
            raise InputError(
                f"checkpoints: {folder} is of another model or optimizer: "
                f"{'; '.join(differences[:5])}{more}; give the config of the run that saved it, or "
                "another output_dir"
            )
        if not likes:
            return found
        trees = {
            name: self._ocp.args.StandardRestore(_abstract(like)) for name, like in likes.items()
        }
        return restore(**trees, run=json_item)


def _split(state: Any) -> tuple[Any, dict[str, Any]]:
    """The student and, by field, everything else."""
    fields: dict[str, Any] = dict(state._asdict())
    return fields.pop("student"), fields


def _describe(tree: Any) -> dict[str, str]:
    """Path of every array in a tree -> its type and shape, as in `float32[3,4]`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{leaf.dtype.name}[{','.join(map(str, leaf.shape))}]"
        )
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def _differences(saved: Mapping[str, str], asked: Mapping[str, str]) -> list[str]:
    return [
        f"{path or 'the array'} is {saved.get(path, 'missing')} there, "
        f"{asked.get(path, 'missing')} here"
        for path in sorted(saved.keys() | asked.keys())
        if saved.get(path) != asked.get(path)
    ]


def _abstract(tree: Any) -> Any:
    """Shapes, types and shardings of a tree; what has no sharding goes to the first device."""
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def describe(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None) or first
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(describe, tree)


def _unreadable(folder: Any, error: Exception) -> InputError:
    return InputError(
        f"checkpoints: {folder} cannot be read ({_first_line(error)}); it is damaged or no "
        "checkpoint of a run: delete it, or choose another folder"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


# --- two runs ------------------------------------------------------------------------------


MEASURED = ("time/", "tokens_per_second/", "compilations")
"""Metrics that differ between equal runs."""


def compare(one: str, other: str) -> str | None:
    """Where two runs differ first: newest checkpoint, metrics or samples; None if nowhere.

    Args:
      one: Folder of a run, whose `config.yaml` says where its checkpoints are.
      other: Another.

    Raises:
      InputError: A folder is no run, or its checkpoint cannot be read.
    """
    return next(
        itertools.chain(_array_differences(one, other), _line_differences(one, other)), None
    )


def _array_differences(*runs: str) -> Iterator[str]:
    saved = []
    for run in runs:
        with Checkpoints(_checkpoints_of(run), read_only=True) as checkpoints:
            saved.append(checkpoints.arrays())
    one, other = saved
    for path in [*one, *(path for path in other if path not in one)]:
        if path not in one or path not in other:
            yield f"{path} is only in {runs[path in other]}"
            continue
        a, b = one[path], other[path]
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            yield f"{path} is {a.dtype.name}{list(a.shape)} and {b.dtype.name}{list(b.shape)}"
        elif a.tobytes() != b.tobytes():
            count = np.count_nonzero(np.ravel(a) != np.ravel(b))
            yield f"{path} differs in {count} of {a.size} values"


def _line_differences(one: str, other: str) -> Iterator[str]:
    names = {
        os.path.basename(path)
        for run in (one, other)
        for kind in ("metrics", "samples")
        for path in glob.glob(os.path.join(glob.escape(run), f"{kind}*.jsonl"))
    }
    for name in sorted(names):
        rows = [_rows(os.path.join(run, name)) for run in (one, other)]
        for number, (a, b) in enumerate(itertools.zip_longest(*rows), start=1):
            if a != b:
                yield f"{name} differs in line {number}"


def _rows(path: str) -> list[dict[str, Any]]:
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    # NaN would differ from itself; as text it does not.
    return [{k: str(v) for k, v in row.items() if not k.startswith(MEASURED)} for row in rows]


def _checkpoints_of(run: str) -> str:
    import yaml

    path = os.path.join(run, "config.yaml")
    try:
        with open(path, encoding="utf-8") as file:
            section = yaml.safe_load(file).get("checkpoint") or {}
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise InputError(f"RUN: {run} is no run ({path}: {_first_line(error)})") from error
    return section.get("path") or os.path.join(run, "checkpoints")


def main(argv: Sequence[str]) -> int:
    """`compare RUN_A RUN_B`: exit code 0 where the two are equal, 1 where they differ."""
    if len(argv) != 3 or argv[0] != "compare":
        raise InputError(f"got {' '.join(argv) or 'nothing'}; must be compare RUN_A RUN_B")
    difference = compare(*argv[1:])
    print(difference or "equal")
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(command(main))
