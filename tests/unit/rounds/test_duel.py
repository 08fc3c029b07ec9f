"""A comparison: people judge pairs that are blind, and the page says what came out."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from trimtab.rounds.duel.people import people_wins
from trimtab.rounds.duel.plan import Duel, DuelError, DuelPlan, Side
from trimtab.rounds.duel.report import verdict, write_duel_report
from trimtab.rounds.duel.run import run_duel
from trimtab.rounds.evaluate import bootstrap_mean, win_rate
from trimtab_client import Sampling

PROMPTS = tuple(f"Prompt {i}: " for i in range(12))


def side(name: str, score: float | None = None) -> Side:
    texts = tuple(tuple(f"{name} {i}.{s} <b>*" for s in range(2)) for i in range(len(PROMPTS)))
    chance = np.random.default_rng(0 if score is None else int(score * 10))
    scores = None if score is None else chance.normal(score, 1.0, (len(PROMPTS), 2))
    return Side(name, f"run/{name}@1", texts, np.full((12, 2), 9.0), np.ones((12, 2), bool), scores)


def plan(folder: Path, judge: str) -> DuelPlan:
    return DuelPlan("a", "b", PROMPTS, judge, Sampling(n=2, seed=3), folder, "store", 1)


def test_a_page_that_would_get_its_token_in_the_clear_is_refused_before_anything_is_sampled(tmp_path):
    far = replace(plan(tmp_path, "people:http://page:7110/c/a-or-b"), token_file=tmp_path / "token")
    with pytest.raises(DuelError, match=r"^--judge: http://page:7110 is another machine, .* https:// address"):
        run_duel(far, lambda text: pytest.fail(text))


def test_peoples_rankings_of_blind_pairs_are_counted_for_the_right_side(tmp_path):
    file = tmp_path / "rankings.jsonl"
    duel = plan(tmp_path, f"people:{file}")
    with pytest.raises(DuelError, match=r"people have not judged all pairs: .* rank the sets in"):
        people_wins(duel, side("a"), side("b"))
    pairs = [json.loads(line) for line in (tmp_path / "to_rank.jsonl").read_text().splitlines()]
    firsts = [pair["responses"][0][0] for pair in pairs]
    assert {"a", "b"} == set(firsts), "either side stands first now and then"

    def ranked(ranks_of: dict[str, int]) -> str:
        rows = [{"task": p["task"], "ranks": [ranks_of[text[0]] for text in p["responses"]]} for p in pairs]
        return "".join(json.dumps(row) + "\n" for row in rows)

    for ranks_of, share in (({"a": 2, "b": 1}, 1.0), ({"a": 1, "b": 2}, 0.0), ({"a": 1, "b": 1}, 0.5)):
        file.write_text(ranked(ranks_of))
        assert people_wins(duel, side("a"), side("b")).tolist() == [share] * len(PROMPTS)


def test_the_page_shows_the_win_rate_both_sides_and_no_markup_of_theirs(tmp_path):
    first, second = side("a", 0.0), side("b", 2.0)
    rate = win_rate(second.scores_PS, first.scores_PS)
    wins_P = np.full(len(PROMPTS), rate.value)
    page = write_duel_report(Duel(plan(tmp_path, "vader"), first, second, rate, wins_P, bootstrap_mean(wins_P)))
    text = page.read_text()
    assert rate.percent() in text and "B is better" in verdict(
        Duel(plan(tmp_path, "vader"), first, second, rate, wins_P, None)
    )
    assert text.count("> *A* (") == text.count("> *B* (") == len(PROMPTS)
    assert "<b>" not in text and "b 0.0 &lt;b>\\*" in text
    assert (tmp_path / "duel.png").stat().st_size > 10_000
    assert json.loads((tmp_path / "duel.json").read_text())["win_rate"]["value"] == rate.value
