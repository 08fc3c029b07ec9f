"""RewardService: scores of token ids, of texts and of conversations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from trimtab_client.calls import Call, Program
from trimtab_client.conversations import ChatMessage, chat_tokens, conversation_to_proto, text_tokens
from trimtab_client.errors import contradiction
from trimtab_client.messages import ModelInfo, Scores
from trimtab_client.models import AsyncModelClient, ModelClient, ServedLimits
from trimtab_client.ragged import RaggedTokens, decode_floats
from trimtab_client.splitting import consecutive, in_parts, split_tokens, starts
from trimtab_client.v1 import reward_pb2, reward_pb2_grpc
from trimtab_client.versions import ModelVersion, VersionPin, pin_to_proto


def tokens_program(
    limits: ServedLimits, tokens: RaggedTokens, tokenizer_digest: str, pin: VersionPin | None, truncate: bool
) -> Program[Scores]:
    """Scores of token ids."""

    def split(info: ModelInfo, pin: VersionPin | None) -> list[Call[Scores]]:
        return [
            _score(part.batch_size, truncate, pin, tokens=_token_batch(part, tokenizer_digest))
            for part in split_tokens(tokens, info)
        ]

    return merge_scores((yield from in_parts(limits, pin, split)))


def texts_program(
    limits: ServedLimits, pairs: Sequence[tuple[str, str]], pin: VersionPin | None, truncate: bool
) -> Program[Scores]:
    """Scores of (prompt, response) pairs."""
    items = [reward_pb2.TextPair(prompt=prompt, response=response) for prompt, response in pairs]

    def split(info: ModelInfo, pin: VersionPin | None) -> list[Call[Scores]]:
        sizes = [text_tokens(prompt) + text_tokens(response) for prompt, response in pairs]
        parts = [items[run] for run in consecutive(sizes, info.max_sequences, info.max_tokens)]
        return [_score(len(part), truncate, pin, texts=reward_pb2.TextBatch(items=part)) for part in parts]

    return merge_scores((yield from in_parts(limits, pin, split)))


def chats_program(
    limits: ServedLimits, conversations: Sequence[Sequence[ChatMessage]], pin: VersionPin | None, truncate: bool
) -> Program[Scores]:
    """Scores of conversations."""
    items = [conversation_to_proto(messages) for messages in conversations]

    def split(info: ModelInfo, pin: VersionPin | None) -> list[Call[Scores]]:
        sizes = [chat_tokens(messages) for messages in conversations]
        parts = [items[run] for run in consecutive(sizes, info.max_sequences, info.max_tokens)]
        return [
            _score(len(part), truncate, pin, conversations=reward_pb2.ConversationBatch(conversations=part))
            for part in parts
        ]

    return merge_scores((yield from in_parts(limits, pin, split)))


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of consecutive batches, all by one version, as one."""
    begins = starts([len(part.scores) for part in parts])
    return Scores(
        scores=np.concatenate([part.scores for part in parts]),
        normalized_scores=np.concatenate([part.normalized_scores for part in parts]),
        version=parts[0].version,
        truncated=tuple(begin + i for begin, part in zip(begins, parts, strict=True) for i in part.truncated),
    )


def _token_batch(tokens: RaggedTokens, tokenizer_digest: str) -> reward_pb2.TokenBatch:
    return reward_pb2.TokenBatch(tokens=tokens.to_proto(), tokenizer_digest=tokenizer_digest)


def _score(count: int, truncate: bool, pin: VersionPin | None, **batch: Any) -> Call[Scores]:
    def parse(answer: reward_pb2.ScoreResponse) -> Scores:
        scores = decode_floats(answer.scores, "scores")
        normalized_scores = decode_floats(answer.normalized_scores, "normalized_scores")
        if len(scores) != count or len(normalized_scores) != count:
            raise contradiction(f"{len(scores)} scores and {len(normalized_scores)} normalised for {count} sequences")
        return Scores(scores, normalized_scores, ModelVersion.from_proto(answer.version), tuple(answer.truncated))

    request = reward_pb2.ScoreRequest(version=pin_to_proto(pin), truncate=truncate, **batch)
    return Call(reward_pb2_grpc.RewardServiceStub, "Score", request, parse)


class RewardClient(ModelClient):
    """Scores sequences; batches beyond the server's limits are split over the addresses.

    `truncate` cuts sequences that are too long at their end instead of refusing them.
    """

    def score_tokens(
        self,
        tokens: RaggedTokens,
        tokenizer_digest: str,
        version: VersionPin | None = None,
        truncate: bool = False,
        timeout_s: float | None = None,
    ) -> Scores:
        """Score token ids made by the tokenizer with that digest; scores [B] in the batch's order."""
        return self._transport.run(tokens_program(self._limits, tokens, tokenizer_digest, version, truncate), timeout_s)

    def score_texts(
        self,
        pairs: Sequence[tuple[str, str]],
        version: VersionPin | None = None,
        truncate: bool = False,
        timeout_s: float | None = None,
    ) -> Scores:
        """Score (prompt, response) texts by the server's own tokenizer."""
        return self._transport.run(texts_program(self._limits, pairs, version, truncate), timeout_s)

    def score_chats(
        self,
        conversations: Sequence[Sequence[ChatMessage]],
        version: VersionPin | None = None,
        truncate: bool = False,
        timeout_s: float | None = None,
    ) -> Scores:
        """Score conversations through the server's own chat template."""
        return self._transport.run(chats_program(self._limits, conversations, version, truncate), timeout_s)


class AsyncRewardClient(AsyncModelClient):
    """Scores sequences; batches beyond the server's limits are split over the addresses.

    `truncate` cuts sequences that are too long at their end instead of refusing them.
    """

    async def score_tokens(
        self,
        tokens: RaggedTokens,
        tokenizer_digest: str,
        version: VersionPin | None = None,
        truncate: bool = False,
        timeout_s: float | None = None,
    ) -> Scores:
        """Score token ids made by the tokenizer with that digest; scores [B] in the batch's order."""
        return await self._transport.run(
            tokens_program(self._limits, tokens, tokenizer_digest, version, truncate), timeout_s
        )

    async def score_texts(
        self,
        pairs: Sequence[tuple[str, str]],
        version: VersionPin | None = None,
        truncate: bool = False,
        timeout_s: float | None = None,
    ) -> Scores:
        """Score (prompt, response) texts by the server's own tokenizer."""
        return await self._transport.run(texts_program(self._limits, pairs, version, truncate), timeout_s)

    async def score_chats(
        self,
        conversations: Sequence[Sequence[ChatMessage]],
        version: VersionPin | None = None,
        truncate: bool = False,
        timeout_s: float | None = None,
    ) -> Scores:
        """Score conversations through the server's own chat template."""
        return await self._transport.run(chats_program(self._limits, conversations, version, truncate), timeout_s)
