"""Logistic regression with PGPO's multiplier, on both sides of the theorem by simulated paths.

Each sample's label is also its demonstration: the teacher is the student with its logit shifted
towards the label. So the information, and with it rho, depends on the sample and on theta, and is
correlated with the gradient. A batch is one sample.

Weak errors are of order eta and the paths' spread of order sqrt(eta), so plain averages would drown
the error. Every path therefore carries Z, the linear response to its own noise around the path
without noise (dZ = -J Z dt + the same noise), whose expectation is exactly 0, and averages are
taken of f - c . Z with c by least squares: what is left spreads like eta, as the error does. The
noise of a discrete step is its deviation from the mean over all samples, which is enumerated.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

import pgpo_jax
from pgpo_jax import information

Method = Literal["SGD", "other batch", "same batch"]
# jaxlib 0.10.2 computes multiply-and-reduce wrongly on CPUs from some size on, without an error
# (https://github.com/jax-ml/jax/issues/39103); this leaves the library out that does it.
COMPILER = {"xla_cpu_experimental_ynn_fusion_type": ""}
FINEST = 2.0**-5
"""The SDE's own steps are eta or this, the smaller: Heun's error, of order eta * step + step^2,
stays a few percent of the error that is measured, which is of order eta."""


class Logistic(NamedTuple):
    """Mean over samples of -log p(label) + ridge / 2 |theta|^2, with a teacher."""

    features: Float[Array, "sample 2"] | np.ndarray
    labels: Float[Array, "sample"] | np.ndarray
    """0 or 1."""
    ridge: float
    shift: float
    """How far the demonstration moves the teacher's logit towards the label."""
    alpha: float
    """Exponent of the multiplier; 0 is SGD."""


FUNCTIONS = ("theta_1", "|theta|^2", "loss")


def example() -> tuple[Logistic, Float[Array, "2 1"]]:
    """The problem that is measured, and where its paths start. With alpha = 1 and two classes
    exp(I) <= 2 = rho_max: the multiplier stays smooth, as the theorem asks."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(8, 2))
    labels = features.sum(1) + rng.logistic(size=8) > 0
    problem = Logistic(features.astype("f4"), labels.astype("f4"), ridge=0.1, shift=1.5, alpha=1.0)
    return problem, jnp.array([[1.0], [-1.0]])


def per_sample(
    problem: Logistic, theta: Float[Array, "2 path"]
) -> tuple[Float[Array, "sample path"], Float[Array, "sample path"], Float[Array, "sample 2 path"]]:
    """Information (nats), loss and gradient of every sample, in float32: half the time, and
    its rounding, unlike that of a path of a thousand steps, is far below what is measured."""
    theta = theta.astype(jnp.float32)
    logits = problem.features @ theta
    labels = problem.labels[:, None]
    teacher = logits + problem.shift * (2 * labels - 1)
    student_logits = jnp.stack([jnp.zeros_like(logits), logits], -1)
    teacher_logits = jnp.stack([jnp.zeros_like(logits), teacher], -1)
    gap = information.entropy_gap(student_logits, teacher_logits)
    penalty = problem.ridge / 2 * (theta**2).sum(0, keepdims=True)
    losses = jnp.logaddexp(0, logits) - labels * logits + penalty
    errors = jax.nn.sigmoid(logits) - labels
    gradient = errors[:, None] * problem.features[:, :, None] + problem.ridge * theta[None]
    return gap, losses, gradient


def multiplier(gap: Array, alpha: float) -> Array:
    """rho of every information, as the optimizer computes it."""
    transformation = pgpo_jax.scale_by_information(alpha, rho_max=2.0)

    def one(value):
        state = transformation.init(value)
        return transformation.update(value, state, information=value)[1].multiplier

    return jax.vmap(one)(gap.ravel()).reshape(gap.shape)


def coefficients(
    problem: Logistic, theta: Float[Array, "2 path"], method: Method
) -> tuple[dict[str, Float[Array, "2 path"]], dict[str, Float[Array, "2 2 path"]]]:
    """Drifts (without the minus sign) and diffusions without sqrt(eta), by their names."""
    gap, _, gradient = per_sample(problem, theta)
    rho = multiplier(gap, problem.alpha)
    mean_rho, grad = rho.mean(0)[None], gradient.mean(0)
    weighted = rho[:, None] * gradient
    square = (rho**2).mean(0)[None]
    second = (gradient[:, :, None] * gradient[:, None]).mean(0)
    if method == "same batch":
        drift = weighted.mean(0)
        covariance = (weighted[:, :, None] * weighted[:, None]).mean(0) - _outer(drift)
    else:
        drift = mean_rho * grad
        covariance = square[None] * second - _outer(drift)
    sigma = _cholesky(second - _outer(grad))
    return {"E[rho] grad L": mean_rho * grad, "E[rho g]": drift}, {
        "Sigma^1/2": sigma,
        "rho Sigma^1/2": jnp.sqrt(square)[None] * sigma,
        "Cov(rho g)^1/2": _cholesky(covariance),
    }


@functools.partial(
    jax.jit,
    static_argnames=("method", "checkpoints", "paths"),
    compiler_options=COMPILER,
)
def discrete(
    problem: Logistic,
    start: Float[Array, "2 1"],
    key: Array,
    eta: float,
    per: int,
    *,
    method: Method,
    checkpoints: int,
    paths: int,
) -> tuple[Array, Array]:
    """Steps of `optax.sgd` and `scale_by_information`; averages at every `per`-th of them.

    Returns:
      Mean and standard error of the test functions, `[checkpoint, function]`.
    """
    optimizer = optax.chain(optax.sgd(eta), pgpo_jax.scale_by_information(problem.alpha, 2.0))

    def update(gradient, gap):
        return optimizer.update(gradient, optimizer.init(gradient), information=gap)[0]

    def mean_step(theta):
        return -eta * coefficients(problem, theta, method)[0]["E[rho g]"]

    def step(carry, key):
        theta, response, path = carry
        gap, _, gradient = per_sample(problem, theta)
        i = jax.random.randint(key, (2, paths), 0, len(problem.labels))
        informer = i[1] if method == "other batch" else i[0]
        drawn = jnp.take_along_axis(gradient, i[0][None, None], 0)[0]
        gap = jnp.take_along_axis(gap, informer[None], 0)[0]
        move = jax.vmap(update, (1, 0), 1)(drawn, gap)
        noise = move - mean_step(theta)
        response = response + _jacobian(mean_step, path) @ response + noise
        return theta + move, response, path + mean_step(path)

    return _run(problem, step, start, key, checkpoints, per, paths)


@functools.partial(
    jax.jit,
    static_argnames=("method", "drift", "diffusion", "checkpoints", "paths"),
    compiler_options=COMPILER,
)
def continuous(
    problem: Logistic,
    start: Float[Array, "2 1"],
    key: Array,
    scale: float,
    step_size: float,
    per: int,
    *,
    method: Method,
    drift: str,
    diffusion: str,
    checkpoints: int,
    paths: int,
) -> tuple[Array, Array]:
    """The SDE d theta = -drift dt + scale * diffusion dw, by Heun's method for the drift.

    Returns:
      As `discrete`.
    """

    def mean_step(theta):
        return -step_size * coefficients(problem, theta, method)[0][drift]

    def heun(theta, noise):
        first = mean_step(theta)
        return theta + (first + mean_step(theta + first + noise)) / 2 + noise

    def step(carry, key):
        theta, response, path = carry
        root = coefficients(problem, theta, method)[1][diffusion]
        normal = jax.random.normal(key, (2, paths), theta.dtype)
        noise = scale * jnp.sqrt(step_size) * (root * normal[None]).sum(1)
        response = response + _jacobian(mean_step, path) @ response + noise
        return heun(theta, noise), response, heun(path, jnp.zeros_like(path))

    return _run(problem, step, start, key, checkpoints, per, paths)


def _run(problem, step, start, key, checkpoints, per, paths):
    def section(carry, key):
        carry = jax.lax.fori_loop(0, per, lambda i, c: step(c, jax.random.fold_in(key, i)), carry)
        theta, response, _ = carry
        values = jnp.stack([theta[0], (theta**2).sum(0), per_sample(problem, theta)[1].mean(0)])
        return carry, _controlled(values, response)

    theta = jnp.broadcast_to(start, (2, paths))
    keys = jax.random.split(key, checkpoints)
    return jax.lax.scan(section, (theta, jnp.zeros_like(theta), start), keys)[1]


def _controlled(values: Float[Array, "function path"], response: Float[Array, "2 path"]):
    """Mean and standard error of the values with `response`, of expectation 0, as control."""
    centred = values - values.mean(1, keepdims=True)
    spread = response - response.mean(1, keepdims=True)
    weight = jnp.linalg.solve(spread @ spread.T, spread @ centred.T).T
    rest = centred - weight @ spread
    mean = values.mean(1) - weight @ response.mean(1)
    return mean, jnp.sqrt((rest**2).mean(1) / values.shape[1])


def _jacobian(function, path: Float[Array, "2 1"]) -> Float[Array, "2 2"]:
    """By central differences: the information carries no gradient. Any matrix would keep the
    expectation of the response at 0."""
    width = 1e-3
    offsets = width * jnp.array([[1.0, 0, -1, 0], [0, 1, 0, -1]], path.dtype)
    moved = function(path + offsets)
    return (moved[:, :2] - moved[:, 2:]) / (2 * width)


def _outer(x: Float[Array, "2 path"]) -> Float[Array, "2 2 path"]:
    return x[:, None] * x[None]


def _cholesky(c: Float[Array, "2 2 path"]) -> Float[Array, "2 2 path"]:
    """A square root of each covariance; every root gives the same law."""
    a = jnp.sqrt(c[0, 0])
    b = c[0, 1] / a
    return jnp.stack([jnp.stack([a, jnp.zeros_like(a)]), jnp.stack([b, jnp.sqrt(c[1, 1] - b**2)])])
