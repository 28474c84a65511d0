"""Session of a run: its checkpoints, files, alarms and signals, around the updates."""

import contextlib
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

from pgpo_jax import sharding
from pgpo_jax.checkpoint import Checkpoints
from pgpo_jax.config import Config
from pgpo_jax.errors import InputError, RunError, printable
from pgpo_jax.logs import End, Watch, Writer
from pgpo_jax.methods import Gate, Progress, refresh_due
from pgpo_jax.run import reactions
from pgpo_jax.run.compilations import count_compilations
from pgpo_jax.run.content import check_content, content, versions
from pgpo_jax.run.evaluation import Interrupted, evaluate_run
from pgpo_jax.run.preview import preview
from pgpo_jax.run.setup import Run, checkpoint_folder, describe, warm_start_folder
from pgpo_jax.run.signals import stop_on_signals
from pgpo_jax.state import TrainState

STOPPED = 75
"""Exit code after a signal: the state is saved, the same command goes on (EX_TEMPFAIL)."""


class Session:
    """What goes on around the updates of a run. A context manager; all hosts take part alike."""

    def __init__(self, run: Run, evaluation_key: jax.Array) -> None:
        self._config = run.config
        self._run = run
        self._key = evaluation_key
        self._stack = contextlib.ExitStack()
        self._state: TrainState | None = None
        self._resumed: int | None = None
        self._evaluated = -1
        self._content: dict[str, str] = {}
        self._versions = versions()
        self._ending: End | None = None
        self._stopped = False
        self._gate = Gate()
        self._warms_up = run.config.warm_start.steps > 0
        self.reacted = False
        """Whether the configuration is that after a reaction."""

    def __enter__(self) -> "Session":
        config = self._config
        self.stopping = self._stack.enter_context(stop_on_signals())
        self._compiled = self._stack.enter_context(count_compilations())
        self._checkpoints = self._stack.enter_context(
            Checkpoints(
                checkpoint_folder(config),
                keep=config.checkpoint.keep,
                on_failure=config.checkpoint.on_failure,
            )
        )
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Saves before a user's mistake ends the run: a reward function that fails after hours
        costs a line, not the steps since a save."""
        _name_the_missing(error)
        if isinstance(error, InputError) and self._state is not None and jax.process_count() == 1:
            try:
                self._save(self._state)
            except RunError as failed:  # the mistake is what to mend first
                self.writer.warn(str(failed))
        self._stack.__exit__(kind, error, trace)

    def restore(self, like: TrainState, changes: Sequence[str]) -> TrainState | None:
        """The newest whole checkpoint, None without one; opens the files of the run.

        Args:
          like: Shapes and places of the state; `abstract_train_state`.
          changes: What changed in the configuration since the run was started, in words.

        Raises:
          InputError: The run's data, reward function or model have changed meanwhile.
        """
        state, saved = None, {}
        self._content = content(self._run)
        if self._checkpoints.latest_step() is not None:
            # Room for what is restored.
            jax.tree.map(lambda p: p.delete(), (self._run.params, self._run.teacher))
            state, saved = self._checkpoints.restore(like)
            self._resumed = int(saved["step"])
            changes = [*changes, *self.check_origin(saved)]
        # Not before: what is written since the checkpoint is dropped.
        self.writer = self._stack.enter_context(self._open_writer(saved.get("files")))
        self.writer.say(describe(self._run))
        for note in self._run.notes:
            self.writer.warn(note)
        lines, warnings = preview(self._run)
        for line in [*self._run.task.notes, *lines]:
            self.writer.say(line)
        for warning in warnings:
            self.writer.warn(warning)
        if state is not None:
            folder = checkpoint_folder(self._config)
            told = f" (changed: {', '.join(changes)})" if changes else ""
            self.writer.say(f"resumed at step {self._resumed} from {folder}{told}")
            if self._config.steps < int(saved["step"]):
                self.writer.say(
                    f"steps = {self._config.steps} lies before step {self._resumed}, which the run "
                    "has reached: no update is left to do; give more steps to go on, or another "
                    "output_dir for a shorter run"
                )
        self._evaluated = saved.get("evaluated", -1)
        self.reacted = saved.get("reacted", False)
        self._gate = Gate(*saved.get("gate", ()))
        # On every host alike: its rows are those of all.
        self._watch = Watch(self._config.alarms, saved.get("watch"))
        ending = self._watch.end()
        self._ending = None if ending and ending.code else ending  # after a failure it goes on
        return state

    def check_origin(self, saved: Mapping[str, Any]) -> list[str]:
        """What stands in no field and changed since the checkpoint was saved, in words.

        Raises:
          InputError: That is not accepted.
        """
        told = check_content(saved.get("content", {}), self._content, self._config)
        before = saved.get("versions", {})
        return told + [
            f"{name} {before[name]} -> {version}"
            for name, version in self._versions.items()
            if before.get(name, version) != version
        ]

    @property
    def origin(self) -> dict[str, Any]:
        """What the state depends on and stands in no field; kept with every checkpoint."""
        return {"content": self._content, "versions": self._versions}

    def goes_on(self, state: TrainState) -> bool:
        """Evaluates and saves where it is time; False where the run is over or was stopped."""
        self._state = state
        config, step = self._config, int(state.step)
        done = step >= config.steps or self._ending is not None
        every = config.evaluation.every
        due = every > 0 and step != self._evaluated and (step % every == 0 or done)
        if due and not self.stopping():
            with contextlib.suppress(Interrupted):
                average = evaluate_run(self._run, state, self._key, self.writer, self.stopping)
                self._checkpoints.save_best(step, state.student, average)
                self._evaluated = step
        self._stopped = self.stopping()
        ends = self._stopped or done
        self._checkpoints.check()
        if ends or (step != self._resumed and self._saves(step)):
            self._save(state)
        if not ends:
            self.writer.begin("train", step, config.steps)
        return not ends

    def refreshes_teacher(self, config: Config, step: int, row: dict[str, Any]) -> bool:
        """Whether the teacher becomes the student after a step, by a rule that looks at the run;
        the metrics say so."""
        reward, cut = row["reward/mean"], row["response_length/clip_fraction"]
        now = Progress(step, config.steps, reward, cut)
        self._gate, due = refresh_due(config.teacher, self._gate, now)
        if due is not None:
            row["teacher/refreshed"] = float(due)
        return bool(due)

    def write(self, step: int, row: dict[str, Any]) -> bool:
        """Adds the metrics of an update to the run's files; whether an alarm asks for a reaction.

        A run reacts once.
        """
        row["compilations"] = self._compiled.total()
        fired = self._watch.check(row)
        self._ending = self._watch.end()
        row["information/running_mean"] = self._watch.running_information
        if fired:
            row["alarm"] = ", ".join(alarm.name for alarm in fired)
        names = tuple(alarm.name for alarm in fired)
        reacts = not self.reacted and reactions.wanted(self._config, names)
        if reacts:
            self.reacted, row["reaction"] = True, self._config.alarms.reaction
        self.writer.write(step, row, [alarm.text for alarm in fired])
        return reacts

    def finish(self, state: TrainState) -> int:
        """Waits until the end is saved and says how the run ended; returns the exit code.

        Raises:
          RunError: The end could not be saved.
        """
        step = int(state.step)
        self._checkpoints.wait()
        if (saved := self._checkpoints.latest_step()) != step:
            raise RunError(
                f"checkpoints: the run ended at step {step}, which is not saved (its newest "
                f"checkpoint: {saved}); the same command goes on from there"
            )
        if self._ending is not None:
            return self._say_why(self._ending, step)
        how = "stopped" if self._stopped else "done"
        self.writer.say(f"{how} at step {step}: {self._config.output_dir}")
        return STOPPED if self._stopped else 0

    def _open_writer(self, sizes: dict[str, int] | None) -> Writer:
        return Writer(
            self._config.output_dir,
            self._config.metrics,
            total_steps=self._config.steps,
            resume_from=self._resumed,
            sizes=sizes,
            run_config=dataclasses.asdict(self._config),
            active=sharding.is_main(),
        )

    def _saves(self, step: int) -> bool:
        if step == 0:
            return self._config.warm_start.steps > 0  # not to be done again after an interruption
        every = self._config.checkpoint.every
        return every > 0 and step % every == 0

    def _save(self, state: TrainState) -> None:
        """Saves the state, and where the run's files end, which must be on the disk before it."""
        step, sizes, problem = int(state.step), {}, None
        try:
            sizes = self.writer.sizes()
        except OSError as error:
            problem = error
        if sharding.agree_max([problem is not None])[0]:
            reason = problem or RuntimeError("the metrics cannot be written")
            self._checkpoints.failed(step, reason)
            return
        counters = {"evaluated": self._evaluated, "watch": self._watch.state}
        counters |= {"reacted": self.reacted, "gate": self._gate, "files": sizes}
        self._checkpoints.save(step, state, counters | self.origin)
        if self._warms_up:
            self._drop_warm_start()

    def _drop_warm_start(self) -> None:
        """Deletes the warm start's own checkpoints once its result is on the disk."""
        self._checkpoints.wait("last")
        if self._checkpoints.latest_step() is None:  # that failed
            return
        self._warms_up, folder = False, epath.Path(warm_start_folder(self._config))
        if sharding.is_main() and folder.exists():
            folder.rmtree()

    def _say_why(self, ending: End, step: int) -> int:
        """Why the run ends early: on the console, a failure as an error on stderr."""
        folder = checkpoint_folder(self._config)
        text = f"ended at step {step}: {ending.text}; {folder} has the newest state"
        if ending.code and sharding.is_main():
            print("error: " + printable(text), file=sys.stderr, flush=True)
        if not ending.code:
            again = "to go on, take it out of alarms.stop_on and give the command again"
            self.writer.say(f"{text}; {again}")
        return ending.code


def _name_the_missing(error: BaseException | None) -> None:
    """When another process died, the first to notice get a broken connection: say which it was."""
    if error is None or jax.process_count() == 1 or isinstance(error, InputError):
        return
    try:
        sharding.barrier("failed", timeout=5)
    except Exception as missing:  # the coordinator may be the one that is gone
        print(f"error: a process is gone: {missing}".splitlines()[0], file=sys.stderr, flush=True)
