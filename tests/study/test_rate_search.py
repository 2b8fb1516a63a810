"""The search for a learning rate: where it ends, and what it leaves alone."""

import itertools
import math

import pytest

from bakeoff.study.rate_search import search_rate


@pytest.mark.parametrize("best", [1e-4, 1e-3, 3e-3, 2e-2, 0.1])
def test_the_search_ends_beside_the_best_of_a_valley(best):
    tried = search_rate(lambda rate: abs(math.log(rate / best)), 3e-3, reach=6)
    found = min(tried, key=tried.get)
    assert 1 / 1.74 < found / best < 1.74  # the square root of 3
    rates = sorted(tried)
    steps = [high / low for low, high in itertools.pairwise(rates)]
    assert steps == pytest.approx([3] * len(steps))


def test_the_search_is_bounded_and_leaves_divergence():
    assert len(search_rate(lambda rate: -rate, 1.0, reach=4)) == 5
    assert len(search_rate(lambda rate: rate, 1.0, reach=4)) == 6
    tried = search_rate(lambda rate: rate if rate < 0.5 else float("inf"), 1.0)
    assert min(tried, key=tried.get) == 1.0 / 9 or tried[min(tried, key=tried.get)] < 0.5


def test_the_search_goes_down_to_where_training_does_not_diverge():
    tried = search_rate(lambda rate: rate if rate < 0.02 else float("inf"), 1.0)
    assert list(tried) == pytest.approx([1, 3, 1 / 3, 1 / 9, 1 / 27, 1 / 81])
    assert min(tried, key=tried.get) == pytest.approx(1 / 81)
    never = search_rate(lambda rate: float("inf"), 1.0, reach=2)
    assert list(never) == pytest.approx([1, 3, 1 / 3, 1 / 9])


@pytest.mark.parametrize(
    ("best", "tried"),
    [(1.0, [1, 3, 1 / 3]), (3.0, [1, 3, 9]), (9.0, [1, 3, 9]), (0.2, [1, 3, 1 / 3, 1 / 9])],
)
def test_what_is_tried(best, tried):
    found = search_rate(lambda rate: abs(math.log(rate / best)), 1.0, reach=2)
    assert list(found) == pytest.approx(tried)


def test_nothing_better_anywhere_keeps_the_start():
    found = search_rate(lambda rate: 0.0, 2.0)
    assert list(found) == pytest.approx([2.0, 6.0, 2 / 3])
    assert min(found, key=found.get) == 2.0
