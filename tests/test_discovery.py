"""discovery@k: its estimates and intervals, and what the section `discovery` refuses."""

import itertools

import numpy as np
import pytest

from pgpo_jax.discovery import (
    DiscoveryConfig,
    Found,
    budgets,
    curve,
    difference,
    discovered,
    summarise,
    wilson,
)
from pgpo_jax.errors import InputError


def test_budgets_are_powers_of_two_and_the_whole():
    assert budgets(1) == [1]
    assert budgets(8) == [1, 2, 4, 8]
    assert budgets(12) == [1, 2, 4, 8, 12]


@pytest.mark.parametrize(("drawn", "right"), [(5, 0), (5, 1), (6, 2), (4, 4)])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(drawn, right):
    found = Found(drawn, tuple(range(1, right + 1)))
    for k in range(1, drawn + 1):
        subsets = list(itertools.combinations(range(drawn), k))
        share = np.mean([any(place < right for place in subset) for subset in subsets])
        assert discovered(found, k, "best_of") == pytest.approx(share)


@pytest.mark.parametrize("method", ["distillation", "multi_turn"])
def test_attempts_that_depend_on_each_other_count_in_their_order(method):
    found = Found(3, (3,))
    assert [discovered(found, k, method) for k in (1, 2, 3, 8)] == [0, 0, 1, 1]
    assert discovered(Found(8, ()), 8, method) == 0


def test_a_curve_never_falls_and_lies_in_its_interval():
    found = [Found(8, (2, 5)), Found(8, ()), Found(8, (8,))]
    told = curve(found, "best_of", 8)
    assert told.attempts == [1, 2, 4, 8]
    assert told.share == sorted(told.share)
    assert told.share[0] == pytest.approx((2 / 8 + 1 / 8) / 3)
    assert told.share[-1] == pytest.approx(2 / 3)
    for share, low, high in zip(told.share, told.low, told.high, strict=True):
        assert 0 <= low < share < high <= 1


def test_the_interval_is_wilsons_and_has_a_width_where_none_or_all_are_solved():
    assert wilson(0.5, 20) == pytest.approx((0.299, 0.701), abs=1e-3)  # tabled
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.278), abs=1e-3)
    assert wilson(1.0, 10) == pytest.approx((0.722, 1.0), abs=1e-3)


def test_a_difference_is_over_pairs():
    ours = np.array([1.0] * 5 + [0.0] * 5)
    mean, low, high = difference(ours, np.zeros(10))
    assert (mean, low < mean < high) == (0.5, True)
    assert difference(ours, ours) == (0, 0, 0)


def test_the_summary_compares_the_methods_on_the_same_questions():
    ours, theirs = [Found(2, (2,)), Found(1, (1,))], [Found(4, ())] * 2
    told = summarise({"distillation": ours, "best_of": theirs}, 4)
    assert (told["questions"], told["attempts"]) == (2, 4)
    assert told["methods"]["distillation"]["share"] == [0.5, 1, 1]
    assert told["methods"]["distillation"]["attempts_used"] == 1.5
    assert told["methods"]["best_of"]["share"] == [0, 0, 0]
    assert told["ahead"] == {"best_of": [1, 1, 1]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"questions": 0}, "discovery.questions: got 0; must be at least 1"),
        ({"candidates": 0}, "discovery.candidates: got 0; must be at least 1"),
        ({"screening_samples": 0}, "discovery.screening_samples: got 0; must be at least 1"),
        ({"max_success_rate": 1.0}, "discovery.max_success_rate: got 1.0; must be at least 0 and"),
        ({"attempts": 0}, "discovery.attempts: got 0; must be at least 1"),
        (
            {"attempts": 10, "samples_per_step": 4},
            "discovery.samples_per_step: got 4; must be at least 1, and divide discovery.attempts "
            "= 10",
        ),
        ({"methods": ()}, "discovery.methods: got (); must be some of distillation, best_of, "),
        ({"methods": ("best_of", "best_of")}, "discovery.methods: got ('best_of', 'best_of')"),
        ({"conversations": 3}, "discovery.conversations: got 3; must be at least 1, and divide"),
        ({"turns": 0}, "discovery.turns: got 0; must be at least 1, or null"),
    ],
)
def test_a_section_that_means_nothing_is_refused(fields, message):
    with pytest.raises(InputError) as error:
        DiscoveryConfig(**fields)
    assert str(error.value).startswith(message)
