"""Runs that train adapters: what they publish, what the generator then serves, and that a run cut off ends the same."""

import asyncio
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import trimtab.generator.service as generator_service
import trimtab.reference.service as reference_service
import trimtab.reward.service as reward_service
import trimtab.trainer.service as trainer_service
from tests.services.test_trainer import COMMON, finished, ppo_config, serving_trainer, sft_config
from trimtab.generator.config import GeneratorConfig
from trimtab.reference.config import ReferenceConfig
from trimtab.reward.config import RewardConfig
from trimtab.runtime.server import RunningServer
from trimtab.trainer.adapters import check_adapters
from trimtab.trainer.config import TrainerConfig
from trimtab.trainer.ranks import Ranks
from trimtab.trainer.stages import SftConfig, StageConfigError
from trimtab.weights.store import open_store
from trimtab_client import AsyncGeneratorClient, AsyncTrainerClient, InvalidArgument, RunStatus, Sampling
from trimtab_client.v1 import trainer_pb2

LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))


def adapted(config, **lora):
    config.lora.CopyFrom(trainer_pb2.LoraConfig(**(LORA | lora)))
    return config


@asynccontextmanager
async def exact_services(model: Path, reward_model: Path, store: Path) -> AsyncIterator[list[str]]:
    """Generator, reference and reward whose answers do not depend on company; their addresses."""
    rooms = [
        (generator_service, GeneratorConfig(**COMMON, model=str(model), store=str(store), max_slots=1)),
        (reference_service, ReferenceConfig(**COMMON, model=str(model), store=str(store), batch_tokens=1)),
        (reward_service, RewardConfig(**COMMON, model=str(reward_model), store=str(store), deterministic=True)),
    ]
    async with AsyncExitStack() as stack:
        servers = [RunningServer(room.LABEL, config, services=room.SERVICES, load=room.load) for room, config in rooms]
        yield [(await stack.enter_async_context(server)).address for server in servers]


@asynccontextmanager
async def trainer_at(folder: Path, store: Path) -> AsyncIterator[AsyncTrainerClient]:
    config = TrainerConfig(**COMMON, store=str(store), folder=folder, keep_versions=50)
    server = RunningServer(trainer_service.LABEL, config, services=trainer_service.SERVICES, load=trainer_service.load)
    async with server, AsyncTrainerClient(server.address) as client:
        yield client


async def run_and_copy(client: AsyncTrainerClient, config, runs: Path, copy: Path, step: int) -> RunStatus:
    """See "run" to its end; `copy` is then what a kill behind `step` would have left of its folder."""
    await client.start("run", config)
    deadline = time.monotonic() + 200
    while (status := await client.status("run")).step < step:
        assert not status.finished and time.monotonic() < deadline, status
        await asyncio.sleep(0.01)
    await client.pause("run")
    while (await client.status("run")).state != "paused":
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
    shutil.copytree(runs, copy)
    await client.resume("run")
    status, _ = await finished(client, "run")
    assert status.state == "succeeded", status.error
    return status


async def test_sft_of_adapters_with_dropout_publishes_merged_models_and_ends_the_same_when_cut_off(make_tiny, tmp_path):
    config = adapted(sft_config(make_tiny("policy"), tmp_path, epochs=16), dropout=0.1)
    config.stage.checkpoint_every_steps = 4
    config.stage.compute_dtype = "bfloat16"
    store = open_store(str(tmp_path / "store"))
    async with trainer_at(tmp_path / "runs", tmp_path / "store") as client:
        status = await run_and_copy(client, config, tmp_path / "runs", tmp_path / "cut-off", 6)
    saved = load_file(next((tmp_path / "cut-off/run/state/checkpoints").glob("0*/policy.safetensors")))
    assert saved and all(".lora_" in name and tensor.dtype == torch.float32 for name, tensor in saved.items())
    published = store.current("run", "policy")
    assert published.kind == "full" and status.published[-1] == published.version
    AutoModelForCausalLM.from_pretrained(store.fetch(published))
    async with trainer_at(tmp_path / "cut-off", tmp_path / "other-store") as client:
        await client.start("run", config)
        again, metrics = await finished(client, "run")
    assert again.state == "succeeded", again.error
    assert again.published[-1].digest == published.version.digest
    assert metrics[-1].values["loss"] < metrics[0].values["loss"]


async def test_ppo_of_adapters_is_served_step_by_step_and_ends_bitwise_the_same_when_cut_off(make_tiny, tmp_path):
    model, reward_model = make_tiny("policy"), make_tiny("reward", seed=3)
    runs, store = tmp_path / "runs", open_store(str(tmp_path / "store"))
    async with exact_services(model, reward_model, tmp_path / "store") as addresses:
        async with trainer_at(runs, tmp_path / "store") as client:
            sft = adapted(sft_config(model, tmp_path, epochs=1, publish="adapter"))
            await client.start("sft", sft)
            assert (await finished(client, "sft"))[0].state == "succeeded"
            changes = {"steps": 8, "ema_decay": 0.9, "publish": "adapter", "value_model": str(reward_model)}
            config = adapted(ppo_config(model, tmp_path, addresses, addresses[2], **changes))
            config.value_lora.CopyFrom(config.lora)
            config.stage.model = "version:sft/policy"
            config.stage.checkpoint_every_steps = 2
            status = await run_and_copy(client, config, runs, tmp_path / "cut-off", 3)
        newest = status.published[-1]
        async with AsyncGeneratorClient(addresses[0]) as generator:
            assert (await generator.get_model()).version == newest
            (completion,) = [c async for c in generator.generate(["w1 w2"], Sampling(max_tokens=6, seed=1))]
        async with trainer_at(tmp_path / "cut-off", tmp_path / "store") as client:
            await client.start("run", config)
            again, metrics = await finished(client, "run")
            # each of its versions was there: with another bit the store would have refused it
            assert again.state == "succeeded" and again.published[-1] == newest, again.error

    base, manifest = store.current("sft", "policy"), store.current("run", "policy")
    assert (base.kind, base.parent) == ("adapter", "sft/base@0")
    assert (manifest.kind, manifest.parent) == ("adapter", str(base.version))
    assert manifest.parent_digest == base.version.digest
    assert [m.version.step for m in store.versions("run", "policy")] == list(range(9))
    assert {m.kind for m in store.versions("run")} == {"adapter"} and store.pinned_steps("sft", "policy")
    ours, theirs = (load_file(store.fetch(m) / "model.safetensors") for m in (manifest, base))
    moved = {name for name in ours if not torch.equal(ours[name], theirs[name])}
    assert moved == {name for name in ours if name.endswith("_proj.weight")}
    assert metrics[-1].values["loss_value"] != metrics[0].values["loss_value"]
    merged = AutoModelForCausalLM.from_pretrained(store.fetch(manifest), dtype=torch.float32)
    prompt, tokens = completion.prompt_token_ids.tolist(), completion.token_ids.tolist()
    with torch.no_grad():
        logprobs = torch.log_softmax(merged(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1], -1)
    expected = logprobs.gather(1, torch.tensor(tokens)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("stage", "changes", "lora", "field"),
    [
        ("sft", {"publish": "adapter"}, None, "sft.publish"),
        ("sft", {}, {"rank": 0}, "sft.lora.rank"),
        ("ppo", {}, {"dropout": 0.1}, "ppo.lora"),
        ("ppo", {"advantage": "group", "samples_per_prompt": 2}, "value", "ppo"),
    ],
)
async def test_settings_that_cannot_be_name_their_field(make_tiny, tmp_path, stage, changes, lora, field):
    model = make_tiny("policy")
    config = sft_config(model, tmp_path) if stage == "sft" else ppo_config(model, tmp_path, ["a:1", "b:1"], "c:1")
    for name, value in changes.items():
        setattr(config, name, value)
    if lora == "value":
        config.value_lora.rank = 4
    elif lora is not None:
        adapted(config, **lora)
    async with serving_trainer(tmp_path) as client:
        with pytest.raises(InvalidArgument) as refused:
            await client.start("run", config)
    assert refused.value.field.removesuffix(".ppo") == field


async def test_targets_that_fit_no_layer_fail_the_run_with_their_field(make_tiny, tmp_path):
    config = adapted(sft_config(make_tiny("policy"), tmp_path), target_modules=["lm_head"])
    async with serving_trainer(tmp_path) as client:
        await client.start("run", config)
        status, _ = await finished(client, "run")
    assert status.state == "failed" and "lora.target_modules" in status.error and "lm_head" in status.error


def test_adapters_on_several_ranks_are_refused_with_the_field():
    stage = SftConfig.model_validate({"stage": {"model": "m"}, "data": "d", "lora": {"rank": 4}})
    with pytest.raises(StageConfigError, match="one process, and this trainer has 2") as refused:
        check_adapters(stage, Ranks(rank=0, world=2))
    assert refused.value.field == "lora"
    check_adapters(stage, Ranks())
