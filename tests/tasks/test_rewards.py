"""Reward functions of the user's: weights, what is not judged, async, any finite number."""

import asyncio
import math

import numpy as np
import pytest

from pgpo_jax import evaluation, methods
from pgpo_jax.errors import InputError
from pgpo_jax.logs import Watch
from pgpo_jax.logs.console import summary
from pgpo_jax.tasks import Outcome, Question, TaskConfig, load, rewards

FUNCTIONS = """
import asyncio
running = []
def right(prompts, completions, answer, **columns):
    return [(float(c == a), "" if c == a else "wrong") for c, a in zip(completions, answer)]
def brief(completions, **columns):
    return [None if not c else -float(len(c)) for c in completions]
def nothing(completions, **columns):
    return [None for _ in completions]
def tenth(completions, **columns):
    return [0.1] * len(completions)
def rest(completions, **columns):
    return [0.7] * len(completions)
async def slow(completions, **columns):
    running.append(1)
    for _ in range(1000):
        if len(running) == 2:
            return [1.0] * len(completions)
        await asyncio.sleep(0)
    raise RuntimeError("alone")
async def slow_too(completions, **columns):
    return await slow(completions)
async def fails(completions, **columns):
    return [1 / len(c) for c in completions]
"""


@pytest.fixture
def judged(tmp_path, monkeypatch):
    """Outcomes of responses to the first questions, by reward functions of the file."""
    (tmp_path / "rewards_of_test_rewards.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(tmp_path))

    def by(*names, responses=("",), weights=()):
        functions = tuple(f"rewards_of_test_rewards:{name}" for name in names)
        task = load(TaskConfig(reward=functions, reward_weights=weights))
        return task, task.verify(task.train[: len(responses)], responses)

    return by


def test_several_functions_are_weighted_and_summed_and_none_is_left_out(judged):
    with pytest.warns(UserWarning, match=r"task.reward gave -1.5 for completion 1 \(.*\), outside"):
        task, outcomes = judged("right", "brief", responses=["", "abc"], weights=(2.0, 0.5))
    assert [outcome.reward for outcome in outcomes] == [0, -1.5]
    assert [dict(outcome.parts) for outcome in outcomes] == [
        {"right": 0.0},
        {"right": 0.0, "brief": -3.0},
    ]
    assert outcomes[0].feedback == "wrong"
    assert task.rewards == ("right", "brief")
    task.verify(task.train[:1], ["abc"])  # a second warning would be an error here


def test_a_sum_reaches_the_threshold_that_its_decimals_reach(judged):
    _, (outcome,) = judged("tenth", "rest")
    assert 0.1 + 0.7 < 0.8 <= outcome.reward


def test_a_completion_that_no_function_judges_is_refused(judged):
    with pytest.raises(InputError, match=r"brief, \S+nothing returned None for comple"):
        judged("brief", "nothing")


def test_async_functions_are_awaited_together(judged):
    _, (outcome,) = judged("slow", "slow_too", weights=(0.5, 0.5))
    assert outcome.reward == 1


def test_what_an_async_function_raises_names_it_and_its_row(judged):
    message = r"rewards_of_test_rewards:fails raised ZeroDivisionError: .* for completion 1 \("
    with pytest.raises(InputError, match=message):
        judged("tenth", "fails", responses=["a", "", "b"])


def test_an_async_function_that_takes_too_long_is_named():
    async def sleeps(**_):
        await asyncio.sleep(60)

    asked = rewards.Asked(["p"], ["c"], {}, ["k"])
    with pytest.raises(InputError, match=r"m:f took longer .* = 0.1 seconds for 1 completions; m"):
        rewards.call_rewards({"m:f": sleeps}, asked, limit=0.1)


def test_functions_of_one_name_are_told_apart_in_the_metrics():
    assert rewards.metric_names(["a:f", "b:f", "a:g", "a:mean"]) == ("a.f", "b.f", "g", "a.mean")


def test_a_prompt_that_is_no_column_is_the_conversation():
    question = Question(({"role": "user", "content": "q"},), "", "k")
    asked = rewards._asked([question], ["r"])
    assert asked.prompts == [[{"role": "user", "content": "q"}]]
    assert asked.completions == [[{"role": "assistant", "content": "r"}]]


# ---- what reads them -----------------------------------------------------------------------------


def answered(*groups):
    outcomes = [[Outcome(reward) for reward in group] for group in groups]
    texts = [["x"] * len(group) for group in groups]
    questions = [
        Question(({"role": "user", "content": "q"},), "", str(i)) for i in range(len(groups))
    ]
    return evaluation.Answered(
        questions, texts, outcomes, np.ones((len(groups), len(groups[0])), int)
    )


def test_an_interval_is_cut_where_rewards_are_shares_only():
    shares = evaluation.scores(answered([0.0, 0.0], [1.0, 1.0]), 2)
    assert (shares["avg@2/low"], shares["avg@2/high"]) == (0, 1)
    assert "reward_min" not in shares
    numbers = evaluation.scores(answered([-4.0, -2.0], [3.0, 5.0]), 2, threshold=4)
    assert numbers["avg@2"] == 0.5
    assert numbers["avg@2/low"] == pytest.approx(0.5 - 1.96 * 3.5, rel=1e-5)
    assert (numbers["reward_min"], numbers["reward_max"], numbers["pass@2"]) == (-4, 5, 0.5)


def test_a_mean_of_such_rewards_is_shown_as_a_number():
    row = {"eval/avg@2": 0.5, "eval/pass@2": 0.5}
    assert summary(row) == "avg@2 50.0% pass@2 50.0%"
    assert summary(row | {"eval/reward_min": -4.0}) == "avg@2 0.5 pass@2 50.0%"


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e25])
def test_advantages_are_right_for_rewards_of_any_size(scale):
    group = methods.group_statistics([[-scale, 0.0, 0.0, scale]], 0.5 * scale)
    assert group.success.tolist() == [False, False, False, True]
    deviation = scale * math.sqrt(2 / 3)
    expected = np.array([-scale, 0, 0, scale]) / (deviation + 1e-4)
    np.testing.assert_allclose(group.advantages, expected, rtol=1e-5)


def falls(*rewards_, deviation=1.0):
    """Whether the alarm of a falling reward is among those that fire."""
    watch = Watch()
    rows = [
        {"loss": 1.0, "reward/mean": reward, "reward/std": deviation, "context_fraction": 1.0}
        for reward in rewards_
        for _ in range(30)
    ]
    return any(alarm.name == "reward_fall" for row in rows for alarm in watch.check(row))


def test_rewards_below_0_fall_by_their_size_and_deviation():
    assert falls(0.8, 0.3)
    assert falls(-1.0, -2.0)
    assert not falls(-1.0, -1.3)
    assert not falls(0.01, -0.1), "noise around 0"
    assert falls(0.01, -0.8)
    assert not falls(-2.0, -1.0)


def test_a_task_that_gives_no_number_or_too_few_is_named(unchecked):
    question = Question(({"role": "user", "content": "q"},), "", "k")

    def task(*outcomes):
        return type("Mine", (), {"name": "mine", "verify": lambda self, q, r: list(outcomes)})()

    with pytest.raises(InputError, match="task: mine gave 1 outcomes for 2 responses"):
        evaluation.verify(task(Outcome(1.0)), [question], [["a", "b"]])
    for number in (math.nan, math.inf, 1e31):
        with pytest.raises(InputError, match=r"task: mine gave the reward .* to 'k'; must be a fi"):
            evaluation.verify(task(Outcome(number)), [question], [["a"]])
