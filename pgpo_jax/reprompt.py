"""What the teacher may see: a successful sibling response, a given solution, or feedback, in the
question's prompt.

Source: Hübotter et al., "Reinforcement Learning via Self-Distillation" (SDPO), arXiv 2601.20802,
and its published code; a given solution is that of Zhao et al., OPSD, arXiv 2601.18734. The
references cut over-long teacher prompts silently, one losing the instruction and the other the
question; here the demonstration gets shorter, and that is counted.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from pgpo_jax import data, sharding
from pgpo_jax.data import Rollouts
from pgpo_jax.errors import InputError, require
from pgpo_jax.sampler import Policy
from pgpo_jax.tasks import Outcome, Question, given_answer

TEMPLATES: Mapping[str, str] = {
    "reprompt": "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.",
    "solution": "\nCorrect solution:\n\n{demonstration}",
    "feedback": "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback}",
    "attempt": "\nYour earlier attempt:\n\n{attempt}",
}
"""The published templates, and `attempt`, which is ours; a task or the config replaces single
ones."""

THINKING: Mapping[str, str] = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",
    "<reasoning>": "</reasoning>",
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",
}
"""The marks around a model's reasoning."""

Solve = Callable[[Question], str | None]

FIELDS = {
    "reprompt": ("{prompt}", "{solution}", "{feedback}"),
    "solution": ("{demonstration}",),
    "feedback": ("{feedback}",),
    "attempt": ("{attempt}",),
}
"""What each template must hold."""


@dataclass(frozen=True)
class RepromptConfig:
    """How the teacher's prompt is made (config section `reprompt`)."""

    threshold: float = 0.5
    """A response with at least this reward is a success and may be shown to its siblings."""

    source: Literal["sibling", "solution", "both"] = "sibling"
    """Where a demonstration is from: a `sibling`'s success; the `solution` that the data give (a
    column, or the worked answer of a task that has one), as it stands, so that every response has a
    context (OPSD); or `both`: a sibling's where there is one, else the solution."""

    demonstration: Literal["sibling", "none", "other", "plain"] = "sibling"
    """`sibling` is the method. Controls that train the same rows: `none`, the teacher sees the
    plain prompt; `other`, it sees a success of another question. `plain`: every row trains and the
    teacher sees the plain prompt, as one that knows more by itself does (`teacher.path`)."""

    use_feedback: Literal["without_demonstration", "always", "never", "only"] = (
        "without_demonstration"
    )
    """When the verifier's feedback on the response itself is shown: where there is no
    demonstration; beside it too; not at all; or `only` it, and no demonstration."""

    show_attempt: bool = False
    """Where there is a demonstration or feedback, the response itself is shown before the latter as
    the earlier attempt (an ablation of SDPO's: the teacher then keeps closer to it)."""

    template_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the chat template in the teacher's prompts, over those of `data.template_options`,
    e.g. `{enable_thinking: true}` for a teacher that may think where the student may not."""

    remove_thinking: bool = True
    """Remove the reasoning from demonstrations: `<think>...</think>` (an unclosed block stays), and
    what the model's own marks enclose, as `[THINK]`, if the chat template or tokenizer has them."""

    max_length: int = 10240
    """Longest teacher prompt in tokens; demonstrations get shorter to fit, and are counted."""

    reprompt_template: str | None = None
    """The user message, with {prompt}, {solution} and {feedback}; null: the task's, else SDPO's."""

    solution_template: str | None = None
    """Fills {solution} where there is a {demonstration}; null: the task's, else SDPO's."""

    feedback_template: str | None = None
    """Fills {feedback} where there is feedback; null: the task's, else SDPO's."""

    attempt_template: str | None = None
    """Fills {feedback}, before the feedback, with the {attempt} that `show_attempt` shows; null:
    the task's, else ours."""

    evidence_template: str | None = None
    """Fills {solution} where `objective.advantage` shows the model a final answer, as
    {demonstration}; null: the solution template."""

    def __post_init__(self) -> None:
        require(
            "reprompt",
            self,
            demonstration=(
                self.demonstration in ("sibling", "none", "other", "plain"),
                "sibling, none, other or plain",
            ),
            use_feedback=(
                self.use_feedback in ("without_demonstration", "always", "never", "only"),
                "without_demonstration, always, never or only",
            ),
            threshold=(math.isfinite(self.threshold), "finite"),
            max_length=(self.max_length > 0, "positive (tokens)"),
        )
        if self.source != "sibling" and self.demonstration == "other":
            raise InputError(
                f"reprompt.source: got {self.source}; must be sibling with reprompt.demonstration "
                "other, which shows a success of another question"
            )
        if self.use_feedback == "only":
            for name in ("source", "demonstration"):
                if (value := getattr(self, name)) != "sibling":
                    raise InputError(
                        f"reprompt.{name}: got {value}; must be sibling with reprompt.use_feedback "
                        "only, which shows no demonstration"
                    )
        for name, fields in (*FIELDS.items(), ("evidence", FIELDS["solution"])):
            template = getattr(self, f"{name}_template")
            if template is not None and not all(field in template for field in fields):
                raise InputError(
                    f"reprompt.{name}_template: got {template!r}; must hold {', '.join(fields)}"
                )


def with_templates(config: RepromptConfig, task_templates: Mapping[str, str]) -> RepromptConfig:
    """The config with a task's own templates where it states none."""
    own = {
        f"{name}_template": template
        for name, template in task_templates.items()
        if getattr(config, f"{name}_template") is None
    }
    return dataclasses.replace(config, **own)


def resolve_templates(config: RepromptConfig) -> dict[str, str]:
    """The templates by name: the config's, else those of `TEMPLATES`."""
    stated = {name: getattr(config, f"{name}_template") for name in TEMPLATES}
    return {
        name: default if stated[name] is None else stated[name]
        for name, default in TEMPLATES.items()
    }


def fill(template: str, **values: str) -> str:
    """Replaces each `{name}` of `values` once; braces in the template or the values are text.

    Not `str.format`: a response with `{` or even `{demonstration}` in it must survive.
    """
    if not values:
        return template
    pattern = "|".join(re.escape(name) for name in values)
    return re.sub(rf"\{{({pattern})\}}", lambda match: values[match[1]], template)


def remove_thinking(text: str, opened: bool = False, mark: str = "<think>") -> str:
    """Removes every closed block of reasoning and the white space after it.

    Args:
      text: a response.
      opened: whether the prompt before it ends within a block, as chat templates of thinking
        models make it.
      mark: what opens a block, of `THINKING`.
    """
    closing = THINKING[mark]
    kept, start = [], 0
    if opened and closing in text:
        text = text.partition(closing)[2].lstrip()
    # Not a lazy regular expression: many unclosed blocks would make it quadratic.
    while (begin := text.find(mark, start)) >= 0:
        end = text.find(closing, begin)
        if end < 0:
            break
        kept.append(text[start:begin])
        start = end + len(closing)
        while start < len(text) and text[start].isspace():
            start += 1
    return "".join(kept) + text[start:]


def teacher_messages(
    messages: Sequence[Mapping[str, str]],
    demonstration: str | None,
    feedback: str,
    templates: Mapping[str, str],
    attempt: str = "",
) -> list[dict[str, str]]:
    """The question's conversation with the filled template as its last message.

    Without demonstration and feedback it is the original conversation. Earlier messages, such as
    the system's, stay.

    Args:
      messages: the question's conversation; its last message is the question.
      demonstration: a correct response, or None.
      feedback: feedback on the response itself, or "".
      templates: from `resolve_templates`.
      attempt: the response itself, or "".
    """
    messages = [dict(message) for message in messages]
    if demonstration is None and not feedback:
        return messages
    solution, remark = "", ""
    if demonstration is not None:
        solution = fill(templates["solution"], demonstration=demonstration)
    if attempt:
        remark = fill(templates["attempt"], attempt=attempt)
    if feedback:
        remark += fill(templates["feedback"], feedback=feedback)
    content = fill(
        templates["reprompt"],
        prompt=messages[-1]["content"],
        solution=solution,
        feedback=remark,
    )
    messages[-1] = {**messages[-1], "content": content}
    return messages


def choose_siblings(
    rewards: Sequence[float], rng: np.random.Generator, threshold: float
) -> list[int | None]:
    """Which response of its group each response is shown; None where there is none to show.

    One random order of the group's successes is drawn; a response gets the first that is not
    itself. So a lone success is shown nothing, and its siblings are shown it.
    """
    successes = [index for index, reward in enumerate(rewards) if reward >= threshold]
    order = [int(index) for index in rng.permutation(np.array(successes, int))]
    return [next((s for s in order if s != index), None) for index in range(len(rewards))]


def choose_demonstrations(
    keys: Sequence[str],
    rewards: Sequence[Sequence[float]],
    rng: np.random.Generator,
    config: RepromptConfig,
) -> list[list[tuple[int, int] | None]]:
    """(question, sample) of the response that each response is shown, or None.

    Each group has its own generator, derived from one draw and the question's key: a group's order
    does not depend on which other questions this host handles.

    Args:
      keys: the questions' stable names.
      rewards: `[question][sample]`.
      rng: derived from the run's seed and the step; one number is drawn from it.
      config: `threshold` and `demonstration`; the control `none` chooses as `sibling` does.
    """
    base = int(rng.integers(2**63))
    successes = [
        (question, sample)
        for question, group in enumerate(rewards)
        for sample, reward in enumerate(group)
        if reward >= config.threshold
    ]
    chosen: list[list[tuple[int, int] | None]] = []
    for question, group in enumerate(rewards):
        own = np.random.default_rng([base, zlib.crc32(keys[question].encode("utf-8", "replace"))])
        siblings = choose_siblings(group, own, config.threshold)
        if config.demonstration == "other":
            others = [pair for pair in successes if pair[0] != question]
            picks = own.integers(len(others), size=len(group)) if others else []
            chosen.append(
                [
                    None if sibling is None or not others else others[int(picks[sample])]
                    for sample, sibling in enumerate(siblings)
                ]
            )
        else:
            chosen.append([None if s is None else (question, s) for s in siblings])
    return chosen


def reprompt(
    policy: Policy,
    questions: Sequence[Question],
    rollouts: Rollouts,
    outcomes: Sequence[Sequence[Outcome]],
    rng: np.random.Generator,
    config: RepromptConfig,
    solution: Solve | None = None,
) -> data.TeacherPrompts:
    """Builds the teacher's prompt of every response.

    Args:
      policy: tokenizer and chat template options, as for the student's prompts.
      questions: the batch's questions, `Q` of them.
      rollouts: their responses; `texts` are the possible demonstrations.
      outcomes: `[Q][G]`, what the verifier said.
      rng: derived from the run's seed and the step.
      config: thresholds, templates (`with_templates` adds a task's), limit, controls.
      solution: the task's (`Task.solution`), for a `source` that shows it.

    Returns:
      `Q * G` rows, question-major, as wide as the widest of all hosts. A response that got
      neither demonstration nor feedback has `has_context` False and the original prompt.

    Raises:
      InputError: if not even one character of a demonstration or feedback fits the limit, or
        `source` needs solutions and there are none.
    """
    shown = _what_is_shown(policy, questions, rollouts, outcomes, rng, config, solution)
    kinds = np.array([_kind(row.what) for row in shown], int)
    has_context = kinds > 0
    if config.demonstration == "plain":
        has_context[:] = True
    if config.demonstration in ("none", "plain"):  # the teacher sees no more than the student
        shown = [row._replace(what=NOTHING) for row in shown]
    prompts = _build_prompts(policy, questions, rollouts, shown, config)
    tokens, mask = _pad([prompts[row].tokens for row in shown], config.max_length)
    return data.TeacherPrompts(
        prompts=tokens,
        prompt_mask=mask,
        has_context=has_context,
        texts=[data.unmarked(prompts[row].text) for row in shown],
        shortened=sum(prompts[row].shortened for row in shown),
        kinds=kinds,
    )


class What(NamedTuple):
    """What a teacher's prompt shows."""

    demonstration: str | None = None
    feedback: str = ""
    attempt: str = ""


NOTHING = What()
Build = Callable[[What], str]


class _Shown(NamedTuple):
    """What the teacher of a response is shown."""

    question: int
    what: What


def _kind(what: What) -> int:
    """The place of a context's kind in `data.KINDS`."""
    return (what.demonstration is not None) + 2 * (what.feedback != "")


class _Prompt(NamedTuple):
    text: str
    tokens: list[int]
    shortened: bool = False


def opens_thinking(policy: Policy, question: Question) -> str | None:
    """The mark of `THINKING` with which the chat template opens a response itself; else None."""
    options = policy.prompts.template_options
    prompt = data.render(policy.tokenizer, question.messages, options).rstrip()
    return next((mark for mark in THINKING if prompt.endswith(mark)), None)


def as_demonstration(policy: Policy, question: Question, response: str) -> str:
    """A response without its reasoning.

    Other marks than `<think>` are a model's own if its chat template opens a response with them or
    they are tokens; elsewhere they may be what the task asked for, and stay.
    """
    for mark, closing in THINKING.items():
        if closing in response:
            opened = opens_thinking(policy, question) == mark
            tokens = policy.tokenizer.get_added_vocab()
            if opened or mark == "<think>" or (mark in tokens and closing in tokens):
                response = remove_thinking(response, opened, mark)
    return response


def teacher_prompt(
    policy: Policy, question: Question, demonstration: str, config: RepromptConfig
) -> str:
    """The text of the prompt in which the teacher of a question is shown a demonstration."""
    build = _builder(policy, question, resolve_templates(config), config.template_options)
    return data.unmarked(build(What(demonstration)))


def _what_is_shown(
    policy: Policy,
    questions: Sequence[Question],
    rollouts: Rollouts,
    outcomes: Sequence[Sequence[Outcome]],
    rng: np.random.Generator,
    config: RepromptConfig,
    solution: Solve | None,
) -> list[_Shown]:
    """Demonstration and feedback of every response, question-major."""
    rewards = [[outcome.reward for outcome in group] for group in outcomes]
    chosen = choose_demonstrations([q.key for q in questions], rewards, rng, config)
    given: list[str | None] = [None] * len(questions)
    if config.source != "sibling":
        if solution is None:
            raise InputError(f"reprompt.source: got {config.source}; the task gives no solutions")
        given = [solution(question) for question in questions]
    shown = []
    for question, group in enumerate(outcomes):
        for sample, outcome in enumerate(group):
            own = config.source == "solution" or config.use_feedback == "only"
            pair = None if own else chosen[question][sample]
            demonstration = given[question] if pair is None else rollouts.texts[pair[0]][pair[1]]
            if pair is not None and demonstration is not None and config.remove_thinking:
                demonstration = as_demonstration(policy, questions[question], demonstration)
            wanted = config.use_feedback in ("always", "only") or (
                config.use_feedback == "without_demonstration" and demonstration is None
            )
            what = What(demonstration, outcome.feedback if wanted else "")
            if config.show_attempt and what != NOTHING:
                attempt = rollouts.texts[question][sample]
                if config.remove_thinking:
                    attempt = as_demonstration(policy, questions[question], attempt)
                what = what._replace(attempt=attempt)
            shown.append(_Shown(question, what))
    return shown


def _build_prompts(
    policy: Policy,
    questions: Sequence[Question],
    rollouts: Rollouts,
    shown: Sequence[_Shown],
    config: RepromptConfig,
) -> dict[_Shown, _Prompt]:
    """The prompt of everything that is shown. Siblings mostly share one demonstration: each
    different one is built and tokenized once."""
    templates, options = resolve_templates(config), config.template_options
    builders = [_builder(policy, question, templates, options) for question in questions]
    texts = {row: builders[row.question](row.what) for row in dict.fromkeys(shown)}
    rows = data.tokenize(policy.tokenizer, list(texts.values()))
    prompts = {}
    for (row, text), tokens in zip(texts.items(), rows, strict=True):
        if row.what == NOTHING and not options:
            prompts[row] = _Prompt(text, _students_tokens(rollouts, row.question))
        elif len(tokens) <= config.max_length or row.what == NOTHING:
            prompts[row] = _Prompt(text, tokens)
        else:
            build, key = builders[row.question], questions[row.question].key
            short = _shorten(build, row.what, policy.tokenizer, config.max_length, key)
            prompts[row] = _Prompt(*short, shortened=True)
    return prompts


def _builder(
    policy: Policy, question: Question, templates: Mapping[str, str], options: Mapping[str, Any]
) -> Build:
    """What is shown -> the text of the teacher's prompt, with these options of the chat template.

    What a model or a verifier wrote holds no control tokens, whatever it says: `data.letters`.
    """
    tokenizer, options = policy.tokenizer, {**policy.prompts.template_options, **options}

    def build(what: What) -> str:
        demonstration, feedback, attempt = (text and data.letters(tokenizer, text) for text in what)
        messages = teacher_messages(
            question.messages, demonstration, feedback or "", templates, attempt or ""
        )
        return data.render(tokenizer, messages, options)

    return build


def answer_prompts(
    policy: Policy,
    questions: Sequence[Question],
    rollouts: Rollouts,
    outcomes: Sequence[Sequence[Outcome]],
    config: RepromptConfig,
) -> data.AnswerPrompts:
    """Prompts that show the right final answer, and that of a group's worst wrong response.

    The worst has the lowest reward (the first of several); its final answer is what stands in its
    last box or answer tags, else its text. Arguments as for `reprompt`.

    Raises:
      InputError: for a question without an answer, or an answer that does not fit the limit.
    """
    templates = resolve_templates(config)
    templates["solution"] = config.evidence_template or templates["solution"]

    def encode(index: int, answer: str | None) -> list[int]:
        if answer is None:
            return _students_tokens(rollouts, index)
        build = _builder(policy, questions[index], templates, config.template_options)
        tokens = data.tokenize(policy.tokenizer, [build(What(answer))])[0]
        if len(tokens) <= config.max_length:
            return tokens
        shown, key = What(answer), questions[index].key
        return _shorten(build, shown, policy.tokenizer, config.max_length, key)[1]

    wrong = [
        worst_answer(*group, config.threshold)
        for group in zip(rollouts.texts, outcomes, strict=True)
    ]
    for question in questions:
        if not question.answer:
            raise InputError(
                f"objective.advantage: question {question.key!r} has no answer to show the model; "
                "give answers, or choose group"
            )
    right = [encode(index, question.answer) for index, question in enumerate(questions)]
    samples = len(rollouts.texts[0])

    def pad(rows: list[list[int]]) -> list[np.ndarray]:
        return [np.repeat(array, samples, axis=0) for array in _pad(rows, config.max_length)]

    return data.AnswerPrompts(
        *pad(right),
        *pad([encode(index, answer) for index, answer in enumerate(wrong)]),
        has_wrong=np.repeat([answer is not None for answer in wrong], samples),
    )


def worst_answer(texts: Sequence[str], outcomes: Sequence[Outcome], threshold: float) -> str | None:
    """The final answer of the response with the lowest reward below the threshold; None if all
    are right or the wrong ones give none."""
    wrong = [
        (outcome.reward, index, given_answer(texts[index]))
        for index, outcome in enumerate(outcomes)
        if outcome.reward < threshold
    ]
    return next((answer for _, _, answer in sorted(wrong) if answer), None)


def _students_tokens(rollouts: data.Rollouts, question: int) -> list[int]:
    """The question's prompt exactly as the student had it."""
    mask = np.asarray(rollouts.prompt_mask[question], bool)
    return np.asarray(rollouts.prompts[question])[mask].tolist()


def _pad(rows: list[list[int]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and mask, left-padded to the bucket of the longest of all hosts (a plain prompt may be
    over the limit)."""
    (longest,) = sharding.agree_max([max(map(len, rows))])
    return data.left_pad(rows, data.bucket(longest, max(limit, longest)))


def _shorten(
    build: Build, shown: What, tokenizer: Any, limit: int, key: str
) -> tuple[str, list[int]]:
    """Keeps as much as fits of the attempt's end, then, without it, of the demonstration's (the
    answer is there), then of the feedback's beginning."""

    def encoded(what: What) -> tuple[str, list[int]]:
        text = build(what)
        return text, data.tokenize(tokenizer, [text])[0]

    def fits(what: What) -> bool:
        return len(encoded(what)[1]) <= limit

    def cut(what: What, name: str, size: int) -> What:
        whole = getattr(what, name) or ""
        return what._replace(**{name: whole[:size] if name == "feedback" else _end(whole, size)})

    def most(what: What, name: str) -> int:
        low, high = 0, len(getattr(what, name) or "")  # the largest size that fits, 0 if none does
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(cut(what, name, middle)) else (low, middle - 1)
        return low

    for name in ("attempt", "demonstration", "feedback"):
        if kept := most(shown, name):
            return encoded(cut(shown, name, kept))
        if name == "attempt" and shown.attempt:
            shown = shown._replace(attempt="")
            if fits(shown):
                return encoded(shown)
        elif getattr(shown, name):
            shown = cut(shown, name, 1)
    size = len(encoded(shown)[1])
    raise InputError(
        f"reprompt.max_length: got {limit}; question {key!r} and the instruction alone have "
        f"{size} tokens; raise it to the longest prompt plus room for a demonstration"
    )


def _end(text: str, size: int) -> str:
    return text[len(text) - size :]
