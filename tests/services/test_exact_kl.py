"""Exact KL end to end: real reference servers send hidden states, the trainer holds their LM head."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import trimtab.generator.service as generator_service
import trimtab.reference.service as reference_service
from tests.services.test_trainer import COMMON, CountingReward, finished, ppo_config, serving_reward, serving_trainer
from trimtab.generator.config import GeneratorConfig
from trimtab.reference.config import ReferenceConfig
from trimtab.runtime.config import RequestLimits
from trimtab.runtime.server import RunningServer
from trimtab.weights.store import open_store
from trimtab_client import (
    AsyncGeneratorClient,
    AsyncReferenceClient,
    AsyncTrainerClient,
    InvalidArgument,
    RaggedTokens,
    RunStatus,
    StepMetrics,
)

SMALL_MESSAGES = RequestLimits(max_sequences=16, max_message_bytes=16_384)
"""Holds the hidden states of some hundred tokens of the tiny model."""


@asynccontextmanager
async def serving_references(sources: list[str], tmp_path: Path, **settings) -> AsyncIterator[str]:
    """Reference servers, one a source; yields their addresses as a client takes them."""
    async with AsyncExitStack() as stack:
        addresses = []
        for source in sources:
            config = ReferenceConfig(**COMMON, model=source, store=str(tmp_path / "store"), **settings)
            room = reference_service
            server = RunningServer(room.LABEL, config, services=room.SERVICES, load=room.load)
            addresses.append((await stack.enter_async_context(server)).address)
        yield ",".join(addresses)


@asynccontextmanager
async def serving_ppo(model: Path, tmp_path: Path) -> AsyncIterator[tuple[AsyncTrainerClient, str, str]]:
    """A trainer, a generator and a gold reward; yields the client and the two addresses."""
    config = GeneratorConfig(**COMMON, model=str(model), store=str(tmp_path / "store"))
    room = generator_service
    async with (
        RunningServer(room.LABEL, config, services=room.SERVICES, load=room.load) as generator,
        AsyncGeneratorClient(generator.address) as client,
        serving_reward(CountingReward(7, (await client.get_model()).tokenizer_digest)) as reward,
        serving_trainer(tmp_path) as trainer,
    ):
        yield trainer, generator.address, reward


async def train(
    model: Path, tmp_path: Path, reference: str, run_id: str = "ppo", **changes
) -> tuple[RunStatus, list[StepMetrics]]:
    async with serving_ppo(model, tmp_path) as (trainer, generator, reward):
        await trainer.start(run_id, ppo_config(model, tmp_path, [generator, reference], reward, **changes))
        return await finished(trainer, run_id)


@pytest.mark.parametrize("tied", [True, False])
async def test_exact_kl_starts_at_zero_and_then_agrees_with_the_sampled_estimators(make_tiny, tmp_path, tied):
    model = make_tiny("policy", tie_word_embeddings=tied)
    published = open_store(str(tmp_path / "store")).publish(model, run_id="sft", name="policy", step=3)
    sources = [f"version:{published.version}"] * 2
    async with serving_references(sources, tmp_path, limits=SMALL_MESSAGES) as references:
        status, metrics = await train(
            model, tmp_path, references, kl="exact_metric", steps=6, batch_size=64, minibatch_size=32
        )
    assert status.state == "succeeded", status.error
    exact = np.array([step.values["kl_exact_nats_per_sequence"] for step in metrics])
    gaps = [step.values["reference_hidden_gap_mean"] for step in metrics]
    assert 0 <= exact[0] < 1e-3 and max(gaps) < 0.02  # what bfloat16 rounds off the hidden states
    assert (exact[2:] > 0.1).all()
    k1, k3 = (np.array([step.values[f"{name}_nats_per_sequence"] for step in metrics[1:]]) for name in ("kl", "kl_k3"))
    assert (abs(k1 - exact[1:]) < 4 * np.sqrt(2 * exact[1:] / 64)).all()  # k1's variance is about 2 KL a sequence
    assert abs(k3 / exact[1:] - 1).max() < 0.4
    assert "loss_kl" not in metrics[0].values


async def test_the_kl_loss_alone_holds_the_policy_near_the_reference(make_tiny, tmp_path):
    model = make_tiny("policy")
    ends = {}
    async with serving_references([str(model)], tmp_path) as reference:
        for kl, coefficient in (("exact_metric", 0.0), ("exact_loss", 3.0)):
            settings = {"kl": kl, "kl_loss_coefficient": coefficient, "kl_coefficient": 0.0, "steps": 5}
            status, metrics = await train(model, tmp_path, reference, kl, batch_size=32, minibatch_size=16, **settings)
            assert status.state == "succeeded", status.error
            ends[kl] = metrics[-1].values
    free, held = ends["exact_metric"], ends["exact_loss"]
    assert held["kl_exact_nats_per_sequence"] < 0.5 * free["kl_exact_nats_per_sequence"]
    assert held["loss_kl"] > 0


async def test_no_hidden_states_travel_where_kl_is_only_sampled(make_tiny, tmp_path, monkeypatch):
    asked = []
    whole = reference_service.ReferenceServicer.LogProbs

    async def noting(self, request, context):
        asked.append((request.include_hidden, request.version.WhichOneof("rule")))
        return await whole(self, request, context)

    monkeypatch.setattr(reference_service.ReferenceServicer, "LogProbs", noting)
    model = make_tiny("policy")
    async with serving_references([str(model)], tmp_path) as reference:
        _, sampled = await train(model, tmp_path, reference, "sampled", steps=1)
        assert set(asked) == {(False, None)}
        asked.clear()
        _, exact = await train(model, tmp_path, reference, "exact", steps=1, kl="exact_metric")
        assert set(asked) == {(True, "exact")}
    assert exact[0].values.keys() - sampled[0].values.keys() == {
        "kl_exact_nats_per_sequence",
        "reference_hidden_gap_mean",
    }


async def test_a_reference_of_another_version_or_vocabulary_ends_the_run_with_advice(make_tiny, tmp_path):
    model, other = make_tiny("policy"), make_tiny("policy", seed=5)
    store = open_store(str(tmp_path / "store"))
    for step, folder in ((1, model), (2, other)):
        store.publish(folder, run_id="sft", name="policy", step=step)
    async with serving_references(["version:sft/policy@1", "version:sft/policy@2"], tmp_path) as mixed:
        status, metrics = await train(model, tmp_path, mixed, "mixed", kl="exact_metric")
    assert status.state == "failed" and "this server serves" in status.error and not metrics

    async with serving_references(["version:sft/policy@1"], tmp_path) as pruned:
        store.set_current("sft", "policy", 2)
        store.prune("sft", "policy", keep_last=1)
        status, _ = await train(model, tmp_path, pruned, "gone", kl="exact_metric")
    assert status.state == "failed" and "publish that model to the trainer's store" in status.error

    wider = make_tiny("policy", edit=lambda policy: policy.resize_token_embeddings(64))
    async with serving_references([str(wider)], tmp_path) as reference:
        status, _ = await train(model, tmp_path, reference, "wider", kl="exact_metric")
    assert status.state == "failed" and status.error.startswith("kl: exact KL needs one vocabulary")


async def test_a_loss_without_coefficient_is_refused_by_field(make_tiny, tmp_path):
    model = make_tiny("policy")
    async with serving_trainer(tmp_path) as trainer:
        for changes, field in (
            ({"kl": "exact_loss"}, "ppo.kl_loss_coefficient"),
            ({"kl_loss_coefficient": 0.1}, "ppo.kl_loss_coefficient"),
            ({"kl": "exact"}, "ppo.kl"),
        ):
            with pytest.raises(InvalidArgument) as refused:
                await trainer.start("run", ppo_config(model, tmp_path, ["a:1", "b:2"], "c:3", **changes))
            assert refused.value.field == field


async def test_hidden_states_beyond_one_message_come_in_parts_from_all_replicas_in_order(make_tiny, tmp_path):
    model = make_tiny("policy")
    random = np.random.default_rng(0)
    prompts = random.integers(1, 5, 40).tolist()
    sequences = [random.integers(2, 50, p + random.integers(0, 20)).astype(np.int32) for p in prompts]
    tokens = RaggedTokens.from_sequences(sequences, prompts)
    limits = SMALL_MESSAGES.model_copy(update={"max_sequences": 64})
    async with (
        serving_references([str(model)] * 2, tmp_path, limits=limits) as addresses,
        AsyncReferenceClient(addresses) as client,
    ):
        info = await client.get_model()
        assert 0 < info.max_hidden_tokens < int((tokens.lengths - tokens.prompt_lengths).sum()) / 2
        answer = await client.logprobs(tokens, info.tokenizer_digest, hidden=True)
        bare = await client.logprobs(tokens, info.tokenizer_digest)
    np.testing.assert_allclose(answer.logprobs.values, bare.logprobs.values, atol=1e-5)
    body = AutoModelForCausalLM.from_pretrained(model).model.eval()
    want = []
    for ids, prompt in zip(sequences, prompts, strict=True):
        with torch.no_grad():
            want.append(body(torch.tensor(ids[None].astype(np.int64))).last_hidden_state[0, prompt - 1 : -1])
    assert answer.hidden is not None
    got = torch.from_numpy(answer.hidden.view(np.int16).copy()).view(torch.bfloat16).float()
    torch.testing.assert_close(got, torch.cat(want), rtol=2**-8, atol=1e-4)
