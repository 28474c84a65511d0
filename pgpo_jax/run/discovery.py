"""Discovery in a run's folder: questions screened for hardness, then every method's attempts.

`screening.json` says how many responses to each candidate succeeded, `discovery.jsonl` has a line
for every question and method that is finished, `discovery.json` the curves. All that is random
derives from the seed, the question's place and the number of the step, so what was interrupted is
done again from its beginning and comes out as it would have.
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pgpo_jax import data, keys
from pgpo_jax.data import Rollouts
from pgpo_jax.discovery import DiscoveryConfig, Found, Method, summarise
from pgpo_jax.errors import InputError, RunError
from pgpo_jax.evaluation import Pace, answer, verify, within_training
from pgpo_jax.keys import Stream
from pgpo_jax.logs import jsonl
from pgpo_jax.reprompt import reprompt, resolve_templates, teacher_messages
from pgpo_jax.run.evaluation import Interrupted
from pgpo_jax.run.folder import write_file
from pgpo_jax.run.session import Session
from pgpo_jax.run.setup import Run
from pgpo_jax.run.updates import configured_optimizer, judged_examples, make_updates
from pgpo_jax.sampler import Conversation, rollout
from pgpo_jax.state import TrainState, abstract_train_state, init_train_state
from pgpo_jax.tasks import Outcome, Question

SCREENING, RECORDS, CURVES = "screening.json", "discovery.jsonl", "discovery.json"


class Models(NamedTuple):
    """What every question begins with; nothing of it is donated."""

    student: Any
    teacher: Any = None
    """Where it is another model (`teacher.path`)."""


class Trial(NamedTuple):
    """One question, and what all methods share there."""

    run: Run
    """As `for_one_question` makes it."""
    question: Question
    place: int
    """Of the question in its split."""

    @property
    def config(self) -> DiscoveryConfig:
        return self.run.config.discovery

    def ask(self, params: Any, step: int) -> Rollouts:
        """A step's attempts at the plain question. At the first step all methods draw the same."""
        conversations, names = [self.question.messages], [self.question.key]
        return rollout(self.run.policy, params, conversations, self.key(step), names=names)

    def key(self, step: int) -> jax.Array:
        return keys.key(self.run.config.seed, Stream.DISCOVERY, self.place, step)

    def judge(self, texts: Sequence[Sequence[str]]) -> list[list[Outcome]]:
        return verify(self.run.task, [self.question] * len(texts), texts)


class Attempts(NamedTuple):
    """Attempts that were drawn together."""

    texts: list[str]
    outcomes: list[Outcome]
    skipped: bool = False
    """Whether the update before them changed nothing."""


def for_one_question(run: Run) -> Run:
    """The run whose step is `discovery.samples_per_step` responses to one question."""
    config, policy = run.config, run.policy
    samples = config.discovery.samples_per_step
    prompts = dataclasses.replace(config.data, questions_per_step=1)
    config = dataclasses.replace(
        config,
        data=prompts,
        sampling=dataclasses.replace(config.sampling, num_samples=samples),
        metrics=dataclasses.replace(config.metrics, samples_per_step=0),
    )
    sampling = dataclasses.replace(policy.sampling, num_samples=samples)
    policy = policy._replace(sampling=sampling, prompts=prompts)
    return run._replace(config=config, policy=policy, params=None, teacher=None)


# ---- the methods ---------------------------------------------------------------------------------


def best_of(trial: Trial, params: Any) -> Iterator[Attempts]:
    """Independent attempts of the same model."""
    for step in range(trial.config.attempts // trial.config.samples_per_step):
        texts = trial.ask(params, step).texts
        yield Attempts(texts[0], trial.judge(texts)[0])


def distillation(trial: Trial, state: TrainState, update: Callable[..., Any]) -> Iterator[Attempts]:
    """Attempts of a model that learns from the feedback on those before.

    Every step is an update as in training, of one question: the teacher sees the feedback on each
    response, for there is no success yet that it could see instead.

    Args:
      trial: The question.
      state: Student and teacher before the first attempt; donated.
      update: From `make_updates`.
    """
    run, question, skipped = trial.run, [trial.question], False
    for step in range(trial.config.attempts // trial.config.samples_per_step):
        rollouts = trial.ask(state.student, step)
        outcomes = trial.judge(rollouts.texts)
        yield Attempts(rollouts.texts[0], outcomes[0], skipped)
        rng = keys.generator(run.config.seed, Stream.DISCOVERY, trial.place, step)
        shown = reprompt(run.policy, question, rollouts, outcomes, rng, run.reprompt)
        examples = judged_examples(run, question, rollouts, outcomes, shown)
        state, row, _ = update(state, examples)
        skipped = bool(row["skipped"])


def multi_turn(trial: Trial, params: Any) -> Iterator[Attempts]:
    """Attempts of the same model with the feedback on earlier ones in the prompt.

    The feedback alone, not the attempts, as SDPO's baseline has it: the authors found that to be
    better than to keep both. The prompt is the teacher's of distillation, with more feedback.
    """
    run, config = trial.run, trial.config
    sampling = dataclasses.replace(run.policy.sampling, num_samples=1)
    policy = run.policy._replace(sampling=sampling)
    policy = policy.with_limit("reprompt.max_length", run.reprompt.max_length)
    told: list[list[str]] = [[] for _ in range(config.conversations)]
    names = [trial.question.key] * config.conversations
    for turn in range(config.attempts // config.conversations):
        prompts = [next_prompt(run, trial.question, feedback) for feedback in told]
        texts = rollout(policy, params, prompts, trial.key(turn), names=names).texts
        outcomes = trial.judge(texts)
        yield Attempts([text for (text,) in texts], [outcome for (outcome,) in outcomes])
        for feedback, (outcome,) in zip(told, outcomes, strict=True):
            feedback += [outcome.feedback] if outcome.feedback else []
            if config.turns:
                del feedback[: -config.turns]


def next_prompt(run: Run, question: Question, feedback: list[str]) -> Conversation:
    """The question with the feedback on earlier attempts, the latest last.

    What does not fit `reprompt.max_length` is dropped from `feedback`, the earliest first.
    """
    policy, templates = run.policy, resolve_templates(run.reprompt)
    while True:
        text = data.letters(policy.tokenizer, "\n\n".join(feedback))
        messages = teacher_messages(question.messages, None, text, templates)
        options = policy.prompts.template_options
        (length,) = data.lengths(policy.tokenizer, [messages], options)
        if length <= run.reprompt.max_length or not feedback:
            return messages
        del feedback[0]


def attempt(
    batches: Iterator[Attempts], trial: Trial, method: Method, stopping: Callable[[], bool]
) -> dict[str, Any]:
    """Goes on to the first success or the end of the budget; `best_of` always to the latter.

    Returns:
      The record of the question and the method.

    Raises:
      Interrupted: `stopping` said so.
    """
    started, budget = time.perf_counter(), trial.config.attempts
    threshold = trial.run.reprompt.threshold
    count, successes, skipped, last = 0, [], 0, ""
    for texts, outcomes, nothing in batches:
        skipped += nothing
        for text, outcome in zip(texts, outcomes, strict=True):
            count += 1
            last = last if successes else text
            if outcome.reward >= threshold:
                successes.append(count)
                if method != "best_of":
                    break
        if count >= budget or (successes and method != "best_of"):
            break
        if stopping():
            raise Interrupted
    return {
        "question": trial.question.key,
        "place": trial.place,
        "method": method,
        "attempts": count,
        "successes": successes,
        "response": last,
        "skipped_updates": skipped,
        "time/seconds": round(time.perf_counter() - started, 3),
    }


# ---- the folder ----------------------------------------------------------------------------------


def run_discovery(run: Run, models: Models, session: Session) -> dict[str, Any]:
    """Does what is missing in the run's folder and says what was found.

    Args:
      run: Task, policy and settings.
      models: What every question begins with.
      session: Says how far it is, and whether to stop; its origin tells what must be the same as in
        what is there already.

    Returns:
      What `discovery.json` holds.

    Raises:
      InputError: No question is hard, failed attempts get no feedback, or files of another run.
      RunError: The folder cannot be written; what is finished is there.
      Interrupted: A signal; likewise.
    """
    config, folder = run.config.discovery, Path(run.config.output_dir)
    questions = candidates(run)
    screened = _screened(run, models.student, questions, session)
    hard = _hard(screened, config, session)
    records = Records(folder / RECORDS)
    pairs: list[tuple[int, Method]] = [(p, method) for p in hard for method in config.methods]
    one, writer = for_one_question(run), session.writer
    optimizer = configured_optimizer(run.config)
    update = make_updates(one, abstract_train_state(models.student, optimizer, models.teacher))

    def begin(trial: Trial, method: Method) -> Iterator[Attempts]:
        if method == "best_of":
            return best_of(trial, models.student)
        if method == "multi_turn":
            return multi_turn(trial, models.student)
        # A copy: what an update changes is donated.
        student, teacher = jax.tree.map(jnp.copy, tuple(models))
        return distillation(trial, init_train_state(student, optimizer, teacher), update)

    with records:
        done = sum(pair in records.found for pair in pairs)
        writer.begin("discovery", done, len(pairs))
        for place, method in pairs:
            if (place, method) in records.found:
                continue
            trial = Trial(one, questions[place], place)
            record = attempt(begin(trial, method), trial, method, session.stopping)
            with _written(folder):
                records.append(record)
                told = _summary(records.found, hard, config)
                write_file(str(folder), CURVES, json.dumps(told) + "\n")
            done += 1
            writer.progress("discovery", done, len(pairs), _solved(records.found))
            if done < len(pairs) and session.stopping():
                raise Interrupted
    return _summary(records.found, hard, config)


def candidates(run: Run) -> list[Question]:
    """The questions that are screened.

    Raises:
      InputError: The split has none.
    """
    config = run.config.discovery
    split = run.task.test if config.split == "test" else run.task.train
    if not split:
        raise InputError(
            f"discovery.split: got {config.split}; {run.task.name} has no such question: choose "
            "the other split, or give some"
        )
    return list(split[: config.candidates])


def _screened(
    run: Run, student: Any, questions: Sequence[Question], session: Session
) -> dict[str, Any]:
    """How many responses to each candidate succeed: as it stands in the folder, or drawn now."""
    folder, config = run.config.output_dir, run.config.discovery
    path = Path(folder) / SCREENING
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            session.check_origin(found["origin"])
            return found
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(
                f"output_dir: {path} cannot be read ({error}); delete it to screen the questions "
                "again"
            ) from error

    def told(done: int, total: int) -> None:
        session.writer.progress("screening", done, total)
        if done < total and session.stopping():
            raise Interrupted

    policy = within_training(run.policy)
    sampling = dataclasses.replace(policy.sampling, num_samples=config.screening_samples)
    policy, key = policy._replace(sampling=sampling), keys.key(run.config.seed, Stream.SCREENING)
    pace = Pace(run.config.evaluation.questions_per_batch, told)
    groups = answer(policy, student, run.task, questions, key, pace=pace).outcomes
    threshold = run.reprompt.threshold
    failed = [each for group in groups for each in group if each.reward < threshold]
    found = {
        "origin": session.origin,
        "successes": [sum(each.reward >= threshold for each in group) for group in groups],
        "failed": len(failed),
        "failed_with_feedback": sum(bool(each.feedback) for each in failed),
    }
    with _written(path.parent):
        write_file(folder, SCREENING, json.dumps(found) + "\n")
    return found


def _hard(found: Mapping[str, Any], config: DiscoveryConfig, session: Session) -> list[int]:
    """The places of the questions to be asked; says what the screening found."""
    successes, writer = found["successes"], session.writer
    most = config.max_success_rate * config.screening_samples
    every = [place for place, count in enumerate(successes) if count <= most]
    rate = sum(successes) / (len(successes) * config.screening_samples)
    told, failed = found["failed_with_feedback"], found["failed"]
    writer.write(0, {"screening/success_rate": rate, "screening/hard": len(every)})
    writer.say(
        f"screening: {len(every)} of {len(successes)} questions are hard, at most "
        f"{config.max_success_rate:.1%} of {config.screening_samples} responses right "
        f"({rate:.1%} of all); {told:,} of {failed:,} failed ones got feedback"
    )
    if not every:
        raise InputError(
            f"discovery.max_success_rate: got {config.max_success_rate}; none of "
            f"{len(successes)} candidates is as hard: raise it, or discovery.candidates"
        )
    if failed and not told and {*config.methods} != {"best_of"}:
        raise InputError(
            f"discovery.methods: got {', '.join(config.methods)}; none of {failed:,} failed "
            "attempts got feedback from the task, so there is nothing to learn from before a "
            "success: choose a task or a task.reward that gives feedback"
        )
    if len(every) < config.questions:
        writer.warn(
            f"discovery.questions = {config.questions}, but {len(every)} candidates are hard; all "
            "of them are asked"
        )
    return every[: config.questions]


class Records:
    """The lines of `discovery.jsonl`: those that are there, and more. A context manager."""

    def __init__(self, path: Path) -> None:
        """Reads what is finished; half a line, where a run was killed, is cut off.

        Raises:
          InputError: A line that is no record.
        """
        self.found: dict[tuple[int, Method], Found] = {}
        text = path.read_bytes() if path.exists() else b""
        size = text.rfind(b"\n") + 1
        for line in jsonl.read(path) if size else ():
            if line.torn and not line.text.endswith(b"\n"):
                break
            try:
                self._keep(line.row)
            except (KeyError, TypeError) as error:
                raise InputError(
                    f"output_dir: {path}:{line.number}: got {line.problem or 'another object'}; "
                    "must be the record of a question and a method"
                ) from error
        self._lines = jsonl.Lines(path, 0, size)

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self._lines.close()

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a record, on the disk when this returns."""
        self._lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        self._lines.sync()
        self._keep(record)

    def _keep(self, record: Mapping[str, Any]) -> None:
        pair = record["place"], record["method"]
        self.found[pair] = Found(record["attempts"], tuple(record["successes"]))


@contextlib.contextmanager
def _written(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"output_dir: {folder} cannot be written ({error.strerror}); the same command goes on "
            "where that ended"
        ) from error


def _summary(
    found: Mapping[tuple[int, Method], Found], hard: Sequence[int], config: DiscoveryConfig
) -> dict[str, Any]:
    """The curves over the questions that all methods are done with; empty where there is none."""
    done = [place for place in hard if all((place, each) in found for each in config.methods)]
    if not done:
        return {}
    each: dict[Method, list[Found]] = {
        method: [found[place, method] for place in done] for method in config.methods
    }
    return summarise(each, config.attempts)


def _solved(found: Mapping[tuple[int, Method], Found]) -> dict[str, float]:
    """The part of its questions that each method has solved so far."""
    solved: dict[str, list[bool]] = {}
    for (_, method), each in found.items():
        solved.setdefault(f"solved/{method}", []).append(bool(each.successes))
    return {name: sum(values) / len(values) for name, values in solved.items()}
