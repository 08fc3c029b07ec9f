"""What each call sends and how its answer is read: pure functions that both client styles share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from trimtab_client.messages import Completion, LogProbs, ModelInfo, RunStatus, Sampling, Scores, StepMetrics
from trimtab_client.ragged import RaggedFloats, RaggedTokens, decode_floats, encode_ids
from trimtab_client.transport import Call
from trimtab_client.v1 import (
    generator_pb2,
    generator_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
    reference_pb2,
    reference_pb2_grpc,
    reward_pb2,
    reward_pb2_grpc,
    tokens_pb2,
    trainer_pb2,
    trainer_pb2_grpc,
)
from trimtab_client.versions import ModelVersion, VersionPin, pin_to_proto

Message = Mapping[str, str]
Prompt = str | Sequence[int] | np.ndarray | Sequence[Message]
T = TypeVar("T")


def get_model() -> Call[ModelInfo]:
    return Call(
        model_pb2_grpc.ModelServiceStub,
        "GetModel",
        model_pb2.GetModelRequest(),
        lambda answer: ModelInfo.from_proto(answer.model),
    )


def load_version(version: ModelVersion) -> Call[ModelInfo]:
    return Call(
        model_pb2_grpc.ModelServiceStub,
        "LoadVersion",
        model_pb2.LoadVersionRequest(version=version.to_proto()),
        lambda answer: ModelInfo.from_proto(answer.model),
    )


def generate(
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seeds: Sequence[Sequence[int]] | None,
    version: VersionPin | None,
) -> Call[Completion]:
    """ValueError where `seeds` does not hold one list of n seeds a prompt."""
    if seeds is not None and (len(seeds) != len(prompts) or any(len(row) != max(1, sampling.n) for row in seeds)):
        raise ValueError("seeds: give one list of n seeds for each prompt")
    messages = [_prompt(prompt, seeds[i] if seeds is not None else ()) for i, prompt in enumerate(prompts)]
    request = generator_pb2.GenerateRequest(
        prompts=messages, sampling=sampling.to_proto(), version=pin_to_proto(version)
    )
    stub = generator_pb2_grpc.GeneratorServiceStub
    return Call(stub, "Generate", request, lambda answer: Completion.from_proto(answer.completion))


def score_tokens(
    tokens: RaggedTokens, tokenizer_digest: str, version: VersionPin | None, truncate: bool, info: ModelInfo
) -> list[Call[Scores]]:
    """One call a batch that fits into the server's limits."""
    parts = split_tokens(tokens, info)
    batches = [reward_pb2.TokenBatch(tokens=part.to_proto(), tokenizer_digest=tokenizer_digest) for part in parts]
    return [_score(truncate, version, tokens=batch) for batch in batches]


def score_texts(
    pairs: Sequence[tuple[str, str]], version: VersionPin | None, truncate: bool, info: ModelInfo
) -> list[Call[Scores]]:
    items = [reward_pb2.TextPair(prompt=prompt, response=response) for prompt, response in pairs]
    chunks = _chunks(items, info.max_sequences)
    return [_score(truncate, version, texts=reward_pb2.TextBatch(items=chunk)) for chunk in chunks]


def score_chats(
    conversations: Sequence[Sequence[Message]], version: VersionPin | None, truncate: bool, info: ModelInfo
) -> list[Call[Scores]]:
    chunks = _chunks([_conversation(messages) for messages in conversations], info.max_sequences)
    batches = [reward_pb2.ConversationBatch(conversations=chunk) for chunk in chunks]
    return [_score(truncate, version, conversations=batch) for batch in batches]


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of consecutive batches as one. The version is the last batch's."""
    starts = np.cumsum([0, *(len(part.scores) for part in parts)])
    return Scores(
        scores=np.concatenate([part.scores for part in parts]),
        normalized_scores=np.concatenate([part.normalized_scores for part in parts]),
        version=parts[-1].version,
        truncated=tuple(int(s) + i for s, part in zip(starts, parts, strict=False) for i in part.truncated),
    )


def logprobs(
    tokens: RaggedTokens,
    tokenizer_digest: str,
    *,
    temperature: float,
    lse: bool,
    entropy: bool,
    hidden: bool,
    version: VersionPin | None,
    info: ModelInfo,
) -> list[Call[LogProbs]]:
    """One call a batch that fits into the server's limits."""
    calls = []
    for part in split_tokens(tokens, info):
        request = reference_pb2.LogProbsRequest(
            tokens=part.to_proto(),
            tokenizer_digest=tokenizer_digest,
            temperature=temperature,
            include_lse=lse,
            include_entropy=entropy,
            include_hidden=hidden,
            version=pin_to_proto(version),
        )
        stub = reference_pb2_grpc.ReferenceServiceStub
        calls.append(Call(stub, "LogProbs", request, _logprobs))
    return calls


def merge_logprobs(parts: Sequence[LogProbs]) -> LogProbs:
    """The answers to consecutive batches as one."""
    first = parts[0]
    return LogProbs(
        logprobs=_join([part.logprobs for part in parts]),
        lse=_join([part.lse for part in parts if part.lse]) if first.lse else None,
        entropy=_join([part.entropy for part in parts if part.entropy]) if first.entropy else None,
        hidden=np.concatenate([p.hidden for p in parts if p.hidden is not None]) if first.hidden is not None else None,
        version=parts[-1].version,
    )


def start(run_id: str, config: Any) -> Call[RunStatus]:
    """`config` is an SftConfig, RewardModelConfig or PpoConfig message."""
    kinds = {"SftConfig": "sft", "RewardModelConfig": "reward_model", "PpoConfig": "ppo"}
    kind = kinds.get(type(config).__name__)
    if kind is None:
        raise ValueError(f"config: one of {', '.join(kinds)} is needed, not {type(config).__name__}")
    return _trainer("Start", trainer_pb2.StartRequest(run_id=run_id, **{kind: config}))


def status(run_id: str) -> Call[RunStatus]:
    return _trainer("Status", trainer_pb2.StatusRequest(run_id=run_id))


def pause(run_id: str) -> Call[RunStatus]:
    return _trainer("Pause", trainer_pb2.PauseRequest(run_id=run_id))


def resume(run_id: str) -> Call[RunStatus]:
    return _trainer("Resume", trainer_pb2.ResumeRequest(run_id=run_id))


def stop(run_id: str) -> Call[RunStatus]:
    return _trainer("Stop", trainer_pb2.StopRequest(run_id=run_id))


def checkpoint(run_id: str) -> Call[tuple[ModelVersion, ...]]:
    def parse(answer: trainer_pb2.CheckpointResponse) -> tuple[ModelVersion, ...]:
        return tuple(ModelVersion.from_proto(version) for version in answer.published)

    request = trainer_pb2.CheckpointRequest(run_id=run_id)
    return Call(trainer_pb2_grpc.TrainerServiceStub, "Checkpoint", request, parse, repeatable=False)


def watch(run_id: str, after_step: int) -> Call[StepMetrics | RunStatus]:
    def parse(answer: trainer_pb2.WatchResponse) -> StepMetrics | RunStatus:
        if answer.WhichOneof("event") == "metrics":
            return StepMetrics.from_proto(answer.metrics)
        return RunStatus.from_proto(answer.status)

    request = trainer_pb2.WatchRequest(run_id=run_id, after_step=after_step)
    return Call(trainer_pb2_grpc.TrainerServiceStub, "Watch", request, parse)


def split_tokens(tokens: RaggedTokens, info: ModelInfo) -> list[RaggedTokens]:
    """Consecutive parts of at most the server's sequences and tokens; one part where it sets no limits."""
    parts: list[list[int]] = [[]]
    room = info.max_tokens
    for index, length in enumerate(tokens.lengths.tolist()):
        full = info.max_sequences and len(parts[-1]) == info.max_sequences
        if parts[-1] and (full or (info.max_tokens and length > room)):
            parts.append([])
            room = info.max_tokens
        parts[-1].append(index)
        room -= length
    if len(parts) == 1:
        return [tokens]
    sequences = tokens.sequences()
    prompts = tokens.prompt_lengths
    return [
        RaggedTokens.from_sequences([sequences[i] for i in part], None if prompts is None else prompts[part])
        for part in parts
    ]


def _prompt(prompt: Prompt, seeds: Sequence[int]) -> generator_pb2.Prompt:
    if isinstance(prompt, str):
        return generator_pb2.Prompt(text=prompt, seeds=seeds)
    if len(prompt) and isinstance(prompt[0], Mapping):
        return generator_pb2.Prompt(chat=_conversation(prompt), seeds=seeds)  # type: ignore[arg-type]
    return generator_pb2.Prompt(token_ids=encode_ids(prompt), seeds=seeds)  # type: ignore[arg-type]


def _conversation(messages: Sequence[Message]) -> tokens_pb2.Conversation:
    return tokens_pb2.Conversation(
        messages=[tokens_pb2.ChatMessage(role=message["role"], content=message["content"]) for message in messages]
    )


def _score(truncate: bool, version: VersionPin | None, **batch: Any) -> Call[Scores]:
    def parse(answer: reward_pb2.ScoreResponse) -> Scores:
        return Scores(
            scores=decode_floats(answer.scores, "scores"),
            normalized_scores=decode_floats(answer.normalized_scores, "normalized_scores"),
            version=ModelVersion.from_proto(answer.version),
            truncated=tuple(answer.truncated),
        )

    request = reward_pb2.ScoreRequest(version=pin_to_proto(version), truncate=truncate, **batch)
    return Call(reward_pb2_grpc.RewardServiceStub, "Score", request, parse)


def _logprobs(answer: reference_pb2.LogProbsResponse) -> LogProbs:
    hidden = None
    if answer.hidden_size:
        hidden = np.frombuffer(answer.hidden, dtype="<u2").reshape(-1, answer.hidden_size)
    return LogProbs(
        logprobs=RaggedFloats.from_proto(answer.logprobs),
        lse=RaggedFloats.from_proto(answer.lse) if answer.HasField("lse") else None,
        entropy=RaggedFloats.from_proto(answer.entropy) if answer.HasField("entropy") else None,
        hidden=hidden,
        version=ModelVersion.from_proto(answer.version),
    )


def _trainer(method: str, request: Any) -> Call[RunStatus]:
    stub = trainer_pb2_grpc.TrainerServiceStub
    return Call(stub, method, request, lambda answer: RunStatus.from_proto(answer.status))


def _chunks(items: Sequence[T], size: int) -> list[list[T]]:
    size = size or max(1, len(items))
    return [list(items[start : start + size]) for start in range(0, max(1, len(items)), size)]


def _join(parts: Sequence[RaggedFloats]) -> RaggedFloats:
    return RaggedFloats(
        np.concatenate([part.values for part in parts]), np.concatenate([part.lengths for part in parts])
    )
