"""Batches beyond a server's limits: cut into consecutive parts, sent over the addresses, answered as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np

from trimtab_client.calls import Call, Program
from trimtab_client.messages import ModelInfo
from trimtab_client.models import ServedLimits
from trimtab_client.ragged import RaggedTokens
from trimtab_client.versions import ModelVersion, VersionPin


class Versioned(Protocol):
    """An answer that names the version that computed it."""

    @property
    def version(self) -> ModelVersion: ...


P = TypeVar("P", bound=Versioned)


def in_parts(
    limits: ServedLimits, pin: VersionPin | None, split: Callable[[ModelInfo, VersionPin | None], list[Call[P]]]
) -> Program[list[P]]:
    """The answers to all parts of a batch, in order and all by one version.

    Where replicas answered by different versions (a swap was under way), the parts of the older ones are asked for
    again, pinned to the newest.

    Args:
        split: the calls of the parts, under a server's limits and with a pin.
    """
    info = yield from limits.get()
    parts: list[P] = yield split(info, pin)
    newest = max((part.version for part in parts), key=lambda version: version.step)
    older = [index for index, part in enumerate(parts) if part.version != newest]
    if older:
        pinned = split(info, newest)
        again: list[P] = yield [pinned[index] for index in older]
        for index, part in zip(older, again, strict=True):
            parts[index] = part
    return parts


def consecutive(sizes: Sequence[int], most_items: int, most_size: int) -> list[slice]:
    """Runs of consecutive items, each of at most so many items and of so much size in all; 0 means no limit.

    An item beyond `most_size` stands alone, for the server to judge. No items make one empty run.
    """
    runs: list[slice] = []
    start, held = 0, 0
    for index, size in enumerate(sizes):
        full = most_items and index - start == most_items
        if index > start and (full or (most_size and held + size > most_size)):
            runs.append(slice(start, index))
            start, held = index, 0
        held += size
    runs.append(slice(start, len(sizes)))
    return runs


def places(run: slice) -> range:
    """The positions of a run of `consecutive`."""
    return range(run.start, run.stop)


def split_tokens(tokens: RaggedTokens, info: ModelInfo) -> list[RaggedTokens]:
    """Consecutive parts of at most the server's sequences and tokens; views of the whole."""
    return _parts(tokens, consecutive(tokens.lengths.tolist(), info.max_sequences, info.max_tokens))


def split_responses(tokens: RaggedTokens, most_tokens: int) -> list[RaggedTokens]:
    """Consecutive parts whose responses hold so many tokens in all; 0 means no limit."""
    assert tokens.prompt_lengths is not None
    return _parts(tokens, consecutive((tokens.lengths - tokens.prompt_lengths).tolist(), 0, most_tokens))


def _parts(tokens: RaggedTokens, runs: Sequence[slice]) -> list[RaggedTokens]:
    ends_B = np.concatenate([[0], np.cumsum(tokens.lengths)])
    prompts = tokens.prompt_lengths
    return [
        RaggedTokens(
            tokens.token_ids[ends_B[run.start] : ends_B[run.stop]],
            tokens.lengths[run],
            None if prompts is None else prompts[run],
        )
        for run in runs
    ]


def starts(counts: Sequence[int]) -> Sequence[Any]:
    """Where each part begins in the whole."""
    return np.cumsum([0, *counts[:-1]]).tolist()
