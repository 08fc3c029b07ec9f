"""The numbers of a round's evaluation, against hand-computed cases."""

import math

import numpy as np
import pytest

from trimtab.rounds.evaluate import (
    Interval,
    bootstrap_mean,
    bootstrap_ratio,
    distinct_n,
    distinct_n_in_groups,
    kl_summary,
    pair_accuracy,
    perplexity,
    text_summary,
    win_rate,
    words,
)


def test_win_rate_counts_every_pair_of_samples_and_ties_half():
    challenger = np.array([[1.0, 3.0], [0.0, 0.0]])
    base = np.array([[2.0, 0.0], [0.0, 1.0]])
    # opening 1: 1>2 no, 1>0 yes, 3>2 yes, 3>0 yes = 3/4; opening 2: tie, no, tie, no = 1/4
    assert win_rate(challenger, base).value == pytest.approx(0.5)
    assert win_rate(base, challenger).value == pytest.approx(0.5)


def test_a_policy_against_itself_does_not_exclude_one_half_and_a_better_one_does():
    generator = np.random.default_rng(1)
    base = generator.normal(size=(240, 2))
    same = generator.normal(size=(240, 2))
    assert not win_rate(same, base).excludes(0.5)
    better = win_rate(same + 0.8, base)
    assert better.excludes(0.5) and better.low > 0.6


def test_the_interval_is_over_openings_so_more_samples_of_one_opening_do_not_narrow_it():
    generator = np.random.default_rng(2)
    openings = generator.normal(size=(100, 1))
    one = win_rate(openings, np.zeros((100, 1)))
    many = win_rate(np.repeat(openings, 20, axis=1), np.zeros((100, 1)))
    assert (one.low, one.high) == (many.low, many.high)


def test_bootstrap_agrees_with_the_normal_interval_and_repeats_by_seed():
    values = np.random.default_rng(3).normal(5, 2, size=400)
    interval = bootstrap_mean(values, seed=7)
    half_width = 1.96 * values.std() / math.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.high - interval.low == pytest.approx(2 * half_width, rel=0.05)
    assert bootstrap_mean(values, seed=7) == interval


def test_win_rate_refuses_different_openings_and_nothing():
    with pytest.raises(ValueError, match="row an opening"):
        win_rate(np.zeros((3, 1)), np.zeros((2, 1)))
    with pytest.raises(ValueError, match="nothing to average"):
        bootstrap_ratio(np.zeros(0), np.zeros(0))


def test_distinct_n_by_hand():
    assert distinct_n([["a", "b", "a", "b"], ["a", "b"]], 2) == pytest.approx(2 / 4)
    assert distinct_n([["a"]], 2) == 0.0
    assert distinct_n_in_groups([["a", "b"]] * 32, 2, group_size=16) == pytest.approx(1 / 16)
    assert distinct_n_in_groups([["a", "b"]] * 3, 2, group_size=16) == pytest.approx(1 / 3)


def test_words_drop_case_and_punctuation():
    assert words('"Hello," said Max — the DOG\'s friend.') == ["hello", "said", "max", "—", "the", "dog's", "friend"]


def test_perplexity_of_a_uniform_model_is_its_vocabulary():
    assert perplexity([np.full(3, -math.log(512)), np.full(9, -math.log(512))]) == pytest.approx(512)
    with pytest.raises(ValueError, match="at least one token"):
        perplexity([])


def test_kl_by_hand_and_zero_for_equal_models():
    same = kl_summary([np.array([-1.0, -2.0])], [np.array([-1.0, -2.0])], [0])
    assert same.k1_per_response.value == same.k3_per_response.value == 0.0
    summary = kl_summary([np.array([-1.0, -1.0]), np.array([-0.5])], [np.array([-2.0, -1.5]), np.array([-1.0])], [0, 1])
    assert summary.k1_per_response.value == pytest.approx((1.5 + 0.5) / 2)
    assert summary.k1_per_40_tokens.value == pytest.approx(40 * 2.0 / 3)
    k3 = sum(math.exp(-x) - 1 + x for x in (1.0, 0.5, 0.5)) / 2
    assert summary.k3_per_response.value == pytest.approx(k3)
    with pytest.raises(ValueError, match="2 log-probs from the policy and 1"):
        kl_summary([np.zeros(2)], [np.zeros(1)], [0])


def test_text_summary_takes_one_response_an_opening_for_diversity_and_all_for_length():
    texts = ["a b c", "a b c", "d e f", "g h i"]
    logprobs = [np.full(4, -1.0), np.full(2, -1.0), np.full(6, -1.0), np.full(8, -1.0)]
    summary = text_summary(texts, logprobs, [True, False, False, False], [0, 0, 1, 1])
    assert summary.distinct_2 == pytest.approx(1.0)
    assert summary.tokens_mean.value == pytest.approx(5.0)
    assert (summary.ended_share, summary.perplexity) == (0.25, pytest.approx(math.e))


def test_pair_accuracy_leaves_ties_of_people_out_and_counts_ties_of_scores_half():
    scores = [np.array([2.0, 1.0, 0.0]), np.array([1.0, 1.0])]
    interval = pair_accuracy(scores, [(1, 1, 2), (1, 2)], ["t1", "t2"])
    assert interval.value == pytest.approx(2.5 / 3)
    assert interval.low == pytest.approx(0.5) and interval.high == pytest.approx(1.0)


def test_intervals_print_as_a_reader_wants_them():
    assert Interval(0.724, 0.701, 0.746).percent() == "72.4 % (70.1 to 74.6)"
    assert Interval(7.314, 6.9, 7.72).plain() == "7.31 (6.90 to 7.72)"
