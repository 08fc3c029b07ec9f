"""The engine's log-probs against the trainer's: a real PPO run with either engine, and the gap that it reports."""

import json
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType

import pytest

import trimtab.reference.service as reference_service
import trimtab.reward.service as reward_service
import trimtab.trainer.service as trainer_service
from tests.vllm.room import CALL_S, save_policy, save_reward, serving
from trimtab.reference.config import ReferenceConfig
from trimtab.reward.config import RewardConfig
from trimtab.runtime.config import ServiceConfig
from trimtab.runtime.server import RunningServer
from trimtab.trainer.config import TrainerConfig
from trimtab_client import AsyncTrainerClient, StepMetrics
from trimtab_client.v1 import trainer_pb2

COMMON = {"port": 0, "metrics_port": None, "threads": 1}
STEPS = 3
# Nats a token. The trainer works in float32; what a generator in bfloat16 samples is off by its own rounding.
LARGEST = {"float32": 1e-4, "bfloat16": 0.5}


def ppo_config(policy: Path, reward: Path, folder: Path, addresses: dict[str, str]) -> trainer_pb2.PpoConfig:
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me of {index}: "}) + "\n" for index in range(32)))
    config = trainer_pb2.PpoConfig(
        prompts=str(prompts),
        generator_address=addresses["generator"],
        reference_address=addresses["reference"],
        reward_address=addresses["reward"],
        value_model=str(reward),
        steps=STEPS,
        batch_size=16,
        minibatch_size=8,
        inner_epochs=2,
        max_new_tokens=32,
        value_optimizer=trainer_pb2.OptimizerConfig(learning_rate=1e-3),
    )
    config.stage.model = str(policy)
    config.stage.optimizer.learning_rate = 1e-3
    return config


@pytest.mark.parametrize(("engine", "dtype"), [("local", "float32"), ("vllm", "float32"), ("vllm", "bfloat16")])
async def test_the_gap_to_the_trainer_is_the_arithmetics_at_every_version(
    tmp_path: Path, engine: str, dtype: str
) -> None:
    policy, reward = save_policy(tmp_path / "policy", 0), save_reward(tmp_path / "reward", 1)
    store = str(tmp_path / "store")

    def server(room: ModuleType, config: ServiceConfig) -> RunningServer:
        return RunningServer(room.LABEL, config, services=room.SERVICES, load=room.load)

    with ExitStack() as stack:
        settings = {"engine": engine, "dtype": dtype, "store": store, "max_slots": 16}
        generator = stack.enter_context(serving(tmp_path / "served", policy, **settings))
        trainer = TrainerConfig(**COMMON, store=store, folder=tmp_path / "runs")
        async with (
            server(reference_service, ReferenceConfig(**COMMON, model=str(policy), store=store)) as reference,
            server(reward_service, RewardConfig(**COMMON, model=str(reward), store=store)) as scorer,
            server(trainer_service, trainer) as training,
            AsyncTrainerClient(training.address) as client,
        ):
            addresses = {"generator": generator.address, "reference": reference.address, "reward": scorer.address}
            await client.start("run", ppo_config(policy, reward, tmp_path, addresses))
            events = [event async for event in client.watch("run")]
        assert events[-1].state == "succeeded", events[-1]
        with generator.client() as caller:
            assert caller.get_model(timeout_s=CALL_S).version.step == STEPS
    metrics = [event.values for event in events if isinstance(event, StepMetrics)]
    gaps = [(step["logprob_gap_mean"], step["logprob_gap_max"]) for step in metrics]
    print(f"\n{engine} {dtype}: logprob_gap_mean, logprob_gap_max of each step: {gaps}")
    assert len(gaps) == STEPS and all(0 < worst < LARGEST[dtype] for _, worst in gaps)
    assert all(step["kl_k3_nats_per_sequence"] > 0 for step in metrics[1:])  # versions did change
