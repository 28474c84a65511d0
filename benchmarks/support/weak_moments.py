"""A quadratic with state-dependent gradient noise, on both sides of the theorem without sampling.

Least squares on a few samples, a batch of one: the gradient of a batch is linear in theta, and so
are its noise and the noise's square root. With z = (1, theta), a step is
z <- (I - eta rho_j B_j) z, an SDE with such coefficients is dz = F z dt + sum_r G_r z dw_r, and the
moments of z up to the fourth close under both:

    E z_k^(x4) = [sum_j p_j (I - eta rho_j B_j)^(x4)]^k z_0^(x4)
    E z_T^(x4) = expm(T [sum_a F at a + sum_(a<b) sum_r G_r at a and at b]) z_0^(x4)

(Ito's formula for a product of four factors), matrices of 81 x 81 for two parameters.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.linalg

DEGREE = 4
"""The highest moment."""
FUNCTIONS = ("theta_1", "|theta|^2", "theta_1^3", "|theta|^4")


class Outcomes(NamedTuple):
    """What one step may draw: a finite list, so that expectations over it are sums."""

    probability: np.ndarray
    """`[outcome]`, sums to 1."""
    multiplier: np.ndarray
    """rho, `[outcome]`."""
    gradient: np.ndarray
    """B of g = B z, `[outcome, 1 + parameter, 1 + parameter]`; the first row is 0."""


class Equation(NamedTuple):
    """dz = drift z dt + sum_r noise_r z dw_r."""

    drift: np.ndarray
    """`[1 + parameter, 1 + parameter]`."""
    noise: np.ndarray
    """`[brownian motion, 1 + parameter, 1 + parameter]`."""


def least_squares(features: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """B of every sample's gradient a (a . theta - b).

    Args:
      features: a, `[sample, parameter]`.
      targets: b, `[sample]`.

    Returns:
      `[sample, 1 + parameter, 1 + parameter]`.
    """
    row = np.concatenate([-targets[:, None], features], 1)
    column = np.concatenate([np.zeros_like(targets)[:, None], features], 1)
    return column[:, :, None] * row[:, None, :]


def example(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A random problem: information and B of every sample, and the start.

    Features of length 1, so that every sample's curvature is 1 and 2^-3 is 1/16 of the largest
    stable step. (With normal features some samples had several times that curvature, 2^-3 was not
    small, and single problems with order 1 had fitted slopes of 0.7 to 1.8.) The information is
    drawn once per sample and does not depend on theta: with one that does, the moments would not
    close (weak_paths.py has such a one).
    """
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(8, 2))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    targets = features @ [0.5, 0.5] + 0.5 * rng.normal(size=8)
    return 0.5 * rng.normal(size=8), least_squares(features, targets), np.array([1.0, -1.0])


def same_batch(multiplier: np.ndarray, gradient: np.ndarray) -> Outcomes:
    """rho and g are read from one and the same sample, drawn uniformly."""
    count = len(multiplier)
    return Outcomes(np.full(count, 1 / count), multiplier, gradient)


def other_batch(multiplier: np.ndarray, gradient: np.ndarray) -> Outcomes:
    """rho is read from another sample, drawn independently of that of g."""
    i, j = (x.ravel() for x in np.indices((len(multiplier),) * 2))
    return Outcomes(np.full(i.size, 1 / i.size), multiplier[i], gradient[j])


def discrete_moments(
    outcomes: Outcomes, start: np.ndarray, eta: float, steps: int
) -> Iterator[np.ndarray]:
    """E z^(x4) after every `steps` steps theta <- theta - eta rho g, a generator without end.

    Yields `[1 + parameter] * 4`, first after `steps` steps from `start`.
    """
    size = outcomes.gradient.shape[-1]
    moves = np.eye(size) - eta * outcomes.multiplier[:, None, None] * outcomes.gradient
    step = sum(p * _power(move) for p, move in zip(outcomes.probability, moves, strict=True))
    return _iterate(np.linalg.matrix_power(step, steps), start)


def continuous_moments(equation: Equation, start: np.ndarray, time: float) -> Iterator[np.ndarray]:
    """E z^(x4) of the SDE's solution at every multiple of `time`, as `discrete_moments` yields."""
    size, places = equation.drift.shape[0], range(DEGREE)
    generator = sum(_at({place: equation.drift}, size) for place in places)
    # Only sum_r G_r (x) G_r enters: as many noises as matrix entries do.
    flat = equation.noise.reshape(-1, size * size)
    for noise in np.linalg.qr(flat, mode="r").reshape(-1, size, size):
        for b in places:
            for a in range(b):
                generator = generator + _at({a: noise, b: noise}, size)
    return _iterate(scipy.linalg.expm(time * generator), start)


def equation(outcomes: Outcomes, eta: float, drift: str, diffusion: str) -> Equation:
    """The candidate SDE of a step size.

    Sigma is the covariance of g alone. A square root of Sigma other than the symmetric one gives
    the same law: it enters the generator through Sigma = sum_r (G_r z)(G_r z)^T only. In `rho`
    Sigma^(1/2) the random rho enters as the root of its mean square, which is what its quadratic
    variation adds up to.
    """
    p, rho, b = outcomes
    mean_b, mean_rho_b = np.tensordot(p, b, 1), np.tensordot(p * rho, b, 1)
    root_p = np.sqrt(p)[:, None, None]
    sigma = root_p * (b - mean_b)
    drifts = {
        "E[rho] grad L": (p @ rho) * mean_b,
        "E[rho g]": mean_rho_b,
        "E[rho g] + eta/2 (..)": mean_rho_b + eta / 2 * mean_rho_b @ mean_rho_b,
    }
    noises = {
        "none": np.zeros((0, *mean_b.shape)),
        "Sigma^1/2": sigma,
        "sqrt(eta) Sigma^1/2": np.sqrt(eta) * sigma,
        "sqrt(eta) rho Sigma^1/2": np.sqrt(eta * (p @ rho**2)) * sigma,
        "sqrt(eta) Cov(rho g)^1/2": np.sqrt(eta) * root_p * (rho[:, None, None] * b - mean_rho_b),
    }
    return Equation(-drifts[drift], noises[diffusion])


def values(moments: np.ndarray) -> np.ndarray:
    """Expectations of the test functions `FUNCTIONS`."""
    parameters = range(1, moments.shape[0])
    return np.array(
        [
            moments[1, 0, 0, 0],
            sum(moments[i, i, 0, 0] for i in parameters),
            moments[1, 1, 1, 0],
            sum(moments[i, i, k, k] for i in parameters for k in parameters),
        ]
    )


def _iterate(propagator: np.ndarray, start: np.ndarray) -> Iterator[np.ndarray]:
    z = np.concatenate([[1.0], start])
    moments = _power(z)
    while True:
        moments = propagator @ moments
        yield moments.reshape((z.size,) * DEGREE)


def _power(x: np.ndarray) -> np.ndarray:
    """x (x) x (x) x (x) x."""
    return functools.reduce(np.kron, [x] * DEGREE)


def _at(factors: dict[int, np.ndarray], size: int) -> np.ndarray:
    """The Kronecker product of the factors at their places and the identity at the others."""
    return functools.reduce(np.kron, [factors.get(i, np.eye(size)) for i in range(DEGREE)])
