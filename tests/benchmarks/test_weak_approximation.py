"""The exact side of the weak-approximation benchmark, and what its simulation must agree with."""

import importlib
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import pgpo_jax

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    # The weak error of small steps is below float32's rounding.
    with jax.enable_x64(True):
        yield


@pytest.fixture
def moments(benchmarks):
    return importlib.import_module("support.weak_moments")


@pytest.fixture
def paths(benchmarks):
    return importlib.import_module("support.weak_paths")


@pytest.fixture
def approximation(benchmarks):
    return importlib.import_module("weak_approximation")


@pytest.mark.parametrize("which", ["same_batch", "other_batch"])
def test_the_recursion_is_the_average_over_all_runs_of_the_optimizer(moments, paths, which):
    information, gradient, start = moments.example(0)
    information, gradient = information[:3], gradient[:3]
    law = getattr(moments, which)(np.asarray(paths.multiplier(information, 1.0), float), gradient)
    optimizer = optax.chain(optax.sgd(0.1), pgpo_jax.scale_by_information(1.0, rho_max=2.0))
    # Information and gradient of every outcome, in the order of the law.
    draws = list(itertools.product(range(3), repeat=2))
    if which == "same_batch":
        draws = [(i, i) for i in range(3)]

    def run(indices):
        theta, state = jnp.array(start), optimizer.init(jnp.array(start))
        for index in indices:
            i, j = draws[index]
            g = jnp.array(gradient[j, 1:]) @ jnp.concatenate([jnp.ones(1), theta])
            updates, state = optimizer.update(g, state, theta, information=information[i])
            theta = optax.apply_updates(theta, updates)
        z = np.concatenate([[1.0], theta])
        return np.einsum("a,b,c,d->abcd", z, z, z, z)

    average = np.mean([run(r) for r in itertools.product(range(len(draws)), repeat=2)], 0)
    exact = next(moments.discrete_moments(law, start, 0.1, 2))
    # The optimizer's multiplier is float32.
    np.testing.assert_allclose(exact, average, atol=1e-6)


def test_the_moments_of_known_equations_are_exact(moments):
    rate, noise, time = 0.7, 0.4, 0.5
    drift = np.array([[0.0, 0.0], [0.0, -rate]])
    additive = np.array([[[0.0, 0.0], [noise, 0.0]]])  # Ornstein and Uhlenbeck
    got = next(moments.continuous_moments(moments.Equation(drift, additive), np.array([2.0]), time))
    mean, variance = 2 * np.exp(-rate * time), noise**2 * -np.expm1(-2 * rate * time) / (2 * rate)
    fourth = mean**4 + 6 * mean**2 * variance + 3 * variance**2
    expected = [mean, mean**2 + variance, mean**3 + 3 * mean * variance, fourth]
    np.testing.assert_allclose(moments.values(got), expected, rtol=1e-12)

    proportional = np.array([[[0.0, 0.0], [0.0, noise]]])  # geometric Brownian motion
    equation = moments.Equation(drift, proportional)
    got = list(itertools.islice(moments.continuous_moments(equation, np.array([2.0]), time), 2))[1]
    p = np.arange(1, 5)
    growth = -rate * p + noise**2 * p * (p - 1) / 2
    np.testing.assert_allclose(moments.values(got), 2.0**p * np.exp(growth * 2 * time), rtol=1e-12)


def test_the_corrected_theorem_has_order_1_and_the_printed_one_order_0(approximation):
    for measured in approximation.quadratic(seeds=[0]):
        case = approximation.case(measured)
        # One problem of sixteen, whose own slopes spread; the orders stay apart.
        assert case["slope"] == pytest.approx(case["expected"], abs=0.15), case["name"]
        assert set(case) >= {"name", "slope", "slope_low", "slope_high", "expected"}
        free = case["functions"]["theta_1"]
        assert free["slope"] == pytest.approx(free["expected"], abs=0.15), case["name"]


def test_rho_of_another_batch_leaves_the_drift_and_rho_of_the_same_batch_does_not(moments, paths):
    information, gradient, _ = moments.example(0)
    rho = np.asarray(paths.multiplier(information, 1.0), float)
    drifts = {}
    for which in ("same_batch", "other_batch"):
        law = getattr(moments, which)(rho, gradient)
        for name in ("E[rho] grad L", "E[rho g]"):
            drifts[which, name] = moments.equation(law, 0.1, name, "none").drift
    plain = drifts["other_batch", "E[rho] grad L"]
    np.testing.assert_allclose(drifts["other_batch", "E[rho g]"], plain, atol=1e-12)
    np.testing.assert_allclose(drifts["same_batch", "E[rho] grad L"], plain, atol=1e-12)
    assert np.abs(drifts["same_batch", "E[rho g]"] - plain).max() > 0.01


def test_a_slope_is_found_and_its_interval_knows_the_noise(approximation):
    errors = 3 * approximation.ETAS[:, None] ** 1.5
    exact = approximation.fit(errors, np.zeros_like(errors))
    np.testing.assert_allclose(exact, 1.5, atol=1e-9)
    noisy = approximation.fit(errors, 0.1 * errors)
    # 0.1 / ln 2 of log2 error at each of the step sizes, whose log2 have 28 as sum of squares.
    half = 1.96 * 0.1 / np.log(2) / np.sqrt(28)
    assert noisy.slope_high - noisy.slope == pytest.approx(half, rel=0.1)  # of 1000 draws


@pytest.mark.parametrize("method", ["SGD", "other batch", "same batch"])
def test_simulated_steps_average_to_the_enumerated_ones(paths, method):
    """With as many paths as the benchmark takes: a compiler's error from some size on shows."""
    problem, start = paths.example()
    problem = problem._replace(alpha=0.0 if method == "SGD" else 1.0)
    gap, _, gradient = (np.asarray(x, float) for x in paths.per_sample(problem, start))
    rho = np.asarray(paths.multiplier(gap, problem.alpha), float)[:, 0]
    if method == "other batch":
        moves = (rho[:, None, None] * gradient[None, ..., 0]).reshape(-1, 2)
    else:
        moves = rho[:, None] * gradient[..., 0]
    ends = np.asarray(start).T - 0.125 * moves
    losses = np.asarray(paths.per_sample(problem, jnp.array(ends.T))[1], float).mean(0)
    expected = [ends[:, 0].mean(), (ends**2).sum(1).mean(), losses.mean()]
    mean, error = paths.discrete(
        *(problem, start, jax.random.key(3), 0.125, 1), method=method, checkpoints=1, paths=2**14
    )
    # Five standard errors, and float32's rounding of the coefficients.
    assert np.all(np.abs(mean[0] - np.array(expected)) < 5 * error[0] + 1e-7)


def test_a_simulated_step_of_the_equation_has_the_enumerated_mean_and_covariance(paths):
    problem, start = paths.example()
    gap, _, gradient = (np.asarray(x, float)[..., 0] for x in paths.per_sample(problem, start))
    rho = np.asarray(paths.multiplier(gap, problem.alpha), float)
    drawn = rho[:, None] * gradient
    scale, step = 0.5, 2.0**-10
    end = np.asarray(start)[:, 0] - step * drawn.mean(0)
    square = (end**2).sum() + scale**2 * step * np.trace(np.cov(drawn.T, bias=True))
    mean, error = paths.continuous(
        *(problem, start, jax.random.key(4), scale, step, 1),
        **{"method": "same batch", "drift": "E[rho g]", "diffusion": "Cov(rho g)^1/2"},
        **{"checkpoints": 1, "paths": 2**14},
    )
    # Five standard errors, and the square of the step, which this expectation leaves out. The
    # diffusion adds 6e-5.
    np.testing.assert_allclose(mean[0, 0], end[0], atol=1e-6)
    assert abs(mean[0, 1] - square) < 5 * error[0, 1] + 1e-6
    assert error[0, 1] < 1e-6
