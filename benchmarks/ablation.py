"""What does the multiplier do, against the right controls? Many seeds, one warm start for each.

    python benchmarks/ablation.py configs/ablation.yaml --seeds 10 --jobs 2 --save ablation_addition
    python benchmarks/ablation.py configs/smollm2_sciknoweval.yaml --seeds 3 \
        --arms sdpo,pgpo_1.0,sdpo_matched_rate

Every arm is the given configuration with a few fields set (`ARMS`). The runs of one seed share
warm start, question order and random keys, so differences are taken within seeds. A run is what
`python -m pgpo_jax.train` does, in a folder of its own, `OUTPUT/ARM/seed_N`: finished ones are
skipped and interrupted ones resumed, so the same command goes on after any stop, and more seeds or
arms can be added; `--finished` tells of those that are there. Further fields are set as for
training (`--steps 50`).

On an accelerator leave `--jobs` at 1: all runs happen in this process, on all devices. On CPUs
`--jobs N` starts N processes of one thread each, which for tiny models is faster than N threads.

The last line is JSON: `runs`, `comparisons` (of the last accuracy; `comparisons_mean` of the
curve's mean, which is less noisy), `alarms`, versions and device. `--save NAME` keeps it under
results/, with a figure and the table.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import io
import multiprocessing
import os
import pathlib
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from support import ablation_report, curves, measure

from pgpo_jax import config as config_module
from pgpo_jax import convert, train
from pgpo_jax.config import Config
from pgpo_jax.errors import InputError, command

BASELINE = "sdpo"
"""What every arm is compared with."""
REFERENCE = "pgpo_1.0"
"""The run whose multipliers the controls take, and which is compared with every control."""

EARLY = {"optimizer.alpha": 0.0, "alarms.information_fraction": 1 / 3}
"""SDPO that reacts when the information stays below a third of its highest running mean."""

REVERSE = {"optimizer.alpha": 0.0, "distillation.kind": "reverse_kl"}
"""What is asked of a student that is pulled to another target than the teacher."""

GRPO = {
    "data.updates_per_rollout": 1,
    "data.without_context": "keep",
    "optimizer.alpha": 0.0,
    "objective.distillation": 0.0,
    "objective.policy": 1.0,
}
"""A policy gradient with as many updates as SDPO has: the ratio is 1 and nothing is clipped."""

ARMS: dict[str, dict[str, Any]] = {
    "sdpo": {"optimizer.alpha": 0.0},
    "pgpo_0.5": {"optimizer.alpha": 0.5},
    "pgpo_1.0": {"optimizer.alpha": 1.0},
    "pgpo_1.5": {"optimizer.alpha": 1.5},
    "pgpo_-1.0": {"optimizer.alpha": -1.0},
    "pgpo_rho_min_1": {"optimizer.alpha": 1.0, "optimizer.rho_min": 1.0},
    "pgpo_relative": {"optimizer.alpha": 1.0, "optimizer.multiplier": "relative"},
    "pgpo_2_to_0": {
        "optimizer.alpha": 2.0,
        "optimizer.alpha_schedule": "linear",
        "optimizer.alpha_end": 0.0,
        "optimizer.alpha_steps": "{updates}",
    },
    "pgpo_token": {"optimizer.alpha": 0.0, "objective.token_weight": "information"},
    "grpo": GRPO,
    "sdpo_matched_rate": {"optimizer.alpha": 0.0, "optimizer.learning_rate": "{matched_rate}"},
    "sdpo_shuffled_rho": {
        "optimizer.multiplier": "replayed",
        "optimizer.replay": "{reference}",
        "optimizer.replay_seed": "{seed}",
    },
    "sdpo_other_seeds_rho": {
        "optimizer.multiplier": "replayed",
        "optimizer.replay": "{other_reference}",
    },
    # Left out unless asked for: GRPO as published, and arms for runs that collapse.
    "grpo_minibatches": {
        **GRPO,
        "data.updates_per_rollout": 2,
        "objective.old_log_probs": "recomputed",
    },
    "sdpo_matched_rate_to_best": {
        "optimizer.alpha": 0.0,
        "optimizer.learning_rate": "{matched_rate_to_best}",
    },
    "sdpo_rehearsal": {"optimizer.alpha": 0.0, "objective.rehearsal": 1.0},
    "sdpo_reacts_lower_rate": {"optimizer.alpha": 0.0, "alarms.reaction": "lower_rate"},
    "sdpo_reacts_rehearse": {"optimizer.alpha": 0.0, "alarms.reaction": "rehearse"},
    "sdpo_reacts_early_lower_rate": {**EARLY, "alarms.reaction": "lower_rate"},
    "sdpo_reacts_early_freeze_teacher": {**EARLY, "alarms.reaction": "freeze_teacher"},
    "sdpo_reacts_early_rehearse": {**EARLY, "alarms.reaction": "rehearse"},
    # Rivals of configs/rivals/ with the same names; left out too.
    "demopsd": {**REVERSE, "objective.target": "demopsd"},
    "veto": {**REVERSE, "objective.target": "veto"},
    "opsd": {
        "optimizer.alpha": 0.0,
        "reprompt.source": "solution",
        "distillation.kind": "forward_kl",
        "distillation.token_clip": 1.0,
        "teacher.refresh": "frozen",
    },
    "opsa_control": {
        "data.without_context": "keep",
        "optimizer.alpha": 0.0,
        "objective.distillation": 0.0,
        "objective.policy": 1.0,
        "objective.advantage": "low_probability",
    },
    "teacher_restarts": {"optimizer.alpha": 0.0, "teacher.refresh": "restarts"},
    "teacher_gated": {
        "optimizer.alpha": 0.0,
        "teacher.refresh": "gated",
        "teacher.period": 10,
        "teacher.gate_rise": 0.02,
    },
}
"""Arm -> fields. In braces: `seed`, `updates`; of the REFERENCE run of the same seed its metrics
file (`reference`) and the learning rate times its mean multiplier (`matched_rate`, and up to its
best evaluation `matched_rate_to_best`); the metrics of another seed's REFERENCE
(`other_reference`), a multiplier of the right course in time that knows nothing of this run."""

DEFAULT_ARMS = list(ARMS)[: list(ARMS).index("grpo_minibatches")]


class Study(NamedTuple):
    """What is to be run, and where."""

    config_path: str
    overrides: tuple[str, ...]
    output: pathlib.Path
    seeds: int

    def folder(self, arm: str, seed: int) -> pathlib.Path:
        return self.output / arm / f"seed_{seed}"


# ---- runs ----------------------------------------------------------------------------------------


def start_config(study: Study, seed: int) -> Config:
    """The warm start alone, as a run without updates."""
    folder = str(study.folder("start", seed))
    return _load(study, {"seed": seed, "output_dir": folder, "checkpoint.path": None, "steps": 0})


def arm_config(study: Study, arm: str, seed: int) -> Config:
    """An arm's configuration; those that need the REFERENCE run read its files."""
    common: dict[str, Any] = {
        "seed": seed,
        "output_dir": str(study.folder(arm, seed)),
        "checkpoint.path": None,
    }
    if _load(study, {}).warm_start.steps:
        common |= {
            "model.path": str(study.folder("start", seed) / "model"),
            "model.architecture": None,
            "warm_start.steps": 0,
            "evaluation.preflight_questions": 0,  # the warm start's own run measured it
        }
    base = _load(study, common)
    places: dict[str, Any] = {"seed": seed, "updates": base.steps * base.data.updates}
    if needs_reference(arm):
        places["reference"] = study.folder(REFERENCE, seed) / "metrics.jsonl"
        places["other_reference"] = study.folder(REFERENCE, other(seed)) / "metrics.jsonl"
        reference = curves.read(study.folder(REFERENCE, seed))
        if not len(reference.updates):
            raise InputError(f"{REFERENCE}: every update of seed {seed} was skipped")
        to_best = reference.updates <= max(reference.steps[reference.best], reference.updates[0])
        rate = base.optimizer.learning_rate
        places["matched_rate"] = rate * float(reference.multiplier.mean())
        places["matched_rate_to_best"] = rate * float(reference.multiplier[to_best].mean())
    special = {
        name: value.format(**places) if isinstance(value, str) else value
        for name, value in ARMS[arm].items()
    }
    return _load(study, common | special)


def needs_reference(arm: str) -> bool:
    """Whether an arm can only run after the REFERENCE runs."""
    return any("reference" in str(v) or "matched" in str(v) for v in ARMS[arm].values())


def other(seed: int) -> int:
    """Whose multipliers a seed takes for `other_reference`, however many seeds there are."""
    return seed - 1 if seed else 1


def _load(study: Study, values: Mapping[str, Any]) -> Config:
    return config_module.load(study.config_path, study.overrides, values)


def is_finished(config: Config) -> bool:
    """Whether a run's folder holds all of it, done with these settings."""
    folder = pathlib.Path(config.output_dir)
    try:
        before = config_module.load(str(folder / "config.yaml"))
        steps = curves.read(folder).steps
    except (InputError, OSError, ValueError, IndexError):
        return False
    sections = ("metrics", "checkpoint", "mesh", "distributed")
    free = {name: getattr(config, name) for name in sections}
    # Where anything else differs, `train` refuses the folder in one line that says what.
    return dataclasses.replace(before, **free) == config and steps[-1] == config.steps


def _is_done(study: Study, arm: str, seed: int) -> bool:
    """Whether a run is finished; one whose REFERENCE is not there cannot be."""
    try:
        return is_finished(arm_config(study, arm, seed))
    except (InputError, OSError):
        return False


def do_start(study: Study, seed: int) -> str | None:
    """Makes a seed's warm start and exports its student."""
    model = study.folder("start", seed) / "model"
    if model.exists() or not _load(study, {}).warm_start.steps:
        return None
    config = start_config(study, seed)
    problem = _train(config)
    if problem is None:
        with contextlib.redirect_stdout(io.StringIO()):
            convert.export(config.output_dir, str(model), "last")
    return problem


def do_arm(study: Study, arm: str, seed: int) -> str | None:
    """Does, resumes or skips one run."""
    config = arm_config(study, arm, seed)
    return None if is_finished(config) else _train(config)


_stopped = False


def _train(config: Config) -> str | None:
    """Trains with the console in a file; returns what went wrong, or None."""
    global _stopped
    if _stopped:
        return "stopped"
    folder = pathlib.Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "console.txt").open("a") as console, contextlib.redirect_stdout(console):
        code = train.train(config)
    _stopped = code == train.STOPPED
    if _stopped:
        return "stopped"
    return None if code == 0 else f"ended with code {code}; see {folder / 'console.txt'}"


def _safely(do, *arguments) -> str | None:
    """One failed run must not end the others."""
    try:
        return do(*arguments)
    except InputError as error:
        return str(error)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"


# ---- several at a time ---------------------------------------------------------------------------


def one_thread(core: "multiprocessing.Queue[int]") -> None:
    """Starts a worker's backend on one thread: XLA counts the cores that it may use when it starts.

    Afterwards the process may wander, so that another one's load does not hold it up.
    """
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core.get()})
    jax.devices()
    os.sched_setaffinity(0, allowed)


@contextlib.contextmanager
def workers(jobs: int) -> Iterator[concurrent.futures.Executor | None]:
    """`jobs` processes, or None for this one; a signal reaches the runs, which save and stop."""
    if jobs == 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    cores, available = context.Queue(), sorted(os.sched_getaffinity(0))
    for index in range(jobs):
        cores.put(available[index % len(available)])

    def stop(number, frame):
        del frame
        for child in multiprocessing.active_children():
            child.terminate()
        raise SystemExit(train.STOPPED)

    before = signal.signal(signal.SIGTERM, stop)
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, one_thread, (cores,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, before)


def do_all(pool, tasks: Sequence[tuple]) -> Iterator[tuple[tuple, str | None, float]]:
    """(task, problem, seconds since the stage began) as each is finished."""
    began = time.perf_counter()
    if pool is None:
        for task in tasks:
            yield task, _safely(*task), time.perf_counter() - began
        return
    futures = {pool.submit(_safely, *task): task for task in tasks}
    for future in concurrent.futures.as_completed(futures):
        yield futures[future], future.result(), time.perf_counter() - began


def do_study(study: Study, arms: Sequence[str], jobs: int) -> list[str]:
    """All runs, in three stages since later ones read what earlier ones wrote; returns problems."""
    seeds, problems = range(study.seeds), []
    referring = [arm for arm in arms if needs_reference(arm)]
    if referring and REFERENCE not in arms:
        raise InputError(f"--arms: got {referring[0]} without {REFERENCE}, which it refers to")
    if study.seeds == 1 and any("{other_reference}" in ARMS[arm].values() for arm in arms):
        raise InputError(
            "--seeds: got 1; must be at least 2 for an arm that takes another seed's rho"
        )
    free = [arm for arm in arms if arm not in referring]
    with workers(jobs) as pool:
        for tasks in (
            [(do_start, study, seed) for seed in seeds],
            # Seed by seed, so that workers side by side do not compile the same program.
            [(do_arm, study, arm, seed) for seed in seeds for arm in free],
            [(do_arm, study, arm, seed) for seed in seeds for arm in referring],
        ):
            for (do, _, *what), problem, seconds in do_all(pool, tasks):
                name = " seed ".join(map(str, what if do is do_arm else ("start", *what)))
                if problem == "stopped":
                    raise SystemExit(train.STOPPED)
                if problem:
                    problems.append(f"{name}: {problem}")
                shown = problem or (describe(study, *what) if do is do_arm else "ready")
                print(f"{name}: {shown} ({seconds:.0f} s)", flush=True)
    return problems


def describe(study: Study, arm: str, seed: int) -> str:
    """A finished run in one line."""
    curve = curves.read(study.folder(arm, seed))
    first, best, last = (curve.accuracy[i] for i in (0, curve.best, -1))
    rho = curves.spread(curve.multiplier)
    multiplier = "no update" if not len(curve.updates) else f"{rho['min']:.2f} to {rho['max']:.2f}"
    return (
        f"{first:.1%} -> {last:.1%} (best {best:.1%} at {curve.steps[curve.best]}), "
        f"multiplier {multiplier}"
    )


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --seed is a field of the configuration
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--seeds", type=int, default=10, help="seeds 0 to N - 1 (default: 10)")
    parser.add_argument(
        "--arms", default=",".join(DEFAULT_ARMS), help="which of: " + ", ".join(ARMS)
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--output", help="folder of the runs (default: the config's output_dir)")
    parser.add_argument(
        "--finished", action="store_true", help="tell of the runs that are finished; train none"
    )
    parser.add_argument("--save", metavar="NAME", help="keep results/NAME.json, .png and .md")
    options, overrides = parser.parse_known_args(argv)
    arms = options.arms.split(",")
    if unknown := [arm for arm in arms if arm not in ARMS]:
        raise InputError(f"--arms: got {unknown[0]}; must be of {', '.join(ARMS)}")
    if BASELINE not in arms:
        raise InputError(f"--arms: got {options.arms}; must hold {BASELINE}, to compare with")
    for name in ("seeds", "jobs"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}: got {getattr(options, name)}; must be at least 1")
    base = config_module.load(options.config, overrides)
    if not base.evaluation.every:
        raise InputError("evaluation.every: got 0; an ablation compares evaluations")
    output = pathlib.Path(options.output or base.output_dir)
    study = Study(options.config, tuple(overrides), output, options.seeds)
    output.mkdir(parents=True, exist_ok=True)
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        # Runs differ in a few numbers: most of what one compiles serves all others.
        cache = str((output / "compilations").absolute())
        os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
        jax.config.update("jax_compilation_cache_dir", cache)

    problems = [] if options.finished else do_study(study, arms, options.jobs)
    found = {
        (arm, seed): curves.read(study.folder(arm, seed))
        for arm in arms
        for seed in range(options.seeds)
        if not any(problem.startswith(f"{arm} seed {seed}:") for problem in problems)
        and (not options.finished or _is_done(study, arm, seed))
    }
    arms = [arm for arm in arms if any(arm == name for name, _ in found)]
    if BASELINE not in arms:
        print(f"no run of {BASELINE} is finished: nothing to compare with", file=sys.stderr)
        return 1
    controls = [arm for arm in arms if needs_reference(arm)]
    result = ablation_report.summarise(found, BASELINE, {REFERENCE: controls})
    result |= {"config": options.config, "overrides": overrides, "problems": problems}
    table = ablation_report.markdown(result)
    print(table)
    name = options.save or "ablation"
    target = measure.RESULTS if options.save else output
    ablation_report.figure(found, result, BASELINE, target / f"{name}.png")
    if options.save:
        (target / f"{name}.md").write_text(table + "\n")
    measure.finish(name, result, bool(options.save))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(command(main))
