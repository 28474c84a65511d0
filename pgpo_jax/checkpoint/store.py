"""Everything a run needs to go on, saved by Orbax and restored onto any mesh.

    <path>/last/<step>/{student, rest, arrays, run}     the whole state; the newest `keep` of them
    <path>/best/<step>/{student, arrays, run}           the best student by evaluation, one

`student` stands by itself so that evaluation and export read nothing else; `arrays` (JSON) says
what each tree holds, so that a checkpoint of another model is told apart before anything is read,
and a checksum of every array. A damaged checkpoint is named, put into `<path>/damaged` and the one
before it used. A save is made under another name and renamed when it is whole, so that one which
was interrupted does not count; one that failed, on a full disk say, is told of, and the run goes on
or stops as `on_failure` has it.
What is *not* saved: random keys and data positions, both pure functions of the seed and the step.

    python -m pgpo_jax.checkpoint compare RUN_A RUN_B     # equal bit by bit, or what differs first

Orbax is imported when a folder is opened, not before: `import pgpo_jax` stays fast.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np

from pgpo_jax import sharding
from pgpo_jax.checkpoint import digest
from pgpo_jax.checkpoint.integrity import (
    Damaged,
    checksum,
    first_line,
    plain,
    quiet,
    unreadable,
    warn,
)
from pgpo_jax.errors import InputError, RunError, require

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

State = TypeVar("State")
Tree = TypeVar("Tree")


@dataclass(frozen=True)
class CheckpointConfig:
    """When and where a run saves (config section `checkpoint`)."""

    every: int = 50
    """Updates between two checkpoints; 0 saves only at the end and on a stop signal."""
    keep: int = 2
    """How many of the newest checkpoints stay, the older for when the newest is damaged. The best
    student stays besides."""
    on_failure: Literal["continue", "stop"] = "continue"
    """After a save that failed (no space left, say): go on and try again at the next one, or stop
    with exit code 1. The checkpoints before it stay. A run whose last state cannot be saved ends
    with exit code 1 either way."""
    accept_changes: bool = False
    """Resume although a field has changed that the results depend on, such as the learning rate
    after a run that ended in broken updates. The run cannot be repeated from one configuration."""
    path: str | None = None
    """Folder or bucket (gs://...) of the checkpoints of this run alone, shared by all its hosts;
    null is `<output_dir>/checkpoints`."""

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
    background after the state was copied, so the caller may donate the state at once; a failure of
    such a save is told by the next `save`, `check` or `wait`, as a warning or, where `on_failure`
    is "stop", as a `RunError`. Usable as a context manager, which waits on leaving.
    """

    def __init__(
        self,
        path: str,
        *,
        keep: int = 2,
        on_failure: Literal["continue", "stop"] = "stop",
        read_only: bool = False,
    ) -> None:
        """Opens (or, unless `read_only`, creates) the checkpoints under `path`.

        Args:
          path: Folder or bucket, the same for all hosts.
          keep: How many of the newest checkpoints stay.
          on_failure: What a save that failed does to the run.
          read_only: For evaluation and export: creates and deletes nothing.

        Raises:
          InputError: If `path` cannot be used, or is missing and `read_only`.
        """
        import orbax.checkpoint as ocp
        from absl import logging
        from etils import epath

        # Orbax warns of the options that are chosen below, and shows a trace of every error; those
        # are told in one line here.
        logging.set_verbosity(logging.FATAL)
        self._ocp = ocp
        # Orbax refuses relative paths, but only in the thread that saves.
        self._path = epath.Path(path if "://" in path else os.path.abspath(path))
        if read_only and not self._path.exists():
            raise InputError(f"checkpoints: {path} does not exist; give the folder of a run")

        self._keep = keep
        self._stops = on_failure == "stop"
        self._read_only = read_only
        self._saving: dict[str, int] = {}  # in the background: which -> step
        self._managers = {which: self._open(which) for which in ("last", "best")}

    def _open(self, which: str) -> ocp.CheckpointManager:
        keep = {"last": self._keep, "best": 1}[which]
        options = self._ocp.CheckpointManagerOptions(
            preservation_policy=self._ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=not self._read_only,  # what a killed save left
            create=not self._read_only,
            read_only=self._read_only,
        )
        try:
            return self._ocp.CheckpointManager(self._path / which, options=options)
        except (OSError, ValueError) as error:
            raise InputError(
                f"checkpoints: {self._path / which} cannot be opened ({first_line(error)}); "
                "give a folder that this user may write, or an empty one"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # After an error other processes may be gone, and what it says matters more.
        self.close(told=kind is not None)

    def latest_step(self) -> int | None:
        """The newest step that was saved completely, or None."""
        return self._managers["last"].latest_step()

    def save(self, step: int, state: Any, run: Mapping[str, Any] | None = None) -> None:
        """Saves `state` as `step`; does nothing where that step is saved already.

        Args:
          step: Steps done.
          state: A NamedTuple of trees of arrays with a field `student`.
          run: What else to keep, as JSON (the counters of a run, say).

        Raises:
          RunError: This save or the one before failed, and `on_failure` is "stop".
        """
        self.wait("last")
        if step in self._managers["last"].all_steps():
            return
        student, rest = _split(state)
        self._write("last", step, {"step": step, **(run or {})}, student=student, rest=rest)

    def failed(self, step: int, error: BaseException, which: str = "last") -> None:
        """Tells that `step` could not be saved, and goes on or stops as configured.

        Raises:
          RunError: If `on_failure` is "stop".
        """
        steps = self._managers[which].all_steps()
        newest = f"step {max(steps)} is the newest there" if steps else "there is none yet"
        message = (
            f"checkpoints: step {step} could not be saved to {self._path / which} "
            f"({plain(error)}); {newest}"
        )
        if self._stops:
            raise RunError(f"{message}; mend that and give the same command again") from error
        warn(f"{message}; the run goes on and tries again at the next")

    def restore(self, like: State, step: int | None = None) -> tuple[State, dict[str, Any]]:
        """Restores a whole state, bitwise, in the shapes and onto the shardings of `like`.

        Args:
          like: The state, or the same structure of `jax.ShapeDtypeStruct` with shardings (a state
            saved from one mesh is restored onto any other).
          step: Which checkpoint; the newest when None.

        Returns:
          The state and what `save` got as `run`.

        Where the newest is damaged this is said, it is moved to `<path>/damaged`, and the one
        before it is restored.

        Raises:
          InputError: If there is no such checkpoint, none can be read, or it is another model's.
        """
        student, rest = _split(like)
        _, found = self._read_good("last", step, student=student, rest=rest)
        fields = {"student": found.student, **found.rest}
        return type(like)(**fields), dict(found.run)

    def save_best(self, step: int, student: Any, value: float) -> bool:
        """Saves `student` if `value` (avg@16, say) is above the best so far; returns whether."""
        best = self.best()
        if best is not None and value <= best.value:
            return False
        if best is not None and best.step == step:
            self._managers["best"].delete(step)  # measured anew after a resume
        self._write("best", step, {"step": step, "value": float(value)}, student=student)
        return True

    def best(self) -> Best | None:
        """Step and value of the best student, or None before the first evaluation."""
        self.wait("best")
        if not self._managers["best"].all_steps():
            return None
        try:
            step, found = self._read_good("best", None)
        except Damaged as error:  # the next evaluation gives another
            self._set_aside("best", self._managers["best"].all_steps(), error, "none is left")
            return None
        return Best(step, float(found.run["value"]))

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
        step, found = self._read_good(which, step, student=like)
        return step, found.student

    def arrays(self, which: Literal["last", "best"] = "last") -> dict[str, np.ndarray]:
        """Every array of the newest checkpoint by its path, as it was saved, in host memory.

        Raises:
          InputError: As for `restore`.
        """
        step = self._need(which, None)
        folder = self._managers[which].directory / str(step)
        names = {"last": ("student", "rest"), "best": ("student",)}[which]
        try:
            with self._ocp.StandardCheckpointer() as reader:
                likes = {name: reader.metadata(folder / name) for name in names}
        except Exception as error:  # as many kinds as in `_read`
            raise unreadable(folder, first_line(error)) from error
        likes = jax.tree.map(
            lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype),
            {name: saved.item_metadata.tree for name, saved in likes.items()},
        )
        found = self._read(which, step, **likes)
        trees = {"student": found["student"], **(found["rest"] if "rest" in names else {})}
        return {
            path: np.asarray(leaf)
            for name, tree in trees.items()
            for path, leaf in digest.by_path({name: tree}).items()
        }

    def check(self) -> None:
        """Tells of a save in the background that failed, without waiting for one that goes on.

        Raises:
          RunError: As for `save`.
        """
        # Several processes would have to agree at every step; they are told at the next save.
        if jax.process_count() == 1:
            for which in list(self._saving):
                if not self._managers[which].is_saving_in_progress():
                    self.wait(which)

    def wait(self, *only: str) -> None:
        """Waits until what was saved is on the disk: all, or `only` "last" or "best".

        Raises:
          RunError: As for `save`.
        """
        for which, step in list(self._saving.items()):
            if only and which not in only:
                continue
            problem = None
            try:
                self._managers[which].wait_until_finished()
            except Exception as error:  # OSError, and ValueError for TensorStore's
                problem = error
            del self._saving[which]
            self._agree(which, step, problem)

    def close(self, told: bool = False) -> None:
        """Waits, then lets go of Orbax's threads.

        Args:
          told: Whether an error is on its way already: one of a save is said then, not raised.
        """
        try:
            if told:
                self._stops = False
            if not told or jax.process_count() == 1:
                self.wait()
        finally:
            for manager in self._managers.values():
                with contextlib.suppress(Exception) if told else contextlib.nullcontext():
                    manager.close()

    def _agree(self, which: str, step: int, problem: Exception | None) -> None:
        """Where a save failed on any process: opens the folder anew on all, and says so."""
        if not sharding.agree_max([problem is not None])[0]:
            return
        # What failed stays in Orbax's memory and, half written, on the disk, which may be full.
        for _ in range(2):  # the first raises the same error again
            with contextlib.suppress(Exception):
                self._managers[which].close()
        self._managers[which] = self._open(which)
        self.failed(step, problem or RuntimeError("on another process"), which)

    def _need(self, which: str, step: int | None) -> int:
        self.wait(which)
        steps = sorted(self._managers[which].all_steps())
        if step is None and steps:
            return steps[-1]
        if step in steps:
            return step  # pyright: ignore[reportReturnType] - None is not among the steps
        wanted = "a step" if step is None else f"step {step}"
        raise InputError(
            f"checkpoints: {self._path / which} does not have {wanted} (it has "
            f"{', '.join(map(str, steps)) or 'none'}); give the folder of a run that saved it"
        )

    def _write(self, which: str, step: int, run: dict[str, Any], **trees: Any) -> None:
        arrays: dict[str, Any] = {name: digest.describe(tree) for name, tree in trees.items()}
        arrays["checksums"] = {name: digest.checksums(tree) for name, tree in trees.items()}
        run = {**run, "checksum": checksum(arrays, run)}
        args = {name: self._ocp.args.StandardSave(tree) for name, tree in trees.items()}
        args |= {"arrays": self._ocp.args.JsonSave(arrays), "run": self._ocp.args.JsonSave(run)}
        problem = None
        try:
            self._managers[which].save(step, args=self._ocp.args.Composite(**args), force=True)
            self._saving[which] = step
        except Exception as error:
            problem = error
        self._agree(which, step, problem)

    def _read_good(self, which: str, step: int | None, **likes: Any) -> tuple[int, Any]:
        """The checkpoint of `step`; for None the newest that is whole."""
        newest = self._need(which, step)
        steps = [s for s in self._managers[which].all_steps() if step is None or s == newest]
        damaged: dict[int, Damaged] = {}
        for candidate in sorted(steps, reverse=True):
            try:
                found = self._read(which, candidate, **likes)
            except Damaged as error:
                damaged[candidate] = error
                continue
            for bad, error in damaged.items():
                self._set_aside(which, [bad], error, f"step {candidate} is used")
            return candidate, found
        first, *others = damaged.values()
        raise first if not others else Damaged(f"{first}. None of {len(damaged)} can be read")

    def _read(self, which: str, step: int, **likes: Any) -> Any:
        """Raises `Damaged` on all processes alike."""
        folder = self._managers[which].directory / str(step)

        def restore(**args: Any) -> Any:
            found, problem = None, ""
            with quiet():
                try:
                    found = self._managers[which].restore(
                        step, args=self._ocp.args.Composite(**args)
                    )
                except (MemoryError, jax.errors.JaxRuntimeError):
                    raise  # says nothing of the checkpoint
                except Exception as error:  # Orbax and TensorStore raise many kinds
                    problem = first_line(error)
            if sharding.agree_max([bool(problem)])[0]:
                raise unreadable(folder, problem or "another process cannot read it")
            return found

        json_item = self._ocp.args.JsonRestore()
        found = restore(arrays=json_item, run=json_item)
        arrays, run = dict(found.arrays), dict(found.run)
        sums = arrays.get("checksums", {})  # the first versions had none
        if (sums or "checksum" in run) and run.pop("checksum", None) != checksum(arrays, run):
            raise unreadable(folder, "arrays or run is not what was written")
        if differences := [
            line
            for name, like in likes.items()
            for line in digest.differences(arrays.get(name, {}), digest.describe(like))
        ]:
            more = f", and {len(differences) - 5} more" if len(differences) > 5 else ""
            raise InputError(
                f"checkpoints: {folder} is of another model or optimizer: "
                f"{'; '.join(differences[:5])}{more}; give the config of the run that saved it, or "
                "another output_dir"
            )
        trees: dict[str, Any] = {}
        if likes:
            trees = dict(
                restore(
                    **{
                        name: self._ocp.args.StandardRestore(digest.abstract(like))
                        for name, like in likes.items()
                    }
                )
            )
        for name, tree in trees.items():
            for path, value in digest.checksums(tree).items() if name in sums else ():
                if sums[name].get(path) != value:
                    raise unreadable(folder, f"{name}/{path} is not what was written")
        return self._ocp.args.Composite(run=run, **trees)

    def _set_aside(self, which: str, steps: Sequence[int], error: Damaged, then: str) -> None:
        """Says what is damaged, and keeps it out of the way of the steps that are saved anew."""
        where = ""
        if not self._read_only:
            where = f"; moved to {self._path / 'damaged'}"
            if sharding.is_main():
                (self._path / "damaged").mkdir(parents=True, exist_ok=True)
                for step in steps:
                    kept = self._path / "damaged" / f"{which}_{step}"
                    if kept.exists():
                        kept.rmtree()
                    (self._managers[which].directory / str(step)).rename(kept)
            sharding.agree_max([0])  # all see it gone
            self._managers[which].reload()
        if sharding.is_main():
            warn(f"{str(error).split(';')[0]}{where}; {then}")


def _split(state: Any) -> tuple[Any, dict[str, Any]]:
    """The student and, by field, everything else."""
    fields: dict[str, Any] = dict(state._asdict())
    return fields.pop("student"), fields
