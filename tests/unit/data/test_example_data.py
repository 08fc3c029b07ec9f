"""The example's sets keep apart what must be kept apart, and come out equal each time."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from trimtab.trainer.data import check_file, load_rankings

ROOT = Path(__file__).parents[3] / "examples" / "data"


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(prepare, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("example")
    prepare.prepare(out)
    return out


def rows(made: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (made / name).read_text().splitlines()]


def test_every_set_is_good_and_of_its_kind(made):
    kinds = {"sft/train": "demonstrations", "ppo/openings": "prompts", "reward/train": "rankings"}
    kinds |= {"sft/validation": "demonstrations", "evaluation/openings": "prompts", "reward/heldout": "rankings"}
    for name, kind in kinds.items():
        report = check_file(made / f"{name}.jsonl")
        assert report.ok and report.kind == kind, (name, report.problems[:3])


def test_equal_sources_give_equal_bytes(prepare, made, tmp_path):
    prepare.prepare(tmp_path)
    for file in made.rglob("*.json*"):
        assert file.read_bytes() == (tmp_path / file.relative_to(made)).read_bytes()


def test_evaluation_openings_are_many_and_begin_no_story_that_training_saw(made):
    held_out = [row["prompt"] for row in rows(made, "evaluation/openings.jsonl")]
    stories = [row["text"] for name in ("train", "validation") for row in rows(made, f"sft/{name}.jsonl")]
    openings = {row["prompt"] for row in rows(made, "ppo/openings.jsonl")}
    assert len(set(held_out)) == len(held_out) >= 200
    assert not openings & set(held_out)
    assert not [text for text in held_out if any(story.startswith(text) for story in stories)]


def test_rankings_have_4_to_9_responses_and_held_out_tasks_are_not_trained_on(made):
    train, held_out = load_rankings(made / "reward/train.jsonl"), load_rankings(made / "reward/heldout.jsonl")
    assert {len(ranking.responses) for ranking in train} == set(range(4, 10))
    assert not {ranking.group for ranking in train} & {ranking.group for ranking in held_out}
    texts = {text for ranking in train for text in ranking.responses}
    assert not texts & {text for ranking in held_out for text in ranking.responses}


def test_the_judge_learns_from_no_text_that_the_reward_model_sees(prepare, made):
    judge = {prepare.key(row["text"]) for row in rows(made, "judge/train.jsonl")}
    assert len(judge) > 3000
    for name in ("train", "heldout", "heldout_persons"):
        seen = {prepare.key(text) for row in rows(made, f"reward/{name}.jsonl") for text in row["responses"]}
        assert not judge & seen


def test_ranks_share_a_place_within_the_tie_and_nowhere_else(prepare):
    assert prepare.ranks([2.0, 1.8, 1.6, -1.0], 0.3) == [1, 1, 3, 4]
    assert prepare.ranks([1, 3, 3], 0) == [3, 1, 1]


def test_one_rater_agrees_with_the_others_about_as_published(made):
    agreement = json.loads((made / "manifest.json").read_text())["rater_agreement"]
    assert 0.78 < agreement["low"] < agreement["share"] < agreement["high"] < 0.88
