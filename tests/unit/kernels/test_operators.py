"""The custom operators: registered soundly, seen as one node by torch.compile, right in their derivatives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.kernels import oracle
from trimtab.kernels.api import exact_kl, ppo_loss, selected_logprobs, selected_logprobs_from_logits
from trimtab.kernels.head_op import head_logprobs, logits_logprobs
from trimtab.kernels.kl_op import two_head_kl
from trimtab.kernels.ppo_op import ppo_head
from trimtab.kernels.ppo_terms import PpoSettings


def tensors(rows=5, width=4, vocab=7, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((rows, width), (vocab, width), (vocab,))
    hidden, weight, bias = (torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)
    return hidden, weight, bias, torch.randint(vocab, (rows,)), 0.5 + torch.rand(rows, dtype=dtype)


def calls():
    hidden, weight, bias, targets, temperature = tensors()
    reference = (hidden.detach() * 0.9, weight.detach(), None, None)
    rows = [torch.randn(5, dtype=torch.float64) for _ in range(3)]
    coefficients = (0.2, 0.2, 3.0, 0.01, 0.1, "k3", 5.0, [True, True, True])
    return {
        "head": (head_logprobs, (hidden, weight, bias, targets, temperature, 5.0, True)),
        "head, recomputed": (head_logprobs, (hidden, weight, None, targets, temperature, None, False)),
        "logits": (logits_logprobs, (torch.randn(5, 7, dtype=torch.float64, requires_grad=True), targets, temperature)),
        "kl": (two_head_kl, (hidden, weight, bias, 5.0, *reference, targets, temperature)),
        "ppo": (
            ppo_head,
            (hidden, weight, bias, targets, temperature, None, *rows, rows[0], None, *coefficients),
        ),
    }


@pytest.mark.parametrize("name", calls())
def test_operators_are_registered_soundly(name):
    operator, arguments = calls()[name]
    results = torch.library.opcheck(operator, arguments)
    assert set(results.values()) == {"SUCCESS"}


def test_derivatives_pass_gradcheck():
    hidden, weight, bias, targets, temperature = tensors()
    fixed = {"temperature": temperature, "softcap": 3.0}
    torch.autograd.gradcheck(
        lambda *t: selected_logprobs(t[0], t[1], targets, bias=t[2], **fixed), (hidden, weight, bias)
    )
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda z: selected_logprobs_from_logits(z, targets, temperature=temperature), (logits,))
    reference = (hidden.detach()[:, :3] * 0.9, weight.detach()[:, :3] * 1.1)
    torch.autograd.gradcheck(
        lambda *t: exact_kl(t[0], t[1], *reference, targets, bias=t[2], **fixed)[:4], (hidden, weight, bias)
    )
    old = (
        selected_logprobs(hidden, weight, targets, bias=bias, **fixed).logprob_N.detach()
        + 0.1 * torch.randn(5).double()
    )
    advantages, options = torch.randn(5).double(), PpoSettings(entropy_coefficient=0.3, kl_coefficient=0.2)
    torch.autograd.gradcheck(
        lambda *t: (
            ppo_loss(
                t[0], t[1], targets, old, advantages, settings=options, reference_logprobs_N=old, bias=t[2], **fixed
            ).loss
        ),
        (hidden, weight, bias),
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_sees_whole_graphs(dynamic):
    def loss(hidden, weight, targets, old):
        selected = selected_logprobs(hidden, weight, targets, temperature=0.7)
        kl = exact_kl(hidden, weight, hidden * 0.9, weight, targets).kl_N
        ppo = ppo_loss(hidden, weight, targets, old, old, settings=PpoSettings(), normalizer=3.0).loss
        return (selected.logprob_N * selected.entropy_N + kl).sum() + ppo

    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for rows in (5, 9):
        hidden, weight, _, targets, _ = tensors(rows, dtype=torch.float32)
        old = torch.randn(rows)
        results = [
            torch.autograd.grad(function(hidden, weight, targets, old), (hidden, weight))
            for function in (loss, compiled)
        ]
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 17), width=st.integers(1, 9), vocab=st.integers(1, 40), chunk=st.integers(1, 60),
    seed=st.integers(0, 2**16), softcap=st.sampled_from([None, 2.0]),
)  # fmt: skip
def test_any_shape_equals_plain_torch(rows, width, vocab, chunk, seed, softcap):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (
        torch.randn(s, width, dtype=torch.float64, generator=generator, requires_grad=True) for s in (rows, vocab)
    )
    targets = torch.randint(vocab, (rows,), generator=generator)
    upstream = [torch.randn(rows, dtype=torch.float64, generator=generator) for _ in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trimtab.kernels.chunked_torch.CHUNK_BYTES", 8 * chunk)
        ours = selected_logprobs(hidden, weight, targets, temperature=0.6, softcap=softcap)
        gradients = torch.autograd.grad(ours, (hidden, weight), upstream)
    want = oracle.selected(oracle.head_logits(hidden, weight, 0.6, softcap=softcap), targets)
    torch.testing.assert_close(tuple(ours), tuple(want), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients, torch.autograd.grad(want, (hidden, weight), upstream), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("entropy_coefficient", [0.0, 0.1])
def test_log_probs_of_the_ppo_loss_are_bitwise_those_of_the_old_pass(entropy_coefficient):
    hidden, weight, bias, targets, temperature = tensors(33, 16, 1009, torch.float32)
    fixed = {"bias": bias, "temperature": temperature}
    selected = selected_logprobs(hidden, weight, targets, **fixed)
    old = selected.logprob_N.detach()
    options = PpoSettings(entropy_coefficient=entropy_coefficient)
    result = ppo_loss(hidden, weight, targets, old, torch.randn(33), settings=options, **fixed)
    assert torch.equal(result.logprob_N, old) and torch.equal(result.lse_N, selected.lse_N)
