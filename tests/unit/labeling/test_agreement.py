"""Agreement against worked examples, and against the definitions written out."""

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.labeling.agreement import Judged, agreement, compare_rankings, disagreement, ordinal_alpha


def test_pairs_are_counted_by_order_and_ties():
    counts = compare_rankings((1, 2, 3, 3), (2, 1, 3, 4))
    assert (counts.same, counts.opposite, counts.both_tied, counts.one_tied) == (4, 1, 0, 1)
    assert counts.share == pytest.approx(0.8)


def test_alpha_is_that_of_krippendorffs_example():
    # Krippendorff 2011, p. 8: four observers, twelve units; the ordinal alpha is 0.815.
    missing = None
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, missing, missing, missing],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, missing, 3],
        [missing, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, missing],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, missing],
    ]
    units = [[row[i] for row in observers] for i in range(12)]
    assert ordinal_alpha(units) == pytest.approx(0.815, abs=0.0005)


def test_equal_rankings_agree_wholly_and_reversed_ones_not_at_all():
    same = agreement([Judged("t", "ann", (1, 2, 3)), Judged("t", "bob", (1, 2, 3))])
    assert same.pairs.share == 1 and same.rank_alpha == pytest.approx(1)
    reverse = agreement([Judged("t", "ann", (1, 2, 3)), Judged("t", "bob", (3, 2, 1))])
    assert reverse.pairs.share == 0 and reverse.rank_alpha < 0
    assert disagreement([Judged("t", "ann", (1, 2, 3)), Judged("t", "bob", (3, 2, 1))]) == 1


def test_nothing_shared_is_no_agreement_rather_than_a_number():
    alone = agreement([Judged("t", "ann", (1, 2)), Judged("u", "bob", (1, 2))])
    assert (alone.pairs.share, alone.rank_alpha, alone.rating_alpha, alone.shared_tasks) == (None, None, None, 0)


def test_each_person_is_measured_against_the_others():
    odd_one_out = agreement(
        [Judged("t", "ann", (1, 2, 3)), Judged("t", "bob", (1, 2, 3)), Judged("t", "cy", (3, 2, 1))]
    )
    assert odd_one_out.by_labeler["ann"].share == pytest.approx(0.5) and odd_one_out.by_labeler["cy"].share == 0


def test_missing_ratings_are_left_out():
    judged = [
        Judged("t", "ann", (1, 2), (7, None)),
        Judged("t", "bob", (1, 2), (7, 3)),
        Judged("u", "ann", (1, 2), (1, 2)),
    ]
    judged.append(Judged("u", "bob", (1, 2), (1, 2)))
    assert agreement(judged).rating_alpha == pytest.approx(1)


UNITS = st.lists(st.lists(st.none() | st.integers(1, 7), min_size=1, max_size=5), min_size=1, max_size=12)


@given(UNITS)
def test_alpha_is_one_less_observed_over_expected_disagreement(units):
    found, expected = ordinal_alpha(units), plain_alpha(units)
    assert found is expected if expected is None else found == pytest.approx(expected)


def plain_alpha(units: list[list[int | None]]) -> float | None:
    """Krippendorff's definition pair by pair: 1 - D_observed / D_expected with the ordinal metric, in plain loops."""
    pairable = [[value for value in unit if value is not None] for unit in units]
    pairable = [unit for unit in pairable if len(unit) > 1]
    values = [value for unit in pairable for value in unit]
    if len(set(values)) < 2:
        return None

    def squared_distance(a: int, b: int) -> float:
        low, high = min(a, b), max(a, b)
        between = sum(low <= value <= high for value in values)
        return (between - (values.count(low) + values.count(high)) / 2) ** 2

    observed = math.fsum(
        2 * squared_distance(a, b) / (len(unit) - 1) for unit in pairable for a, b in combinations(unit, 2)
    )
    expected = math.fsum(2 * squared_distance(a, b) for a, b in combinations(values, 2)) / (len(values) - 1)
    return 1 - observed / expected


@given(st.lists(st.integers(1, 4), min_size=2, max_size=9), st.randoms(use_true_random=False))
def test_pairwise_agreement_is_the_share_of_untied_pairs_in_the_same_order(first, dice):
    second = [dice.randint(1, 4) for _ in first]
    both = [(i, j) for i, j in combinations(range(len(first)), 2) if first[i] != first[j] and second[i] != second[j]]
    same = sum((first[i] < first[j]) == (second[i] < second[j]) for i, j in both)
    assert compare_rankings(first, second).share == (same / len(both) if both else None)
