"""Prints the peak memory in MB that one PPO step over a large head adds; run by test_memory.py: `… VOCAB ROWS`."""

import resource
import sys

import torch

from trimtab.kernels.api import ppo_loss
from trimtab.kernels.ppo_terms import PpoSettings


def main(vocab: int, rows: int) -> None:
    torch.manual_seed(0)
    body = torch.nn.Linear(16, 16)
    weight = torch.nn.Parameter(torch.randn(vocab, 16))
    inputs, targets, advantages = torch.randn(rows, 16), torch.randint(vocab, (rows,)), torch.randn(rows)
    optimizer = torch.optim.SGD([*body.parameters(), weight], lr=1e-3)
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = ppo_loss(
        body(inputs), weight, targets, torch.full((rows,), -11.0), advantages, settings=PpoSettings(), normalizer=rows
    )
    result.loss.backward()
    optimizer.step()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
