"""ReferenceService: log-probs of response tokens under the frozen reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab_client.calls import Call, Program
from trimtab_client.errors import contradiction
from trimtab_client.messages import LogProbs, ModelInfo
from trimtab_client.models import AsyncModelClient, ModelClient, ServedLimits
from trimtab_client.ragged import RaggedError, RaggedFloats, RaggedTokens
from trimtab_client.splitting import in_parts, split_responses, split_tokens
from trimtab_client.v1 import reference_pb2, reference_pb2_grpc
from trimtab_client.versions import ModelVersion, VersionPin, pin_to_proto


@dataclass(frozen=True)
class Wanted:
    """What of each response token, beside its log-prob."""

    temperature: float
    lse: bool
    entropy: bool
    hidden: bool


def logprobs_program(
    limits: ServedLimits, tokens: RaggedTokens, tokenizer_digest: str, wanted: Wanted, pin: VersionPin | None
) -> Program[LogProbs]:
    """Log-probs of a batch; RaggedError without prompt_lengths."""
    if tokens.prompt_lengths is None:
        raise RaggedError("prompt_lengths", "required: one entry a sequence, each at least 1")

    def split(info: ModelInfo, pin: VersionPin | None) -> list[Call[LogProbs]]:
        parts = split_tokens(tokens, info)
        if wanted.hidden:
            parts = [piece for part in parts for piece in split_responses(part, info.max_hidden_tokens)]
        return [_logprobs(part, tokenizer_digest, wanted, pin) for part in parts]

    return merge_logprobs((yield from in_parts(limits, pin, split)))


def merge_logprobs(parts: Sequence[LogProbs]) -> LogProbs:
    """The answers to consecutive batches, all by one version, as one."""
    hidden = [part.hidden for part in parts if part.hidden is not None]
    return LogProbs(
        logprobs=_joined([part.logprobs for part in parts]),
        lse=_joined([part.lse for part in parts if part.lse]) if parts[0].lse else None,
        entropy=_joined([part.entropy for part in parts if part.entropy]) if parts[0].entropy else None,
        hidden=np.concatenate(hidden) if hidden else None,
        version=parts[0].version,
    )


def _logprobs(tokens: RaggedTokens, tokenizer_digest: str, wanted: Wanted, pin: VersionPin | None) -> Call[LogProbs]:
    assert tokens.prompt_lengths is not None
    lengths_B = tokens.lengths - tokens.prompt_lengths

    def floats(answer: reference_pb2.LogProbsResponse, name: str) -> RaggedFloats:
        values = RaggedFloats.from_proto(getattr(answer, name))
        if not np.array_equal(values.lengths, lengths_B):
            raise contradiction(f"the lengths of {name} are not those of the responses")
        return values

    def parse(answer: reference_pb2.LogProbsResponse) -> LogProbs:
        hidden = None
        if wanted.hidden:
            expected = 2 * int(lengths_B.sum()) * answer.hidden_size
            if not answer.hidden_size or len(answer.hidden) != expected:
                raise contradiction(f"{len(answer.hidden)} bytes of hidden states where {expected} belong")
            hidden = np.frombuffer(answer.hidden, dtype="<u2").reshape(-1, answer.hidden_size)
        return LogProbs(
            logprobs=floats(answer, "logprobs"),
            lse=floats(answer, "lse") if wanted.lse else None,
            entropy=floats(answer, "entropy") if wanted.entropy else None,
            hidden=hidden,
            version=ModelVersion.from_proto(answer.version),
        )

    request = reference_pb2.LogProbsRequest(
        tokens=tokens.to_proto(),
        tokenizer_digest=tokenizer_digest,
        temperature=wanted.temperature,
        include_lse=wanted.lse,
        include_entropy=wanted.entropy,
        include_hidden=wanted.hidden,
        version=pin_to_proto(pin),
    )
    return Call(reference_pb2_grpc.ReferenceServiceStub, "LogProbs", request, parse)


def _joined(parts: Sequence[RaggedFloats]) -> RaggedFloats:
    return RaggedFloats(
        np.concatenate([part.values for part in parts]), np.concatenate([part.lengths for part in parts])
    )


class ReferenceClient(ModelClient):
    """Log-probs of response tokens; batches beyond the server's limits are split over the addresses."""

    def logprobs(
        self,
        tokens: RaggedTokens,
        tokenizer_digest: str,
        temperature: float = 1.0,
        lse: bool = False,
        entropy: bool = False,
        hidden: bool = False,
        version: VersionPin | None = None,
        timeout_s: float | None = None,
    ) -> LogProbs:
        """`tokens` needs prompt_lengths; one value a response token comes back, of logits / `temperature`."""
        wanted = Wanted(temperature, lse, entropy, hidden)
        program = logprobs_program(self._limits, tokens, tokenizer_digest, wanted, version)
        return self._transport.run(program, timeout_s)


class AsyncReferenceClient(AsyncModelClient):
    """Log-probs of response tokens; batches beyond the server's limits are split over the addresses."""

    async def logprobs(
        self,
        tokens: RaggedTokens,
        tokenizer_digest: str,
        temperature: float = 1.0,
        lse: bool = False,
        entropy: bool = False,
        hidden: bool = False,
        version: VersionPin | None = None,
        timeout_s: float | None = None,
    ) -> LogProbs:
        """`tokens` needs prompt_lengths; one value a response token comes back, of logits / `temperature`."""
        wanted = Wanted(temperature, lse, entropy, hidden)
        program = logprobs_program(self._limits, tokens, tokenizer_digest, wanted, version)
        return await self._transport.run(program, timeout_s)
