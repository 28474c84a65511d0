"""Samples of runs as the page's table: every text visible and of bounded length."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from pgpo_jax import logs
from pgpo_jax.errors import printable
from pgpo_jax.logs import RunLog

SHOWN = 4000
"""Characters of a text that the page holds; how many were left out is said there."""


class Cut(NamedTuple):
    """The first characters of a text."""

    text: str
    left: int
    """How many were left out."""


def cut(text: str, most: int = SHOWN) -> Cut:
    """The first `most` characters."""
    return Cut(text[:most], max(len(text) - most, 0))


def sample_table(runs: Sequence[RunLog], most: int) -> tuple[list[dict[str, Any]], str]:
    """The samples to show, evenly spread over runs and steps, and what must be said of them."""
    by_run = [
        logs.read_samples(run, lambda record, i=index: _sample(i, record))
        for index, run in enumerate(runs)
    ]
    total = sum(map(len, by_run))
    share = most // len(runs) if total > most else most
    table = [sample for samples in by_run for sample in _spread(samples, share)]
    for number, sample in enumerate(table):
        sample["id"] = number
    about = []
    if len(table) < total:
        about.append(
            f"{len(table):,} of {total:,} samples, evenly spread over the steps; "
            "--samples takes more."
        )
    without = [run.name for run, samples in zip(runs, by_run, strict=True) if not samples]
    if without:
        named = ", ".join(without) if len(runs) > 1 else "This run"
        about.append(
            f"{named}: no samples (metrics.samples_per_step is 0, or no update was done yet)."
        )
    if table and not any(sample["tokens"] for sample in table):
        about.append(
            "These samples were written without the divergence of their tokens, so there is "
            "no colour."
        )
    elif table:
        about.append(
            "Colour: how far student and teacher disagree about a token, in nats; a row opens "
            "with a click."
        )
    return table, " ".join(about)


def _spread(rows: list[Any], most: int) -> list[Any]:
    if len(rows) <= most:
        return rows
    return [rows[i] for i in np.linspace(0, len(rows) - 1, most).round().astype(int)]


def _sample(run: int, record: dict[str, Any]) -> dict[str, Any]:
    """A record of samples.jsonl as the page has it: every text visible and of bounded length."""
    left: dict[str, int] = {}

    def part(name: str, called: str | None = None) -> str | None:
        value = record.get(name)
        if value is None:
            return None
        kept = cut(value if isinstance(value, str) else json.dumps(value))
        if kept.left:
            left[called or name] = kept.left
        return _visible(kept.text)

    tokens, divergence = _per_token(record) or (None, None)
    finite = [value for value in divergence or [] if value is not None]
    sample = {
        "run": run,
        "step": record["step"],
        "reward": _finite(record.get("reward")),
        "context": record["has_context"] if type(record.get("has_context")) is bool else None,
        "prompt": part("prompt") or "",
        "response": part("response") or "",
        "answer": part("answer"),
        "feedback": part("feedback"),
        "teacher": part("teacher_prompt", "teacher"),
        "mean": sum(finite) / len(finite) if finite else None,
    }
    if tokens and divergence:
        kept = list(_within(tokens))
        if len(kept) < len(tokens):
            left["response"] = sum(map(len, tokens[len(kept) :]))
        else:
            left.pop("response", None)
        tokens, divergence = [_visible(token) for token in kept], divergence[: len(kept)]
    return sample | {"tokens": tokens, "divergence": divergence, "left": left}


def _per_token(record: dict[str, Any]) -> tuple[list[str], list[float | None]] | None:
    """Token texts and their divergences, where the record has both and they fit together."""
    tokens, divergence = record.get("tokens"), record.get("divergence")
    if not (isinstance(tokens, list) and isinstance(divergence, list)):
        return None
    if not all(isinstance(token, str) for token in tokens) or len(tokens) != len(divergence):
        return None
    return tokens, [_finite(value) for value in divergence]


def _within(tokens: Sequence[str]) -> Iterator[str]:
    """The first tokens, as many as have SHOWN characters together."""
    room = SHOWN
    for token in tokens:
        room -= max(len(token), 1)
        if room < 0:
            return
        yield token


def _finite(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100
    return value if good else None


def _visible(value: str) -> str:
    return printable(value.replace("\r\n", "\n"))
