"""selected_logprobs against plain torch in float64."""

import pytest
import torch

from trimtab.kernels import chunked_torch, kl
from trimtab.kernels.api import selected_logprobs
from trimtab.kernels.selfcheck import check_selected_logprobs


def plain(hidden, weight, targets, temperature=1.0, bias=None, softcap=None):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    logp = torch.log_softmax(logits, 1)
    return logp.gather(1, targets[:, None])[:, 0], torch.logsumexp(logits, 1), -(logp.exp() * logp).sum(1)


@pytest.mark.parametrize("rows,width,vocab", [(1, 3, 2), (7, 5, 11), (64, 16, 127), (33, 8, 1009)])
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_values_and_gradients_equal_plain_torch(monkeypatch, rows, width, vocab, softcap):
    monkeypatch.setattr(chunked_torch, "CHUNK_BYTES", 5 * vocab * 8)  # several ragged chunks
    torch.manual_seed(rows)
    inputs = [
        torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((rows, width), (vocab, width), (vocab,))
    ]
    targets = torch.randint(vocab, (rows,))
    temperature = 0.3 + torch.rand(rows, dtype=torch.float64)
    upstream = [torch.randn(rows, dtype=torch.float64) for _ in range(3)]
    hidden, weight, bias = inputs
    ours = selected_logprobs(hidden, weight, targets, temperature=temperature, bias=bias, softcap=softcap)
    oracle = plain(hidden, weight, targets, temperature, bias, softcap)
    for got, want in zip(ours, oracle, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    ours_grads = torch.autograd.grad(ours, inputs, upstream)
    oracle_grads = torch.autograd.grad(oracle, inputs, upstream)
    for got, want in zip(ours_grads, oracle_grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_large_shifts_and_one_hot_rows_stay_exact():
    weight = torch.eye(5, dtype=torch.float32)
    hidden = torch.tensor([[200.0, 0, 0, 0, 0], [-200.0, -200, -200, -200, -200], [30.0, 30, 30, 30, 30]])
    result = selected_logprobs(hidden, weight, torch.tensor([0, 4, 2]))
    oracle = plain(hidden.double(), weight.double(), torch.tensor([0, 4, 2]))
    for got, want in zip(result, oracle, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


def test_a_nan_row_harms_no_other_row():
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(6, 4), torch.randn(9, 4), torch.randint(9, (6,))
    clean = selected_logprobs(hidden, weight, targets).logprob_N
    hidden[2] = float("nan")
    poisoned = selected_logprobs(hidden, weight, targets).logprob_N
    keep = torch.arange(6) != 2
    assert torch.equal(clean[keep], poisoned[keep]) and poisoned[2].isnan()


def test_rows_without_upstream_gradient_get_exactly_none():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
    result = selected_logprobs(hidden, weight, torch.randint(9, (6,)))
    result.logprob_N[:3].sum().backward()
    assert hidden.grad[3:].abs().max() == 0 and hidden.grad[:3].abs().min() > 0


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature"):
        selected_logprobs(torch.randn(2, 3), torch.randn(4, 3), torch.tensor([0, 1]), temperature=temperature)


def test_kl_estimators_agree_in_the_mean_and_k3_is_never_negative():
    torch.manual_seed(0)
    p, q = torch.log_softmax(torch.randn(50).double(), 0), torch.log_softmax(torch.randn(50).double(), 0)
    exact = (p.exp() * (p - q)).sum()
    for estimator in (kl.k1, kl.k3):
        torch.testing.assert_close((p.exp() * estimator(p, q)).sum(), exact)
    assert (kl.k3(p, q) >= 0).all()
    torch.testing.assert_close(kl.k2(p, q), (p - q) ** 2 / 2)


def test_self_check_passes_here_and_catches_a_wrong_backend(monkeypatch):
    check_selected_logprobs()
    monkeypatch.setattr(torch.Tensor, "amax", lambda self, dim: self.mean(dim), raising=True)
    check_selected_logprobs()  # the maximum is only for range: any offset is exact
    monkeypatch.setattr(chunked_torch, "logits", lambda x, w, b, s: (x @ w.T * 1.001, None))
    with pytest.raises(RuntimeError, match="off by"):
        check_selected_logprobs()
