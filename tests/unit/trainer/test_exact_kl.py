"""Exact KL in the PPO update: equal to the full softmax in float64, its gradient to autograd's, and the right head."""

import dataclasses

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trimtab.models.policy import LMHead, Policy
from trimtab.trainer.forward import (
    TokenBatch,
    hidden_exact_kl,
    response_hidden,
    response_logprobs,
    scaled_like,
    slice_batch,
)
from trimtab.trainer.optimizer import MasterWeightOptimizer
from trimtab.trainer.ppo.exact_kl import ReferenceHeadError, StepKl, load_reference_head
from trimtab.trainer.ppo.experience import Experience
from trimtab.trainer.ppo.rollout_metrics import rollout_metrics
from trimtab.trainer.ppo.update import PpoUpdate
from trimtab.trainer.stages import OptimizerConfig, PpoConfig, StageConfigError, parse_stage
from trimtab.weights.store import open_store
from trimtab_client import ModelInfo, ModelVersion

TEMPERATURE = 0.7


def config(**changes) -> PpoConfig:
    values = {
        "stage": {"model": "m", "optimizer": {"learning_rate": 1e-3}, "micro_batch_tokens": 24},
        "prompts": "p",
        "batch_size": 8,
        "minibatch_size": 4,
        "temperature": TEMPERATURE,
    }
    return parse_stage("ppo", values | changes)  # type: ignore[return-value]


def make_folder(tiny_folder, folder, *, tied: bool, seed: int = 7, hidden_size: int = 32):
    """Another model with the tiny model's tokenizer."""
    settings = LlamaConfig.from_pretrained(tiny_folder).to_dict()
    settings |= {"tie_word_embeddings": tied, "hidden_size": hidden_size, "initializer_range": 0.2, "head_dim": 8}
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(folder)
    return folder


def experience_of(policy: Policy, reference: Policy, episodes: int = 8) -> Experience:
    """Random sequences with both models' log-probs and the reference's bfloat16 hidden states."""
    random = np.random.default_rng(0)
    prompts = random.integers(1, 6, episodes).tolist()
    sequences = [random.integers(3, 48, p + random.integers(1, 12)).astype(np.int32) for p in prompts]
    tokens = TokenBatch(tuple(sequences), tuple(prompts))
    part = slice_batch(tokens, range(episodes))
    with torch.no_grad():
        behaviour = response_logprobs(policy, part, TEMPERATURE).logprob_N.float()
        reference_logprobs = response_logprobs(reference, part, TEMPERATURE).logprob_N.float()
        hidden = response_hidden(reference, part).bfloat16()
    scores = torch.linspace(-1, 1, episodes)
    return Experience(tokens, behaviour, reference_logprobs, scores, scores, torch.ones(episodes).bool(), hidden)


def make_update(policy: Policy, reference: Policy | None, **changes) -> PpoUpdate:
    optimizer = MasterWeightOptimizer(policy.model, OptimizerConfig(learning_rate=1e-3))
    cfg = config(samples_per_prompt=2, advantage="group", **changes)
    head = None if reference is None else scaled_like(reference.head, policy.head)
    return PpoUpdate(cfg, policy, optimizer, None, None, np.random.default_rng(0), reference_head=head)


def full_logits(policy: Policy, part) -> torch.Tensor:
    """All logits over temperature of the response tokens, [R, V], by transformers' own head."""
    head: torch.nn.Module = policy.model.get_output_embeddings()  # type: ignore[assignment]
    return head(response_hidden(policy, part)) / TEMPERATURE


def naive_kl(logits_RV: torch.Tensor, experience: Experience, reference: Policy, part) -> torch.Tensor:
    """KL by two full softmaxes in float64, [R]."""
    assert experience.reference_hidden_RD is not None
    weight_VD = reference.head.weight_VD.detach().double()
    logr_RV = (experience.reference_hidden_RD[part.flat_R].double() @ weight_VD.T / TEMPERATURE).log_softmax(1)
    logp_RV = logits_RV.double().log_softmax(1)
    return (logp_RV.exp() * (logp_RV - logr_RV)).sum(1)


@pytest.fixture(params=[True, False], ids=["tied heads", "heads not tied"])
def models(request, tiny_folder, tmp_path) -> tuple[Policy, Policy]:
    """A policy and a reference of another hidden size, both with or without tied heads."""
    ours = make_folder(tiny_folder, tmp_path / "policy", tied=request.param, seed=1)
    theirs = make_folder(tiny_folder, tmp_path / "reference", tied=request.param, seed=2, hidden_size=48)
    return Policy.load(str(ours)), Policy.load(str(theirs))


def test_the_metric_is_the_kl_of_two_full_softmaxes(models):
    policy, reference = models
    update = make_update(policy, reference, kl="exact_metric")
    experience = experience_of(policy, reference)
    targets = update.fix_targets(experience, update.plan_epoch(experience), 0.02)
    part = slice_batch(experience.tokens, range(8))
    with torch.no_grad():
        want_R = naive_kl(full_logits(policy, part), experience, reference, part)
    assert targets.exact_kl is not None and float(want_R.min()) > 0.1
    np.testing.assert_allclose(targets.exact_kl.kl_R, want_R, atol=1e-5, rtol=1e-5)
    metrics = rollout_metrics(experience, targets)
    assert metrics["kl_exact_nats_per_sequence"] == pytest.approx(float(want_R.sum()) / 8, abs=1e-5, rel=1e-5)
    assert 0 < metrics["reference_hidden_gap_mean"] < 0.05  # bfloat16 hidden states


def test_the_gradient_of_the_loss_is_autograds_of_the_written_out_formula(models):
    policy, reference = models
    update = make_update(policy, reference, kl="exact_loss", kl_loss_coefficient=0.3)
    experience = experience_of(policy, reference)
    minibatch, *rest = update.plan_epoch(experience)
    assert len(minibatch) > 1  # micro-batches
    targets = update.fix_targets(experience, [minibatch, *rest], 0.02)
    sums = update._minibatch_gradients(minibatch, targets, move_policy=True)
    ours = [p.grad.clone() for p in policy.model.parameters() if p.grad is not None]

    policy.model.zero_grad()
    tokens, loss, total_kl = sums["tokens"], torch.zeros(()), 0.0
    for part in minibatch:
        logits_RV = full_logits(policy, part)
        logprobs_R = logits_RV.log_softmax(1).gather(1, part.targets_R[:, None])[:, 0]
        old_R, advantages_R, weights_R = part.take(targets.old_R, targets.advantages_R, targets.weights_R)
        ratio_R = (logprobs_R - old_R).exp()
        surrogate_R = torch.minimum(ratio_R * advantages_R, ratio_R.clamp(0.8, 1.2) * advantages_R)
        kl_R = naive_kl(logits_RV, experience, reference, part)
        loss = loss + ((-weights_R * surrogate_R).sum() + 0.3 * kl_R.sum()) / tokens
        total_kl += float(kl_R.detach().sum())
    loss.backward()
    want = [p.grad for p in policy.model.parameters() if p.grad is not None]
    assert len(ours) == len(want) > 10
    for got, expected in zip(ours, want, strict=True):
        assert float((got - expected).norm()) <= 2e-5 * float(expected.norm())
    assert sums["loss_kl"] == pytest.approx(total_kl, rel=1e-5)
    assert sums["loss_policy"] / tokens == pytest.approx(float(loss.detach()), rel=1e-4)


def test_the_kl_loss_pulls_the_policy_back_to_the_reference_and_the_metric_alone_does_not(models):
    def first_gradient(**changes) -> torch.Tensor:
        update = make_update(policy, reference, **changes)
        experience = experience_of(policy, reference)
        minibatch, *_ = epoch = update.plan_epoch(experience)
        policy.model.zero_grad()
        update._minibatch_gradients(minibatch, update.fix_targets(experience, epoch, 0.02), move_policy=True)
        return torch.cat([p.grad.to_dense().flatten() for p in policy.model.parameters() if p.grad is not None])

    policy, reference = models
    sampled = first_gradient(kl="sampled")
    assert torch.equal(sampled, first_gradient(kl="exact_metric"))
    assert not torch.allclose(sampled, first_gradient(kl="exact_loss", kl_loss_coefficient=0.3))
    update = make_update(policy, reference, kl="exact_loss", kl_loss_coefficient=10.0, inner_epochs=20)
    experience = experience_of(policy, reference)
    epoch = update.plan_epoch(experience)
    before = update.fix_targets(experience, epoch, 0.0)
    metrics = update.optimize(experience, epoch, before, 1e-2, 0.0)
    after = update.fix_targets(experience, epoch, 0.0)
    assert before.exact_kl is not None and after.exact_kl is not None
    assert float(after.exact_kl.kl_R.mean()) < 0.7 * float(before.exact_kl.kl_R.mean())
    assert 0 < metrics["loss_kl"] < float(before.exact_kl.kl_R.mean())


def test_ratio_one_holds_beside_the_exact_kl_and_a_still_policy_gets_no_gradient(models):
    policy, reference = models
    update = make_update(policy, reference, kl="exact_loss", kl_loss_coefficient=0.3)
    experience = experience_of(policy, reference)
    epoch = update.plan_epoch(experience)
    targets = update.fix_targets(experience, epoch, 0.02)
    sums = update._minibatch_gradients(epoch[0], targets, move_policy=False)
    assert sums["ratio"] / sums["tokens"] == 1 and sums["approx_kl"] == 0 and sums["loss_kl"] > 0
    assert all(p.grad is None for p in policy.model.parameters())


def test_against_itself_only_the_rounding_of_hidden_states_is_left(tiny_folder, tmp_path):
    policy = Policy.load(str(make_folder(tiny_folder, tmp_path / "p", tied=False)))
    update = make_update(policy, policy, kl="exact_metric")
    experience = experience_of(policy, policy)
    targets = update.fix_targets(experience, update.plan_epoch(experience), 0.02)
    assert targets.exact_kl is not None
    assert float(targets.exact_kl.kl_R.min()) >= 0 and 0 < float(targets.exact_kl.kl_R.max()) < 1e-4


@pytest.mark.parametrize(("policy_scale", "reference_scale"), [(1.0, 1.0), (0.5, 0.25), (3.0, 1.0)])
def test_heads_of_other_scale_bias_and_cap_than_the_policys_count_as_they_are(
    tiny_folder, monkeypatch, policy_scale, reference_scale
):
    policy = Policy.load(str(tiny_folder))
    generator = torch.Generator().manual_seed(0)
    weight_VD, bias = torch.randn(48, 32, generator=generator), torch.randn(48, generator=generator)
    ours = LMHead(policy.head.weight_VD.detach() * 20, None, 4.0, policy_scale)
    theirs = LMHead(weight_VD, bias, 3.0, reference_scale)
    monkeypatch.setattr(Policy, "head", ours)
    part = slice_batch(TokenBatch((np.array([3, 5, 9, 11, 7], dtype=np.int32),), (2,)), [0])
    with torch.no_grad():
        hidden_RD, reference_RD = response_hidden(policy, part), torch.randn(3, 32, generator=generator).bfloat16()
        got = hidden_exact_kl(policy, hidden_RD, part, scaled_like(theirs, ours), reference_RD, TEMPERATURE)

    def logp(head: LMHead, x_RD: torch.Tensor) -> torch.Tensor:
        z_RV = head.scale * (x_RD.double() @ head.weight_VD.double().T + (0 if head.bias is None else head.bias))
        assert head.softcap is not None
        return (head.softcap * torch.tanh(z_RV / head.softcap) / TEMPERATURE).log_softmax(1)

    logp_RV, logr_RV = logp(ours, hidden_RD), logp(theirs, reference_RD)
    want_R = (logp_RV.exp() * (logp_RV - logr_RV)).sum(1)
    np.testing.assert_allclose(got.kl_N, want_R, atol=1e-5, rtol=1e-5)


def info(folder: str, policy: Policy, version: ModelVersion | None = None, **changes) -> ModelInfo:
    """What a reference that serves `folder` says of itself."""
    made = ModelInfo(
        version=version or ModelVersion("", folder, 0),
        tokenizer_digest=policy.tokenizer_digest,
        vocab_size=policy.vocab_size,
        max_length=policy.max_length,
        dtype="float32",
        architecture=policy.architecture,
        parameter_count=policy.parameter_count,
        eos_token_ids=policy.eos_token_ids,
        has_chat_template=False,
        max_sequences=1,
        max_tokens=1,
    )
    return dataclasses.replace(made, **changes)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_comes_from_the_folder_or_from_the_store(tiny_folder, tmp_path, tied):
    folder = make_folder(tiny_folder, tmp_path / "m", tied=tied)
    policy, store = Policy.load(str(folder)), open_store(str(tmp_path / "store"))
    weight = AutoModelForCausalLM.from_pretrained(folder).lm_head.weight
    manifest = store.publish(folder, run_id="sft", name="policy", step=3)
    for version, dtype in ((None, "float32"), (manifest.version, "float32"), (manifest.version, "bfloat16")):
        head = load_reference_head(info(str(folder), policy, version, dtype=dtype), policy, store)
        assert torch.equal(head.weight_VD, weight.to(getattr(torch, dtype))) and not head.weight_VD.requires_grad
    half = load_reference_head(info(str(folder), policy, dtype="float16"), policy, store)
    assert torch.equal(half.weight_VD, weight.half().float())


def test_a_head_that_is_not_the_references_is_refused_with_what_to_do(tiny_folder, tmp_path):
    folder = make_folder(tiny_folder, tmp_path / "m", tied=True)
    policy, store = Policy.load(str(folder)), open_store(str(tmp_path / "store"))
    version = store.publish(folder, run_id="sft", name="policy", step=3).version
    table = [
        (info(str(folder), policy, vocab_size=52), "52 tokens and the policy 48"),
        (info(str(folder), policy, ModelVersion("sft", "policy", 4)), "publish that model to the trainer's store"),
        (info(str(tmp_path / "absent"), policy), "absent is not a model folder"),
        (info("", policy, dataclasses.replace(version, digest="blake3:0")), "digest blake3:0"),
        (info(str(folder), policy, parameter_count=5), "not the model that the reference serves"),
        (info(str(folder), policy, tokenizer_digest="blake3:0"), "not the model that the reference serves"),
    ]
    for served, words in table:
        with pytest.raises(ReferenceHeadError, match=words) as refused:
            load_reference_head(served, policy, store)
        assert str(refused.value).startswith("kl: ")


def test_hidden_states_that_the_head_does_not_fit_are_refused(models):
    policy, reference = models
    experience = experience_of(policy, reference)
    update = make_update(policy, reference, kl="exact_metric")
    with pytest.raises(ReferenceHeadError, match=r"size 48.*takes 32"):
        StepKl(policy.head, experience, TEMPERATURE)
    with pytest.raises(ReferenceHeadError, match="none came"):
        StepKl(reference.head, dataclasses.replace(experience, reference_hidden_RD=None), TEMPERATURE)
    wrong = torch.randn(48, 48, generator=torch.Generator().manual_seed(0))
    update.reference_head = dataclasses.replace(reference.head, weight_VD=wrong)
    with pytest.raises(ReferenceHeadError, match="other log-probs than the reference"):
        update.fix_targets(experience, update.plan_epoch(experience), 0.02)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kl": "exact"}, "kl"),
        ({"kl": "exact_loss"}, "kl_loss_coefficient"),
        ({"kl": "exact_loss", "kl_loss_coefficient": -0.1}, "kl_loss_coefficient"),
        ({"kl": "exact_metric", "kl_loss_coefficient": 0.1}, "kl_loss_coefficient"),
        ({"kl_loss_coefficient": 0.1}, "kl_loss_coefficient"),
        ({"kl": "exact_loss", "kl_loss_coefficient": float("inf")}, "kl_loss_coefficient"),
    ],
)
def test_a_wrong_kl_setting_names_its_field(changes, field):
    with pytest.raises(StageConfigError) as refused:
        config(**changes)
    assert refused.value.field == field
