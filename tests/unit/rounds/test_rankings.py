"""Sources of rankings: a simulated labeler that is what it says, and a file that is checked and waited for."""

import json

import numpy as np
import pytest

from trimtab.rounds.ranking.file_source import FileSource
from trimtab.rounds.ranking.simulated_labeler import SimulatedLabeler, ranks_with_ties
from trimtab.rounds.ranking.source import AnswerSet
from trimtab.rounds.scorers import Scorer


def answer_set(number: int, *texts: str) -> AnswerSet:
    return AnswerSet(f"r1-{number:05}", "Once", tuple(texts), (False,) * len(texts))


SETS = [answer_set(i, "1.0", "3.0", "2.0", "3.0") for i in range(3)]
GOLD = Scorer("numbers", lambda prompts, answers: np.array([float(answer) for answer in answers]))


def labeler(**settings) -> SimulatedLabeler:
    return SimulatedLabeler(GOLD, **({"noise": 0.0, "tie_within": 0.0, "labelers": 1, "seed": 0} | settings))


def test_without_noise_the_simulated_labeler_follows_the_gold_score_and_ties_equals():
    collected = labeler(labelers=2).poll(SETS)
    assert {ranked.ranks for ranked in collected.rankings} == {(4, 1, 3, 1)}
    assert {ranked.labeler for ranked in collected.rankings} == {"simulated-1", "simulated-2"}
    assert len(collected.rankings) == 6 and not collected.waiting


def test_its_noise_is_that_of_the_plackett_luce_model():
    sets = [answer_set(i, "0.0", "0.3", "-9.0", "-9.0") for i in range(4000)]
    rankings = labeler(noise=0.2, seed=7).poll(sets).rankings
    share = np.mean([ranked.ranks[1] < ranked.ranks[0] for ranked in rankings])
    assert share == pytest.approx(1 / (1 + np.exp(-0.3 / 0.2)), abs=0.03)


def test_a_simulated_ranking_depends_on_seed_set_and_labeler_alone():
    many = [answer_set(i, "0.1", "0.2", "0.3", "0.4") for i in range(40)]
    whole = {r.answers.task: r.ranks for r in labeler(noise=0.5).poll(many).rankings}
    backwards = {r.answers.task: r.ranks for r in labeler(noise=0.5).poll(many[::-1]).rankings}
    assert whole == backwards and len(set(whole.values())) > 5
    assert whole != {r.answers.task: r.ranks for r in labeler(noise=0.5, seed=1).poll(many).rankings}


def test_scores_near_the_best_of_their_rank_tie():
    assert ranks_with_ties(np.array([1.0, 0.95, 0.91, 0.5]), 0.1) == (1, 1, 1, 4)
    assert ranks_with_ties(np.array([1.0, 0.95, 0.89, 0.5]), 0.1) == (1, 1, 3, 4)


def file_source(tmp_path, rows: list, minimum: int = 1) -> FileSource:
    file = tmp_path / "rankings.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FileSource(file, minimum, 5.0)
    source.offer(SETS, tmp_path / "to_rank.jsonl")
    return source


def test_a_file_of_rankings_is_waited_for_by_name(tmp_path):
    source = FileSource(tmp_path / "rankings.jsonl", 1, 5.0)
    source.offer(SETS, tmp_path / "to_rank.jsonl")
    assert "rankings.jsonl is not there: rank the sets in" in source.poll(SETS).waiting
    rows = [{"task": one.task, "ranks": [4, 1, 3, 1], "labeler": "ann"} for one in SETS]
    waiting = file_source(tmp_path, rows[:1]).poll(SETS).waiting
    assert "1 of 3 sets have rankings; missing: r1-00001, r1-00002" in waiting
    collected = file_source(tmp_path, rows).poll(SETS)
    assert not collected.waiting and [ranked.ranks for ranked in collected.rankings] == [(4, 1, 3, 1)] * 3
    assert "of 2 different labelers" in file_source(tmp_path, rows + rows, minimum=2).poll(SETS).waiting


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"task": "r9-00001", "ranks": [1, 2, 3, 4]}, "rankings.jsonl:1: task: 'r9-00001' is not a set of this round"),
        ({"task": "r1-00000", "ranks": [1, 2, 3]}, "rankings.jsonl:1: ranks: 3 ranks for 4 responses"),
        ({"task": "r1-00000", "ranks": [1, 2, 3, "x"]}, "rankings.jsonl:1: ranks[3]: a rank is a whole number"),
        ({"task": "r1-00000", "ranks": [1, 2], "responses": ["1.0", "9"]}, "rankings.jsonl:1: responses: they are not"),
    ],
)
def test_a_wrong_row_is_named_by_line_and_field(tmp_path, row, said):
    assert said in file_source(tmp_path, [row]).poll(SETS).waiting


def test_ranks_belong_to_the_responses_of_their_own_row(tmp_path):
    row = {"task": "r1-00000", "responses": ["3.0", "3.0", "2.0", "1.0"], "ranks": [1, 2, 3, 4]}
    collected = file_source(tmp_path, [row]).poll(SETS[:1])
    assert collected.rankings[0].ranks == (4, 1, 3, 2)


def test_a_labelers_second_ranking_of_a_set_replaces_the_first(tmp_path):
    rows = [{"task": "r1-00000", "ranks": ranks, "labeler": "ann"} for ranks in ([1, 2, 3, 4], [4, 3, 2, 1])]
    collected = file_source(tmp_path, rows).poll(SETS[:1])
    assert [ranked.ranks for ranked in collected.rankings] == [(4, 3, 2, 1)]
