"""SFT: the loss is the mean over response tokens, whatever the micro-batches; schedules and dropout."""

import numpy as np
import pytest
import torch

from trimtab.models.policy import Policy
from trimtab.trainer.forward import TokenBatch, residual_dropout, response_logprobs, slice_batch
from trimtab.trainer.optimizer import MasterWeightOptimizer, learning_rate, masters_of
from trimtab.trainer.sft import accumulate_nll, mean_nll
from trimtab.trainer.stages import OptimizerConfig


def demonstrations() -> TokenBatch:
    random = np.random.default_rng(0)
    sequences = tuple(random.integers(3, 48, n).astype(np.int32) for n in (5, 12, 9, 3, 20, 7))
    return TokenBatch(sequences, (1, 4, 2, 1, 6, 3))


def test_loss_equals_transformers_own_with_prompts_masked(tiny_folder):
    policy = Policy.load(str(tiny_folder))
    batch = demonstrations()
    total = 0.0
    theirs = Policy.load(str(tiny_folder)).model
    theirs.set_attn_implementation("eager")
    for ids, prompt in zip(batch.sequences, batch.prompt_lengths, strict=True):
        tokens = torch.tensor(ids[None].astype(np.int64))
        with torch.no_grad():
            logp = torch.log_softmax(theirs(tokens).logits[0, :-1].double(), -1)
        total -= float(logp[torch.arange(len(ids) - 1), tokens[0, 1:]][prompt - 1 :].sum())
    assert mean_nll(policy, batch, 30) == pytest.approx(total / batch.response_lengths.sum(), rel=1e-5)


@pytest.mark.parametrize("micro_batch_tokens", [8, 25, 1000])
def test_gradients_do_not_depend_on_micro_batches(tiny_folder, micro_batch_tokens):
    def gradients(tokens):
        policy = Policy.load(str(tiny_folder), dtype="float64")
        optimizer = MasterWeightOptimizer(policy.model, OptimizerConfig())
        loss = accumulate_nll(policy, demonstrations(), range(6), tokens, optimizer)
        return loss, [p.grad for p in policy.model.parameters()]

    (loss, ours), (whole_loss, whole) = gradients(micro_batch_tokens), gradients(10_000)
    assert loss == pytest.approx(whole_loss, rel=1e-12)
    for got, want in zip(ours, whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_residual_dropout_is_seeded_unbiased_and_gone_afterwards(tiny_folder):
    policy = Policy.load(str(tiny_folder))
    part = slice_batch(demonstrations(), range(6))

    def run(seed):
        with torch.no_grad(), residual_dropout(policy, 0.2, torch.Generator().manual_seed(seed)):
            return response_logprobs(policy, part).logprob_N

    with torch.no_grad():
        clean = response_logprobs(policy, part).logprob_N
        assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2)) and not torch.equal(run(1), clean)
        assert torch.equal(response_logprobs(policy, part).logprob_N, clean)


def test_schedules_warm_up_from_a_tenth_and_end_where_they_say():
    cosine = OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_steps=10)
    assert learning_rate(cosine, 0, 110) == pytest.approx(0.1)
    assert learning_rate(cosine, 10, 110) == pytest.approx(1.0)
    assert learning_rate(cosine, 60, 110) == pytest.approx(0.55)
    assert learning_rate(cosine, 110, 110) == pytest.approx(0.1)
    linear = OptimizerConfig(learning_rate=1.0, schedule="linear")
    assert learning_rate(linear, 25, 100) == pytest.approx(0.75)
    constant = OptimizerConfig(learning_rate=1.0, schedule="constant", warmup_steps=2)
    assert [learning_rate(constant, step, 9) for step in (0, 1, 2, 8)] == pytest.approx([0.1, 0.55, 1, 1])


@pytest.mark.parametrize("prompt", [0, 5])
def test_a_sequence_without_prompt_or_response_is_refused(prompt):
    with pytest.raises(ValueError, match="prompt and a response"):
        TokenBatch((np.arange(5, dtype=np.int32),), (prompt,))


def test_bfloat16_weights_keep_float32_masters_and_the_positions_that_the_services_use(tiny_folder):
    policy, served = Policy.load(str(tiny_folder)), Policy.load(str(tiny_folder), dtype="bfloat16")
    masters = masters_of(policy.model, "bfloat16")
    assert masters is not None and {tensor.dtype for tensor in masters.values()} == {torch.float32}
    assert policy.dtype == "bfloat16"
    part = slice_batch(demonstrations(), range(6))
    with torch.no_grad():  # bit by bit: rounded rotary frequencies alone would show
        assert torch.equal(policy.hidden(part.packed), served.hidden(part.packed))
    buffers = dict(served.model.named_buffers())
    assert buffers and all(torch.equal(value, buffers[name]) for name, value in policy.model.named_buffers())
