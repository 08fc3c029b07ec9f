"""Promises of the stage files: proto field names, numbers as people write them, one line for a wrong key."""

from __future__ import annotations

import re

import pytest
import typer

from trimtab.cli.errors import CommandError
from trimtab.cli.settings import merged, parse_assignments
from trimtab.cli.stage_config import stage_config
from trimtab_client.v1 import trainer_pb2


def test_shared_and_own_keys_stand_side_by_side() -> None:
    config = stage_config("sft", {"model": "m", "data": "d.jsonl", "epochs": 2, "optimizer": {"beta2": 0.9}}, "f")
    assert config == trainer_pb2.SftConfig(
        stage=trainer_pb2.StageConfig(model="m", optimizer=trainer_pb2.OptimizerConfig(beta2=0.9)),
        data="d.jsonl",
        epochs=2,
    )


def test_a_learning_rate_without_a_dot_is_a_number() -> None:
    config = stage_config("ppo", {"optimizer": {"learning_rate": "2e-3"}, "temperature": 1}, "f")
    assert isinstance(config, trainer_pb2.PpoConfig)
    assert config.stage.optimizer.learning_rate == 2e-3 and config.temperature == 1.0


def test_a_key_left_empty_stays_unset() -> None:
    config = stage_config("ppo", {"no_eos_score": None}, "f")
    assert isinstance(config, trainer_pb2.PpoConfig) and not config.HasField("no_eos_score")


def test_zero_is_not_unset() -> None:
    config = stage_config("ppo", {"kl_coefficient": 0}, "f")
    assert isinstance(config, trainer_pb2.PpoConfig) and config.HasField("kl_coefficient")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 1}, "f: unknown key 'epoch'; did you mean 'epochs'?"),
        ({"optimizer": {"lerning_rate": 1}}, "f: optimizer: unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
        ({"optimizer": 3}, "f: optimizer: expected a mapping, got 3"),
        ({"epochs": -1}, "f: epochs: expected a whole number from 0, got -1"),
        ({"epochs": "two"}, "f: epochs: expected a whole number from 0, got 'two'"),
        ({"dropout": "high"}, "f: dropout: expected a number, got 'high'"),
        ({"data": 7}, "f: data: expected text, got 7"),
    ],
)
def test_a_wrong_key_or_value_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(CommandError, match=f"^{re.escape(message)}$"):
        stage_config("sft", values, "f")


def test_assignments_nest_and_are_laid_over_the_file() -> None:
    over = parse_assignments(["optimizer.learning_rate=0.1", "epochs=3", "data=x.jsonl"])
    assert over == {"optimizer": {"learning_rate": 0.1}, "epochs": 3, "data": "x.jsonl"}
    base = {"optimizer": {"learning_rate": 1.0, "beta1": 0.5}, "epochs": 1}
    assert merged(base, over)["optimizer"] == {"learning_rate": 0.1, "beta1": 0.5}


@pytest.mark.parametrize("assignments", [["epochs"], ["=3"], ["a..b=1"], ["a=1", "a.b=2"], ["a=[1"]])
def test_a_malformed_assignment_is_wrong_usage(assignments: list[str]) -> None:
    with pytest.raises(typer.BadParameter):
        parse_assignments(assignments)
