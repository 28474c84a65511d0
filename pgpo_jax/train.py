"""Trains a student to follow its own teacher: `python -m pgpo_jax.train CONFIG`.

One step: the student answers questions, the answers are verified, the teacher (an average of the
student's past) is shown a successful sibling answer, and one jitted function (`step.py`) moves the
student towards what the teacher would have said.
"""

import contextlib
import dataclasses
import functools
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from pgpo_jax import config as config_module
from pgpo_jax import data, methods, sharding
from pgpo_jax.checkpoint import Checkpoints
from pgpo_jax.config import Config
from pgpo_jax.data import Contexts, Evidence, Rollouts, packing
from pgpo_jax.errors import InputError, RunError, command, printable
from pgpo_jax.evaluation import answer, evaluate, held_out, question_rewards, verify
from pgpo_jax.logs import End, Watch, Writer, count_compilations, read_multipliers
from pgpo_jax.optimizer import information_state, learning_rate, make_optimizer
from pgpo_jax.reprompt import reprompt, show_answers
from pgpo_jax.run import (
    Run,
    check_rows,
    checkpoint_folder,
    claim_folder,
    describe,
    load_run,
    reactions,
    records,
    summarise,
    token_columns,
)
from pgpo_jax.sampler import rollout
from pgpo_jax.state import TrainState, abstract_train_state, init_train_state, train_state_shardings
from pgpo_jax.step import make_train_step
from pgpo_jax.tasks import Outcome, Question
from pgpo_jax.warm_start import warm_start

STOPPED = 75
"""Exit code after a signal: the state is saved, the same command goes on (EX_TEMPFAIL)."""


# ---- the run -------------------------------------------------------------------------------------


def train(config: Config) -> int:
    """Runs, or resumes, a run; returns the exit code."""
    sharding.initialize(config.distributed)
    check_rows(config, sharding.make_mesh(config.mesh))  # before a model is loaded
    run = load_run(config)
    if config.evaluation.every:
        held_out(run.task, config.evaluation)
    batch_indices = functools.partial(
        data.batch_indices,
        config.seed,
        total=len(run.task.train),
        questions_per_step=config.data.questions_per_step,
    )
    batch_indices(step=0)  # too few questions are found now, not after the warm start
    changes = claim_folder(config)
    optimizer = make_optimizer(config.optimizer, read_multipliers(config.optimizer.replay))
    shardings = train_state_shardings(run.params, optimizer, run.teacher)
    step_key, evaluation_key = jax.random.split(jax.random.key(config.seed))

    with contextlib.ExitStack() as stack:
        stopping = stack.enter_context(_stop_on_signals())
        compiled = stack.enter_context(count_compilations())
        checkpoints = stack.enter_context(
            Checkpoints(
                checkpoint_folder(config),
                keep=config.checkpoint.keep,
                on_failure=config.checkpoint.on_failure,
            )
        )
        state, saved = _restore(run, optimizer, checkpoints)
        resumed = None if state is None else int(saved["step"])
        # Not before: what is written since the checkpoint is dropped.
        writer = stack.enter_context(_open_writer(config, resumed, saved.get("files")))
        writer.say(describe(config, run))
        if state is None:
            state = _first_state(config, run, optimizer, writer)
        else:
            writer.say(f"resumed at step {resumed} from {checkpoint_folder(config)}{changes}")
        evaluated = saved.get("evaluated", -1)
        # On every host alike: its rows are those of all.
        watch = Watch(config.alarms, saved.get("watch"))
        ending = watch.end()
        if ending and ending.code:
            ending = None  # whoever comes back after a failure wants to go on
        reacted = saved.get("reacted", False)
        now = reactions.react(config) if reacted else config
        train_step = _build(now, run, shardings)
        run = run._replace(params=None, teacher=None)  # the state holds and donates them

        def save() -> None:
            counters = {"evaluated": evaluated, "watch": watch.state, "reacted": reacted}
            _save(checkpoints, writer, state, counters)

        @stack.push
        def save_before_a_mistake_ends_it(kind, error, trace) -> None:
            """A reward function that fails after hours costs a line, not the steps since a save."""
            del kind, trace
            if isinstance(error, InputError) and jax.process_count() == 1:
                try:
                    save()
                except RunError as failed:  # the mistake is what to mend first
                    writer.warn(str(failed))

        stack.push(_name_the_missing)

        while True:
            step = int(state.step)
            done = step == config.steps or ending is not None
            if step != evaluated and _is_due(config, step, done) and not stopping():
                _evaluate(config, run, state, evaluation_key, step, writer, checkpoints)
                evaluated = step
            ends = (stopped := stopping()) or done
            checkpoints.check()
            if ends or (step != resumed and _saves(config, step)):
                save()
            if ends:
                break

            started = time.perf_counter()
            indices = batch_indices(step=step)
            own = indices[sharding.host_rows(len(indices))]
            questions = [run.task.train[int(index)] for index in own]
            key = jax.random.fold_in(step_key, step)
            rollouts = _rollout(config, run, state.student, questions, key)
            sampled = time.perf_counter()
            outcomes = verify(run.task, questions, rollouts.texts)
            contexts = _reprompt(config, run, questions, rollouts, outcomes, step)
            evidence = _show_answers(config, run, questions, rollouts, outcomes)
            prompted = time.perf_counter()
            judged = methods.judge(
                [[outcome.reward for outcome in group] for group in outcomes],
                config.reprompt.threshold,
                config.objective.scale_advantage,
            )
            batch = data.make_batch(rollouts, contexts, judged, evidence)
            mine = packing.pack(batch, config.data, run.mesh)
            batch = sharding.to_global(mine, run.mesh)
            updates = int(information_state(state.opt_state).count)
            state, measured = train_step(state, batch)
            divergence = sharding.to_host(measured.pop("token_divergence", None))
            if divergence is not None:
                divergence = packing.to_rows(mine, divergence)
            # Nothing is gained by fetching one step late: the next answers need this student.
            measured = {name: float(value) for name, value in jax.device_get(measured).items()}
            ended = time.perf_counter()

            row = summarise(config, run, rollouts, outcomes, contexts)
            tokens = row.pop("tokens")
            row |= measured | {
                "skipped/total": step - updates + int(measured["skipped"]),
                "lr": float(np.asarray(learning_rate(now.optimizer)(updates))),
                "time/rollout": sampled - started,
                "time/reprompt": prompted - sampled,
                "time/train": ended - prompted,
                "tokens_per_second/rollout": tokens / (sampled - started),
                "tokens_per_second/train": tokens / (ended - prompted),
                "compilations": compiled.total(),
            }
            fired = watch.check(row)
            ending = watch.end()
            row["information/running_mean"] = watch.running_information
            if fired:
                row["alarm"] = ", ".join(alarm.name for alarm in fired)
            if not reacted and reactions.wanted(config, tuple(alarm.name for alarm in fired)):
                reacted, now = True, reactions.react(config)
                row["reaction"] = config.alarms.reaction
                state = reactions.react_in_state(config, state)
                train_step = _build(now, run, shardings)
            writer.write(step + 1, row, [alarm.text for alarm in fired])
            writer.samples(
                step + 1,
                records(run, questions, rollouts, outcomes, contexts),
                lambda row, rollouts=rollouts, divergence=divergence: token_columns(
                    run, rollouts, divergence, row
                ),
            )
        checkpoints.wait()
        if checkpoints.latest_step() != step:
            raise RunError(
                f"checkpoints: the run ended at step {step}, which is not saved (its newest "
                f"checkpoint: {checkpoints.latest_step()}); the same command goes on from there"
            )
        if ending is None:
            writer.say(f"{'stopped' if stopped else 'done'} at step {step}: {config.output_dir}")
            return STOPPED if stopped else 0
        _say_the_end(ending, step, config, writer)
    return ending.code


# ---- parts of the loop ---------------------------------------------------------------------------


def _build(config: Config, run: Run, shardings: TrainState) -> Callable[..., Any]:
    """The update that a configuration states."""
    return make_train_step(
        run.graphdef,
        make_optimizer(config.optimizer, read_multipliers(config.optimizer.replay)),
        config.distillation,
        shardings,
        objective=config.objective,
        teacher_config=config.teacher,
        teacher_graphdef=run.teacher_graphdef,
        micro_batches=config.data.micro_batches,
        vocab_size=run.sampling.vocab_size,
        estimators=config.metrics.estimators,
        per_token=config.metrics.samples_per_step > 0,
    )


def _open_writer(config: Config, resumed: int | None, sizes: dict[str, int] | None) -> Writer:
    return Writer(
        config.output_dir,
        config.metrics,
        total_steps=config.steps,
        resume_from=resumed,
        sizes=sizes,
        run_config=dataclasses.asdict(config),
        active=sharding.is_main(),
    )


def _restore(run: Run, optimizer: Any, checkpoints: Checkpoints) -> tuple[Any, dict[str, Any]]:
    """The newest whole checkpoint and what was saved with it; None and nothing without one."""
    if checkpoints.latest_step() is None:
        return None, {}
    like = abstract_train_state(run.params, optimizer, run.teacher)
    jax.tree.map(lambda p: p.delete(), (run.params, run.teacher))  # room for what is restored
    return checkpoints.restore(like)


def _save(
    checkpoints: Checkpoints, writer: Writer, state: TrainState, counters: dict[str, Any]
) -> None:
    """Saves the state, and where the files of the run end, which must be on the disk before it."""
    step, sizes, problem = int(state.step), {}, None
    try:
        sizes = writer.sizes()
    except OSError as error:
        problem = error
    if sharding.agree_max([problem is not None])[0]:
        checkpoints.failed(step, problem or RuntimeError("the metrics cannot be written"))
    else:
        checkpoints.save(step, state, {**counters, "files": sizes})


def _first_state(config: Config, run: Run, optimizer: Any, writer: Writer) -> TrainState:
    """The model, after its warm start."""
    params = run.params
    if config.warm_start.steps:
        params = warm_start(
            run.graphdef,
            params,
            run.task,
            run.tokenizer,
            config.seed,
            config.warm_start,
            config.data,
            config.reprompt,
            run.mesh,
            lambda done, loss: writer.progress(
                "warm start", done, config.warm_start.steps, {"loss": loss}
            ),
        )
    return init_train_state(params, optimizer, run.teacher)


def _rollout(
    config: Config, run: Run, student: Any, questions: Sequence[Question], key: jax.Array
) -> Rollouts:
    prompts = data.encode(
        run.tokenizer,
        [question.messages for question in questions],
        max_length=config.data.max_prompt_length,
        template_options=config.data.template_options,
        names=[question.key for question in questions],
    )
    return rollout(
        run.graphdef, student, run.tokenizer, prompts, key, run.sampling, config.data, run.mesh
    )


def _reprompt(
    config: Config,
    run: Run,
    questions: Sequence[Question],
    rollouts: Rollouts,
    outcomes: Sequence[Sequence[Outcome]],
    step: int,
) -> Contexts:
    contexts = reprompt(
        questions,
        rollouts,
        outcomes,
        np.random.default_rng([config.seed, step]),
        config.reprompt,
        run.tokenizer,
        run.task.templates,
        template_options=config.data.template_options,
    )
    (width,) = sharding.agree_max([contexts.prompts.shape[1]])
    prompts, mask = data.widen_left(contexts.prompts, contexts.prompt_mask, width)
    return contexts._replace(prompts=prompts, prompt_mask=mask)


def _show_answers(
    config: Config,
    run: Run,
    questions: Sequence[Question],
    rollouts: Rollouts,
    outcomes: Sequence[Sequence[Outcome]],
) -> Evidence | None:
    """Prompts with final answers in them, where the objective weighs tokens by those."""
    if not config.objective.needs_evidence:
        return None
    evidence = show_answers(
        questions,
        rollouts,
        outcomes,
        config.reprompt,
        run.tokenizer,
        run.task.templates,
        template_options=config.data.template_options,
    )
    right, right_mask, wrong, wrong_mask, has_wrong = map(np.asarray, evidence)
    right_width, wrong_width = sharding.agree_max([right.shape[1], wrong.shape[1]])
    right, right_mask = data.widen_left(right, right_mask, right_width)
    wrong, wrong_mask = data.widen_left(wrong, wrong_mask, wrong_width)
    return Evidence(right, right_mask, wrong, wrong_mask, has_wrong)


def _evaluate(config, run, state, key, step, writer, checkpoints) -> None:
    """Scores the held-out questions, keeps the best student, shows a few answers."""
    started = time.perf_counter()
    metrics, answered = evaluate(
        run.graphdef,
        state.student,
        run.task,
        run.tokenizer,
        key,
        config.evaluation,
        run.sampling,
        config.data,
        run.mesh,
    )
    if config.evaluation.teacher_questions and run.task.demonstration:
        questions = run.task.test[: config.evaluation.teacher_questions]
        graphdef = run.teacher_graphdef or run.graphdef
        accuracy = _accuracy(config, run, graphdef, state.teacher, key, questions, shown=True)
        metrics["eval/teacher_with_demonstration"] = accuracy
    metrics["time/evaluate"] = time.perf_counter() - started
    if step == 0 and config.evaluation.preflight_questions and run.task.demonstration:
        metrics |= _preflight(config, run, state.student, key, writer)
    writer.write(step, metrics)
    asked = len(held_out(run.task, config.evaluation))
    writer.evaluation(step, question_rewards(answered, asked))
    if answered.questions:
        shown = zip(answered.questions, answered.texts, answered.outcomes, strict=True)
        writer.table(
            f"held-out answers at step {step}",
            [
                {
                    "question": question.messages[-1]["content"],
                    "response": texts[0],
                    "answer": question.answer,
                    "reward": outcomes[0].reward,
                }
                for question, texts, outcomes in list(shown)[: config.metrics.samples_shown]
            ],
        )
    average = metrics[f"eval/avg@{config.evaluation.num_samples}"]
    checkpoints.save_best(step, state.student, average)


def _accuracy(config, run, graphdef, params, key, questions, *, shown: bool) -> float:
    """Mean reward on some questions, with or without a right answer in the prompt."""
    answered = answer(
        graphdef,
        params,
        run.task,
        run.tokenizer,
        questions,
        key,
        config.evaluation,
        run.sampling,
        config.data,
        run.mesh,
        {question.key: run.task.demonstration(question) for question in questions}
        if shown
        else None,
        config.reprompt,
    )
    rewards = np.array(
        [[outcome.reward for outcome in group] for group in answered.outcomes], np.float32
    ).reshape(-1, run.sampling.num_samples)
    return float(sharding.gather_rows(rewards, len(questions)).mean())


def _preflight(config, run, student, key, writer) -> dict[str, float]:
    """Whether the model can use a demonstration: without that its teacher knows no more than it."""
    questions = run.task.test[: config.evaluation.preflight_questions]
    accuracy = {
        f"preflight/{name}": _accuracy(
            config, run, run.graphdef, student, key, questions, shown=shown
        )
        for name, shown in (("plain", False), ("with_demonstration", True))
    }
    plain, helped = accuracy.values()
    writer.say(
        f"pre-flight: {plain:.1%} right without a demonstration in the prompt, {helped:.1%} with"
    )
    if helped <= plain:
        writer.warn(
            "the model does not profit from a demonstration, so its teacher knows no more than it "
            "does; use a larger model or a warm start"
        )
    return accuracy


def _is_due(config: Config, step: int, done: bool) -> bool:
    every = config.evaluation.every
    return every > 0 and (step % every == 0 or done)


def _saves(config: Config, step: int) -> bool:
    if step == 0:
        return config.warm_start.steps > 0  # not to be done again after an interruption
    return config.checkpoint.every > 0 and step % config.checkpoint.every == 0


def _say_the_end(ending: End, step: int, config: Config, writer: Writer) -> None:
    """Why the run ends early: on the console, a failure as an error on stderr."""
    text = f"ended at step {step}: {ending.text}; {checkpoint_folder(config)} has the newest state"
    if ending.code and sharding.is_main():
        print("error: " + printable(text), file=sys.stderr, flush=True)
    if not ending.code:
        writer.say(text + "; to go on, take it out of alarms.stop_on and give the command again")


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGINT ask the loop to save and end; a second SIGINT interrupts at once.

    Yields:
      Whether any process was asked; all hosts must call it together and get the same answer.
    """
    asked = []

    def ask(number, frame):
        del frame
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(sharding.agree_max([len(asked)])[0])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _name_the_missing(kind, error, trace) -> bool:
    """When another process died, the first to notice get a broken connection: say which it was."""
    del kind, trace
    if error is not None and jax.process_count() > 1 and not isinstance(error, InputError):
        try:
            sharding.barrier("failed", timeout=5)
        except Exception as missing:  # the coordinator may be the one that is gone
            print(
                f"error: a process is gone: {missing}".splitlines()[0], file=sys.stderr, flush=True
            )
    return False  # the exception goes on


def main(argv: Sequence[str]) -> int:
    """`CONFIG [--section.field value ...]`."""
    return train(config_module.from_command_line(argv, "train"))


if __name__ == "__main__":
    sys.exit(command(main))
