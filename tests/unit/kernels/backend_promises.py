"""What every backend promises, against plain torch in float64; run by test_backends.py, a process a backend.

TRIMTAB_KERNELS says which one; for triton TRITON_INTERPRET=1 must be set before torch is imported.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.kernels import kl, oracle
from trimtab.kernels.api import exact_kl, ppo_loss, selected_logprobs, selected_logprobs_from_logits
from trimtab.kernels.backends import backend_for
from trimtab.kernels.ppo_terms import PpoSettings
from trimtab.kernels.statistics import logprob_lse_entropy, merged

pytestmark = [
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
]
LOGPROB_TOLERANCE = 2e-5  # nats, |z| ≤ 50
GRADIENT_TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}  # relative Frobenius norm


def head(rows, width, vocab, dtype=torch.float32, largest=12.0, seed=0):
    """Hidden states and weight whose largest logit is about `largest`, and targets."""
    torch.manual_seed(seed)
    hidden, weight = torch.randn(rows, width), torch.randn(vocab, width)
    scale = (largest / float((hidden @ weight.T).abs().max())) ** 0.5
    inputs = [(matrix * scale).to(dtype).requires_grad_() for matrix in (hidden, weight)]
    return *inputs, torch.randint(vocab, (rows,))


def worst(ours, want):
    return max(float((a.detach().double() - b.detach().double()).abs().max()) for a, b in zip(ours, want, strict=True))


def relative(ours, want):
    return float((ours.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows,width,vocab", [(1, 3, 2), (37, 24, 101), (33, 130, 1009), (5, 16, 2048)])
def test_values_and_gradients_at_ragged_shapes(dtype, rows, width, vocab):
    hidden, weight, targets = head(rows, width, vocab, dtype, largest=40)
    targets[0], targets[-1] = 0, vocab - 1
    bias = torch.randn(vocab, requires_grad=True)
    temperature = 0.9 + torch.rand(rows)
    ours = selected_logprobs(hidden, weight, targets, temperature=temperature, bias=bias)
    want = oracle.selected(oracle.head_logits(hidden, weight, temperature, bias), targets)
    assert worst(ours, want) <= LOGPROB_TOLERANCE
    upstream = [torch.randn(rows) for _ in range(3)]
    got = torch.autograd.grad(ours, (hidden, weight, bias), upstream)
    right = torch.autograd.grad(want, (hidden, weight, bias), [u.double() for u in upstream])
    allowed = GRADIENT_TOLERANCE[dtype] * (2 if rows == 1 else 1)  # roundings of a handful do not average out
    for ours_gradient, gradient in zip(got, right, strict=True):
        assert relative(ours_gradient, gradient) <= allowed


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_soft_cap_and_temperature(temperature):
    hidden, weight, targets = head(9, 20, 257, largest=15)
    ours = selected_logprobs(hidden, weight, targets, temperature=temperature, softcap=10.0)
    want = oracle.selected(oracle.head_logits(hidden, weight, temperature, softcap=10.0), targets)
    assert worst(ours, want) <= LOGPROB_TOLERANCE
    upstream = [torch.randn(9) for _ in range(3)]
    got = torch.autograd.grad(ours, (hidden, weight), upstream)
    right = torch.autograd.grad(want, (hidden, weight), [u.double() for u in upstream])
    assert max(relative(a, b) for a, b in zip(got, right, strict=True)) <= 1e-4


@pytest.mark.parametrize("shift", [-200.0, 200.0])
def test_a_shift_of_all_logits_moves_the_lse_alone(shift):
    hidden, weight, targets = head(11, 16, 300)
    plain = selected_logprobs(hidden, weight, targets)
    shifted = selected_logprobs(hidden, weight, targets, bias=torch.full((300,), shift))
    want = oracle.selected(oracle.head_logits(hidden, weight, bias=torch.full((300,), shift)), targets)
    assert worst(shifted, want) <= 1e-4  # a float32 logit of 200 has steps of 1.5e-5
    assert float((shifted.lse_N - plain.lse_N - shift).abs().max()) <= 1e-4


def test_ruled_out_columns_count_nothing():
    hidden, weight, targets = head(6, 16, 300)
    bias = torch.zeros(300)
    bias[torch.arange(300) % 7 != 3] = -torch.inf
    targets = torch.randint(42, (6,)) * 7 + 3
    ours = selected_logprobs(hidden, weight, targets, bias=bias)
    want = oracle.selected(oracle.head_logits(hidden, weight, bias=bias), targets)
    assert worst(ours, want) <= LOGPROB_TOLERANCE
    (ours.logprob_N + ours.entropy_N).sum().backward()
    assert hidden.grad.isfinite().all() and weight.grad.isfinite().all()
    assert weight.grad[torch.arange(300) % 7 != 3].abs().max() == 0


def test_equal_logits_one_hot_logits_and_a_permuted_vocabulary():
    vocab = 131
    flat = selected_logprobs(torch.zeros(4, 8), torch.randn(vocab, 8), torch.tensor([0, 1, 65, 130]))
    assert float((flat.entropy_N - torch.tensor(vocab).log()).abs().max()) <= 1e-6
    certain = selected_logprobs(torch.full((1, 1), 1.0), 100.0 * torch.eye(vocab)[:, 65:66], torch.tensor([65]))
    assert certain.logprob_N.item() == 0 and 0 <= certain.entropy_N.item() < 1e-30
    hidden, weight, targets = head(7, 16, vocab)
    order = torch.randperm(vocab)
    permuted = selected_logprobs(hidden, weight[order], order.argsort()[targets])
    assert worst(permuted, selected_logprobs(hidden, weight, targets)) <= 2e-6


def test_a_nan_row_harms_no_other_row():
    hidden, weight, targets = head(6, 16, 200)
    keep = torch.arange(6) != 2
    poisoned = hidden.detach().clone()
    poisoned[2] = torch.nan
    clean, harmed = (selected_logprobs(h, weight.detach(), targets) for h in (hidden.detach(), poisoned))
    for before, after in zip(clean, harmed, strict=True):
        assert torch.equal(before[keep], after[keep]) and after[2].isnan()


def test_shards_of_the_vocabulary_merge_to_the_whole():
    hidden, weight, targets = (t.detach() for t in head(9, 16, 300))
    forward = backend_for(hidden).head_forward
    ones = torch.ones(9)
    parts = [
        forward(hidden, weight[start:end], None, targets - start, ones, None, False)[0]
        for start, end in ((0, 7), (7, 260), (260, 300))
    ]
    whole = selected_logprobs(hidden, weight, targets)
    assert worst(logprob_lse_entropy(merged(torch.stack(parts))), whole) <= 2e-6


def test_from_logits():
    torch.manual_seed(0)
    logits = (10 * torch.randn(5, 5000)).requires_grad_()
    targets = torch.tensor([0, 4999, 4095, 4096, 17])
    ours = selected_logprobs_from_logits(logits, targets, temperature=0.8)
    want = oracle.selected(logits.double() / 0.8, targets)
    assert worst(ours, want) <= LOGPROB_TOLERANCE
    upstream = [torch.randn(5) for _ in range(3)]
    got, right = (
        torch.autograd.grad(result, logits, [u.to(result[0]) for u in upstream])[0] for result in (ours, want)
    )
    assert relative(got, right) <= 2e-5


def ppo_inputs(rows, dtype=torch.float32):
    hidden, weight, targets = head(rows, 40, 300, dtype)
    now = oracle.selected(oracle.head_logits(hidden, weight, 0.8), targets)
    old = (now.logprob_N + 0.25 * torch.randn(rows)).detach().float()
    advantages, weights, reference = torch.randn(rows), 0.5 + torch.rand(rows), old + 0.3 * torch.randn(rows)
    return hidden, weight, targets, old, advantages, weights, reference, now.lse_N.detach().float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hint", ["exact", "off by 300", "off by -300", "NaN", None])
def test_ppo_loss_with_any_hint(monkeypatch, dtype, hint):
    monkeypatch.setattr("trimtab.kernels.triton_ppo.SCRATCH_BYTES", 0)  # two row chunks of 128
    monkeypatch.setattr("trimtab.kernels.chunked_torch.CHUNK_BYTES", 4 * 300 * 50)
    hidden, weight, targets, old, advantages, weights, reference, lse = ppo_inputs(140, dtype)
    hints = {"exact": lse, "NaN": torch.full_like(lse, torch.nan), None: None}
    hints |= {f"off by {by}": torch.where(torch.arange(140) % 3 == 0, lse + by, lse) for by in (300, -300)}
    options = PpoSettings(dual_clip=3.0, kl_coefficient=0.1, kl_estimator="k3")
    ours = ppo_loss(
        hidden, weight, targets, old, advantages, settings=options, weights_N=weights, reference_logprobs_N=reference,
        hint_lse_N=hints[hint], temperature=0.8, normalizer=140,
    )  # fmt: skip
    logits = oracle.head_logits(hidden, weight, 0.8)
    want = oracle.ppo(logits, targets, old, advantages, weights, reference, options) / 140
    assert float((ours.loss - want).abs()) <= 1e-6
    assert worst(ours[1:], oracle.selected(logits, targets)[:2]) <= LOGPROB_TOLERANCE
    got, right = (torch.autograd.grad(loss, (hidden, weight)) for loss in (ours.loss, want))
    assert max(relative(a, b) for a, b in zip(got, right, strict=True)) <= GRADIENT_TOLERANCE[dtype]


def test_ppo_loss_with_entropy_bonus_and_bias_takes_the_general_path():
    hidden, weight, targets, old, advantages, weights, reference, lse = ppo_inputs(20)
    bias = torch.randn(300, requires_grad=True)
    for options in (PpoSettings(entropy_coefficient=0.05), PpoSettings()):
        ours = ppo_loss(
            hidden, weight, targets, old, advantages, settings=options, weights_N=weights, bias=bias, hint_lse_N=lse
        )
        logits = oracle.head_logits(hidden, weight, bias=bias)
        want = oracle.ppo(logits, targets, old, advantages, weights, reference, options)
        got, right = (torch.autograd.grad(loss, (hidden, weight, bias)) for loss in (ours.loss, want))
        assert relative(ours.loss, want) <= 5e-6
        assert max(relative(a, b) for a, b in zip(got, right, strict=True)) <= 2e-5


def test_ppo_gradients_of_a_second_pass_and_of_a_multiple_are_as_right_as_the_first():
    hidden, weight, targets, old, advantages, weights, _, lse = ppo_inputs(20)
    leaves = (hidden, weight)
    loss = ppo_loss(
        hidden, weight, targets, old, advantages, settings=PpoSettings(), weights_N=weights, hint_lse_N=lse
    ).loss
    once = [gradient.clone() for gradient in torch.autograd.grad(loss, leaves, retain_graph=True)]
    loss.backward(retain_graph=True)
    loss.backward(retain_graph=True)
    thrice = torch.autograd.grad(3 * loss, leaves)
    for leaf, one, three in zip(leaves, once, thrice, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * one)
        torch.testing.assert_close(three, 3 * one)


@pytest.mark.parametrize("closeness", [1e-3, 0.02, 0.5])
def test_exact_kl_is_accurate_when_small_and_never_negative(closeness):
    hidden, weight, targets = head(20, 16, 2100, largest=8)
    reference_hidden, reference_weight = hidden.detach()[:, :8] * (1 + closeness), weight.detach()[:, :8]
    bias = (hidden.detach()[0, 8:] @ weight.detach()[:, 8:].T) * (1 + closeness)
    same = {"reference_bias": bias, "temperature": 0.9}
    ours = exact_kl(hidden, weight, reference_hidden, reference_weight, targets, **same)
    logits = oracle.head_logits(hidden, weight, 0.9)
    want = oracle.two_heads(logits, oracle.head_logits(reference_hidden, reference_weight, 0.9, bias), targets)
    assert worst(ours[:3], want[:3]) <= LOGPROB_TOLERANCE and worst(ours[4:], want[4:]) <= LOGPROB_TOLERANCE
    assert (ours.kl_N >= 0).all()
    measured = want.kl_N >= 1e-4
    assert measured.any() and float((ours.kl_N / want.kl_N - 1)[measured].abs().max()) <= 1e-3
    upstream = [torch.randn(20) for _ in range(4)]
    got, right = (
        torch.autograd.grad(result[:4], (hidden, weight), [u.to(result[0]) for u in upstream])
        for result in (ours, want)
    )
    assert max(relative(a, b) for a, b in zip(got, right, strict=True)) <= 5e-5


def test_exact_kl_of_equal_heads_is_zero_and_k3_agrees_in_the_mean():
    hidden, weight, targets = (t.detach() for t in head(4, 16, 200))
    assert float(exact_kl(hidden, weight, hidden, weight, targets).kl_N.abs().max()) == 0
    every = torch.arange(200)
    ours = exact_kl(hidden[:1].expand(200, -1), weight, 0.9 * hidden[:1].expand(200, -1), weight, every)
    mean = (ours.logprob_N.exp() * kl.k3(ours.logprob_N, ours.reference_logprob_N)).sum()
    torch.testing.assert_close(mean, ours.kl_N[0], rtol=1e-4, atol=1e-7)


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 70), width=st.integers(1, 70), vocab=st.integers(1, 300), seed=st.integers(0, 999))
def test_any_shape(rows, width, vocab, seed):
    torch.manual_seed(seed)
    hidden, weight = (torch.randn(n, width).div(width**0.5).requires_grad_() for n in (rows, vocab))
    targets = torch.randint(vocab, (rows,))
    ours = selected_logprobs(hidden, weight, targets)
    want = oracle.selected(oracle.head_logits(hidden, weight), targets)
    torch.testing.assert_close(tuple(ours), tuple(w.float() for w in want), rtol=1e-5, atol=1e-5)
    got, right = (
        torch.autograd.grad(result.logprob_N.sum() + result.entropy_N.sum(), (hidden, weight))
        for result in (ours, want)
    )
    torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-5)
