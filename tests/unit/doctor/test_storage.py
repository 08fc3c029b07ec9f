"""Room on the disks: versions in the store, two checkpoints beside the run, and both together where they share one."""

import tempfile
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trimtab.doctor.memory import adapter_parameters
from trimtab.doctor.plan import Plan, Planned
from trimtab.doctor.shapes import shape_of
from trimtab.doctor.storage import checkpoint_bytes, disk_findings, versions_bytes
from trimtab.trainer.config import TrainerConfig
from trimtab.trainer.moving_average import MovingAverage
from trimtab.trainer.optimizer import MasterWeightOptimizer
from trimtab.trainer.stages import OptimizerConfig, parse_stage
from trimtab.trainer.state import Checkpoints, TrainingState, trained_tensors
from trimtab.weights.store import open_store

SIZES = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 4}
OTHER_DISK = Path("/dev/shm")


@pytest.fixture
def model(tmp_path):
    config = LlamaConfig(**SIZES, num_hidden_layers=2, num_key_value_heads=2, tie_word_embeddings=False)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def ppo(model, **values):
    return parse_stage("ppo", {"stage": {"model": model, "compute_dtype": "bfloat16"}, "prompts": "p", **values})


def stepped(model: torch.nn.Module) -> MasterWeightOptimizer:
    """An optimizer with moments of every parameter."""
    optimizer = MasterWeightOptimizer(model, OptimizerConfig())
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.accumulate()
    optimizer.step(1e-3)
    return optimizer


def test_a_checkpoint_of_ppo_is_as_large_as_reckoned(model, tmp_path):
    policy = LlamaForCausalLM.from_pretrained(model)
    value = LlamaForCausalLM.from_pretrained(model)
    value.lm_head = torch.nn.Linear(48, 1, bias=False)  # as a ScalarModel has it
    optimizers = stepped(policy), stepped(value)
    tensors = {"policy": trained_tensors(policy, optimizers[0]), "value": trained_tensors(value, optimizers[1])}
    tensors["average"] = MovingAverage(policy, optimizers[0], 0.9).state()
    Checkpoints(tmp_path / "checkpoints").save(TrainingState(1, {}, tensors))
    written = sum(file.stat().st_size for file in (tmp_path / "checkpoints").rglob("*.safetensors"))
    shape = shape_of(model, None)
    reckoned = checkpoint_bytes(ppo(model, ema_decay=0.9), shape, shape)
    assert reckoned == 16 * shape.parameters + 12 * shape.scalar_parameters
    count = sum(len(named) for named in tensors.values())
    assert 0 <= written - reckoned < 200 * count  # names and places, in the files' headers


def test_what_each_stage_keeps_on_disk(model):
    shape = shape_of(model, None)
    whole, scalar, adapters = shape.parameters, shape.scalar_parameters, adapter_parameters(shape, 4)
    rows = {"stage": {"model": model, "compute_dtype": "bfloat16"}, "data": "d"}
    sft, reward = parse_stage("sft", rows), parse_stage("reward_model", rows)
    assert checkpoint_bytes(sft, shape, None) == 12 * whole
    assert checkpoint_bytes(reward, shape, None) == 12 * scalar
    assert checkpoint_bytes(ppo(model, lora={"rank": 4}), shape, None) == 12 * adapters
    assert versions_bytes(sft, shape, 5) == 6 * 2 * whole
    assert versions_bytes(reward, shape, 5) == 6 * 2 * scalar
    assert versions_bytes(ppo(model, ema_decay=0.9), shape, 5) == 11 * 2 * whole
    published = ppo(model, lora={"rank": 4}, publish="adapter")
    assert versions_bytes(published, shape, 5) == 6 * 2 * adapters + 2 * whole


def test_on_one_disk_versions_and_two_checkpoints_must_fit_together(model, tmp_path):
    stage, shape = ppo(model, ema_decay=0.9), shape_of(model, None)
    trainer = TrainerConfig(folder=tmp_path / "runs", keep_versions=3)
    store = open_store(str(tmp_path / "store"))
    (found,) = disk_findings(Plan((Planned("ppo", stage),), {"trainer": trainer}), store)
    assert found.check == "disk of the store and the runs" and found.state == "ok"
    gib = (versions_bytes(stage, shape, 3) + 2 * checkpoint_bytes(stage, shape, shape)) / 2**30
    assert found.detail.startswith(f"{gib:.3g} of ") and "3 versions and one more" in found.detail
    (found,) = disk_findings(Plan((Planned("ppo", ppo(model, max_staleness=3)),), {"trainer": trainer}), store)
    assert "5 versions and one more" in found.detail  # a replay asks for older ones, whatever the trainer keeps


def test_a_disk_that_is_too_small_is_named_also_where_the_store_is_elsewhere(model, tmp_path):
    here, there = tmp_path.stat().st_dev, OTHER_DISK.stat().st_dev if OTHER_DISK.exists() else None
    if there in (None, here):
        pytest.skip("one disk only")
    with tempfile.TemporaryDirectory(dir=OTHER_DISK) as folder:
        trainer = TrainerConfig(folder=Path(folder) / "runs", keep_versions=10**9)
        plan = Plan((Planned("ppo", ppo(model)),), {"trainer": trainer})
        store, runs = disk_findings(plan, open_store(str(tmp_path / "store")))
    assert (store.check, store.state, runs.check, runs.state) == (
        "disk of the store",
        "failed",
        "disk of the runs",
        "ok",
    )
    assert "keep_versions" in store.fix and "a checkpoint and the next one" in runs.detail


def test_without_a_local_store_the_disk_of_the_runs_is_looked_at_all_the_same(model, tmp_path):
    plan = Plan((Planned("ppo", ppo(model)),), folder=tmp_path / "runs")
    (found,) = disk_findings(plan, open_store("memory://versions"))
    assert found.check == "disk of the runs" and found.state == "ok"
