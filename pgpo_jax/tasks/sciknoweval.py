"""SciKnowEval, level 3: multiple-choice questions of four sciences (arXiv 2406.09098)."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from pgpo_jax.errors import InputError
from pgpo_jax.tasks.dataset import make_question, repeated
from pgpo_jax.tasks.formats import read_file
from pgpo_jax.tasks.rows import Rows, column, read_each
from pgpo_jax.tasks.sources import open_source
from pgpo_jax.tasks.task import Question, Task, TaskConfig, worked_examples
from pgpo_jax.tasks.verification import make_check, read_gold, verify_by
from pgpo_jax.tasks.verifiers import VERIFIERS

HUB = "hicai-zju/SciKnowEval"
SIZES = {"biology": 500, "chemistry": 2100, "materials": 935, "physics": 800}
"""Level-3 multiple-choice questions a domain had when the split was published."""
SYSTEM = """
Given a question and four options, please select the right answer. Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>

For the answer, only output the letter corresponding to the correct option (A, B, C, or D), and \
nothing else. Do not restate the answer text. For example, if the answer is "A", just output:
<answer>
A
</answer>
"""


def published_split(count: int) -> tuple[list[int], list[int]]:
    """Positions of the training and held-out questions in a domain's list of `count`.

    The published files are a permutation by numpy's default generator with seed 42: its first
    tenth, rounded up, is held out and the rest is for training, in this order.
    """
    order = np.random.default_rng(42).permutation(count).tolist()
    held_out = -(-count // 10)
    return order[held_out:], order[:held_out]


def level_3_rows(hub_rows: Rows, domain: str) -> Rows:
    """The level-3 multiple-choice questions of a domain, in the columns of the published files.

    Args:
      hub_rows: all rows of the hub data set, in its order.
      domain: as in the config (the hub writes "Material").

    Returns:
      Rows with `idx` (the position in the domain's list), `system`, `prompt`, `answer`.

    Raises:
      InputError: rows without a column that they must have.
    """

    def read(where: str, row: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
        level = (row.get("details") or row).get("level")
        name = str(column(row, "domain")).lower().rstrip("s")
        kind = str(row.get("type"))
        if name != domain.rstrip("s") or level != "L3" or not kind.startswith("mcq"):
            return None
        choices = column(row, "choices")
        options = [f"{a}: {b}" for a, b in zip(choices["label"], choices["text"], strict=True)]
        text = "\n".join([f"{column(row, 'question')}\n", *options])
        return where, {
            "system": SYSTEM,
            "prompt": text + "\nPlease reason step by step.",
            "answer": column(row, "answerKey"),
        }

    kept = [found for found in read_each("task.path", hub_rows, read) if found is not None]
    return [(where, {"idx": index, **record}) for index, (where, record) in enumerate(kept)]


def load(config: TaskConfig) -> Task:
    """Level-3 multiple-choice questions of SciKnowEval (Feng et al., arXiv 2406.09098).

    With `task.path`: `<path>/<domain>/{train,test}.jsonl` with the fields `idx`, `system`,
    `prompt`, `answer`. Without: the hub data set, filtered, in the split that the SDPO authors
    published. That split is drawn by position, so it is theirs as long as the hub's list is the one
    they had; another number of questions is a warning that says so.

    There is no feedback, as in SDPO.
    """
    if config.path is not None:
        folder = Path(config.path) / config.domain
        train, test = (read_file(folder / f"{part}.jsonl") for part in ("train", "test"))
    else:
        hub, size = HUB, SIZES[config.domain]
        whole = [row for read in open_source(hub, None).splits.values() for row in read()]
        found = level_3_rows(whole, config.domain)
        if not found:
            raise InputError(f"task.domain: got {config.domain!r}; {hub} has no such questions")
        if len(found) != size:
            warnings.warn(
                f"{hub} has {len(found)} {config.domain} questions, the published split was drawn "
                f"from {size}: this split is drawn the same way, but is not theirs",
                stacklevel=2,
            )
        train, test = ([found[index] for index in part] for part in published_split(len(found)))

    check = make_check(config, "multiple_choice")

    def question(where: str, row: dict[str, Any]) -> Question:
        record = {"system": SYSTEM, **row, "answer": str(column(row, "answer")).strip()}
        gold = read_gold({"answer": record["answer"]}, "multiple_choice", check)
        return make_question(record, f"{config.domain}/{column(row, 'idx')}", gold)

    def worked(question: Question) -> str:
        return VERIFIERS["multiple_choice"].worked(question.answer)

    asked = read_each("task.path", train[: config.train_questions], question)
    held_out = read_each("task.path", test[: config.test_questions], question)
    return Task(
        name=f"sciknoweval/{config.domain}",
        train=asked,
        test=held_out,
        verify=verify_by(config, "multiple_choice"),
        examples=worked_examples(asked, worked),
        demonstration=worked,
        solution=worked,
        notes=tuple(repeated(asked, held_out)),
    )
