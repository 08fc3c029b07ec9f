"""Several ranks train as one: real torchrun, FSDP2 over gloo, tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab.trainer.ranks import Ranks, share_out

WORKER = Path(__file__).with_name("ranks_worker.py")
STAGES = ["sft", "reward_model", "ppo"]


@pytest.fixture(scope="module")
def compared(tiny_folder, tmp_path_factory) -> dict:
    """Each stage by two ranks beside one: the first step in float32, twenty in float64."""
    out = tmp_path_factory.mktemp("ranks") / "compared.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*torchrun, str(WORKER), str(tiny_folder), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("stage", STAGES)
def test_the_first_gradients_of_two_ranks_are_those_of_one(compared, stage):
    assert compared[stage]["float32"]["gradients"] < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_twenty_steps_of_two_ranks_in_float64_are_those_of_one(compared, stage):
    found = compared[stage]["float64"]
    assert found["weights"] < 1e-9 and found["metrics"] < 1e-9


@pytest.mark.parametrize("stage", STAGES)
def test_each_rank_holds_about_half_of_the_weights(compared, stage):
    found = compared[stage]["float64"]
    assert found["elements_held"] < 0.51 * found["elements"]


@pytest.mark.parametrize("way", ["many to many", "many to one", "one to many"])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(compared, way):
    found = compared["checkpoints"]
    assert found[way] <= (0 if way == "many to many" else 1e-7)  # one rank sums in another order
    assert [name.startswith("shard-") for name in found["files"]] == [True, True, False]


@pytest.mark.parametrize("model", ["policy-float32", "policy-bfloat16", "reward-float32"])
def test_ranks_publish_the_folder_that_one_rank_publishes(compared, model):
    whole, pieces = (compared["folders"][f"{model}-{name}"] for name in ("whole", "pieces"))
    assert whole == {"tensors": True, "config": True, "files": 1}
    assert pieces["tensors"] and pieces["config"] and pieces["files"] > 3


def test_a_batch_is_shared_out_evenly_by_tokens():
    sizes = [90, 10, 40, 30, 20, 50]
    shares = share_out(sizes, 2)
    assert sorted(i for share in shares for i in share) == list(range(6))
    assert [sum(sizes[i] for i in share) for share in shares] == [120, 120]


def test_a_rank_with_little_to_do_takes_part_in_every_micro_batch():
    def cut(sizes, _):
        return [[i] for i in range(len(sizes))]

    busy, idle = (Ranks(rank, 2).plan([9, 1, 1, 1], 100, cut) for rank in range(2))
    assert len(busy) == len(idle) == 3
    assert sorted(i for plan in (busy, idle) for micro in plan for i in micro) == [0, 1, 2, 3] and busy[1:] == [[], []]
