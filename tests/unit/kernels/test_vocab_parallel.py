"""A vocabulary over several ranks, in uneven shards, gives what one rank would."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from trimtab.kernels.statistics import logprob_lse_entropy, merged


def test_three_uneven_shards_equal_the_whole_head_in_values_and_gradients(tmp_path):
    script = Path(__file__).parent / "vocab_shards.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(tmp_path / "store")],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    outputs = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], "\n".join(outputs)[-4000:]


def test_a_shard_of_impossible_columns_adds_nothing():
    possible = torch.tensor([[2.0], [1.5], [-0.2], [1.0]])
    impossible = torch.tensor([[-torch.inf], [0.0], [0.0], [-torch.inf]])
    for order in ([possible, impossible], [impossible, possible]):
        for ours, want in zip(
            logprob_lse_entropy(merged(torch.stack(order))), logprob_lse_entropy(possible), strict=True
        ):
            assert torch.equal(ours, want)
