"""What a reward model reports about itself: accuracy by labelers, intervals, calibration, length."""

import json

import numpy as np
import pytest

from trimtab.trainer.data import TokenizedRanking, TokenSequence
from trimtab.trainer.rankings import untied_pairs
from trimtab.trainer.reward_plots import write_report
from trimtab.trainer.reward_report import HeldOutScores, make_report


def ranking(ranks, labeler="", group="", lengths=None, seed=0):
    random = np.random.default_rng(seed)
    lengths = lengths or [5] * len(ranks)
    sequences = tuple(TokenSequence(random.integers(3, 1000, 3 + length).astype(np.int32), 3) for length in lengths)
    return TokenizedRanking(sequences, np.array(ranks), labeler, group)


def people_who_follow_the_score(count=400, seed=0):
    """Pairs that people decide with the very probability that the model predicts."""
    random = np.random.default_rng(seed)
    scores = random.normal(0, 1.5, (count, 2))
    first_wins = random.random(count) < 1 / (1 + np.exp(-(scores[:, 0] - scores[:, 1])))
    rankings = [
        ranking([1, 2] if wins else [2, 1], f"ann{i % 3}", f"t{i}", [4 + i % 7, 9], i)
        for i, wins in enumerate(first_wins)
    ]
    return HeldOutScores(rankings, tuple(scores.astype(np.float32)))


def test_accuracy_counts_untied_pairs_and_equal_scores_as_half():
    rankings = [ranking([1, 2, 2, 3], seed=1), ranking([2, 1], seed=2)]
    scores = (np.array([3.0, 1, 2, 2], dtype=np.float32), np.array([5.0, 4], dtype=np.float32))
    right = sum(
        (s[a] > s[b]) + 0.5 * (s[a] == s[b])
        for s, r in zip(scores, rankings, strict=True)
        for a, b in zip(*untied_pairs(r.ranks_K), strict=True)
    )
    report = make_report(HeldOutScores(rankings, scores))
    assert report.accuracy.pairs == 6 and report.accuracy.share == pytest.approx(right / 6)
    assert report.accuracy_by_k[2].share == 0 and report.accuracy_by_k[4].pairs == 5
    assert report.training_labelers is None and report.held_out_labelers is None


def test_labelers_that_training_knew_are_told_from_others():
    right, wrong = np.array([2.0, 1]), np.array([1.0, 2])
    held_out = HeldOutScores(
        [ranking([1, 2], "ann"), ranking([1, 2], "bob"), ranking([1, 2], "bob"), ranking([1, 2])],
        (right, wrong, right, wrong),
    )
    report = make_report(held_out, [ranking([1, 2], "ann", seed=9)])
    assert report.training_labelers is not None and report.held_out_labelers is not None
    assert (report.training_labelers.pairs, report.training_labelers.share) == (1, 1.0)
    assert (report.held_out_labelers.pairs, report.held_out_labelers.share) == (2, 0.5)
    assert (report.accuracy.pairs, report.accuracy.share) == (4, 0.5)


def test_texts_that_training_had_are_counted():
    seen, new = ranking([1, 2], seed=1), ranking([1, 2], seed=2)
    held_out = HeldOutScores([seen, new], (np.array([1.0, 0]),) * 2)
    assert make_report(held_out, [seen]).rankings_seen_in_training == 1


def test_the_interval_is_that_of_whole_groups():
    """Ten copies of one opinion tell no more than one: the interval is as wide as for the groups alone."""
    rng = np.random.default_rng(0)
    right = rng.random(60) < 0.7
    scores = [np.array([2.0, 1]) if one else np.array([1.0, 2]) for one in right]
    alone = make_report(HeldOutScores([ranking([1, 2], group=f"t{i}") for i in range(60)], tuple(scores)))
    copied = make_report(
        HeldOutScores(
            [ranking([1, 2], group=f"t{i}") for i in range(60) for _ in range(10)],
            tuple(score for score in scores for _ in range(10)),
        )
    )
    assert copied.accuracy.share == pytest.approx(alone.accuracy.share)
    assert copied.accuracy.high - copied.accuracy.low == pytest.approx(alone.accuracy.high - alone.accuracy.low)
    expected = 2 * 1.96 * np.sqrt(0.7 * 0.3 / 60)
    assert alone.accuracy.high - alone.accuracy.low == pytest.approx(expected, rel=0.2)


def test_a_model_that_predicts_what_people_do_is_calibrated_and_one_twice_as_sure_is_not():
    held_out = people_who_follow_the_score(4000)
    honest = make_report(held_out)
    sure = make_report(HeldOutScores(held_out.rankings, tuple(3 * score for score in held_out.scores)))
    assert honest.calibration_error < 0.03 < 0.08 < sure.calibration_error
    assert sum(one.observed.pairs for one in honest.calibration) == 4000
    predicted = [one.predicted for one in honest.calibration]
    assert predicted == sorted(predicted) and len(predicted) == 10


def test_length_is_that_of_the_response():
    lengths = [1, 2, 3, 4, 5, 6]
    held_out = HeldOutScores([ranking([6, 5, 4, 3, 2, 1], lengths=lengths)], (np.array([1.0, 2, 3, 4, 5, 0]),))
    report = make_report(held_out)
    assert held_out.response_tokens_B.tolist() == lengths
    assert report.longer_preferred_by_people == 1 and report.longer_preferred_by_model == pytest.approx(10 / 15)


def test_the_report_is_written_with_its_plots(tmp_path):
    held_out = people_who_follow_the_score()
    report = make_report(held_out, [ranking([1, 2], "ann0")])
    write_report(report, held_out, tmp_path, mean=0.0, std=1.5)
    written = json.loads((tmp_path / "reward_report.json").read_text())
    assert written["accuracy"]["low"] < written["accuracy"]["share"] < written["accuracy"]["high"]
    for name in ("reward_calibration.png", "reward_length.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
