"""A PPO step in small: two prompts through the real generator, reward and reference, and an update on what comes back.

The update trains a model of a few thousand parameters with the policy's vocabulary, so that it runs anywhere; no
service changes and nothing is published. It shows that the calls fit together, that every number is finite, and that
generator and reference, where they serve the same weights, agree on the log-probs.
"""

from __future__ import annotations

import math
import tempfile
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from trimtab.doctor.finding import Finding, failed, ok, skipped
from trimtab.doctor.plan import Plan
from trimtab.models.errors import ModelLoadError
from trimtab.models.tokenizers import decode, encode_prompt, load_tokenizer, tokenizer_digest
from trimtab.trainer.data import DataError, load_prompts, tokenize_prompts
from trimtab.trainer.ppo.experience import Episode, gather_experience
from trimtab.trainer.ppo.update import PpoUpdate
from trimtab.trainer.stages import PpoConfig
from trimtab.weights.errors import StoreError
from trimtab.weights.sources import resolve_source
from trimtab.weights.store import Store
from trimtab_client import (
    Completion,
    GeneratorClient,
    ModelInfo,
    RaggedTokens,
    ReferenceClient,
    RewardClient,
    Sampling,
    TrimtabError,
)

CHECK = "dry PPO step"
PROMPTS, NEW_TOKENS, CALL_S = 2, 8, 120.0
LARGEST_GAP_NATS = {"float32": 1e-3}
"""Mean difference of two services' log-probs of the same weights; half precision makes some hundredths."""
LARGEST_HALF_GAP_NATS = 0.2


def dry_step(plan: Plan, served: dict[str, ModelInfo], store: Store | None) -> list[Finding]:
    """One finding; skipped where a service is missing."""
    ppo = plan.ppo
    if ppo is None:
        return []
    missing = {"generator", "reward", "reference"} - served.keys()
    if missing:
        return [skipped(CHECK, f"needs {', '.join(sorted(missing))} to be up")]
    try:
        tokenizer = load_tokenizer(resolve_source(ppo.stage.model, store).path_or_id)
    except (StoreError, ModelLoadError) as error:
        return [skipped(CHECK, f"the policy's tokenizer cannot be read here: {error}")]
    try:
        episodes = _rollouts(ppo, plan, tokenizer)
    except TrimtabError as error:
        return [failed(CHECK, str(error), "correct what the service refuses; a run would be refused the same")]
    bad = _not_finite(episodes)
    if bad:
        return [failed(CHECK, f"{bad} answered with a number that is not finite", f"look at the {bad}'s model")]
    sampled, referenced = (np.concatenate(list(values)) for values in zip(*map(_logprobs, episodes), strict=True))
    gap_nats = float(np.mean(np.abs(sampled - referenced)))
    if _disagree(served, gap_nats):
        return [
            failed(
                CHECK,
                f"generator and reference serve the same weights and differ by {gap_nats:.3g} nats a token",
                "give both the same dtype and temperature; if they have, one computes wrong numbers",
            )
        ]
    metrics = _update(ppo, episodes, tokenizer, served["generator"].vocab_size)
    if not all(math.isfinite(metrics[name]) for name in ("loss_policy", "loss_value", "grad_norm_policy")):
        return [failed(CHECK, f"the update is not finite: {metrics}", "look at the scores and log-probs above")]
    tokens = sum(len(episode.completion.token_ids) for episode in episodes)
    scores = ", ".join(f"{episode.normalized_score:.3g}" for episode in episodes)
    return [
        ok(CHECK, f"{tokens} tokens sampled, scored ({scores}), {gap_nats:.2g} nats from the reference, and trained on")
    ]


def _rollouts(ppo: PpoConfig, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> list[Episode]:
    sampling = Sampling(max_tokens=min(NEW_TOKENS, ppo.max_new_tokens), temperature=ppo.temperature, ignore_eos=True)
    with GeneratorClient(ppo.generator_address, plan.options) as generator:
        prompts = _prompts(ppo, tokenizer)
        completions = list(generator.generate(prompts, sampling=sampling, seeds=[[1]] * len(prompts), timeout_s=CALL_S))
    completions.sort(key=lambda completion: completion.prompt_index)
    tokens = RaggedTokens.from_sequences(
        [np.concatenate([c.prompt_token_ids, c.token_ids]) for c in completions],
        prompt_lengths=[len(c.prompt_token_ids) for c in completions],
    )
    scores = _scores(ppo, plan, completions, tokens, tokenizer)
    with ReferenceClient(ppo.reference_address, plan.options) as reference:
        logprobs = reference.logprobs(
            tokens, tokenizer_digest(tokenizer), temperature=ppo.temperature, timeout_s=CALL_S
        )
    return [
        Episode(completion, raw, normalized, one)
        for completion, (raw, normalized), one in zip(completions, scores, logprobs.logprobs.split(), strict=True)
    ]


def _scores(
    ppo: PpoConfig, plan: Plan, completions: list[Completion], tokens: RaggedTokens, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[float, float]]:
    with RewardClient(ppo.reward_address, plan.options) as reward:
        pairs = [(decode(tokenizer, c.prompt_token_ids), c.text) for c in completions]
        if ppo.gold_scorer:
            reward.score_texts(pairs, timeout_s=CALL_S, scorer=ppo.gold_scorer)
        if ppo.score_text:
            scores = reward.score_texts(pairs, timeout_s=CALL_S, scorer=ppo.reward_scorer)
        else:
            scores = reward.score_tokens(
                tokens, tokenizer_digest(tokenizer), timeout_s=CALL_S, scorer=ppo.reward_scorer
            )
    return list(zip(scores.scores.tolist(), scores.normalized_scores.tolist(), strict=True))


def _prompts(ppo: PpoConfig, tokenizer: PreTrainedTokenizerBase) -> list[np.ndarray]:
    """The first prompts of the recipe, or a made-up one where its file cannot be read here."""
    limit = ppo.stage.max_length - min(NEW_TOKENS, ppo.max_new_tokens)
    try:
        found = list(islice(tokenize_prompts(load_prompts(ppo.prompts), tokenizer, limit), PROMPTS))
    except (DataError, ValueError, OSError):
        found = []
    return found or [encode_prompt(tokenizer, "Once upon a time")] * PROMPTS


def _not_finite(episodes: list[Episode]) -> str:
    for episode in episodes:
        if not np.isfinite(episode.completion.logprobs).all():
            return "generator"
        if not math.isfinite(episode.normalized_score):
            return "reward"
        if not np.isfinite(_logprobs(episode)[1]).all():
            return "reference"
    return ""


def _logprobs(episode: Episode) -> tuple[np.ndarray, np.ndarray]:
    """By the generator and by the reference."""
    assert episode.reference_logprobs is not None
    return episode.completion.logprobs, episode.reference_logprobs


def _disagree(served: dict[str, ModelInfo], gap_nats: float) -> bool:
    one, other = served["generator"], served["reference"]
    same = one.version.digest == other.version.digest and one.version.name == other.version.name
    allowed = LARGEST_GAP_NATS.get(one.dtype, LARGEST_HALF_GAP_NATS)
    return same and one.dtype == other.dtype and gap_nats > allowed


def _update(
    ppo: PpoConfig, episodes: list[Episode], tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> dict[str, float]:
    """The metrics of an update of a tiny policy and value model on these episodes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from trimtab.models.policy import Policy
    from trimtab.models.scalar_head import ScalarModel
    from trimtab.trainer.forward import prepare_for_training
    from trimtab.trainer.optimizer import MasterWeightOptimizer

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    with tempfile.TemporaryDirectory(prefix="trimtab-doctor-") as folder:
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        policy = Policy.load(folder)
    value = ScalarModel.from_policy(policy, seed=0)
    for model in (policy.model, value.model):
        prepare_for_training(model, activation_checkpointing=False)
    optimizers = [MasterWeightOptimizer(model.model, ppo.stage.optimizer) for model in (policy, value)]
    small = {"batch_size": len(episodes), "minibatch_size": len(episodes), "samples_per_prompt": 1, "inner_epochs": 1}
    one_step = ppo.model_copy(update=small | {"advantage": "gae", "kl": "sampled", "kl_loss_coefficient": 0.0})
    update = PpoUpdate(one_step, policy, optimizers[0], value, optimizers[1], np.random.default_rng(0))
    experience = gather_experience(episodes)
    epoch = update.plan_epoch(experience)
    targets = update.fix_targets(experience, epoch, ppo.kl_coefficient)
    return update.optimize(experience, epoch, targets, ppo.stage.optimizer.learning_rate, 1e-5)
