"""The ablation's statistics on numbers worked out by hand, and a study from end to end."""

import importlib
import json
import pathlib

import numpy as np
import pytest
import yaml
from test_train import TINY

from pgpo_jax.errors import InputError

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def module(monkeypatch):
    """A module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def curves(module):
    return module("support.curves")


def curve(curves, steps=(0, 10), rewards=((0.0, 1.0), (1.0, 1.0)), **updates):
    """A run with 40 updates, whatever is not given being constant."""
    rewards = np.array(rewards)
    found = {
        name: np.asarray(updates.get(name, [value] * 40), float)
        for name, value in (("information", 0.5), ("multiplier", 1.0), ("reward", 0.5))
    }
    count = len(found["information"])
    return curves.Curve(
        np.array(steps), rewards.mean(1), rewards, np.arange(1, count + 1), **found, fired={}
    )


def test_the_interval_of_paired_differences_is_students(curves):
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), t(0.975; 2) = 4.3027.
    found = curves.paired_difference({0: 2.0, 1: 4.0, 2: 6.0, 9: 7.0}, {0: 1.0, 1: 2.0, 2: 3.0})
    half = 4.302653 / np.sqrt(3)
    np.testing.assert_allclose(found[:3], (2.0, 2.0 - half, 2.0 + half), rtol=1e-6)
    assert found.seeds == 3


def test_one_pair_has_a_difference_and_no_interval(curves):
    assert curves.paired_difference({4: 0.75}, {4: 0.5}) == (0.25, None, None, 1)


def test_the_bootstrap_draws_questions_and_not_runs(curves):
    # Two runs that agree on every question are no more evidence than one.
    rewards = np.array([1.0] * 25 + [0.0] * 75)
    low, high = curves.clustered_interval(rewards)
    assert curves.clustered_interval(np.stack([rewards, rewards])) == (low, high)
    # The mean of 100 questions has a standard error of sqrt(0.25 * 0.75 / 100) = 0.0433.
    assert low == pytest.approx(0.25 - 1.96 * 0.0433, abs=0.015)  # of 2000 resamples
    assert high == pytest.approx(0.25 + 1.96 * 0.0433, abs=0.015)
    # Runs that differ in a constant differ in no question: there is nothing to draw.
    assert curves.clustered_interval(rewards - (rewards + 0.125)) == (-0.125, -0.125)


@pytest.mark.parametrize(
    "accuracy, expected",
    [
        ((0.2, 0.9, 0.79), True),
        ((0.2, 0.9, 0.8), False),
        ((0.9, 0.1, 0.85), False),
        ((0.5,), False),
    ],
)
def test_a_run_collapsed_if_it_ends_more_than_ten_points_under_its_best(curves, accuracy, expected):
    assert curves.collapsed(accuracy) == expected


def test_the_fall_is_the_evaluation_after_which_a_run_stays_ten_points_under_its_best(curves):
    assert curves.fall([0, 20, 40, 60, 80], [0.2, 0.6, 0.45, 0.3, 0.1]) == 40
    assert curves.fall([0, 20, 40, 60, 80], [0.2, 0.6, 0.45, 0.5, 0.4]) == 80, "0.5 is within"
    assert curves.fall([0, 20, 40, 60], [0.2, 0.6, 0.45, 0.7]) is None, "a dip is no fall"


def test_a_running_mean_begins_with_what_there_is(curves):
    np.testing.assert_allclose(curves.running_mean([1, 3, 5, 7], 3), [1, 2, 3, 5])
    assert len(curves.running_mean([], 3)) == 0


def test_the_information_alarm_wants_its_mean_below_zero_five_times_in_a_row(curves):
    # 20 updates of +1, then -1: the mean of the last 20 is below 0 from the 31st on.
    run = curve(curves, information=[1.0] * 20 + [-1.0] * 20)
    assert curves.information_alarm(run) == 35
    assert curves.information_alarm(curve(curves, information=[1.0] * 20 + [-1.0] * 14)) is None
    # Below a third of its first mean: from the 27th on (26 updates: (14 - 6) / 20 = 0.4).
    assert curves.information_fraction_alarm(run) == 31


def test_the_reward_alarm_wants_its_mean_five_points_below_its_best(curves):
    # The mean of the last 20 falls by 1/20 an update after the 20th: more than 0.05 from the 22nd.
    run = curve(curves, reward=[1.0] * 20 + [0.0] * 20)
    assert curves.reward_alarm(run) == 26
    assert curves.reward_alarm(curve(curves)) is None


def test_a_run_whose_updates_were_all_skipped_raises_no_alarm(curves):
    empty = curve(curves, information=[], multiplier=[], reward=[])
    assert [alarm(empty) for alarm in curves.ALARMS.values()] == [None] * 5
    assert curves.spread(empty.multiplier) == {"min": None, "mean": None, "max": None}


def test_a_run_read_back_has_its_updates_and_the_alarms_that_it_gave(curves, tmp_path):
    rows = [{"step": 0, "eval/avg@16": 0.25}]
    for step in range(1, 41):  # information falls through 0 at update 20; update 3 was skipped
        falling = {"information": 2.0 - step / 10, "entropy/student": 2.0 - step / 10}
        update = {
            "loss": 0.1,
            "context_fraction": 1.0,
            "entropy/teacher": 0.0,
            "multiplier": 1.5,
            "reward/mean": 0.5,
        }
        rows.append({"step": step, **falling, **update, "skipped": float(step == 3)})
    asked = [{"step": 0, "rewards": [0.5, 0.0]}, {"step": 40, "rewards": [1.0, 0.5]}]
    for name, lines in (("metrics", rows), ("evaluations", asked)):
        text = "".join(json.dumps(row) + "\n" for row in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    found = curves.read(tmp_path)
    assert found.steps.tolist() == [0, 40]
    assert found.accuracy.tolist() == [0.25, 0.75]
    assert found.updates.tolist() == [1, 2, *range(4, 41)]
    assert found.best == 1
    assert 29 < found.fired["information"] <= 40  # 10 steps after its mean went below 0
    assert curves.ALARMS["watch: information"](found) == found.fired["information"]


def test_a_step_of_several_updates_has_the_multiplier_of_each(curves, tmp_path):
    row = {"loss": 0.1, "information": 0.5, "multiplier": 1.25, "reward/mean": 0.5}
    rows = [
        {"step": 1, **row, "skipped": 0.0, "multipliers": [1.0, 1.5]},
        {"step": 2, **row, "skipped": 0.5, "multipliers": [2.0]},
        {"step": 3, **row, "skipped": 1.0},
    ]
    for name, lines in (("metrics", rows), ("evaluations", [{"step": 0, "rewards": [0.5]}])):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    found = curves.read(tmp_path)
    assert found.updates.tolist() == [1, 1, 2]
    assert found.multiplier.tolist() == [1.0, 1.5, 2.0]


def test_an_alarm_is_judged_by_lead_time_misses_and_false_alarms(curves):
    alarms = [10, 60, 40, 50, None, 30, None]
    falls = [40, 100, 40, 20, 80, None, None]
    assert curves.judge(alarms, falls) == {
        "falls": 5,
        "before": 3,
        "late": 1,
        "missed": 1,
        "lead_mean": pytest.approx((30 + 40 + 0) / 3),
        "lead_min": 0,
        "lead_max": 40,
        "calm": 2,
        "false_alarms": 1,
    }


def test_a_report_compares_within_seeds_on_the_last_the_best_and_the_mean(module, curves):
    report = module("support.ablation_report")
    runs = {
        ("sdpo", 0): curve(curves, rewards=((0.0, 0.0), (0.5, 0.5))),
        ("sdpo", 1): curve(curves, rewards=((0.0, 0.0), (0.5, 0.75))),
        ("pgpo_1.0", 0): curve(curves, rewards=((0.0, 0.0), (0.75, 0.75)), multiplier=[1.5, 1.25]),
        ("pgpo_1.0", 1): curve(curves, rewards=((0.0, 1.0), (0.25, 0.0)), multiplier=[1.0, 1.25]),
    }
    result = report.summarise(runs, "sdpo", {"pgpo_1.0": ["sdpo_shuffled_rho"]})
    (last,), (best,), (mean,) = (result[f"comparisons{part}"] for part in ("", "_best", "_mean"))
    assert (last["method"], last["against"], last["seeds"]) == ("pgpo_1.0", "sdpo", 2)
    assert last["difference"] == pytest.approx((0.25 - 0.5) / 2)
    assert best["difference"] == pytest.approx((0.25 - 0.125) / 2)
    assert mean["difference"] == pytest.approx((0.125 + 0.0) / 2)
    assert [run["collapsed"] for run in result["runs"]] == [False, False, False, True]
    assert result["methods"][1]["multiplier_mean"] == 1.25
    table = report.markdown(result)
    assert "| pgpo_1.0 | sdpo | -12.5 (" in table
    assert "1 of 2" in table


@pytest.fixture
def ablation(module, monkeypatch, tmp_path):
    """The harness, as its command starts it, in a folder of its own."""
    found = module("ablation")
    monkeypatch.setattr(found.measure, "RESULTS", tmp_path / "results")
    return found


@pytest.mark.slow
def test_a_study_runs_from_warm_start_to_figure_and_goes_on_where_it_stopped(
    ablation, tmp_path, capsys, monkeypatch
):
    settings = {**TINY, "output_dir": str(tmp_path / "study")}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    arguments = [str(tmp_path / "tiny.yaml"), "--seeds", "1", "--save", "tiny"]

    def run(arms, *more):
        assert ablation.main([*arguments, "--arms", arms, *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        return lines, json.loads(lines[-1])

    lines, result = run("sdpo,pgpo_1.0")
    assert [line.split(":")[0] for line in lines[:3]] == [
        "start seed 0", "sdpo seed 0", "pgpo_1.0 seed 0",
    ]  # fmt: skip
    wanted = {"method", "seed", "first", "best", "last", "information_mean", "collapsed"}
    wanted |= {f"multiplier_{part}" for part in ("min", "mean", "max")}
    assert [run["method"] for run in result["runs"]] == ["sdpo", "pgpo_1.0"]
    assert all(wanted <= set(run) for run in result["runs"])
    assert [run["updates"] for run in result["runs"]] == [4, 4]
    assert result["runs"][0]["first"] == result["runs"][1]["first"], "one warm start for both"
    assert result["runs"][0]["multiplier_max"] == 1.0
    assert {"method", "against", "difference", "low", "high", "seeds"} <= set(
        result["comparisons"][0]
    )
    assert result["jax"] and result["device"]
    saved = tmp_path / "results"
    assert json.loads((saved / "tiny.json").read_text()) == result
    assert (saved / "tiny.png").stat().st_size > 10_000

    # What is there is not done again, and a control takes the multipliers of the run beside it.
    def refuse(config):
        assert "shuffled" in config.output_dir, "this run was finished"
        return trained(config)

    trained = ablation.train.train
    with monkeypatch.context() as patch:
        patch.setattr(ablation.train, "train", refuse)
        lines, more = run("sdpo,pgpo_1.0,sdpo_shuffled_rho")
    assert more["runs"][:2] == result["runs"]
    rho = [
        ablation.curves.read(tmp_path / "study" / arm / "seed_0").multiplier
        for arm in ("pgpo_1.0", "sdpo_shuffled_rho")
    ]
    np.testing.assert_array_equal(*map(sorted, rho))

    # Told of before all is there: no run is begun, and an arm without any is left out.
    with monkeypatch.context() as patch:
        patch.setattr(ablation.train, "train", None)
        _, told = run("sdpo,pgpo_1.0,grpo", "--finished")
    assert told["runs"] == result["runs"]

    # Other settings in the same folder are an error in one line, and no result.
    assert ablation.main([*arguments, "--arms", "sdpo", "--optimizer.eps", "1e-6"]) == 1
    assert "optimizer.eps: got 1e-06; " in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--arms", "sdpo,pgpo"], "--arms: got pgpo; must be of sdpo, "),
        (["--arms", "pgpo_1.0"], "--arms: got pgpo_1.0; must hold sdpo"),
        (["--arms", "sdpo,sdpo_matched_rate"], "--arms: got sdpo_matched_rate without pgpo_1.0"),
        (["--seeds", "0"], "--seeds: got 0; must be at least 1"),
        (["--seeds", "1"], "--seeds: got 1; must be at least 2"),
        (["--evaluation.every", "0"], "evaluation.every: got 0"),
    ],
)
def test_a_mistake_is_found_before_anything_runs(ablation, tmp_path, arguments, expected):
    config = str(FOLDER.parent / "configs" / "ablation.yaml")
    with pytest.raises(InputError, match=expected):
        ablation.main([config, "--output", str(tmp_path), *arguments])


def method(c):
    """All that may make an arm another method."""
    return repr((c.optimizer, c.objective, c.alarms, c.distillation, c.reprompt, c.teacher))


def test_every_arm_is_a_valid_configuration_of_its_own(ablation, tmp_path):
    config = str(FOLDER.parent / "configs" / "ablation.yaml")
    study = ablation.Study(config, (), tmp_path, 2)
    for seed in range(2):
        folder = study.folder(ablation.REFERENCE, seed)
        folder.mkdir(parents=True)
        update = {"information": 0.1, "skipped": 0.0, "reward/mean": 0.5}
        rows = [{"step": s, "multiplier": rho, **update} for s, rho in ((1, 1.5), (2, 1.0))]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        asked = [{"step": 0, "rewards": [0.0]}, {"step": 1, "rewards": [1.0]}]
        asked += [{"step": 2, "rewards": [0.5]}]
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in asked))
    found = {arm: ablation.arm_config(study, arm, 0) for arm in ablation.ARMS}
    rate = found["sdpo"].optimizer.learning_rate
    assert found["sdpo_matched_rate"].optimizer.learning_rate == pytest.approx(1.25 * rate)
    to_best = found["sdpo_matched_rate_to_best"].optimizer.learning_rate
    assert to_best == pytest.approx(1.5 * rate)
    assert found["sdpo_other_seeds_rho"].optimizer.replay.endswith("pgpo_1.0/seed_1/metrics.jsonl")
    different = {method(c) for c in found.values()}
    assert len(different) == len(ablation.ARMS)
    assert {c.model.path for c in found.values()} == {str(study.folder("start", 0) / "model")}


@pytest.mark.parametrize(
    "name", ["demopsd", "veto", "opsd", "opsa_control", "teacher_restarts", "teacher_gated"]
)
def test_an_arm_named_as_a_rival_is_that_rival(ablation, tmp_path, name):
    configs = FOLDER.parent / "configs"
    load, base = ablation.config_module.load, str(configs / "ablation.yaml")
    arm = ablation.arm_config(ablation.Study(base, (), tmp_path, 1), name, 0)
    rival = load(str(configs / "rivals" / f"{name}.yaml"), ["--base", base])
    for section in ("distillation", "objective", "reprompt", "teacher", "optimizer"):
        assert getattr(arm, section) == getattr(rival, section)


@pytest.mark.parametrize("name", ["smollm2_sciknoweval", "sciknoweval_qwen3_8b"])
def test_real_models_take_the_same_arms(ablation, tmp_path, name):
    study = ablation.Study(str(FOLDER.parent / "configs" / f"{name}.yaml"), (), tmp_path, 1)
    base = ablation.config_module.load(study.config_path)
    free = [arm for arm in ablation.ARMS if not ablation.needs_reference(arm)]
    found = [ablation.arm_config(study, arm, 0) for arm in free]
    assert len({method(c) for c in found}) == len(free)
    warm = str(study.folder("start", 0) / "model")  # without a warm start: the model as it comes
    assert {c.model.path for c in found} == {warm if base.warm_start.steps else base.model.path}
    assert {c.warm_start.steps for c in found} == {0}
