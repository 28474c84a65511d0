"""Rival objectives: GRPO, CEPO, RLSD, TGPO, SRPO, SC-SDPO, DemoPSD, Veto, OPSA's control, as
independent choices of one config.

The loss of a token is `distillation * divergence from the target + policy * clipped surrogate`.
Which responses get which term (`ROUTES`), what the target is (`TARGETS`) and a token's advantage
(`ADVANTAGES`), and how questions and tokens are weighted (`QUESTION_WEIGHTS`, `TOKEN_WEIGHTS`) are
dicts of small pure functions; `make_objective` puts them together. Methods are files in
`configs/rivals/`. The teacher's refresh rule (`teacher.py`) and the multiplier (`optimizer.py`) are
the other two choices.

Sources: GRPO (Shao et al., arXiv 2402.03300), CEPO (2605.19436), RLSD (2604.03128), TGPO
(2605.13230), SRPO (2604.02288), SC-SDPO (2605.27765), OPSA (2608.31046); `targets.py` for DemoPSD
and Veto.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from pgpo_jax import objective
from pgpo_jax.errors import require
from pgpo_jax.fused import Terms
from pgpo_jax.information import mean_weights
from pgpo_jax.losses import Aggregation, aggregation_weights, importance_ratio
from pgpo_jax.methods import targets
from pgpo_jax.objective import Forward, GroupStatistics, Objective, Responses, Weights, weighted_sum


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Which loss the student minimises; the defaults are SDPO."""

    distillation: float = 1.0
    """Coefficient of the divergence from the teacher; 0 turns it off (the teacher is still run, for
    the information)."""
    distillation_end: float | None = None
    """What that coefficient becomes, linearly, over `distillation_steps`; null keeps it."""
    distillation_steps: int = 200
    """Steps in which the coefficient reaches `distillation_end`."""
    target: Literal["teacher", "demopsd", "veto"] = "teacher"
    """What the divergence is taken from: the `teacher`; `demopsd`, T^(1 - a) S^a normalised, with S
    the teacher without its context and a growing with their distance (one more forward pass);
    `veto`, T S^beta with S the student. The information stays that of teacher and student."""
    target_most: float = 0.15
    """Largest a of `demopsd`; 0 is the teacher."""
    target_slope: float = 50.0
    """How fast a rises with the Jensen-Shannon divergence d of T and S, per nat:
    a = 2 target_most (sigmoid(target_slope d) - 1/2)."""
    target_power: float = 0.3
    """beta of `veto`; 0 is the teacher. The value is ours."""
    policy: float = 0.0
    """Coefficient of the clipped policy gradient with advantages relative to the group (GRPO)."""
    scale_advantage: bool = True
    """Divide advantages by the group's standard deviation (GRPO); false does not (Dr. GRPO)."""
    old_log_probs: Literal["sampler", "recomputed"] = "sampler"
    """What the policy gradient's ratio and the importance weights compare with: the sampler's
    log-probs, or those that the student itself gives in one more forward pass before a step's first
    update. Then a weight of its own, also up to `distillation.importance_cap`, corrects both terms
    for the sampler, and clipping sees the updates alone, not the sampler's rounding."""
    clip_low: float = 0.2
    """The ratio to the old probability is clipped below at 1 - clip_low."""
    clip_high: float = 0.28
    """The ratio is clipped above at 1 + clip_high."""
    advantage: Literal["group", "contrast", "evidence", "teacher_argmax", "low_probability"] = (
        "group"
    )
    """A token's advantage: `group` is the response's own (GRPO); `contrast` weighs it by what the
    right answer in the prompt makes likelier than a wrong one does (CEPO), `evidence` by what it
    makes likelier than the student has it (RLSD); `teacher_argmax` adds the student's
    probability of the teacher's likeliest token (TGPO, adv); `low_probability` is -1 at tokens
    that the student finds unlikely and 0 elsewhere, whatever teacher and rewards say (the control
    of OPSA)."""
    low_probability: float = 0.1
    """Below this probability under the student a token is unlikely; the threshold is ours."""
    advantage_weight: float = 0.5
    """How much of `contrast`, `evidence` or `teacher_argmax` there is at the first step."""
    advantage_weight_end: float = 0.0
    """How much after `advantage_steps`, reached linearly."""
    advantage_steps: int = 25
    """Steps in which the weight reaches its end; 0 keeps the first."""
    evidence_clip: float = 0.2
    """Evidence changes an advantage by at most this part; below 1 it keeps its sign."""
    without_wrong: Literal["student", "none"] = "student"
    """A group without a wrong response to contrast with: the student stands for it (CEPO's paper),
    or there is no evidence (its code)."""
    route: Literal["all", "by_outcome", "with_context"] = "all"
    """Which rows get which term: `all` rows both (distillation where there is a context), those
    `with_context` alone both, or successes the policy gradient and failures with a context
    distillation (SRPO)."""
    question_weight: Literal["uniform", "reward_std"] = "uniform"
    """Weight of a question's distillation: equal, or sqrt(p (1 - p)) with p its share of
    successes, the standard deviation of a 0/1 reward (SC-SDPO); mean 1 over the questions."""
    token_weight: Literal["uniform", "teacher_entropy", "information"] = "uniform"
    """Weight of a token's distillation, mean 1 over its response: equal, exp(-H(teacher)) (SRPO),
    or exp(token_alpha * i_t), the multiplier token by token."""
    token_alpha: float = 1.0
    """Exponent of `token_weight: information`, per nat."""
    rehearsal: float = 0.0
    """Coefficient of a cross-entropy on successes as the teacher reads them, a demonstration in the
    prompt: nothing else trains the student to use one, and its teacher forgets how. Costs one more
    forward and backward pass; 0 leaves it out."""

    def __post_init__(self):
        finite = {
            name: (abs(getattr(self, name)) < float("inf"), "finite")
            for name in ("advantage_weight", "advantage_weight_end", "token_alpha")
        }
        require(
            "objective",
            self,
            distillation=(0 <= self.distillation < float("inf"), "at least 0"),
            distillation_end=(
                self.distillation_end is None or 0 <= self.distillation_end < float("inf"),
                "at least 0, or null",
            ),
            distillation_steps=(self.distillation_steps >= 1, "at least 1"),
            policy=(
                0 <= self.policy < float("inf") and self.policy + self.distillation > 0,
                "at least 0, and not 0 together with objective.distillation",
            ),
            target_most=(0 <= self.target_most <= 1, "in [0, 1]"),
            target_slope=(0 < self.target_slope < float("inf"), "positive"),
            target_power=(0 <= self.target_power < 1, "in [0, 1)"),
            rehearsal=(0 <= self.rehearsal < float("inf"), "at least 0"),
            clip_low=(0 < self.clip_low <= 1, "in (0, 1]"),
            clip_high=(0 < self.clip_high < float("inf"), "positive"),
            advantage_steps=(self.advantage_steps >= 0, "at least 0"),
            low_probability=(0 < self.low_probability <= 1, "in (0, 1]"),
            evidence_clip=(0 <= self.evidence_clip < float("inf"), "at least 0"),
            **finite,
        )

    @property
    def views(self) -> tuple[str, ...]:
        """What else must come before the responses, beside what student and teacher read."""
        shown = self.policy > 0 and self.advantage in ("contrast", "evidence")
        return ("right", "wrong") if shown else ()


# ---- coefficients --------------------------------------------------------------------------------


def distillation_coefficient(config: ObjectiveConfig, step: Array | int) -> Array:
    """The divergence's coefficient at a step (from 0)."""
    end = config.distillation if config.distillation_end is None else config.distillation_end
    return _linear(config.distillation, end, config.distillation_steps, step)


def advantage_weight(config: ObjectiveConfig, step: Array | int) -> Array:
    """How much of the evidence there is at a step (from 0)."""
    first, end = config.advantage_weight, config.advantage_weight_end
    if config.advantage_steps == 0:
        return jnp.float32(first)
    return _linear(first, end, config.advantage_steps, step)


def _linear(first: float, end: float, steps: int, step: Array | int) -> Array:
    """From first to end over so many steps; then exactly the end: 0 turns a term off."""
    schedule = optax.linear_schedule(first, end, steps)
    return jnp.where(step >= steps, jnp.float32(end), jnp.asarray(schedule(step), jnp.float32))


# ---- responses -----------------------------------------------------------------------------------


def group_statistics(
    rewards: Any, threshold: float = 0.5, scale_advantage: bool = True
) -> GroupStatistics:
    """Successes and advantages of `[question, sample]` rewards, one after the other.

    An advantage is the reward minus its group's mean, over the group's standard deviation if
    `scale_advantage`: that of a sample (n - 1), plus 1e-4 as in GRPO's usual code. Equal rewards
    give exactly 0, which the difference from a rounded mean would not: equal as float32, so that
    what a sum in double precision rounds is no difference.
    """
    success = np.asarray(rewards, np.float64) >= threshold
    rewards = np.asarray(rewards, np.float32)
    rate = np.broadcast_to(success.mean(axis=1, keepdims=True), rewards.shape)
    equal = rewards.max(axis=1, keepdims=True) == rewards.min(axis=1, keepdims=True)
    exact = rewards.astype(np.float64)  # the squares of large rewards leave float32
    advantages = np.where(equal, 0, exact - exact.mean(axis=1, keepdims=True))
    if scale_advantage:
        degrees = max(rewards.shape[1] - 1, 1)
        variance = np.square(advantages).sum(axis=1, keepdims=True) / degrees
        advantages = advantages / (np.sqrt(variance) + 1e-4)
    flat = (success, rate.astype(np.float32), advantages.astype(np.float32))
    return GroupStatistics(*(array.reshape(-1) for array in flat))


class Routes(NamedTuple):
    """Which responses get which term of the loss."""

    policy: Bool[Array, " response"]
    distillation: Bool[Array, " response"]


ROUTES: dict[str, Callable[[Array, Array], Routes]] = {
    "all": lambda success, context: Routes(jnp.ones_like(success), context),
    "by_outcome": lambda success, context: Routes(success, context & ~success),
    "with_context": lambda success, context: Routes(context, context),
}
"""(success, has_context) of every response -> its terms."""


def route(
    config: ObjectiveConfig,
    success: Bool[Array, " response"],
    has_context: Bool[Array, " response"],
) -> Routes:
    """The responses of both terms; a term that is off has none."""
    routes = ROUTES[config.route](success, has_context)
    end = config.distillation if config.distillation_end is None else config.distillation_end
    return Routes(
        routes.policy & (config.policy > 0), routes.distillation & (config.distillation + end > 0)
    )


QUESTION_WEIGHTS: dict[str, Callable[[Array], Array]] = {
    "uniform": jnp.ones_like,
    "reward_std": lambda rate: jnp.sqrt(rate * (1 - rate)),
}
"""A group's share of successes -> the weight of its question, before they get mean 1."""


def question_weights(
    config: ObjectiveConfig, success_rate: Float[Array, " response"]
) -> Float[Array, " response"]:
    """The weight of every response's question: mean 1 over the batch, or all 0."""
    weights = QUESTION_WEIGHTS[config.question_weight](success_rate)
    return weights / jnp.maximum(jnp.mean(weights), 1e-12)


# ---- tokens --------------------------------------------------------------------------------------

TARGETS: dict[str, Callable[[ObjectiveConfig, Array, Array, Any], Array]] = {
    "demopsd": lambda config, student, teacher, plain: targets.demopsd(
        teacher, plain, config.target_most, config.target_slope
    ),
    "veto": lambda config, student, teacher, plain: targets.veto(
        student, teacher, config.target_power
    ),
}
"""(config, log-probs of student, teacher, teacher without its context) -> the target's logits."""

TOKEN_WEIGHTS: dict[str, Callable[[Array, Array, float], Array]] = {
    "teacher_entropy": lambda teacher_entropy, terms, alpha: -teacher_entropy,
    "information": lambda teacher_entropy, terms, alpha: alpha * terms,
}
"""(teacher's entropy, information terms, token_alpha) -> logarithm of a token's weight."""


def token_weights(
    config: ObjectiveConfig,
    teacher_entropy: Float[Array, "*tokens"],
    terms: Float[Array, "*tokens"],
) -> Float[Array, "*tokens"]:
    """The weight of every token, before those of a response get mean 1; without gradient.

    Args:
      config: `token_weight` and `token_alpha`.
      teacher_entropy: Nats per token.
      terms: The information estimate's terms, nats per token.
    """
    logarithm = TOKEN_WEIGHTS[config.token_weight](teacher_entropy, terms, config.token_alpha)
    return jax.lax.stop_gradient(jnp.exp(jnp.clip(logarithm, -50.0, 50.0)))  # sums stay finite


class Policy(NamedTuple):
    """What the policy gradient needs, of every response and then of each of its tokens."""

    weights: Float[Array, "*token"]
    """Weight in the loss; 0 where there is no policy gradient."""
    advantages: Float[Array, "*token"]
    """The response's advantage."""
    advantage_weight: Float[Array, "*token"]
    """How much of the evidence there is."""
    has_wrong: Bool[Array, "*token"] | None = None
    """Whether the group has a wrong response."""
    shares: Float[Array, "*token"] | None = None
    """Weight in a mean over each response's tokens, then over the responses of this term."""
    with_right: Float[Array, "*token"] | None = None
    """Log-prob of the token where the prompt shows the right final answer, nats."""
    with_wrong: Float[Array, "*token"] | None = None
    """Log-prob where the prompt shows a wrong response's final answer."""


def weigh_by_evidence(
    advantages: Float[Array, "*tokens"],
    evidence: Float[Array, "*tokens"],
    weight: Float[Array, "*tokens"],
    clip: float,
) -> Float[Array, "*tokens"]:
    """A [(1 - lambda) + lambda clip(exp(sign(A) Delta), 1 - eps, 1 + eps)], CEPO's token advantage.

    Args:
      advantages: A, the response's.
      evidence: Delta, nats: how much likelier the token is in the light of the evidence.
      weight: lambda.
      clip: eps; below 1 the sign of the advantage stays.
    """
    factor = jnp.clip(jnp.exp(jnp.sign(advantages) * evidence), 1 - clip, 1 + clip)
    return advantages * ((1 - weight) + weight * factor)


def _evidence(policy: Policy, token_log_probs, at_argmax, config: ObjectiveConfig):
    assert policy.with_right is not None
    delta = policy.with_right - token_log_probs
    return weigh_by_evidence(
        policy.advantages, delta, policy.advantage_weight, config.evidence_clip
    )


def _contrast(policy: Policy, token_log_probs, at_argmax, config: ObjectiveConfig):
    assert policy.with_right is not None and policy.with_wrong is not None
    assert policy.has_wrong is not None
    fallback = token_log_probs if config.without_wrong == "student" else policy.with_right
    wrong = jnp.where(policy.has_wrong, policy.with_wrong, fallback)
    delta = policy.with_right - wrong
    return weigh_by_evidence(
        policy.advantages, delta, policy.advantage_weight, config.evidence_clip
    )


ADVANTAGES: dict[str, Callable[[Policy, Array, Array, ObjectiveConfig], Array]] = {
    "group": lambda policy, token_log_probs, at_argmax, config: policy.advantages,
    "evidence": _evidence,
    "contrast": _contrast,
    "teacher_argmax": lambda policy, token_log_probs, at_argmax, config: (
        policy.advantages + policy.advantage_weight * jnp.exp(at_argmax)
    ),
    "low_probability": lambda policy, token_log_probs, at_argmax, config: (
        -1.0 * (token_log_probs < math.log(config.low_probability))
    ),
}
"""(policy, student's log-prob of the token, that of the teacher's likeliest token, config) -> the
token's advantage."""


def surrogate(
    token_log_probs: Float[Array, "*tokens"],
    old_log_probs: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Float[Array, "*tokens"]:
    """-min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), PPO's clipped surrogate.

    Args:
      token_log_probs: Under the student; the gradient flows here only.
      old_log_probs: Under the policy that sampled. With one update per rollout the two differ by
        the sampler's rounding alone.
      advantages: Of every token.
      clip_low: How far the ratio may fall before the gradient stops.
      clip_high: How far it may rise.
    """
    ratio = importance_ratio(token_log_probs, old_log_probs)
    clipped = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    return -jnp.minimum(ratio * advantages, clipped * advantages)


def is_clipped(
    token_log_probs: Float[Array, "*tokens"],
    old_log_probs: Float[Array, "*tokens"],
    advantages: Float[Array, "*tokens"],
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Bool[Array, "*tokens"]:
    """Where `surrogate` has no gradient because the student has gone far enough: a positive
    advantage whose ratio is above its bound, a negative one whose ratio is below it."""
    ratio = importance_ratio(token_log_probs, old_log_probs)
    above, below = ratio > 1 + clip_high, ratio < 1 - clip_low
    return ((advantages > 0) & above) | ((advantages < 0) & below)


def policy_terms(
    token_log_probs: Float[Array, " tokens"],
    old_log_probs: Float[Array, " tokens"] | None,
    at_argmax: Float[Array, " tokens"],
    policy: Policy,
    config: ObjectiveConfig,
) -> tuple[Float[Array, " tokens"], Bool[Array, " tokens"]]:
    """The policy gradient's loss at every token, before its weight, and where it is clipped.

    Args:
      token_log_probs: The student's log-prob of the sampled token; carries the gradient.
      old_log_probs: Before the step's updates; None stands for the student's own, a ratio of 1.
      at_argmax: The student's log-prob of the teacher's likeliest token.
      policy: Advantages and evidence.
      config: The rule for a token's advantage, and the clipping.
    """
    fixed, at_argmax = jax.lax.stop_gradient((token_log_probs, at_argmax))
    advantages = ADVANTAGES[config.advantage](policy, fixed, at_argmax, config)
    old = fixed if old_log_probs is None else old_log_probs
    given = old, advantages, config.clip_low, config.clip_high
    return surrogate(token_log_probs, *given), is_clipped(fixed, *given)


# ---- the objective -------------------------------------------------------------------------------


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a configuration states."""
    if config == ObjectiveConfig():
        return objective.SDPO
    return Objective(
        functools.partial(_weights, config),
        functools.partial(_loss, config),
        functools.partial(policy_terms, config=config) if config.policy else None,
        None if config.target == "teacher" else functools.partial(TARGETS[config.target], config),
    )


def _weights(
    config: ObjectiveConfig, responses: Responses, step: Array, aggregation: Aggregation
) -> tuple[Weights, Bool[Array, ""]]:
    """`Objective.weights` of every rival."""
    context, counts = responses.has_context, responses.lengths > 0
    unjudged = GroupStatistics(jnp.zeros_like(context), *[jnp.zeros(context.shape)] * 2)
    group: Any = responses.group or unjudged
    routes = route(config, group.success, context)
    per_token = aggregation_weights(
        responses.lengths, routes.policy | routes.distillation, aggregation
    )
    coefficient = distillation_coefficient(config, step)
    questions = question_weights(config, group.success_rate)
    learned = routes.distillation & (coefficient != 0) & (questions != 0)
    weights = Weights(coefficient * questions * per_token * routes.distillation)
    if config.policy:
        policy, taught = _policy(config, responses, group, routes, step)
        shares = mean_weights(responses.lengths, routes.policy)
        policy = policy._replace(weights=policy.weights * per_token, shares=shares)
        weights = weights._replace(policy=policy)
        learned |= taught
    if config.rehearsal:
        rehearsed = context & group.success
        shares = mean_weights(responses.lengths, rehearsed)
        weights, learned = weights._replace(rehearsal=shares), learned | rehearsed
    return weights, jnp.any(learned & counts)


def _policy(
    config: ObjectiveConfig,
    responses: Responses,
    group: Any,
    routes: Routes,
    step: Array,
) -> tuple[Policy, Bool[Array, " response"]]:
    """The policy gradient of every response, and which have one that is not 0 at every token."""
    evidence = jnp.full(responses.lengths.shape, advantage_weight(config, step))
    matters = group.advantages != 0
    if config.advantage == "teacher_argmax":  # without a context it is the student's own
        evidence *= responses.has_context
        matters |= evidence != 0  # a gradient even where all rewards are equal
    if config.advantage == "low_probability":  # which tokens are, a forward pass will tell
        matters = jnp.ones_like(matters)
    weights = config.policy * routes.policy
    policy = Policy(weights, group.advantages, evidence, responses.has_wrong)
    return policy, routes.policy & matters


def _loss(
    config: ObjectiveConfig, forward: Forward, weights: Weights
) -> tuple[Array, Terms, dict[str, Array]]:
    """`Objective.loss` of every rival."""
    student, teacher = forward.student("student"), forward.teacher("teacher")
    plain = forward.teacher("student").hidden if config.target == "demopsd" else None
    distillation, policy = weights.distillation, weights.policy
    measured: dict[str, Array] = {}
    if config.token_weight != "uniform":  # they need every token of a response at once
        fixed = jax.lax.stop_gradient(student)
        _, terms = forward.distill(fixed, teacher, distillation, None, plain)
        gaps = terms.information[forward.estimator]
        distillation *= forward.to_mean_1(token_weights(config, terms.teacher_entropy, gaps))
    if config.views:
        policy = policy._replace(with_right=forward.score(forward.teacher("right")))
        if config.advantage == "contrast":
            policy = policy._replace(with_wrong=forward.score(forward.teacher("wrong")))
    loss, terms = forward.distill(student, teacher, distillation, policy, plain)
    if terms.policy is not None and terms.clipped is not None:
        measured["loss/policy"] = weighted_sum(terms.policy, policy.weights)
        measured["clip_fraction"] = weighted_sum(terms.clipped, policy.shares)
    if weights.rehearsal is not None:
        measured["loss/rehearsal"] = forward.cross_entropy(
            forward.student("teacher"), weights.rehearsal
        )
        loss += config.rehearsal * measured["loss/rehearsal"]
    return loss, terms, measured
