"""Checks by name: how a task's responses are judged and its gold answers read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import Any

from pgpo_jax.tasks import mathematics, programs, rows, workers
from pgpo_jax.tasks.answers import Outcome
from pgpo_jax.tasks.rows import RowError
from pgpo_jax.tasks.task import Question, TaskConfig, Verify
from pgpo_jax.tasks.verifiers import VERIFIERS

Check = Callable[[str, str], Outcome]


def verify_by(config: TaskConfig, name: str) -> Verify:
    """The check of that name as a task's `verify`.

    A row's own feedback replaces the check's.
    """
    if name == "code":
        return programs.verify_programs(config)
    check = make_check(config, name)

    def judge(question: Question, response: str) -> Outcome:
        outcome = check(response, question.answer)
        feedback = question.columns.get("feedback")
        return outcome._replace(feedback=feedback) if feedback and outcome.reward < 1 else outcome

    def verify(questions: Sequence[Question], responses: Sequence[str]) -> list[Outcome]:
        if len(questions) != len(responses):
            raise ValueError(f"{len(questions)} questions and {len(responses)} responses")
        if name != "math":
            return list(map(judge, questions, responses))
        return workers.spread(judge, questions, responses, workers=config.workers)

    return verify


def make_check(config: TaskConfig, name: str) -> Check:
    """A check by name."""
    check = VERIFIERS[name].check
    if name == "math":
        mathematics.require_math_verify()
        return partial(check, time_limit=config.time_limit)
    return check if name == "tool_use" else partial(check, require_tags=config.require_tags)


def read_gold(row: Mapping[str, Any], verifier: str, check: Check) -> str:
    """The answer of a row that the check compares with.

    Raises:
      RowError: where no response could be right: a night of rewards of 0 has an earlier sign.
    """
    answer = rows.column(row, "answer")
    if verifier != "tool_use":
        answer = _written(answer, verifier)
    text = answer if isinstance(answer, str) else json.dumps(answer, default=str)
    rows.check_text("answer", text)
    try:
        gold = VERIFIERS[verifier].read_gold(text, row)
        if check(VERIFIERS[verifier].worked(gold), gold).reward != 1:
            raise ValueError("a text that no response can give")
    except ValueError as error:
        raise RowError(
            f"got the answer {text[:80]!r}, {error}, which no response can match by "
            f"task.verifier = {verifier}; correct the row or choose another verifier"
        ) from error
    return gold


def _written(answer: Any, verifier: str) -> Any:
    """A number as it is written; text as it is."""
    if type(answer) not in (str, int, float, Decimal):
        raise RowError(
            f"got the answer {str(answer)[:80]}, a {type(answer).__name__}; must be a string or a "
            "number"
        )
    if isinstance(answer, str | int):
        return answer
    if not math.isfinite(answer):
        raise RowError(f"got the answer {answer}; must be a finite number or a string")
    if verifier not in ("numeric", "math") and answer == int(answer):
        raise RowError(
            f"got the answer {answer}, a {type(answer).__name__}; {verifier} compares text, and it "
            f"may stand for {int(answer)}: must be a string or a whole number"
        )
    return answer if isinstance(answer, float) else format(answer, "f")
