"""What the Triton backend promises beyond `backend_promises.py`; run by test_backends.py in the interpreter."""

from concurrent.futures import ThreadPoolExecutor

import torch

from trimtab.kernels import triton_backward
from trimtab.kernels.api import selected_logprobs
from trimtab.kernels.backends import backend_for
from trimtab.kernels.selfcheck import check_training_kernels


def inputs(rows, width, vocab, dtype=torch.float32):
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, width).to(dtype).requires_grad_() for n in (rows, vocab))
    return hidden, weight, torch.randint(vocab, (rows,))


def test_this_process_interprets():
    assert backend_for(torch.zeros(1)).name == "triton"
    check_training_kernels()


def test_rows_do_not_depend_on_their_company_and_runs_repeat_bitwise():
    hidden, weight, targets = inputs(70, 40, 1009, torch.bfloat16)
    with torch.no_grad():
        together = selected_logprobs(hidden, weight, targets)
        again = selected_logprobs(hidden, weight, targets)
        for rows in (slice(0, 1), slice(31, 34), slice(64, 70)):
            alone = selected_logprobs(hidden[rows], weight, targets[rows])
            assert all(torch.equal(a[rows], b) for a, b in zip(together, alone, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(together, again, strict=True))


def test_rows_without_upstream_are_left_out(monkeypatch):
    hidden, weight, targets = inputs(6, 16, 200)
    (selected_logprobs(hidden, weight, targets).logprob_N * torch.tensor([1.0, 0, 0, 2, 0, 0])).sum().backward()
    assert hidden.grad[[1, 2, 4, 5]].abs().max() == 0
    assert (hidden.grad[[0, 3]].abs().sum(1) > 0).all()
    hidden.grad = None
    monkeypatch.setattr(triton_backward, "launch", None)  # no live row: no kernel
    (selected_logprobs(hidden, weight, targets).logprob_N * 0).sum().backward()
    assert hidden.grad.abs().max() == 0


def test_vocabulary_chunks_of_the_backward_pass_change_nothing(monkeypatch):
    hidden, weight, targets = inputs(9, 16, 300)
    gradients = []
    for columns in (1024, 64):
        monkeypatch.setattr(triton_backward, "MIN_COLUMNS", columns)
        monkeypatch.setattr(triton_backward, "SCRATCH_BYTES", 0)
        result = selected_logprobs(hidden, weight, targets)
        gradients.append(torch.autograd.grad(result.logprob_N.sum() + result.entropy_N.sum(), (hidden, weight)))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_threads_may_call_at_once():
    hidden, weight, targets = (t.detach() for t in inputs(9, 16, 200))
    want = selected_logprobs(hidden, weight, targets)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: selected_logprobs(hidden, weight, targets), range(8)))
    assert all(torch.equal(result.logprob_N, want.logprob_N) for result in results)
