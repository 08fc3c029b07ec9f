"""Every recipe that stands in examples/ is a config that its stage takes."""

from pathlib import Path

import pytest

from trimtab.cli.settings import read_yaml
from trimtab.cli.stage_config import stage_config
from trimtab.trainer.stages import LoraConfig, PpoConfig, stage_from_proto

RECIPES = Path(__file__).parents[3] / "examples" / "recipes"
SWITCHED_ON = {
    "adaptive-kl": {"adaptive_kl_target": 6.0},
    "ema": {"ema_decay": 0.992},
    "gold": {"gold_scorer": "judge"},
    "grpo": {"advantage": "grpo", "samples_per_prompt": 8},
    "lora": {"publish": "adapter", "lora": LoraConfig(rank=16, alpha=32), "value_lora": LoraConfig(rank=16, alpha=32)},
    "old-logprobs": {"old_logprobs": "generator"},
    "overlap": {"max_staleness": 1},
    "ptx": {"ptx_data": "pretraining.jsonl", "ptx_coefficient": 27.8},
    "rloo": {"advantage": "group", "samples_per_prompt": 4},
    "value-warmup": {"value_warmup_steps": 10, "value_model": ""},
}


def test_every_recipe_is_named_here():
    assert {path.stem for path in RECIPES.glob("*.yaml")} == set(SWITCHED_ON)


@pytest.mark.parametrize("name", SWITCHED_ON)
def test_a_recipe_is_a_config_with_its_one_thing_switched_on(name):
    path = RECIPES / f"{name}.yaml"
    config = stage_from_proto("ppo", stage_config("ppo", read_yaml(path), str(path)))
    assert isinstance(config, PpoConfig)
    assert {key: getattr(config, key) for key in SWITCHED_ON[name]} == SWITCHED_ON[name]
