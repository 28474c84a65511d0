"""Discovery time: attempts at a hard question until the first success, over questions.

Source: Hübotter et al., "Reinforcement Learning via Self-Distillation" (SDPO), arXiv 2601.20802,
section 5, "Solving Hard Questions via Test-Time Self-Distillation", definition 5.1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float

from pgpo_jax.errors import require

Method = Literal["distillation", "best_of", "multi_turn"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class DiscoveryConfig:
    """Hard questions, each answered from the same model (config section `discovery`)."""

    questions: int = 32
    """Hard questions to be asked: the first of the candidates that are hard."""
    split: Literal["test", "train"] = "test"
    """Whether the task's held-out or training questions are the candidates."""
    candidates: int = 256
    """The first so many questions of the split are screened."""
    screening_samples: int = 64
    """Responses to every candidate that say whether it is hard; they count as no attempts."""
    max_success_rate: float = 0.0
    """A candidate is hard where at most this part of them succeeds."""
    attempts: int = 512
    """Budget: the most responses to a question, in every way the same."""
    samples_per_step: int = 16
    """Responses of `distillation` between two updates, and of `best_of` at a time."""
    methods: tuple[Method, ...] = METHODS
    """The ways to be compared. `distillation`: the feedback on failed attempts is distilled into
    the model, which then makes the next ones. `best_of`: independent attempts. `multi_turn`: the
    feedback on earlier attempts stands in the prompt of the next one, nothing is learned."""
    conversations: int = 1
    """Conversations of `multi_turn` side by side, which share the budget; the paper's is one."""
    turns: int | None = None
    """Earlier attempts whose feedback `multi_turn` shows; null: as many as `reprompt.max_length`
    has room for. The latest are kept."""

    def __post_init__(self):
        require(
            "discovery",
            self,
            questions=(self.questions >= 1, "at least 1"),
            candidates=(self.candidates >= 1, "at least 1"),
            screening_samples=(self.screening_samples >= 1, "at least 1"),
            max_success_rate=(0 <= self.max_success_rate < 1, "at least 0 and below 1"),
            attempts=(self.attempts >= 1, "at least 1"),
            samples_per_step=(
                self.samples_per_step >= 1 and self.attempts % self.samples_per_step == 0,
                f"at least 1, and divide discovery.attempts = {self.attempts}",
            ),
            methods=(
                bool(self.methods) and len({*self.methods}) == len(self.methods),
                f"some of {', '.join(METHODS)}, each once",
            ),
            conversations=(
                self.conversations >= 1 and self.attempts % self.conversations == 0,
                f"at least 1, and divide discovery.attempts = {self.attempts}",
            ),
            turns=(self.turns is None or self.turns >= 1, "at least 1, or null"),
        )


class Found(NamedTuple):
    """What came of the attempts at one question."""

    attempts: int
    """Responses drawn: up to the first success, or all of `best_of`."""
    successes: tuple[int, ...]
    """Numbers of the attempts that succeeded, from 1; only the first where it ends the attempts."""


class Curve(NamedTuple):
    """discovery@k of one method, for some k."""

    attempts: list[int]
    """The k."""
    share: list[float]
    """Mean over questions of the probability of a success within k attempts."""
    low: list[float]
    """Of the 95 % interval."""
    high: list[float]


def budgets(attempts: int) -> list[int]:
    """Powers of two up to the budget, and the budget."""
    powers = [2**n for n in range(attempts.bit_length()) if 2**n < attempts]
    return [*powers, attempts]


def discovered(found: Found, k: int, method: Method) -> float:
    """The probability of a success within `k` attempts at a question, as estimated from its own.

    Attempts of `best_of` are independent, so any k of the n count: the unbiased estimate of pass@k,
    1 - C(n - c, k) / C(n, k) with c successes (Chen et al., arXiv 2107.03374). Those of the other
    methods depend on the earlier ones: 1 or 0.
    """
    if method != "best_of":
        return float(any(place <= k for place in found.successes))
    drawn, right = found.attempts, len(found.successes)
    if drawn - right < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(drawn - right + 1, drawn + 1)))


def curve(found: Sequence[Found], method: Method, attempts: int) -> Curve:
    """discovery@k of a method over questions, at the `budgets` of `attempts`."""
    ks = budgets(attempts)
    shares = [float(np.mean([discovered(each, k, method) for each in found])) for k in ks]
    bounds = [wilson(share, len(found)) for share in shares]
    return Curve(ks, shares, [low for low, _ in bounds], [high for _, high in bounds])


def wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a share of `count` questions.

    It has a width where all or none are solved. Where a question's value is a probability between 0
    and 1, as that of `best_of`, questions vary less than it assumes: there it is too wide, if
    anything.
    """
    z = 1.96
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    half = half / (1 + z * z / count)
    return max(float(centre - half), 0.0), min(float(centre + half), 1.0)


def difference(
    ours: Float[np.ndarray, " question"], theirs: Float[np.ndarray, " question"]
) -> tuple[float, float, float]:
    """Mean difference over the same questions, with the 95 % interval of a bootstrap over them."""
    gaps = ours - theirs
    draws = np.random.default_rng(0).integers(len(gaps), size=(10_000, len(gaps)))
    low, high = np.quantile(gaps[draws].mean(axis=1), [0.025, 0.975])
    return float(gaps.mean()), float(low), float(high)


def summarise(found: Mapping[Method, Sequence[Found]], attempts: int) -> dict[str, Any]:
    """The curves of all methods over the same questions, and what `distillation` is ahead by.

    Args:
      found: Of every method, question by question.
      attempts: The budget.

    Returns:
      `questions`, `attempts`, `methods` with a `Curve` of each as a mapping and its mean number of
      attempts, and `ahead`: other method -> difference, low and high at the budget.
    """
    count = len(next(iter(found.values())))
    told: dict[str, Any] = {"questions": count, "attempts": attempts, "methods": {}}
    for method, each in found.items():
        values = curve(each, method, attempts)._asdict()
        if method != "best_of":  # which never stops early
            values["attempts_used"] = float(np.mean([one.attempts for one in each]))
        told["methods"][method] = values
    if "distillation" in found:
        at_budget = {
            method: np.array([discovered(one, attempts, method) for one in each], float)
            for method, each in found.items()
        }
        ours = at_budget.pop("distillation")
        told["ahead"] = {name: [*difference(ours, other)] for name, other in at_budget.items()}
    return told
