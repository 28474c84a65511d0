"""Which SDE approximates PGPO's steps, and to which order in the step size?

A stochastic differential equation approximates theta <- theta - eta rho g weakly, to order p, if

    max over the steps k <= T / eta of | E f(theta_k) - E f(X_(k eta)) |  <=  C eta^p

for every smooth f. Theorem 2 of PGPO (arXiv 2606.03620) claims p = 1 for a drift of E[rho] grad L
and a diffusion that its appendix prints as Sigma^(1/2) dw, Sigma = Cov(g). This measures the left
side for that equation and its corrections, eta = 2^-3 .. 2^-9, T = 1, k eta = 1/8 .. 1, for SGD
(rho = 1) and for PGPO with rho read from another batch than g or from the same:

- quadratic: 16 random least squares, exact moments up to the fourth on both sides
  (weak_moments.py);
- logistic: logistic regression, rho a function of sample and theta, simulated (weak_paths.py).

What theory says of a drift b and a diffusion D^(1/2) dw (Li, Tai and E, Stochastic modified
equations and dynamics of stochastic gradient algorithms, 2019, https://arxiv.org/abs/1811.01558):
order 1 needs b = E[rho g] and D = O(eta) only, whatever D is, none included; order 2 needs
D = eta Cov(rho g) and b = E[rho g] + eta/2 (grad E[rho g]) E[rho g]. In a quadratic no diffusion
moves the mean, so there theta_1 converges even with the printed one.

A slope is that of log2(error) on log2(eta) by least squares over the seven step sizes; the error is
the largest over the checkpoints, and in "worst" over the test functions too.

- quadratic: the mean slope of the problems with its 95 % interval over them (Student's t). There is
  no other noise; what spreads is how small eta must be before the first order leads.
- logistic: the 95 % interval of the regression, joined (root of the sum of squares) with 1.96
  standard deviations of the slope under the simulation's standard errors, by 1000 draws.

About 190 CPU seconds, most of it the simulation: two to three minutes on two idle cores.
"""

import argparse
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.stats
from support import measure, weak_moments, weak_paths

ETAS = 2.0 ** -np.arange(3, 10)
CHECKPOINTS = 8
"""Of the horizon T = 1, evenly: the coarsest step size meets each."""
SPACING = 1 / CHECKPOINTS
PROBLEMS = 16
"""Random quadratics, seeds 0 and on."""
TOLERANCE = 0.1
"""A slope further from its order than this is reported as a miss."""

PRINTED, ROOT_ETA = "Sigma^1/2", "sqrt(eta) Sigma^1/2"
RHO, COVARIANCE = "sqrt(eta) rho Sigma^1/2", "sqrt(eta) Cov(rho g)^1/2"
CANDIDATES: dict[weak_paths.Method, list[tuple[str, str, int]]] = {
    "SGD": [
        ("E[rho g]", PRINTED, 0),
        ("E[rho g]", ROOT_ETA, 1),
        ("E[rho g]", "none", 1),
        ("E[rho g] + eta/2 (..)", COVARIANCE, 2),
    ],
    # E[rho g] = E[rho] grad L here.
    "other batch": [
        ("E[rho] grad L", PRINTED, 0),
        ("E[rho] grad L", ROOT_ETA, 1),
        ("E[rho] grad L", RHO, 1),
        ("E[rho] grad L", COVARIANCE, 1),
        ("E[rho] grad L", "none", 1),
        ("E[rho g] + eta/2 (..)", COVARIANCE, 2),
    ],
    "same batch": [
        ("E[rho] grad L", PRINTED, 0),
        ("E[rho] grad L", ROOT_ETA, 0),
        ("E[rho] grad L", RHO, 0),
        ("E[rho g]", PRINTED, 0),
        ("E[rho g]", ROOT_ETA, 1),
        ("E[rho g]", RHO, 1),
        ("E[rho g]", COVARIANCE, 1),
        ("E[rho g]", "none", 1),
        ("E[rho g] + eta/2 (..)", COVARIANCE, 2),
    ],
}
"""Drift (with a minus sign in the equation), diffusion and expected order, by method."""


class Measured(NamedTuple):
    """One candidate: E f(theta_k) - E f(X_(k eta)) for all step sizes."""

    problem: str
    method: weak_paths.Method
    drift: str
    diffusion: str
    expected: int
    functions: tuple[str, ...]
    difference: np.ndarray
    """`[problem, eta, checkpoint, function]`."""
    standard_error: np.ndarray
    """Same shape; 0 where both sides are exact."""


class Slope(NamedTuple):
    slope: float
    slope_low: float
    slope_high: float


def mean_slope(slopes: Sequence[Slope]) -> Slope:
    """The mean over problems with its 95 % interval; of one problem, its own."""
    if len(slopes) == 1:
        return slopes[0]
    values = np.array([slope.slope for slope in slopes])
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * scipy.stats.sem(values)
    return Slope(*(float(values.mean() + x) for x in (0, -half, half)))


def fit(difference: np.ndarray, standard_error: np.ndarray, etas: np.ndarray = ETAS) -> Slope:
    """Slope of the largest error against the step size; see the top of the file.

    Args:
      difference: `[eta, ...]`; the error of a step size is the largest absolute value.
      standard_error: Same shape.
      etas: The step sizes.
    """

    def log_error(values: np.ndarray) -> np.ndarray:
        return np.log2(np.abs(values).reshape(*values.shape[: -difference.ndim + 1], -1).max(-1))

    x = np.log2(etas)
    line = scipy.stats.linregress(x, log_error(difference))
    regression = scipy.stats.t.ppf(0.975, len(x) - 2) * line.stderr
    normal = np.random.default_rng(0).normal(size=(1000, *difference.shape))
    draws = log_error(difference + normal * standard_error)
    simulation = 1.96 * np.std(draws @ (x - x.mean()) / ((x - x.mean()) ** 2).sum())
    half = float(np.hypot(regression, simulation))
    return Slope(float(line.slope), float(line.slope - half), float(line.slope + half))


def quadratic(seeds: Sequence[int] = range(PROBLEMS)) -> Iterator[Measured]:
    """Every candidate on the quadratics, by exact moments."""
    problems = []
    for seed in seeds:
        information, gradient, start = weak_moments.example(seed)
        rho = np.asarray(weak_paths.multiplier(information, alpha=1.0), float)
        outcomes = {
            "SGD": weak_moments.same_batch(np.ones_like(rho), gradient),
            "other batch": weak_moments.other_batch(rho, gradient),
            "same batch": weak_moments.same_batch(rho, gradient),
        }
        problems.append((start, outcomes))

    def read(moments: Iterator[np.ndarray]) -> np.ndarray:
        """`[checkpoint, function]`."""
        return np.array([weak_moments.values(next(moments)) for _ in range(CHECKPOINTS)])

    def discrete(start, law, eta):
        return read(weak_moments.discrete_moments(law, start, eta, round(SPACING / eta)))

    def continuous(start, law, eta, drift, diffusion):
        equation = weak_moments.equation(law, eta, drift, diffusion)
        return read(weak_moments.continuous_moments(equation, start, SPACING))

    for method, candidates in CANDIDATES.items():
        laws = [(start, outcomes[method]) for start, outcomes in problems]
        steps = np.array([[discrete(*law, eta) for eta in ETAS] for law in laws])
        for drift, diffusion, expected in candidates:
            paths = [[continuous(*law, eta, drift, diffusion) for eta in ETAS] for law in laws]
            difference = steps - np.array(paths)
            yield Measured(
                *("quadratic", method, drift, diffusion, expected, weak_moments.FUNCTIONS),
                *(difference, np.zeros_like(difference)),
            )


def logistic(paths: int) -> Iterator[Measured]:
    """The candidates that weak_paths.py knows, on logistic regression, by simulation."""
    problem, start = weak_paths.example()
    root_key = jax.random.key(0)
    for method, candidates in CANDIDATES.items():
        law = problem._replace(alpha=0.0) if method == "SGD" else problem
        static = {"method": method, "checkpoints": CHECKPOINTS, "paths": paths}
        steps = []
        for eta in ETAS:
            root_key, key = jax.random.split(root_key)
            per = round(SPACING / eta)
            steps.append(jax.device_get(weak_paths.discrete(law, start, key, eta, per, **static)))
        for drift, diffusion, expected in candidates:
            name = diffusion.removeprefix("sqrt(eta) ")
            if diffusion == "none" or drift == "E[rho g] + eta/2 (..)":
                continue  # the first needs no simulation, the second far more paths
            solved = []
            for eta in ETAS:
                root_key, key = jax.random.split(root_key)
                own = min(eta, weak_paths.FINEST)
                scale = 1.0 if diffusion == name else np.sqrt(eta)
                solved.append(
                    jax.device_get(
                        weak_paths.continuous(
                            *(law, start, key, scale, own, round(SPACING / own)),
                            **(static | {"drift": drift, "diffusion": name}),
                        )
                    )
                )
            (mean, error), (mean_x, error_x) = (
                (np.array(part) for part in zip(*side, strict=True)) for side in (steps, solved)
            )
            yield Measured(
                *("logistic", method, drift, diffusion, expected, weak_paths.FUNCTIONS),
                *((mean - mean_x)[None], np.hypot(error, error_x)[None]),
            )


def case(measured: Measured) -> dict[str, Any]:
    """One entry of `cases`: the worst of the test functions, and each of them."""
    m = measured
    both = list(zip(m.difference, m.standard_error, strict=True))
    functions = {}
    for i, name in enumerate(m.functions):
        # No diffusion moves the mean where the drift is linear.
        free = m.problem == "quadratic" and name == "theta_1" and m.drift == "E[rho g]"
        free |= m.problem == "quadratic" and name == "theta_1" and m.method == "other batch"
        expected = max(m.expected, 1) if free else m.expected
        slope = mean_slope([fit(d[..., i], s[..., i]) for d, s in both])
        functions[name] = slope._asdict() | {"expected": expected}
    slopes = [fit(d, s) for d, s in both]
    worst = mean_slope(slopes)
    errors = np.abs(m.difference).max((2, 3))
    return {
        "name": f"{m.problem}, {m.method}: drift {m.drift}, diffusion {m.diffusion}",
        **worst._asdict(),
        "expected": m.expected,
        "as_expected": abs(worst.slope - m.expected) <= TOLERANCE,
        "functions": functions,
        "lowest": min(slope.slope for slope in slopes),
        "highest": max(slope.slope for slope in slopes),
        # Over problems: the geometric mean's slope is the mean of their slopes.
        "errors": np.exp(np.log(errors).mean(0)).tolist(),
        **{key: getattr(m, key) for key in ("problem", "method", "drift", "diffusion")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", type=int, default=2**14, help="simulated paths per average")
    parser.add_argument("--save", action="store_true", help="keep result and figure in results/")
    args = parser.parse_args()
    started = time.perf_counter()
    jax.config.update("jax_enable_x64", True)

    cases = [case(m) for m in quadratic()]
    cases += [case(m) for m in logistic(args.paths)]
    for problem in ("quadratic", "logistic"):
        print(f"\n{problem}: slope of log(weak error) against log(eta)")
        rows = [c for c in cases if c["problem"] == problem]
        measure.table(
            [
                {
                    "method": c["method"],
                    "drift": c["drift"],
                    "diffusion": c["diffusion"],
                    "expected": c["expected"],
                    "worst": f"{c['slope']:.3f} [{c['slope_low']:.3f}, {c['slope_high']:.3f}]",
                    **{name: f"{f['slope']:.3f}" for name, f in c["functions"].items()},
                    "error at 2^-9": c["errors"][-1],
                }
                for c in rows
            ]
        )
    missed = [c["name"] for c in cases if not c["as_expected"]]
    print(f"\n{len(cases) - len(missed)} of {len(cases)} within {TOLERANCE} of the expected slope")
    for name in missed:
        print(f"missed: {name}")
    print()
    if args.save:
        figure(cases, measure.RESULTS / "weak_approximation.png")
    result = {
        "cases": cases,
        "missed": missed,
        "etas": ETAS.tolist(),
        "paths": args.paths,
        "seconds": time.perf_counter() - started,
    }
    measure.finish("weak_approximation", result, args.save)


def figure(cases: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Weak error against the step size, a panel for each problem and method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = {
        "SGD": r"SGD ($\rho = 1$)",
        "other batch": r"PGPO, $\rho$ from another batch",
        "same batch": r"PGPO, $\rho$ from the same batch",
    }
    problems = {
        "quadratic": f"{PROBLEMS} quadratics, exact",
        "logistic": "logistic regression, simulated",
    }
    # Colours for the colour-blind (Okabe and Ito); a wrong drift is dashed.
    styles = {
        PRINTED: ("#D55E00", "s", r"$\Sigma^{1/2}$ (printed)"),
        ROOT_ETA: ("#0072B2", "o", r"$\sqrt{\eta}\,\Sigma^{1/2}$"),
        RHO: ("#009E73", "^", r"$\sqrt{\eta}\,\rho\,\Sigma^{1/2}$"),
        COVARIANCE: ("#CC79A7", "D", r"$\sqrt{\eta}\,\mathrm{Cov}(\rho g)^{1/2}$"),
        "none": ("#555555", "x", "none (gradient flow)"),
    }
    drifts = {
        "E[rho g]": ("-", r"$E[\rho g]$ ($=E[\rho]\nabla L$ unless the batch is the same)"),
        "E[rho] grad L": ("--", r"$E[\rho]\,\nabla L$, same batch"),
        "E[rho g] + eta/2 (..)": (
            ":",
            r"$b+\frac{\eta}{2}(\nabla b)\,b,\;\; b=E[\rho g]$ (second order)",
        ),
    }
    fig, axes = pyplot.subplots(2, 3, figsize=(13, 9), sharex=True, sharey="row")
    for axis_row, problem in zip(axes, problems, strict=True):
        for axis, method in zip(axis_row, methods, strict=True):
            panel = [c for c in cases if (c["problem"], c["method"]) == (problem, method)]
            for c in panel:
                color, marker, _ = styles[c["diffusion"]]
                wrong = c["drift"] == "E[rho] grad L" and method == "same batch"
                line = "--" if wrong else ":" if "eta/2" in c["drift"] else "-"
                axis.loglog(ETAS, c["errors"], line, color=color, marker=marker, ms=5, lw=1.6)
            for order in sorted({c["expected"] for c in panel} - {0}):
                last = min(c["errors"][-1] for c in panel if c["expected"] == order)
                guide = 0.35 * last * (ETAS / ETAS[-1]) ** order
                axis.loglog(ETAS, guide, color="0.6", lw=1, zorder=0)
                # Where the other guide and the second order are far.
                at = 5 if order == 1 else 2
                axis.annotate(
                    f"slope {order}",
                    (ETAS[at], guide[at]),
                    xytext=(2, -14),
                    textcoords="offset points",
                    color="0.4",
                    fontsize=9,
                )
            axis.set_title(f"{methods[method]}\n{problems[problem]}", fontsize=11)
            axis.set_xscale("log", base=2)
            axis.grid(True, which="major", color="0.92")
    for axis in axes[:, 0]:
        axis.set_ylabel(r"weak error $\max_{f,\,k}|E f(\theta_k) - E f(X_{k\eta})|$")
    for axis in axes[-1]:
        axis.set_xlabel(r"step size $\eta$")
    lines = [
        pyplot.Line2D([], [], color=color, marker=marker, label=label)
        for color, marker, label in styles.values()
    ]
    kinds = [
        pyplot.Line2D([], [], color="black", ls=line, label=label)
        for line, label in drifts.values()
    ]
    fig.tight_layout(rect=(0, 0.12, 1, 1))
    keys = {"loc": "lower left", "frameon": False, "fontsize": 10, "alignment": "left"}
    fig.legend(handles=lines, title="diffusion", bbox_to_anchor=(0.06, 0), ncols=2, **keys)
    fig.legend(handles=kinds, title="drift", bbox_to_anchor=(0.5, 0), **keys)
    fig.savefig(path, dpi=130)
    pyplot.close(fig)


if __name__ == "__main__":
    main()
