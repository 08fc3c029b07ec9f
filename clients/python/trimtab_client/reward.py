"""RewardService: scores of token ids, of texts and of conversations."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trimtab_client.calls import Call, Program
from trimtab_client.conversations import ChatMessage, chat_tokens, conversation_to_proto, text_tokens
from trimtab_client.errors import contradiction
from trimtab_client.messages import ModelInfo, PartScores, Scores
from trimtab_client.models import AsyncModelClient, ModelClient, ServedLimits
from trimtab_client.progress import Progress
from trimtab_client.ragged import RaggedTokens, decode_floats
from trimtab_client.score_many import (
    BATCH_ROWS,
    BATCHES_AT_ONCE_PER_ADDRESS,
    Batches,
    R,
    RowScore,
    is_texts,
    score_in_batches,
    score_in_batches_async,
    texts_of,
)
from trimtab_client.splitting import consecutive, in_parts, places, split_tokens, starts
from trimtab_client.v1 import reward_pb2, reward_pb2_grpc
from trimtab_client.versions import ModelVersion, VersionPin, pin_to_proto


@dataclass(frozen=True)
class ScoreOptions:
    """What every form of the call may say; the field comments of reward.proto say more."""

    truncate: bool = False
    scorer: str = ""
    deterministic: bool = False
    references: Sequence[str] | None = None


def tokens_program(
    limits: ServedLimits, tokens: RaggedTokens, tokenizer_digest: str, pin: VersionPin | None, options: ScoreOptions
) -> Program[Scores]:
    """Scores of token ids."""
    references = checked_references(options, tokens.batch_size)

    def split(info: ModelInfo, pin: VersionPin | None) -> list[Call[Scores]]:
        calls, begin = [], 0
        for part in split_tokens(tokens, info):
            whole = range(begin, begin + part.batch_size)
            own, begin = references[whole.start : whole.stop], whole.stop
            batch = reward_pb2.TokenBatch(tokens=part.to_proto(), tokenizer_digest=tokenizer_digest, references=own)
            calls.append(_score(whole, options, pin, tokens=batch))
        return calls

    return merge_scores((yield from in_parts(limits, pin, split)))


def texts_program(
    limits: ServedLimits, pairs: Sequence[tuple[str, str]], pin: VersionPin | None, options: ScoreOptions
) -> Program[Scores]:
    """Scores of (prompt, response) pairs."""
    references = checked_references(options, len(pairs)) or [""] * len(pairs)
    items = [
        reward_pb2.TextPair(prompt=prompt, response=response, reference=reference)
        for (prompt, response), reference in zip(pairs, references, strict=True)
    ]

    def split(info: ModelInfo, pin: VersionPin | None) -> list[Call[Scores]]:
        sizes = [text_tokens(prompt) + text_tokens(response) for prompt, response in pairs]
        runs = consecutive(sizes, info.max_sequences, info.max_tokens)
        return [_score(places(run), options, pin, texts=reward_pb2.TextBatch(items=items[run])) for run in runs]

    return merge_scores((yield from in_parts(limits, pin, split)))


def chats_program(
    limits: ServedLimits, conversations: Sequence[Sequence[ChatMessage]], pin: VersionPin | None, options: ScoreOptions
) -> Program[Scores]:
    """Scores of conversations."""
    references = checked_references(options, len(conversations))
    items = [conversation_to_proto(messages) for messages in conversations]

    def split(info: ModelInfo, pin: VersionPin | None) -> list[Call[Scores]]:
        sizes = [chat_tokens(messages) for messages in conversations]
        calls = []
        for run in consecutive(sizes, info.max_sequences, info.max_tokens):
            batch = reward_pb2.ConversationBatch(conversations=items[run], references=references[run])
            calls.append(_score(places(run), options, pin, conversations=batch))
        return calls

    return merge_scores((yield from in_parts(limits, pin, split)))


def merge_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of consecutive batches, all by one version, as one."""
    begins = starts([len(part.scores) for part in parts])
    return Scores(
        scores=np.concatenate([part.scores for part in parts]),
        normalized_scores=np.concatenate([part.normalized_scores for part in parts]),
        version=parts[0].version,
        truncated=tuple(begin + i for begin, part in zip(begins, parts, strict=True) for i in part.truncated),
        scorer=parts[0].scorer,
        parts=tuple(
            replace(pieces[0], scores=np.concatenate([piece.scores for piece in pieces]))
            for pieces in zip(*(part.parts for part in parts), strict=True)
        ),
    )


def checked_references(options: ScoreOptions, count: int) -> list[str]:
    """The references, or none; ValueError unless there is one a sequence."""
    found = list(options.references or ())
    if found and len(found) != count:
        raise ValueError(f"references: {len(found)} for {count} sequences")
    return found


def _score(whole: range, options: ScoreOptions, pin: VersionPin | None, **batch: Any) -> Call[Scores]:
    """The call for the sequences at `whole` of the caller's batch."""
    count = len(whole)

    def parse(answer: reward_pb2.ScoreResponse) -> Scores:
        scores = decode_floats(answer.scores, "scores")
        normalized_scores = decode_floats(answer.normalized_scores, "normalized_scores")
        if len(scores) != count or len(normalized_scores) != count:
            raise contradiction(f"{len(scores)} scores and {len(normalized_scores)} normalised for {count} sequences")
        parts = tuple(
            PartScores(part.scorer, part.weight, decode_floats(part.scores), ModelVersion.from_proto(part.version))
            for part in answer.parts
        )
        version = ModelVersion.from_proto(answer.version)
        return Scores(scores, normalized_scores, version, tuple(answer.truncated), answer.scorer, parts)

    request = reward_pb2.ScoreRequest(
        version=pin_to_proto(pin),
        truncate=options.truncate,
        scorer=options.scorer,
        deterministic=options.deterministic,
        **batch,
    )
    return Call(reward_pb2_grpc.RewardServiceStub, "Score", request, parse, places=whole)


class RewardClient(ModelClient):
    """Scores sequences; batches beyond the server's limits are split over the addresses.

    `truncate` cuts sequences that are too long at their end instead of refusing them. `scorer` names one of those of
    the server (`get_model().scorers`; empty: its default one). `deterministic` asks for scores that are bitwise the
    same in any company. `references`, one a sequence, are what a verifier compares the responses with.
    """

    def score_tokens(
        self,
        tokens: RaggedTokens,
        tokenizer_digest: str,
        version: VersionPin | None = None,
        truncate: bool = False,
        timeout_s: float | None = None,
        *,
        scorer: str = "",
        deterministic: bool = False,
        references: Sequence[str] | None = None,
    ) -> Scores:
        """Score token ids made by the tokenizer with that digest; scores [B] in the batch's order."""
        options = ScoreOptions(truncate, scorer, deterministic, references)
        program = tokens_program(self._limits, tokens, tokenizer_digest, version, options)
        return self._transport.run(program, timeout_s)

    def score_texts(
        self,
        pairs: Sequence[tuple[str, str]],
        version: VersionPin | None = None,
        truncate: bool = False,
        timeout_s: float | None = None,
        *,
        scorer: str = "",
        deterministic: bool = False,
        references: Sequence[str] | None = None,
    ) -> Scores:
        """Score (prompt, response) texts by the server's own tokenizer."""
        options = ScoreOptions(truncate, scorer, deterministic, references)
        program = texts_program(self._limits, pairs, version, options)
        return self._transport.run(program, timeout_s)

    def score_chats(
        self,
        conversations: Sequence[Sequence[ChatMessage]],
        version: VersionPin | None = None,
        truncate: bool = False,
        timeout_s: float | None = None,
        *,
        scorer: str = "",
        deterministic: bool = False,
        references: Sequence[str] | None = None,
    ) -> Scores:
        """Score conversations through the server's own chat template."""
        options = ScoreOptions(truncate, scorer, deterministic, references)
        program = chats_program(self._limits, conversations, version, options)
        return self._transport.run(program, timeout_s)

    def score_many(
        self,
        rows: Iterable[R],
        *,
        batch_rows: int = BATCH_ROWS,
        at_once: int | None = None,
        progress: bool = False,
        total: int | None = None,
        version: VersionPin | None = None,
        truncate: bool = False,
        timeout_s: float | None = None,
        scorer: str = "",
        deterministic: bool = False,
    ) -> Generator[RowScore[R], None, None]:
        """Score any number of rows: yields a `RowScore` each, in order, in bounded memory.

        Rows are (prompt, response) tuples, (prompt, response, reference) for verifiers, or conversations, from any
        iterable. They travel in batches of at most `batch_rows` and of what a server takes in one request, `at_once`
        of them at a time (4 an address by default). Each batch has the deadline and the retries of a call of its own;
        where it fails for good, its TrimtabError is raised and what came before is yours. Closing the iterator sends
        no more.

        Args:
            progress: show on stderr how far it is; with a bar and the time left where the number of rows is known.
            total: the number of rows, where `rows` has no length.
            timeout_s: of a batch.
            scorer, deterministic: as in the other calls.
        """

        def score(batch: Sequence[Any]) -> Scores:
            options: dict[str, Any] = {"scorer": scorer, "deterministic": deterministic}
            if not is_texts(batch[0]):
                return self.score_chats(batch, version, truncate, timeout_s, **options)
            pairs, references = texts_of(batch)
            return self.score_texts(pairs, version, truncate, timeout_s, references=references, **options)

        info = self._transport.run(self._limits.get(), timeout_s)
        shown = Progress(progress, len(rows) if isinstance(rows, Sized) else total)
        most = at_once or BATCHES_AT_ONCE_PER_ADDRESS * self._transport.routing.replicas
        return score_in_batches(score, rows, Batches(info, batch_rows), most, shown)


class AsyncRewardClient(AsyncModelClient):
    """Scores sequences; batches beyond the server's limits are split over the addresses.

    `truncate` cuts sequences that are too long at their end instead of refusing them. `scorer` names one of those of
    the server (`get_model().scorers`; empty: its default one). `deterministic` asks for scores that are bitwise the
    same in any company. `references`, one a sequence, are what a verifier compares the responses with.
    """

    async def score_tokens(
        self,
        tokens: RaggedTokens,
        tokenizer_digest: str,
        version: VersionPin | None = None,
        truncate: bool = False,
        timeout_s: float | None = None,
        *,
        scorer: str = "",
        deterministic: bool = False,
        references: Sequence[str] | None = None,
    ) -> Scores:
        """Score token ids made by the tokenizer with that digest; scores [B] in the batch's order."""
        options = ScoreOptions(truncate, scorer, deterministic, references)
        program = tokens_program(self._limits, tokens, tokenizer_digest, version, options)
        return await self._transport.run(program, timeout_s)

    async def score_texts(
        self,
        pairs: Sequence[tuple[str, str]],
        version: VersionPin | None = None,
        truncate: bool = False,
        timeout_s: float | None = None,
        *,
        scorer: str = "",
        deterministic: bool = False,
        references: Sequence[str] | None = None,
    ) -> Scores:
        """Score (prompt, response) texts by the server's own tokenizer."""
        options = ScoreOptions(truncate, scorer, deterministic, references)
        program = texts_program(self._limits, pairs, version, options)
        return await self._transport.run(program, timeout_s)

    async def score_chats(
        self,
        conversations: Sequence[Sequence[ChatMessage]],
        version: VersionPin | None = None,
        truncate: bool = False,
        timeout_s: float | None = None,
        *,
        scorer: str = "",
        deterministic: bool = False,
        references: Sequence[str] | None = None,
    ) -> Scores:
        """Score conversations through the server's own chat template."""
        options = ScoreOptions(truncate, scorer, deterministic, references)
        program = chats_program(self._limits, conversations, version, options)
        return await self._transport.run(program, timeout_s)

    async def score_many(
        self,
        rows: Iterable[R] | AsyncIterable[R],
        *,
        batch_rows: int = BATCH_ROWS,
        at_once: int | None = None,
        progress: bool = False,
        total: int | None = None,
        version: VersionPin | None = None,
        truncate: bool = False,
        timeout_s: float | None = None,
        scorer: str = "",
        deterministic: bool = False,
    ) -> AsyncGenerator[RowScore[R], None]:
        """Score any number of rows: yields a `RowScore` each, in order, in bounded memory.

        Rows are (prompt, response) tuples, (prompt, response, reference) for verifiers, or conversations, from any
        iterable, asynchronous ones too. They travel in batches of at most `batch_rows` and of what a server takes in
        one request, `at_once` of them at a time (4 an address by default). Each batch has the deadline and the retries
        of a call of its own; where it fails for good, its TrimtabError is raised and what came before is yours. Closing
        the iterator cancels what is in flight.

        Args:
            progress: show on stderr how far it is; with a bar and the time left where the number of rows is known.
            total: the number of rows, where `rows` has no length.
            timeout_s: of a batch.
            scorer, deterministic: as in the other calls.
        """

        async def score(batch: Sequence[Any]) -> Scores:
            options: dict[str, Any] = {"scorer": scorer, "deterministic": deterministic}
            if not is_texts(batch[0]):
                return await self.score_chats(batch, version, truncate, timeout_s, **options)
            pairs, references = texts_of(batch)
            return await self.score_texts(pairs, version, truncate, timeout_s, references=references, **options)

        info = await self._transport.run(self._limits.get(), timeout_s)
        shown = Progress(progress, len(rows) if isinstance(rows, Sized) else total)
        most = at_once or BATCHES_AT_ONCE_PER_ADDRESS * self._transport.routing.replicas
        async for one in score_in_batches_async(score, rows, Batches(info, batch_rows), most, shown):
            yield one
