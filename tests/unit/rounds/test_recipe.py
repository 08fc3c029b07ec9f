"""A recipe is refused in one line that names the key, and never changes under a run that was begun with it."""

from pathlib import Path

import pytest
import yaml

from trimtab.rounds.recipe import RecipeError, check_unchanged, parse_recipe
from trimtab.rounds.scorers import ScorerError, check_spec, open_scorer, spec_with_paths

EXAMPLE = Path(__file__).parents[3] / "examples" / "rounds" / "stories.yaml"


@pytest.fixture
def values() -> dict:
    return yaml.safe_load(EXAMPLE.read_text())


def set_key(values: dict, key: str, value: object) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        values = values[parent]
    values[last] = value


def test_the_example_is_a_recipe(values):
    recipe = parse_recipe(values, "stories.yaml").resolved(EXAMPLE.parent)
    assert recipe.ppo.start == "sft" and recipe.ppo.stage.max_new_tokens == 40
    assert Path(recipe.model).is_dir() and Path(recipe.evaluate.judge.partition(":")[2]).is_file()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("name", "a/b", "name"),
        ("rounds", 0, "rounds"),
        ("sample.k", 3, "sample.k"),
        ("rank.source", "wizard", "rank"),
        ("rank.gold", "sentiment", "rank.gold"),
        ("evaluate.judge", "words:", "evaluate.judge"),
        ("ppo.start", "last", "ppo.start"),
        ("ppo.value_model", "x", "ppo.value_model: the rounds fill it in"),
        ("sft.model", "x", "sft.model: the rounds fill it in"),
        ("ppo.minibatch_size", 100, "batch_size 128 is not a multiple"),
        ("ppo.kl_coeficient", 0.1, "ppo.kl_coeficient"),
        ("reward.optimizer.learning_rate", -1, "reward.optimizer.learning_rate"),
        ("sft.data", None, "sft.data"),
        ("rank", {"source": "people", "address": "http://page:7110", "token_file": "t"}, "give its https:// address"),
    ],
)
def test_a_wrong_key_is_named_in_one_line(values, key, value, said):
    set_key(values, key, value)
    with pytest.raises(RecipeError) as caught:
        parse_recipe(values, "stories.yaml")
    message = str(caught.value)
    assert message.startswith("stories.yaml: ") and said in message and "\n" not in message


def test_a_changed_recipe_or_changed_data_is_refused_but_more_rounds_are_welcome(values):
    recipe = parse_recipe(values, "f")
    begun = recipe.model_dump(mode="json")
    set_key(values, "rounds", 5)
    check_unchanged(parse_recipe(values, "f"), begun, {"sft.data": "a"}, {"sft.data": "a"})
    with pytest.raises(RecipeError, match=r"sft\.data: the file is not what it was"):
        check_unchanged(recipe, begun, {"sft.data": "b"}, {"sft.data": "a"})
    set_key(values, "ppo.kl_coefficient", 0.1)
    with pytest.raises(RecipeError, match=r"ppo\.kl_coefficient was 0\.2 when this run was begun and is 0\.1 now"):
        check_unchanged(parse_recipe(values, "f"), begun, {}, {})


def test_scorers_are_one_line_of_text(tmp_path):
    assert check_spec("words:happy,glad") == ("words", "happy,glad")
    for wrong in ("", "vader:x", "words", "reward:", "judge:x"):
        with pytest.raises(ScorerError, match="is no scorer"):
            check_spec(wrong)
    (tmp_path / "judge.json").write_text("{}")
    assert spec_with_paths("sentences:judge.json", tmp_path) == f"sentences:{tmp_path / 'judge.json'}"
    assert spec_with_paths("reward:version:a/b@1", tmp_path) == "reward:version:a/b@1"


def test_counted_words_are_those_of_the_answer():
    from contextlib import ExitStack

    with ExitStack() as stack:
        scorer = open_scorer("words:happy,glad", lambda source: "", stack)
    assert scorer.score(["happy", [{"role": "user", "content": "glad"}]], ["Happy! Glad.", "sad"]).tolist() == [2, 0]
