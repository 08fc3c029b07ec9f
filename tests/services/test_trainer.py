"""The trainer service over gRPC with the real generator, reward and reference servers beside it."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import trimtab.generator.service as generator_service
import trimtab.reference.service as reference_service
import trimtab.reward.service as reward_service
import trimtab.trainer.service as trainer_service
from trimtab.generator.config import GeneratorConfig
from trimtab.models.scalar_head import ScalarModel
from trimtab.reference.config import ReferenceConfig
from trimtab.reward.config import RewardConfig
from trimtab.rounds.launchers.services import free_ports
from trimtab.runtime.server import RunningServer
from trimtab.trainer.config import TrainerConfig
from trimtab.weights.store import open_store
from trimtab_client import (
    AlreadyExists,
    AsyncGeneratorClient,
    AsyncTrainerClient,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    RunStatus,
    Sampling,
    StepMetrics,
)
from trimtab_client.ragged import RaggedTokens, encode_floats
from trimtab_client.v1 import model_pb2, model_pb2_grpc, reward_pb2, reward_pb2_grpc, trainer_pb2

COMMON = {"port": 0, "metrics_port": None, "threads": 1}
WORDS = [f"w{i}" for i in range(20)]


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sentence(random: np.random.Generator, count: int) -> str:
    return " ".join(random.choice(WORDS, count))


@asynccontextmanager
async def serving_trainer(tmp_path: Path, **settings: int) -> AsyncIterator[AsyncTrainerClient]:
    config = TrainerConfig(**COMMON, store=str(tmp_path / "store"), folder=tmp_path / "runs", **settings)
    server = RunningServer(trainer_service.LABEL, config, services=trainer_service.SERVICES, load=trainer_service.load)
    async with server, AsyncTrainerClient(server.address) as client:
        yield client


async def finished(client: AsyncTrainerClient, run_id: str) -> tuple[RunStatus, list[StepMetrics]]:
    metrics: list[StepMetrics] = []
    async for event in client.watch(run_id):
        if isinstance(event, StepMetrics):
            metrics.append(event)
        elif event.finished:
            return event, metrics
    raise AssertionError("the watch ended before the run")


async def reached(client: AsyncTrainerClient, condition: Callable[[RunStatus], bool]) -> RunStatus:
    for _ in range(1000):
        status = await client.status("run")
        if condition(status):
            return status
        await asyncio.sleep(0.02)
    raise AssertionError(f"still {status}")


def sft_config(model: Path, tmp_path: Path, **changes) -> trainer_pb2.SftConfig:
    random = np.random.default_rng(0)
    rows = [{"prompt": sentence(random, 2), "completion": " " + sentence(random, 5)} for _ in range(24)]
    config = trainer_pb2.SftConfig(
        data=write_rows(tmp_path / "sft.jsonl", rows),
        validation_data=write_rows(tmp_path / "sft_validation.jsonl", rows[:6]),
        epochs=2,
        batch_size=8,
        evaluate_every_steps=3,
    )
    config.stage.model = str(model)
    config.stage.optimizer.learning_rate = 1e-2
    for name, value in changes.items():
        setattr(config, name, value)
    return config


async def test_sft_lowers_the_loss_and_publishes_a_plain_folder(make_tiny, tmp_path):
    async with serving_trainer(tmp_path) as client:
        await client.start("sft-run", sft_config(make_tiny("policy"), tmp_path))
        status, metrics = await finished(client, "sft-run")
    assert status.state == "succeeded" and status.error == ""
    assert metrics[-1].values["loss"] < metrics[0].values["loss"]
    assert [m.step for m in metrics] == list(range(1, 7))
    store = open_store(str(tmp_path / "store"))
    folder = store.fetch(store.current("sft-run", "policy"))
    AutoModelForCausalLM.from_pretrained(folder)
    lines = (tmp_path / "runs" / "sft-run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["validation_loss"] > 0


async def test_only_the_newest_versions_are_kept(make_tiny, tmp_path):
    async with serving_trainer(tmp_path, keep_versions=2) as client:
        await client.start("run", sft_config(make_tiny("policy"), tmp_path, epochs=400))
        for _ in range(4):
            await client.checkpoint("run")
        await client.stop("run")
        status, _ = await finished(client, "run")
    kept = [manifest.version.step for manifest in open_store(str(tmp_path / "store")).versions("run", "policy")]
    assert len(status.published) == 4 and kept == [version.step for version in status.published[-2:]]


async def test_a_start_is_idempotent_and_one_run_goes_at_a_time(make_tiny, tmp_path):
    model = make_tiny("policy")
    async with serving_trainer(tmp_path) as client:
        config = sft_config(model, tmp_path, epochs=200)
        await client.start("one", config)
        assert (await client.start("one", config)).run_id == "one"
        with pytest.raises(AlreadyExists):
            await client.start("one", sft_config(model, tmp_path, epochs=3))
        with pytest.raises(FailedPrecondition, match="one"):
            await client.start("two", sft_config(model, tmp_path))
        await client.stop("one")
        status, _ = await finished(client, "one")
        assert status.state == "stopped"


async def test_pause_holds_resume_goes_on_and_checkpoint_publishes(make_tiny, tmp_path):
    async with serving_trainer(tmp_path) as client:
        await client.start("run", sft_config(make_tiny("policy"), tmp_path, epochs=400))
        published = await client.checkpoint("run")
        assert published[0].name == "policy" and published[0].step >= 1
        await client.pause("run")
        step = (await reached(client, lambda status: status.state == "paused")).step
        await asyncio.sleep(0.3)
        assert (await client.status("run")).step == step
        await client.resume("run")
        await reached(client, lambda status: status.step > step)
        await client.stop("run")
        await finished(client, "run")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"epochs": 0}, "sft.epochs"),
        ({"dropout": 1.5}, "sft.dropout"),
        ({"data": ""}, "sft.data"),
    ],
)
async def test_a_wrong_config_names_its_field(make_tiny, tmp_path, change, field):
    async with serving_trainer(tmp_path) as client:
        with pytest.raises(InvalidArgument) as refused:
            await client.start("run", sft_config(make_tiny("policy"), tmp_path, **change))
        assert refused.value.field == field
        with pytest.raises(InvalidArgument, match="run_id"):
            await client.start("../up", sft_config(make_tiny("policy"), tmp_path))
        with pytest.raises(NotFound):
            await client.status("nobody")


@pytest.mark.parametrize(("model", "data", "words"), [("nowhere", None, "nowhere"), (None, "missing.jsonl", "missing")])
async def test_a_run_that_cannot_start_fails_with_its_reason(make_tiny, tmp_path, model, data, words):
    config = sft_config(make_tiny("policy"), tmp_path)
    if model:
        config.stage.model = str(tmp_path / model)
    if data:
        config.data = str(tmp_path / data)
    async with serving_trainer(tmp_path) as client:
        await client.start("run", config)
        status, _ = await finished(client, "run")
    assert status.state == "failed" and words in status.error


def rankings(tmp_path: Path, count: int = 120) -> str:
    """People prefer answers with more w1."""
    random = np.random.default_rng(1)
    rows = []
    for number in range(count):
        responses = [" " + sentence(random, 6) for _ in range(int(random.integers(4, 10)))]
        liked = [response.split().count("w1") for response in responses]
        order = sorted(set(liked), reverse=True)
        if len(order) == 1:
            continue
        rows.append(
            {
                "prompt": "w3 w4",
                "responses": responses,
                "ranks": [1 + sum(other > mine for other in liked) for mine in liked],
                "task": f"t{number}",
            }
        )
    return write_rows(tmp_path / "rankings.jsonl", rows)


async def test_reward_model_learns_the_rankings_and_is_normalised(make_tiny, tmp_path):
    data = rankings(tmp_path)
    config = trainer_pb2.RewardModelConfig(data=data, validation_data=data, epochs=8, batch_prompts=16)
    config.stage.model = str(make_tiny("policy"))
    config.stage.optimizer.learning_rate = 5e-3
    async with serving_trainer(tmp_path) as client:
        await client.start("rm", config)
        status, metrics = await finished(client, "rm")
    assert status.state == "succeeded", status.error
    assert metrics[-1].values["validation_pair_accuracy"] > 0.9
    store = open_store(str(tmp_path / "store"))
    manifest = store.current("rm", "reward")
    assert {"score_mean", "score_std", "validation_pair_accuracy_low"} <= manifest.metrics.keys()
    folder = store.fetch(manifest)
    AutoModelForSequenceClassification.from_pretrained(folder)
    assert ScalarModel.load(str(folder)).std == pytest.approx(manifest.metrics["score_std"])
    report = json.loads((tmp_path / "runs" / "rm" / "reward_report.json").read_text())
    assert set(map(int, report["accuracy_by_k"])) <= set(range(4, 10))


class CountingReward(reward_pb2_grpc.RewardServiceServicer, model_pb2_grpc.ModelServiceServicer):
    """A gold function behind the reward API: the share of one token in the response."""

    def __init__(self, token: int, tokenizer_digest: str) -> None:
        self.token = token
        self.digest = tokenizer_digest
        self.bad_score = False

    async def GetModel(self, request, context):
        return model_pb2.GetModelResponse(model=model_pb2.ModelInfo(tokenizer_digest=self.digest))

    async def LoadVersion(self, request, context):
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "a gold function never moves")

    async def Score(self, request, context):
        tokens = RaggedTokens.from_proto(request.tokens.tokens)
        scores = [float((ids == self.token).sum()) for ids in tokens.sequences()]
        encoded = encode_floats([float("nan")] * len(scores) if self.bad_score else scores)
        return reward_pb2.ScoreResponse(scores=encoded, normalized_scores=encoded)


@asynccontextmanager
async def serving_reward(servicer: CountingReward) -> AsyncIterator[str]:
    server = grpc.aio.server()
    reward_pb2_grpc.add_RewardServiceServicer_to_server(servicer, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


@asynccontextmanager
async def serving_all(model: Path, tmp_path: Path, reward_model: Path | None = None, scorers: dict | None = None):
    """Trainer, generator and reference (and reward, with a model or scorers) as real servers; client and addresses."""
    rooms = [
        (generator_service, GeneratorConfig, {"model": str(model)}),
        (reference_service, ReferenceConfig, {"model": str(model)}),
    ]
    if reward_model is not None:
        rooms.append((reward_service, RewardConfig, {"model": str(reward_model)}))
    if scorers is not None:
        rooms.append((reward_service, RewardConfig, {"scorers": scorers, "default": next(iter(scorers))}))
    async with AsyncExitStack() as stack:
        addresses = []
        for room, config_class, settings in rooms:
            config = config_class(**COMMON, **settings, store=str(tmp_path / "store"))
            server = RunningServer(room.LABEL, config, services=room.SERVICES, load=room.load)
            addresses.append((await stack.enter_async_context(server)).address)
        client = await stack.enter_async_context(serving_trainer(tmp_path))
        yield client, addresses


def ppo_config(model: Path, tmp_path: Path, addresses: list[str], reward: str, **changes) -> trainer_pb2.PpoConfig:
    prompts = [{"prompt": f"{a} {b}"} for a in WORDS[:8] for b in WORDS[:4]]
    config = trainer_pb2.PpoConfig(
        prompts=write_rows(tmp_path / "prompts.jsonl", prompts),
        generator_address=addresses[0],
        reference_address=addresses[1],
        reward_address=reward,
        steps=3,
        batch_size=16,
        minibatch_size=8,
        inner_epochs=2,
        max_new_tokens=8,
        value_optimizer=trainer_pb2.OptimizerConfig(learning_rate=1e-2),
    )
    config.stage.model = str(model)
    config.stage.optimizer.learning_rate = 1e-2
    for name, value in changes.items():
        setattr(config, name, value)
    return config


async def test_ppo_runs_against_real_services_and_publishes_every_step(make_tiny, tmp_path):
    model, reward_model = make_tiny("policy"), make_tiny("reward", seed=3)
    async with serving_all(model, tmp_path, reward_model) as (client, addresses):
        config = ppo_config(model, tmp_path, addresses, addresses[2], value_model=str(reward_model))
        await client.start("ppo", config)
        status, metrics = await finished(client, "ppo")
        assert status.state == "succeeded", status.error
        async with AsyncGeneratorClient(addresses[0]) as generator:
            served = (await generator.get_model()).version
            completions = [c async for c in generator.generate(["w1 w2"], Sampling(max_tokens=4))]
    assert [v.step for v in status.published] == [0, 1, 2, 3] and served == status.published[-1]
    assert completions[0].versions[0].version == served
    first = metrics[0].values
    assert first["kl_nats_per_sequence"] == pytest.approx(0, abs=1e-4)
    assert first["approx_kl_first_minibatch"] == 0 and first["logprob_gap_max"] < 1e-4
    assert metrics[-1].values["kl_k3_nats_per_sequence"] > 0
    assert {"seconds_generate", "wait_share_score", "tokens_per_second_train", "beta"} <= first.keys()


@pytest.mark.parametrize("advantage", ["gae", pytest.param("group", marks=pytest.mark.slow)])
async def test_a_bandit_with_a_known_optimum_converges_to_it(make_tiny, tmp_path, advantage):
    model = make_tiny("policy")
    async with serving_all(model, tmp_path) as (client, addresses), AsyncGeneratorClient(addresses[0]) as generator:
        digest = (await generator.get_model()).tokenizer_digest
        async with serving_reward(CountingReward(7, digest)) as reward:
            config = ppo_config(
                model,
                tmp_path,
                addresses,
                reward,
                steps=22,
                inner_epochs=4,
                batch_size=64,
                minibatch_size=32,
                kl_coefficient=0.0,
                ignore_eos=True,
                advantage=advantage,
                samples_per_prompt=2,
            )
            await client.start("bandit", config)
            status, metrics = await finished(client, "bandit")
    assert status.state == "succeeded", status.error
    assert metrics[0].values["score_mean"] < 1.5
    assert metrics[-1].values["score_mean"] > 6.5  # of 8


async def test_a_large_beta_keeps_the_policy_at_the_reference(make_tiny, tmp_path):
    model = make_tiny("policy")
    async with serving_all(model, tmp_path) as (client, addresses), AsyncGeneratorClient(addresses[0]) as generator:
        digest = (await generator.get_model()).tokenizer_digest
        async with serving_reward(CountingReward(7, digest)) as reward:
            config = ppo_config(
                model, tmp_path, addresses, reward, steps=8, batch_size=64, minibatch_size=64, kl_coefficient=50.0
            )
            config.stage.optimizer.learning_rate = 1e-3
            await client.start("held", config)
            _, metrics = await finished(client, "held")
    assert metrics[-1].values["kl_k3_nats_per_sequence"] < 0.1
    assert metrics[-1].values["score_mean"] < 1.5


async def test_a_nan_reward_ends_the_run_and_the_last_version_goes_on_being_served(make_tiny, tmp_path):
    model = make_tiny("policy")
    async with serving_all(model, tmp_path) as (client, addresses), AsyncGeneratorClient(addresses[0]) as generator:
        servicer = CountingReward(7, (await generator.get_model()).tokenizer_digest)
        servicer.bad_score = True
        async with serving_reward(servicer) as reward:
            await client.start("nan", ppo_config(model, tmp_path, addresses, reward))
            status, metrics = await finished(client, "nan")
        assert status.state == "failed" and "non-finite score" in status.error and not metrics
        assert (await generator.get_model()).version.step == 0
        assert [c async for c in generator.generate(["w1"], Sampling(max_tokens=2))]


async def test_a_foreign_reward_tokenizer_is_refused_with_advice(make_tiny, tmp_path):
    model = make_tiny("policy")
    async with (
        serving_all(model, tmp_path) as (client, addresses),
        serving_reward(CountingReward(7, "blake3:other")) as reward,
    ):
        await client.start("foreign", ppo_config(model, tmp_path, addresses, reward))
        status, _ = await finished(client, "foreign")
    assert status.state == "failed" and "score_text" in status.error


async def test_a_model_in_half_precision_is_published_as_what_changed(make_tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    async with serving_trainer(tmp_path, full_version_every=3) as client:
        config = sft_config(make_tiny("policy"), tmp_path, epochs=400)
        config.stage.compute_dtype = "bfloat16"
        config.stage.optimizer.learning_rate = 1e-6
        await client.start("run", config)
        for _ in range(4):
            await client.checkpoint("run")
        await client.stop("run")
        await finished(client, "run")
    store = open_store(str(tmp_path / "store"))
    versions = store.versions("run", "policy")
    assert [manifest.kind for manifest in versions[:4]] == ["full", "delta", "delta", "full"]
    assert versions[1].size_bytes < 0.3 * versions[0].size_bytes
    assert AutoModelForCausalLM.from_pretrained(store.fetch(versions[2], tmp_path / "cold")).dtype == torch.bfloat16


def normalized_by_generator(model: Path, tmp_path: Path, port: int) -> trainer_pb2.RewardModelConfig:
    prompts = [{"prompt": f"{a} {b}"} for a in WORDS[:6] for b in WORDS[:4]]
    config = trainer_pb2.RewardModelConfig(
        data=rankings(tmp_path, 24),
        batch_prompts=8,
        normalization_data=write_rows(tmp_path / "prompts.jsonl", prompts),
        generator_address=f"127.0.0.1:{port}",
        normalization_max_tokens=8,
    )
    config.stage.model = str(model)
    return config


async def test_a_reward_model_waits_for_the_generator_of_its_reference_samples(make_tiny, tmp_path):
    model, port = make_tiny("policy"), free_ports(1)[0]
    async with serving_trainer(tmp_path) as client:
        await client.start("run", normalized_by_generator(model, tmp_path, port))
        waiting = await reached(client, lambda status: "waiting for" in status.activity)
        assert f"waiting for the generator at 127.0.0.1:{port}, 600 s at most" in waiting.activity
        generator = GeneratorConfig(**{**COMMON, "port": port}, model=str(model), store=str(tmp_path / "store"))
        async with RunningServer(
            generator_service.LABEL, generator, services=generator_service.SERVICES, load=generator_service.load
        ):
            status, metrics = await finished(client, "run")
    assert status.state == "succeeded", status.error
    assert [row.step for row in metrics] == [1, 2, 3]
    store = open_store(str(tmp_path / "store"))
    assert store.current("run", "reward").metrics["score_std"] > 0


async def test_a_reward_model_whose_generator_never_comes_says_so_and_can_go_on(make_tiny, tmp_path):
    config = normalized_by_generator(make_tiny("policy"), tmp_path, free_ports(1)[0])
    config.service_timeout_s = 0.3
    async with serving_trainer(tmp_path) as client:
        await client.start("run", config)
        status, _ = await finished(client, "run")
    assert status.state == "failed"
    assert "the generator at" in status.error and "did not answer within 0.3 s" in status.error
