"""From rankings to a served score: the trainer publishes a reward model, a reward server loads it while serving."""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

import trimtab.reward.service as reward_service
import trimtab.trainer.service as trainer_service
from trimtab.models.scalar_head import ScalarModel
from trimtab.reward.config import RewardConfig
from trimtab.runtime.server import RunningServer
from trimtab.trainer.config import TrainerConfig
from trimtab.trainer.data import load_rankings, tokenize_rankings
from trimtab.weights.store import open_store
from trimtab_client import AsyncRewardClient, AsyncTrainerClient, RaggedTokens, RunStatus
from trimtab_client.v1 import trainer_pb2

COMMON = {"port": 0, "metrics_port": None, "threads": 1}
RIGHT, WRONG = "w1 " * 6, "w2 " * 6


def write_rankings(path: Path, labelers: tuple[str, ...], seed: int) -> str:
    """People prefer answers with more w1; every ranking has five answers and a tie."""
    random = np.random.default_rng(seed)
    rows = []
    for number in range(24):
        counts = random.permutation([0, 1, 3, 3, 5])
        rows.append(
            {
                "prompt": f"w{20 + number} w{10 + seed}",
                "responses": [" w1" * n + "".join(random.choice([" w7", " w8"], 6 - n)) for n in counts],
                "ranks": [1 + len({other for other in counts if other > mine}) for mine in counts],
                "labeler": labelers[number % len(labelers)],
                "task": f"{seed}-{number}",
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


async def trained(client: AsyncTrainerClient, run_id: str) -> RunStatus:
    async for event in client.watch(run_id):
        if isinstance(event, RunStatus) and event.finished:
            return event
    raise AssertionError("the watch ended before the run")


@pytest.fixture
def config(make_tiny, tmp_path) -> trainer_pb2.RewardModelConfig:
    config = trainer_pb2.RewardModelConfig(
        data=write_rankings(tmp_path / "train.jsonl", ("ann", "bob"), 0),
        validation_data=write_rankings(tmp_path / "held_out.jsonl", ("ann", "eve"), 1),
        epochs=6,
        batch_prompts=8,
    )
    config.stage.model = str(make_tiny("policy"))
    config.stage.optimizer.learning_rate = 1e-2
    return config


async def test_a_published_reward_model_is_taken_over_while_scores_go_on(make_tiny, tmp_path, config):
    store = str(tmp_path / "store")
    trainer_config = TrainerConfig(**COMMON, store=store, folder=tmp_path / "runs")
    settings = {"store": store, "follow": "rm/reward", "poll_interval_s": 0.05, "model": str(make_tiny("reward"))}
    async with (
        RunningServer(
            trainer_service.LABEL, trainer_config, services=trainer_service.SERVICES, load=trainer_service.load
        ) as trainer,
        RunningServer(
            reward_service.LABEL,
            RewardConfig(**COMMON, **settings),
            services=reward_service.SERVICES,
            load=reward_service.load,
        ) as reward,
        AsyncTrainerClient(trainer.address) as training,
        AsyncRewardClient(reward.address) as scoring,
    ):
        await training.start("rm", config)
        run = asyncio.ensure_future(trained(training, "rm"))
        names = []
        for _ in range(2000):
            reply = await scoring.score_texts([("w5 w4", " " + RIGHT), ("w5 w4", " " + WRONG)])
            names.append(reply.version.name)
            if names[-1] == "reward":
                break
            await asyncio.sleep(0.01)
        status = await run
    assert status.state == "succeeded", status.error
    assert len(names) > 1 and names[-1] == "reward", "scores were given before and after, none failed"
    served = open_store(store).current("rm", "reward")
    model = ScalarModel.load(str(open_store(store).fetch(served)))
    assert reply.version == served.version
    np.testing.assert_allclose(reply.normalized_scores, (reply.scores - model.mean) / model.std, rtol=1e-4, atol=1e-5)
    assert reply.scores[0] > reply.scores[1]


async def test_the_report_tells_known_labelers_from_new_ones_and_its_constants_normalise(tmp_path, config):
    trainer_config = TrainerConfig(**COMMON, store=str(tmp_path / "store"), folder=tmp_path / "runs")
    async with (
        RunningServer(
            trainer_service.LABEL, trainer_config, services=trainer_service.SERVICES, load=trainer_service.load
        ) as trainer,
        AsyncTrainerClient(trainer.address) as client,
    ):
        await client.start("rm", config)
        status = await trained(client, "rm")
    assert status.state == "succeeded", status.error
    folder = tmp_path / "runs" / "rm"
    report = json.loads((folder / "reward_report.json").read_text())
    assert report["training_labelers"]["pairs"] == report["held_out_labelers"]["pairs"] == 12 * 9
    assert report["accuracy"]["share"] > 0.8 and report["rankings_seen_in_training"] == 0
    assert (folder / "reward_calibration.png").exists() and (folder / "reward_length.png").exists()
    store = open_store(str(tmp_path / "store"))
    manifest = store.current("rm", "reward")
    assert "validation_pair_accuracy_held_out_labelers_low" in manifest.metrics
    model = ScalarModel.load(str(store.fetch(manifest)))
    rows = tokenize_rankings(load_rankings(config.data), model.tokenizer, 64, eos_token_id=1)
    tokens = RaggedTokens.from_sequences([sequence.token_ids_T for row in rows for sequence in row.sequences])
    settings = {"model": "version:rm/reward", "store": str(tmp_path / "store")}
    server = RunningServer(
        reward_service.LABEL,
        RewardConfig(**COMMON, **settings),
        services=reward_service.SERVICES,
        load=reward_service.load,
    )
    async with server, AsyncRewardClient(server.address) as scoring:
        scores = (await scoring.score_tokens(tokens, model.tokenizer_digest)).normalized_scores
    assert abs(float(scores.mean())) < 1e-3 and float(scores.std()) == pytest.approx(1, rel=5e-3)
