"""Three ranks, each with a part of the vocabulary; run by test_vocab_parallel.py: `vocab_shards.py RANK STORE_FILE`."""

import sys

import torch
import torch.distributed as dist

from trimtab.kernels.api import selected_logprobs
from trimtab.kernels.vocab_parallel import vocab_parallel_logprobs


def main(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=3)
    torch.manual_seed(0)
    rows, width, vocab = 23, 8, 101
    hidden, weight = (torch.randn(n, width, dtype=torch.float64, requires_grad=True) for n in (rows, vocab))
    bias = torch.randn(vocab, dtype=torch.float64, requires_grad=True)
    targets, upstream = torch.randint(vocab, (rows,)), [torch.randn(rows, dtype=torch.float64) for _ in range(3)]
    targets[:3] = torch.tensor([0, 6, 100])
    options = {"temperature": 0.5 + torch.rand(rows, dtype=torch.float64), "softcap": 9.0}
    whole = selected_logprobs(hidden, weight, targets, bias=bias, **options)
    want = torch.autograd.grad(whole, (hidden, weight, bias), upstream)

    start, end = ((0, 7), (7, 80), (80, 101))[rank]
    shard = [t[start:end].detach().requires_grad_() for t in (weight, bias)]
    own = hidden.detach().requires_grad_()
    ours = vocab_parallel_logprobs(own, shard[0], targets, vocab_start=start, bias_shard=shard[1], **options)
    got = torch.autograd.grad(ours, (own, *shard), upstream)
    torch.testing.assert_close(tuple(ours), tuple(whole), rtol=1e-12, atol=1e-12)
    for ours_gradient, gradient in zip(got, (want[0], want[1][start:end], want[2][start:end]), strict=True):
        torch.testing.assert_close(ours_gradient, gradient, rtol=1e-10, atol=1e-12)

    gathered = [torch.empty_like(ours.lse_N) for _ in range(3)]
    dist.all_gather(gathered, ours.lse_N.detach())
    assert all(torch.equal(gathered[0], other) for other in gathered), "ranks must agree in every bit"
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
