"""What calls take and answer, as plain frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

import numpy as np

from trimtab_client.ragged import RaggedFloats, decode_floats, decode_ids
from trimtab_client.v1 import generator_pb2, model_pb2, trainer_pb2
from trimtab_client.versions import ModelVersion


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled; the field comments of generator.proto say more.

    `max_tokens` 0 is the server's default; `temperature` 0 is greedy; `seed` None draws at random.
    """

    n: int = 1
    max_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    seed: int | None = None

    def to_proto(self) -> generator_pb2.SamplingParameters:
        return generator_pb2.SamplingParameters(
            n=self.n,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            seed=self.seed,
        )


@dataclass(frozen=True)
class VersionRun:
    """Consecutive tokens sampled by one version."""

    version: ModelVersion
    token_count: int


@dataclass(frozen=True, eq=False)
class Completion:
    """One sampled response.

    Attributes:
        prompt_token_ids, token_ids: int32; the end token is part of token_ids.
        logprobs: float32, one a sampled token, of logits / temperature over the full vocabulary.
        versions: which version sampled which tokens, in order.
    """

    prompt_index: int
    sample_index: int
    prompt_token_ids: np.ndarray
    token_ids: np.ndarray
    logprobs: np.ndarray
    text: str
    finish_reason: Literal["stop", "length"]
    versions: tuple[VersionRun, ...]
    seed: int

    @classmethod
    def from_proto(cls, message: generator_pb2.Completion) -> Completion:
        stopped = message.finish_reason == generator_pb2.FINISH_REASON_STOP
        return cls(
            prompt_index=message.prompt_index,
            sample_index=message.sample_index,
            prompt_token_ids=decode_ids(message.prompt_token_ids, "prompt_token_ids"),
            token_ids=decode_ids(message.token_ids),
            logprobs=decode_floats(message.logprobs, "logprobs"),
            text=message.text,
            finish_reason="stop" if stopped else "length",
            versions=tuple(VersionRun(ModelVersion.from_proto(r.version), r.token_count) for r in message.versions),
            seed=message.seed,
        )


@dataclass(frozen=True, eq=False)
class PartScores:
    """One scorer's share of a weighted sum, which adds weight · scores [B] of each."""

    scorer: str
    weight: float
    scores: np.ndarray
    version: ModelVersion


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of a batch, float32 [B]: raw, and normalised by the version's mean and deviation.

    `truncated` holds the positions of sequences that were cut, where the caller allowed it. `scorer` is the one that
    answered, `parts` what it is made of where it is a weighted sum.
    """

    scores: np.ndarray
    normalized_scores: np.ndarray
    version: ModelVersion
    truncated: tuple[int, ...] = ()
    scorer: str = ""
    parts: tuple[PartScores, ...] = ()


@dataclass(frozen=True, eq=False)
class LogProbs:
    """Log-prob, and where asked for lse, entropy (nats) and last hidden states, of each response token.

    `hidden` is uint16 [response tokens, hidden size]: the bits of bfloat16, which numpy has no type for.
    """

    logprobs: RaggedFloats
    lse: RaggedFloats | None
    entropy: RaggedFloats | None
    hidden: np.ndarray | None
    version: ModelVersion


@dataclass(frozen=True)
class ScorerInfo:
    """One scorer of a reward server; see model.proto. `kind` is model, sum, length, regex, answer or function."""

    name: str
    kind: str
    version: ModelVersion
    tokenizer_digest: str
    max_length: int
    needs_reference: bool
    timeout_s: float
    weights: Mapping[str, float]

    @classmethod
    def from_proto(cls, message: model_pb2.ScorerInfo) -> ScorerInfo:
        return cls(
            name=message.name,
            kind=message.kind,
            version=ModelVersion.from_proto(message.version),
            tokenizer_digest=message.tokenizer_digest,
            max_length=message.max_length,
            needs_reference=message.needs_reference,
            timeout_s=message.timeout_s,
            weights=dict(message.weights),
        )


@dataclass(frozen=True)
class ModelInfo:
    """What a server serves; see model.proto."""

    version: ModelVersion
    tokenizer_digest: str
    vocab_size: int
    max_length: int
    dtype: str
    architecture: str
    parameter_count: int
    eos_token_ids: tuple[int, ...]
    has_chat_template: bool
    max_sequences: int
    max_tokens: int
    max_hidden_tokens: int = 0
    scorers: tuple[ScorerInfo, ...] = ()

    @classmethod
    def from_proto(cls, message: model_pb2.ModelInfo) -> ModelInfo:
        return cls(
            version=ModelVersion.from_proto(message.version),
            tokenizer_digest=message.tokenizer_digest,
            vocab_size=message.vocab_size,
            max_length=message.max_length,
            dtype=message.dtype,
            architecture=message.architecture,
            parameter_count=message.parameter_count,
            eos_token_ids=tuple(message.eos_token_ids),
            has_chat_template=message.has_chat_template,
            max_sequences=message.max_sequences,
            max_tokens=message.max_tokens,
            max_hidden_tokens=message.max_hidden_tokens,
            scorers=tuple(ScorerInfo.from_proto(scorer) for scorer in message.scorers),
        )


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one training step."""

    run_id: str
    stage: str
    step: int
    total_steps: int
    values: Mapping[str, float]
    time: datetime

    @classmethod
    def from_proto(cls, message: trainer_pb2.StepMetrics) -> StepMetrics:
        time = message.time.ToDatetime()
        return cls(message.run_id, message.stage, message.step, message.total_steps, dict(message.values), time)


@dataclass(frozen=True)
class RunStatus:
    """Where a training run is. `state` is running, paused, succeeded, failed or stopped."""

    run_id: str
    stage: str
    state: str
    step: int
    total_steps: int
    activity: str
    error: str
    published: tuple[ModelVersion, ...]

    @property
    def finished(self) -> bool:
        return self.state in ("succeeded", "failed", "stopped")

    @classmethod
    def from_proto(cls, message: trainer_pb2.RunStatus) -> RunStatus:
        return cls(
            run_id=message.run_id,
            stage=message.stage,
            state=trainer_pb2.RunState.Name(message.state).removeprefix("RUN_STATE_").lower(),
            step=message.step,
            total_steps=message.total_steps,
            activity=message.activity,
            error=message.error,
            published=tuple(ModelVersion.from_proto(version) for version in message.published),
        )


@dataclass(frozen=True)
class Sample:
    """One response of a PPO run, and what the step that trained on it knew of its tokens.

    Attributes:
        tokens: text of each response token (at most 512); `kl_nats` (policy against reference) and `values` have one
            number for each.
        ended: whether an end token closed it.
        first: the SFT policy's answer to the same prompt, where there is one and this is another.
    """

    step: int
    prompt: str
    text: str
    tokens: tuple[str, ...]
    kl_nats: tuple[float, ...]
    values: tuple[float, ...]
    score: float
    normalized_score: float
    seed: int
    ended: bool
    first: Sample | None

    @classmethod
    def from_proto(cls, message: trainer_pb2.Sample) -> Sample:
        return cls(
            step=message.step,
            prompt=message.prompt,
            text=message.text,
            tokens=tuple(message.tokens),
            kl_nats=tuple(message.kl_nats),
            values=tuple(message.values),
            score=message.score,
            normalized_score=message.normalized_score,
            seed=message.seed,
            ended=message.ended,
            first=Sample.from_proto(message.first) if message.HasField("first") else None,
        )
