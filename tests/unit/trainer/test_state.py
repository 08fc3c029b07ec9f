"""Checkpoints: bitwise back, whole or not at all, only the newest; a damaged or foreign one is refused."""

import copy

import numpy as np
import pytest
import torch

from tests.unit.trainer.test_sft import demonstrations
from trimtab.models.policy import Policy
from trimtab.trainer.durable import RunLockedError, held
from trimtab.trainer.epochs import EpochOrder
from trimtab.trainer.forward import response_logprobs, slice_batch
from trimtab.trainer.metrics import keep_rows
from trimtab.trainer.optimizer import MasterWeightOptimizer, masters_of
from trimtab.trainer.run_record import OtherConfigError, OtherDataError, RunFolder
from trimtab.trainer.stages import OptimizerConfig, parse_stage
from trimtab.trainer.state import Checkpoints, StateError, TrainingState, restore_trained, trained_tensors


def trainable(folder, dtype="float32"):
    policy = Policy.load(str(folder))
    masters = masters_of(policy.model, dtype)
    return policy, MasterWeightOptimizer(policy.model, OptimizerConfig(), masters)


def train(policy, optimizer, steps):
    part = slice_batch(demonstrations(), range(6))
    for _ in range(steps):
        (-response_logprobs(policy, part).logprob_N.mean()).backward()
        optimizer.accumulate()
        optimizer.step(1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_goes_on_bitwise_from_a_checkpoint(tiny_folder, tmp_path, dtype):
    policy, optimizer = trainable(tiny_folder, dtype)
    train(policy, optimizer, 3)
    Checkpoints(tmp_path).save(TrainingState(3, {}, {"policy": trained_tensors(policy.model, optimizer)}))
    train(policy, optimizer, 2)

    other, resumed = trainable(tiny_folder, dtype)
    saved = Checkpoints(tmp_path).newest()
    assert saved is not None and saved.step == 3
    restore_trained(other.model, resumed, saved.tensors["policy"])
    train(other, resumed, 2)
    for a, b in zip(optimizer.masters, resumed.masters, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(policy.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_numbers_and_generators_come_back_exactly(tmp_path):
    random = np.random.default_rng(7)
    random.normal(size=3)
    values = {"beta": 0.1 + 0.2, "random": random.bit_generator.state, "queue": [3, 1, 2], "loss": float("inf")}
    Checkpoints(tmp_path).save(TrainingState(5, values, {"empty": {}}))
    saved = Checkpoints(tmp_path).newest()
    assert saved is not None and saved.values == values and saved.tensors == {"empty": {}}
    other = np.random.default_rng()
    other.bit_generator.state = saved.values["random"]
    assert other.integers(1 << 60) == random.integers(1 << 60)


def test_only_the_newest_whole_checkpoint_counts(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(TrainingState(step, {"step": step}, {"policy": {"w": torch.tensor([float(step)])}}))
    torn = tmp_path / ".writing-000000000003"
    torn.mkdir()
    (torn / "policy.safetensors").write_bytes(b"half")
    newest = checkpoints.newest()
    assert newest is not None and newest.step == 2 and newest.tensors["policy"]["w"] == 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["000000000002"]


def test_a_damaged_checkpoint_is_refused_by_name(tmp_path):
    Checkpoints(tmp_path).save(TrainingState(1, {}, {"policy": {"w": torch.ones(64)}}))
    path = tmp_path / "000000000001" / "policy.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(StateError, match=r"policy\.safetensors is not what was saved"):
        Checkpoints(tmp_path).newest()


def test_a_checkpoint_of_another_model_is_refused(tiny_folder):
    policy, optimizer = trainable(tiny_folder)
    tensors = copy.copy(trained_tensors(policy.model, optimizer))
    tensors["master/model.norm.weight"] = torch.ones(3)
    with pytest.raises(StateError, match=r"model\.norm\.weight"):
        restore_trained(policy.model, optimizer, tensors)


def test_the_order_of_rows_follows_from_seed_and_step():
    order = EpochOrder(rows=10, batch_size=4, epochs=3, seed=5)
    whole = list(order.batches())
    assert len(whole) == order.total_steps == 9
    assert sorted(row for _, batch in whole[3:6] for row in batch) == list(range(10))
    assert [list(order.batches(done)) for done in range(10)] == [whole[done:] for done in range(10)]


def sft(**changes):
    return parse_stage("sft", {"stage": {"model": "m", "seed": 1}, "data": "d"} | changes)


def test_a_run_is_known_by_its_config_and_another_is_refused_with_the_field(tmp_path):
    folder = RunFolder(tmp_path)
    folder.begin("sft", sft())
    record = folder.record()
    assert record is not None
    record.check_same("run", "sft", sft())
    record.check_same("run", "sft", sft(stage={"model": "m", "seed": 1, "checkpoint_every_steps": 3}))
    with pytest.raises(OtherConfigError, match=r"sft\.stage\.optimizer\.learning_rate 9.65e-06, not 0.1") as refused:
        record.check_same("run", "sft", sft(stage={"model": "m", "seed": 1, "optimizer": {"learning_rate": 0.1}}))
    assert refused.value.field == "sft.stage.optimizer.learning_rate"


def test_where_the_services_are_is_not_part_of_a_run(tmp_path):
    def ppo(**changes):
        return parse_stage("ppo", {"stage": {"model": "m"}, "prompts": "p"} | changes)

    folder = RunFolder(tmp_path)
    folder.begin("ppo", ppo())
    record = folder.record()
    assert record is not None
    record.check_same("run", "ppo", ppo(generator_address="elsewhere:1", service_timeout_s=5.0))
    with pytest.raises(OtherConfigError, match="max_staleness"):
        record.check_same("run", "ppo", ppo(max_staleness=1))


def test_data_that_changed_meanwhile_is_refused(tmp_path):
    folder, rows = RunFolder(tmp_path), [np.arange(4, dtype=np.int32), np.arange(2, dtype=np.int32)]
    folder.begin("sft", sft())
    folder.check_data("data", rows)
    folder.begin("sft", sft())
    folder.check_data("data", rows)
    with pytest.raises(OtherDataError, match="data: it is not what"):
        folder.check_data("data", rows[::-1])


def test_a_run_is_held_by_one_trainer(tmp_path):
    with held(tmp_path / "lock"), pytest.raises(RunLockedError, match="process"), held(tmp_path / "lock"):
        pass
    with held(tmp_path / "lock"):
        pass


def test_rows_cut_off_or_to_be_computed_again_are_taken_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    assert [row["step"] for row in keep_rows(path, 2)] == [1, 2]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
