"""Two versions of a policy with one PPO step between them, as a trainer makes them: bfloat16 over float32 masters.

A step samples answers with the generator's engine and takes one AdamW step a minibatch on the PPO loss. Advantages are
one standard normal draw an answer, in the place of a reward model's. A run that has gone on for a while has masters
anywhere between two bfloat16 numbers, while fresh ones lie on them exactly and change too little at first; so the
masters begin at random points that round to the model's weights.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from trimtab.generator.engine import FinishedSequence, Sampling, SequenceRequest
from trimtab.generator.loading import in_own_memory
from trimtab.generator.local.scheduler import LocalEngine
from trimtab.kernels.ppo_terms import PpoSettings
from trimtab.models.folders import load_pretrained
from trimtab.models.policy import Policy
from trimtab.models.tokenizers import encode_chat, encode_prompt, load_tokenizer
from trimtab.trainer.forward import TokenBatch, hidden_ppo_loss, response_hidden, response_logprobs, slice_batch
from trimtab.trainer.optimizer import MasterWeightOptimizer
from trimtab.trainer.stages import OptimizerConfig
from trimtab_client import ModelVersion

Pair = tuple[np.ndarray, np.ndarray]
BELOW_HALF = 0x7FFF  # in units of the last float32 bit: what still rounds to the same bfloat16


@dataclass(frozen=True)
class Plan:
    """How far a run goes, and the size of a step: `minibatches` optimizer steps of `minibatch` answers."""

    learning_rate: float
    steps: int
    minibatches: int
    minibatch: int
    response_tokens: int


def generating_policy(folder: Path | str, dtype: str) -> Policy:
    """A policy as the generator loads it."""
    model = load_pretrained(AutoModelForCausalLM, str(folder), dtype=dtype, attention=None)
    return Policy(in_own_memory(model), load_tokenizer(str(folder)), str(folder))  # type: ignore[arg-type]


def engine_of(policy: Policy, version: ModelVersion, slots: int = 32) -> LocalEngine:
    """The generator's engine over it."""
    return LocalEngine(
        policy.model,
        policy.tokenizer,
        eos_token_ids=policy.eos_token_ids,
        version=version,
        max_length=min(policy.max_length, 1024),
        max_slots=slots,
    )


def read_prompts(path: Path | None, policy: Policy, count: int) -> list[np.ndarray]:
    """Token ids of a JSONL file's prompts, or random ones of 32 tokens."""
    if path is None:
        rng = np.random.default_rng(0)
        return [rng.integers(3, policy.vocab_size, 32, dtype=np.int32) for _ in range(count)]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ids = [
        encode_chat(policy.tokenizer, row["messages"], add_generation_prompt=True)
        if "messages" in row
        else encode_prompt(policy.tokenizer, row["prompt"])
        for row in rows
    ]
    return [ids[index % len(ids)] for index in range(count)]


def two_versions(model: Path, prompts: Path | None, plan: Plan, folder: Path) -> None:
    """Writes the policy before and after its last PPO step into `folder`/before and `folder`/after."""
    torch.manual_seed(0)
    policy, sampler = Policy.load(str(model), dtype="bfloat16"), generating_policy(model, "bfloat16")
    optimizer = MasterWeightOptimizer(
        policy.model,
        OptimizerConfig(learning_rate=plan.learning_rate, beta2=0.999, warmup_steps=0),
        {name: within_rounding(parameter) for name, parameter in policy.model.named_parameters()},
    )
    rng = np.random.default_rng(1)
    asked = read_prompts(prompts, policy, plan.steps * plan.minibatches * plan.minibatch)
    size = plan.minibatches * plan.minibatch
    for step in range(1, plan.steps + 1):
        batch = asked[(step - 1) * size : step * size]
        if step == plan.steps:
            policy.save(folder / "before")
        sampler.model.load_state_dict(policy.model.state_dict())
        answers = sample(sampler, batch, plan.response_tokens, step)
        ppo_step(policy, optimizer, plan, answers, rng)
    policy.save(folder / "after")


def within_rounding(parameter: torch.Tensor) -> torch.Tensor:
    """Float32 values at random points that all round to these bfloat16 ones."""
    values = parameter.detach().float()
    moved = values.view(torch.int32) + torch.randint(-BELOW_HALF, BELOW_HALF + 1, values.shape, dtype=torch.int32)
    return torch.where(values == 0, values, moved.view(torch.float32))


def sample(policy: Policy, prompts: Sequence[np.ndarray], tokens: int, seed: int) -> list[Pair]:
    """A prompt and its answer each, at temperature 1."""
    engine = engine_of(policy, ModelVersion("bench", "policy", seed))
    engine.submit(
        [
            SequenceRequest(index, prompt, index, seed * 1_000_003 + index, Sampling(max_tokens=tokens))
            for index, prompt in enumerate(prompts)
        ]
    )
    outcomes = []
    while engine.has_work:
        outcomes += engine.step()
    done = {outcome.sequence_id: outcome for outcome in outcomes if isinstance(outcome, FinishedSequence)}
    return [(prompt, done[index].token_ids) for index, prompt in enumerate(prompts)]


def ppo_step(
    policy: Policy,
    optimizer: MasterWeightOptimizer,
    plan: Plan,
    answers: Sequence[Pair],
    rng: np.random.Generator,
) -> None:
    """One optimizer step a minibatch, against the log-probs of before the first one."""
    sequences = tuple(np.concatenate(pair) for pair in answers)
    batch = TokenBatch(sequences, tuple(len(prompt) for prompt, _ in answers))
    starts = range(0, len(sequences), plan.minibatch)
    parts = [slice_batch(batch, range(start, start + plan.minibatch), policy.device) for start in starts]
    with torch.no_grad():
        old = [response_logprobs(policy, part) for part in parts]
    drawn = np.repeat(rng.standard_normal(len(sequences)).astype(np.float32), batch.response_lengths)
    for part, before in zip(parts, old, strict=True):
        advantages = torch.from_numpy(drawn)[part.flat_R]
        loss = hidden_ppo_loss(
            policy,
            response_hidden(policy, part),
            part,
            before.logprob_N,
            advantages,
            torch.ones_like(advantages),
            before.lse_N,
            settings=PpoSettings(),
            normalizer=float(len(advantages)),
        )
        loss.loss.backward()
        optimizer.accumulate()
        optimizer.step(plan.learning_rate)
