"""Preview of a run's texts: one prompt as the model gets it, end tokens, a demonstration."""

import itertools
import re
from collections.abc import Sequence
from typing import NamedTuple

from pgpo_jax import data, hf
from pgpo_jax.reprompt import as_demonstration, opens_thinking, teacher_prompt
from pgpo_jax.run.setup import Run
from pgpo_jax.tasks import Question

LONGEST = 600
"""Characters of a text that are shown."""


class Preview(NamedTuple):
    """What is said of a run's texts before it begins."""

    lines: list[str]
    warnings: list[str]
    """What the model is given that its user may not have meant."""


def preview(run: Run) -> Preview:
    """One prompt, what ends a response, a demonstration, and what is unusual about them."""
    policy, question = run.policy, run.task.train[0]
    tokenizer, options = policy.tokenizer, policy.prompts.template_options
    prompt = data.render(tokenizer, question.messages, options)
    (tokens,) = data.tokenize(tokenizer, [prompt])
    given = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    lines = [
        *([run.source] if run.source else []),
        f"the prompt of question {question.key!r}, {len(tokens)} tokens: {clip(given)}",
        f"a response ends with {_ends(run)}",
        f"its teacher's prompt goes on with {clip(_demonstration(run, question, prompt))}",
    ]
    if gaps := len(policy.sampling.unknown_tokens):
        lines.append(f"{gaps:,} ids between the tokenizer's are no tokens and never drawn")
    questions = _some_questions(run)
    if getattr(tokenizer, "chat_template", None):
        notes, warnings = _about_template(run, question, prompt)
        warnings += _left_out(run, questions)
    else:
        notes, warnings = ["no chat template: a prompt is the question's plain text"], []
    warnings += _about_tokens(run, tokens)
    named = sum(
        any(data.names_special_tokens(tokenizer, message["content"]) for message in each.messages)
        for each in questions
    )
    if named:
        warnings.append(
            f"{named:,} of {len(questions):,} questions hold the name of a special token, which "
            "the model is given as that token"
        )
    return Preview(lines + notes, warnings)


def clip(text: str, longest: int = LONGEST) -> str:
    """`text` in quotes on one line; a long one without its middle."""
    if len(text) <= longest:
        return repr(text)
    half = longest // 2
    left_out = len(text) - 2 * half
    return f"{text[:half]!r} ... {left_out:,} characters left out ... {text[-half:]!r}"


def _some_questions(run: Run) -> Sequence[Question]:
    """All where they are a list, else one."""
    train = run.task.train
    return train if isinstance(train, list) else [train[0]]


def _ends(run: Run) -> str:
    tokenizer, turn_end = run.policy.tokenizer, hf.turn_end(run.policy.tokenizer)
    ends = []
    for token in run.policy.sampling.end_tokens:
        what = ", which ends a turn of the chat template" if token == turn_end else ""
        ends.append(f"{tokenizer.convert_ids_to_tokens(token)!r} (token {token}{what})")
    return " or ".join(ends)


def _demonstration(run: Run, question: Question, prompt: str) -> str:
    """The teacher's prompt with a made response shown, from where it leaves the student's."""
    if run.task.demonstration is not None:
        response = run.task.demonstration(question)
    else:
        response = f"(a successful response) {question.answer}"
    if run.reprompt.remove_thinking:
        response = as_demonstration(run.policy, question, response)
    text = teacher_prompt(run.policy, question, response, run.reprompt)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(prompt, text, strict=False))
    return text[sum(1 for _ in same) :]


def _about_template(run: Run, question: Question, prompt: str) -> tuple[list[str], list[str]]:
    """Where a response begins, and what ends one."""
    notes, warnings = [], []
    tokenizer, options = run.policy.tokenizer, run.policy.prompts.template_options
    if prompt == data.render(tokenizer, question.messages, options, generation_prompt=False):
        warnings.append(
            "the chat template has no generation prompt: a response begins right after "
            f"{prompt[-40:]!r}"
        )
    turn_end = hf.turn_end(tokenizer)
    if turn_end is None:
        notes.append("the chat template ends an answer with no token of its own")
    elif turn_end not in run.policy.sampling.end_tokens:
        name = tokenizer.convert_ids_to_tokens(turn_end)
        warnings.append(
            f"sampling.end_tokens lacks {name!r} (token {turn_end}), with which the chat template "
            "ends an answer"
        )
    mark = opens_thinking(run.policy, question)
    if mark is None and (tag := re.search(r"(<\w[\w:]*>|\[[A-Z_]+\])\s*$", prompt)):
        warnings.append(
            f"the chat template opens a response with {tag[1]!r}, which is not known to begin "
            "reasoning: nothing is removed from demonstrations for it"
        )
    elif mark and not run.reprompt.remove_thinking:
        notes.append(f"demonstrations keep the reasoning that the chat template opens with {mark}")
    return notes, warnings


def _left_out(run: Run, questions: Sequence[Question]) -> list[str]:
    """The roles of messages that a chat template does not write as they are."""
    tokenizer, options = run.policy.tokenizer, run.policy.prompts.template_options
    shapes = {tuple(message["role"] for message in each.messages): each for each in questions}
    lost: dict[str, str] = {}
    for question in shapes.values():
        prompt = data.render(tokenizer, question.messages, options)
        for message in question.messages:
            if message["content"].strip() not in prompt:
                lost.setdefault(message["role"], question.key)
    return [
        f"the chat template leaves out or alters the {role} message of question {key!r}"
        for role, key in lost.items()
    ]


def _about_tokens(run: Run, tokens: Sequence[int]) -> list[str]:
    """What a tokenizer or template writes before a text, and what ends a prompt."""
    tokenizer, warnings = run.policy.tokenizer, []
    bos, opening = tokenizer.bos_token_id, data.opening(tokenizer)
    if bos is not None and list(tokens[:2]) == [bos, bos]:
        warnings.append(f"the prompt begins with {tokenizer.bos_token!r} twice")
    elif opening and list(tokens[: len(opening)]) != opening:
        names = tokenizer.convert_ids_to_tokens(opening)
        warnings.append(
            f"the tokenizer writes {''.join(names)!r} before a text, the chat template does not: "
            "prompts begin without it"
        )
    if tokens[-1] == tokenizer.eos_token_id:
        warnings.append(
            f"the prompt ends with the end token {tokenizer.eos_token!r}, after which a model has "
            "nothing to say"
        )
    return warnings
