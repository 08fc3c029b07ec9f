"""A ScoreRequest's input as token ids for one model: checked, and encoded where it came as text."""

from __future__ import annotations

import asyncio

import numpy as np

from trimtab.reward.scorer import Scorer
from trimtab.runtime.config import RequestLimits
from trimtab.runtime.errors import invalid
from trimtab.runtime.limits import (
    check_batch_size,
    check_lengths,
    check_sequences,
    check_tokenizer_digest,
    read_tokens,
)
from trimtab_client.v1 import reward_pb2, tokens_pb2

AT_ONCE_CHARACTERS = 2_000
"""Texts up to this many characters are encoded on the event loop: it takes less time than a hop to a thread."""


async def read_sequences(request: reward_pb2.ScoreRequest, scorer: Scorer, limits: RequestLimits) -> list[np.ndarray]:
    """int32 ids of each sequence; longer than the model takes only where the request allows to cut them.

    ServiceError INVALID_ARGUMENT naming the field; FAILED_PRECONDITION for ids of another tokenizer.
    """
    kind = request.WhichOneof("input")
    if kind == "tokens":
        return _token_batch(request.tokens, scorer, limits, allow_longer=request.truncate)
    if kind == "texts":
        field, batch = "texts.items", request.texts
        check_batch_size(len(batch.items), limits, field=field)
        small = sum(len(item.prompt) + len(item.response) for item in batch.items) <= AT_ONCE_CHARACTERS
        sequences = _encode_texts(batch, scorer) if small else await asyncio.to_thread(_encode_texts, batch, scorer)
    elif kind == "conversations":
        field = "conversations.conversations"
        check_batch_size(len(request.conversations.conversations), limits, field=field)
        sequences = await asyncio.to_thread(_encode_conversations, request.conversations, scorer)
    else:
        raise invalid("input", "one of tokens, texts or conversations is required")
    lengths_B = np.asarray([len(ids) for ids in sequences])
    check_lengths(lengths_B, limits, scorer.max_length, field=field, allow_longer=request.truncate)
    return sequences


def _token_batch(
    batch: reward_pb2.TokenBatch, scorer: Scorer, limits: RequestLimits, *, allow_longer: bool
) -> list[np.ndarray]:
    tokens = read_tokens(batch.tokens, limits, field="tokens.tokens")
    check_tokenizer_digest(batch.tokenizer_digest, scorer.model.tokenizer_digest, field="tokens.tokenizer_digest")
    vocabulary, longest = scorer.model.vocab_size, scorer.max_length
    check_sequences(tokens, limits, vocabulary, longest, field="tokens.tokens", allow_longer=allow_longer)
    return tokens.sequences()


def _encode_texts(batch: reward_pb2.TextBatch, scorer: Scorer) -> list[np.ndarray]:
    return [scorer.encode_pair(item.prompt, item.response) for item in batch.items]


def _encode_conversations(batch: reward_pb2.ConversationBatch, scorer: Scorer) -> list[np.ndarray]:
    sequences = []
    for index, conversation in enumerate(batch.conversations):
        try:
            sequences.append(scorer.encode_conversation(messages_of(conversation)))
        except ValueError as error:
            raise invalid(f"conversations.conversations[{index}]", str(error)) from error
    return sequences


def messages_of(conversation: tokens_pb2.Conversation) -> list[dict[str, str]]:
    """Role and content of each message."""
    return [{"role": message.role, "content": message.content} for message in conversation.messages]
