"""Scores of more rows than memory holds: bounded batches, several at a time, answers in the rows' order.

Rows are taken from their source only as answers are taken away, so that neither a fast source nor a slow reader makes
memory grow: at most `at_once` batches are in flight and as many wait to be read.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Generator,
    Iterable,
    Iterator,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeGuard, TypeVar

from trimtab_client.conversations import ChatMessage, chat_tokens, text_tokens
from trimtab_client.messages import ModelInfo, Scores
from trimtab_client.progress import Progress
from trimtab_client.versions import ModelVersion

Texts = tuple[str, str] | tuple[str, str, str]
Row = Texts | Sequence[ChatMessage]
"""(prompt, response), with a third text for verifiers (prompt, response, reference), or a conversation."""

R = TypeVar("R", tuple[str, str], tuple[str, str, str], Sequence[ChatMessage], Row)

BATCH_ROWS = 256
BATCHES_AT_ONCE_PER_ADDRESS = 4


@dataclass(frozen=True, slots=True)
class RowScore(Generic[R]):
    """One row and what it scored: the bare logit, normalised, by which version, and whether its end was cut."""

    row: R
    score: float
    normalized_score: float
    truncated: bool
    version: ModelVersion


class Batches(Generic[R]):
    """Cuts rows into batches of one kind, each within a server's limits for one request."""

    def __init__(self, info: ModelInfo, most_rows: int) -> None:
        if most_rows < 1:
            raise ValueError(f"batch_rows: {most_rows} is not at least 1")
        self._most_rows = min(most_rows, info.max_sequences or most_rows)
        self._most_tokens = info.max_tokens
        self._rows: list[R] = []
        self._tokens = 0

    def add(self, row: R) -> list[R] | None:
        """Take a row; the batch that it did not fit in any more, if there is one. ValueError for what is no row."""
        tokens = row_tokens(row)
        full = len(self._rows) >= self._most_rows or (
            self._rows and self._most_tokens and self._tokens + tokens > self._most_tokens
        )
        done = None
        if self._rows and (full or _form(row) != _form(self._rows[0])):
            done = self.rest()
        self._rows.append(row)
        self._tokens += tokens
        return done

    def rest(self) -> list[R]:
        """What is left over."""
        rows, self._rows, self._tokens = self._rows, [], 0
        return rows


def is_texts(row: Row) -> TypeGuard[Texts]:
    """Whether a row is a tuple of texts rather than a conversation."""
    return isinstance(row, tuple) and len(row) in (2, 3) and isinstance(row[0], str)


def texts_of(rows: Sequence[Texts]) -> tuple[list[tuple[str, str]], list[str] | None]:
    """The pairs of a batch of one form, and their references if they have some."""
    references = [row[2] for row in rows if len(row) == 3]
    return [(row[0], row[1]) for row in rows], references or None


def _form(row: Row) -> int:
    """Rows of one form travel together."""
    return len(row) if is_texts(row) else 0


def row_tokens(row: Row) -> int:
    """No fewer than the tokens of a row."""
    if is_texts(row):
        return text_tokens(row[0]) + text_tokens(row[1])
    try:
        return chat_tokens(row)  # type: ignore[arg-type]
    except (TypeError, KeyError, AttributeError):
        raise ValueError(
            "a row is a tuple of texts, (prompt, response) or (prompt, response, reference), or a list of chat "
            f"messages, not {str(row)[:100]!r}"
        ) from None


def results(rows: Sequence[R], scores: Scores) -> Iterator[RowScore[R]]:
    """Rows beside what they scored."""
    cut = set(scores.truncated)
    pairs = zip(rows, scores.scores.tolist(), scores.normalized_scores.tolist(), strict=True)
    for index, (row, raw, normalized) in enumerate(pairs):
        yield RowScore(row, raw, normalized, index in cut, scores.version)


def score_in_batches(
    score: Callable[[Sequence[R]], Scores], rows: Iterable[R], batches: Batches[R], at_once: int, progress: Progress
) -> Generator[RowScore[R], None, None]:
    """The blocking side: `score` of each batch on a pool of threads."""
    pool = ThreadPoolExecutor(at_once, thread_name_prefix="score-many")
    waiting: deque[tuple[list[R], Future[Scores]]] = deque()

    def taken() -> Iterator[RowScore[R]]:
        batch, future = waiting.popleft()
        found = future.result()
        yield from results(batch, found)
        progress.add(len(batch))

    try:
        for row in rows:
            done = batches.add(row)
            if done is None:
                continue
            waiting.append((done, pool.submit(score, done)))
            if len(waiting) >= 2 * at_once:
                yield from taken()
        if last := batches.rest():
            waiting.append((last, pool.submit(score, last)))
        while waiting:
            yield from taken()
        progress.done()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # what is in flight ends by its own deadline


async def score_in_batches_async(
    score: Callable[[Sequence[R]], Coroutine[Any, Any, Scores]],
    rows: Iterable[R] | AsyncIterable[R],
    batches: Batches[R],
    at_once: int,
    progress: Progress,
) -> AsyncGenerator[RowScore[R], None]:
    """The asyncio side: `score` starts a task for each batch."""
    waiting: deque[tuple[list[R], asyncio.Future[Scores]]] = deque()
    free = asyncio.Semaphore(at_once)

    async def limited(batch: list[R]) -> Scores:
        async with free:
            return await score(batch)

    async def taken() -> AsyncIterator[RowScore[R]]:
        batch, task = waiting.popleft()
        try:
            found = await task
        finally:
            task.cancel()
        for one in results(batch, found):
            yield one
        progress.add(len(batch))

    try:
        async for row in _each(rows):
            done = batches.add(row)
            if done is None:
                continue
            waiting.append((done, asyncio.ensure_future(limited(done))))
            if len(waiting) >= 2 * at_once:
                async for one in taken():
                    yield one
        if last := batches.rest():
            waiting.append((last, asyncio.ensure_future(limited(last))))
        while waiting:
            async for one in taken():
                yield one
        progress.done()
    finally:
        for _, task in waiting:
            task.cancel()
        await asyncio.gather(*(task for _, task in waiting), return_exceptions=True)


async def _each(rows: Iterable[R] | AsyncIterable[R]) -> AsyncIterator[R]:
    if isinstance(rows, AsyncIterable):
        async for row in rows:
            yield row
    else:
        for row in rows:
            yield row
