"""docs/metrics.md names each metric that a stage reports, and none besides; with every option of PPO at once."""

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.services.test_trainer import (
    finished,
    ppo_config,
    rankings,
    sentence,
    serving_all,
    serving_trainer,
    sft_config,
    write_rows,
)
from trimtab.trainer.data.source import read_rows
from trimtab.trainer.warning_signs import SIGNS
from trimtab.weights.store import open_store
from trimtab_client import AsyncTrainerClient
from trimtab_client.v1 import trainer_pb2

DOCS = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
PARTS = ("generate", "score", "reference", "values", "train", "publish")
STEPS = 5


def documented(*headings: str) -> set[str]:
    """The names in the first column of the tables under these headings, a suffix or a wildcard written out."""
    names: set[str] = set()
    for heading in headings:
        table = DOCS.split(f"## {heading}\n")[1].split("\n## ")[0]
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE):
            written = re.findall(r"`(\w+)`", row)
            suffixes = [name for name in written if name.startswith("_")]
            for name in written:
                if name.startswith("_"):
                    continue
                names |= {name} | {name + suffix for suffix in suffixes}
    for name in [name for name in names if name.endswith("_X")]:
        names = names - {name} | {name.removesuffix("X") + part for part in PARTS}
    return names - {"warning_NAME"} | {sign.metric for sign in SIGNS}


async def reported(client: AsyncTrainerClient, run_id: str, config) -> list[dict[str, float]]:
    await client.start(run_id, config)
    status, metrics = await finished(client, run_id)
    assert status.state == "succeeded", status.error
    return [dict(row.values) for row in metrics]


def names_of(rows: list[dict[str, float]]) -> set[str]:
    return set().union(*rows)


@pytest.fixture
def ranked(tmp_path) -> str:
    """Rankings of two labelers, of whom one ranks no training row."""
    rows = [row.fields() for row in read_rows(rankings(tmp_path))]
    for number, row in enumerate(rows):
        row["labeler"] = "ann" if number % 2 else "bob"
    write_rows(tmp_path / "train.jsonl", [row for row in rows if row["labeler"] == "ann"][::2])
    write_rows(tmp_path / "held_out.jsonl", rows)
    return str(tmp_path / "train.jsonl")


async def test_each_metric_of_sft_and_reward_model_is_documented_and_each_documented_one_is_there(
    make_tiny, tmp_path, ranked
):
    model = make_tiny("policy")
    reward = trainer_pb2.RewardModelConfig(data=ranked, validation_data=str(tmp_path / "held_out.jsonl"), epochs=1)
    reward.stage.model = str(model)
    async with serving_trainer(tmp_path) as client:
        seen = names_of(await reported(client, "sft", sft_config(model, tmp_path, epochs=1)))
        seen |= names_of(await reported(client, "rm", reward))
    manifest = open_store(str(tmp_path / "store")).current("rm", "reward")
    assert seen | manifest.metrics.keys() == documented("SFT and reward model") | {sign.metric for sign in SIGNS}


async def test_each_metric_of_ppo_is_documented_and_each_documented_one_is_there(make_tiny, tmp_path):
    """PPO-ptx, moving average, adaptive KL, value warm-up, exact KL in the loss and a gold judge, in one run."""
    model, reward_model = make_tiny("policy"), make_tiny("reward", seed=3)
    random = np.random.default_rng(5)
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": sentence(random, 8)} for _ in range(16)])
    scorers = {
        "reward": {"kind": "model", "model": str(reward_model)},
        "judge": {"kind": "length", "unit": "words"},
    }
    async with serving_all(model, tmp_path, scorers=scorers) as (client, addresses):
        config = ppo_config(
            model,
            tmp_path,
            addresses,
            addresses[2],
            steps=STEPS,
            value_model=str(reward_model),
            value_warmup_steps=2,
            adaptive_kl_target=0.01,
            adaptive_kl_horizon=100.0,
            ema_decay=0.9,
            ptx_data=texts,
            ptx_coefficient=1.0,
            kl="exact_loss",
            kl_loss_coefficient=0.1,
            gold_scorer="judge",
        )
        rows = await reported(client, "ppo", config)
        config.gold_scorer = "nobody"
        await client.start("unknown", config)
        unknown, _ = await finished(client, "unknown")
    assert names_of(rows) == documented("PPO")

    moved = [False, False, True, True, True]  # the value model warms up alone
    assert [row["grad_norm_policy"] > 0 for row in rows] == ["loss_ptx" in row for row in rows] == moved
    for row, after in pairwise(rows):
        error = min(0.2, max(-0.2, row["kl_nats_per_sequence"] / 0.01 - 1))
        assert after["beta"] == pytest.approx(row["beta"] * (1 + error * 16 / 100))
    assert rows[-1]["beta"] > rows[-2]["beta"] and rows[1]["beta"] < rows[0]["beta"], "above the target, and below it"
    for row in rows:  # its words, so tokens without the special ones
        assert 0.7 * row["response_length_mean"] < row["gold_score_mean"] <= row["response_length_mean"]
    published = open_store(str(tmp_path / "store"))
    average, policy = (published.current("ppo", name) for name in ("policy-ema", "policy"))
    assert average.version.step == policy.version.step == STEPS and average.version.digest != policy.version.digest
    assert "gold_scorer: nobody is none of the service's: reward, judge" in unknown.error
