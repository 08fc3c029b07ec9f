"""docs/reward.md: the settings it shows are settings, and it names every kind of scorer."""

import re
from pathlib import Path
from typing import get_args

import yaml

from trimtab.reward.config import RewardConfig
from trimtab.reward.rules import Response, function_rule
from trimtab.reward.scorer_config import AnyRule, ModelSettings, SumSettings

PAGE = Path("docs/reward.md").read_text()


def block(language: str) -> str:
    return PAGE.split(f"```{language}\n")[1].split("```")[0]


def test_the_example_of_several_scorers_is_a_config_with_every_kind():
    config = RewardConfig(**yaml.safe_load(block("yaml")))
    assert next(iter(config.all_scorers())) == "blend"
    kinds = {kind.model_fields["kind"].annotation for kind in (ModelSettings, *get_args(AnyRule), SumSettings)}
    known = {get_args(kind)[0] for kind in kinds}
    assert {settings.kind for settings in config.scorers.values()} == known
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M)) == known


def test_the_example_of_a_function_is_one(tmp_path):
    (tmp_path / "my_rules.py").write_text(block("python"))
    rule = function_rule({"function": "my_rules:style", "folder": str(tmp_path)})
    assert rule(Response("Hi", "Hello!!", "")) == -2
