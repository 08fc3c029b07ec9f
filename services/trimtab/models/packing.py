"""Packing: sequences of different lengths in one row of tokens, without padding.

Position ids restart for each sequence; `attention` keeps sequences apart by the layout made here. Sequences that begin
alike, the K responses to one prompt, may stand behind one copy of what they share (`pack_sets`).
Suffixes: B sequences, N tokens of the packed row, T tokens of a sequence, S segments of the row, M columns of all
groups of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from trimtab.models.cpu import compiles_by_shape

SHARED_SLACK = 0.15
"""Most queries of a group that are asked in vain because shared beginnings differ, as a share of its longest total."""
PADDED_PLACES = {"cpu": 2**14}
OTHERS_PADDED_PLACES = 2**20
"""Places, of a query and a key, that padding may add to a group: about what a group of its own costs. That of other
devices is reckoned, not measured."""


@dataclass(frozen=True)
class AttentionGroup:
    """Sequences of similar length whose attention runs as one dense causal batch.

    Attributes:
        count: sequences.
        length: columns, the longest one's tokens and what rounds them up.
        first_query: columns before it are seen only, being asked for in another group: a shared beginning.
    """

    count: int
    length: int
    first_query: int

    @property
    def queries(self) -> int:
        """Columns that are asked for, of each sequence."""
        return self.length - self.first_query


@dataclass(frozen=True)
class PackedBatch:
    """Tokens of B sequences in one row of N, on one device.

    Attributes:
        token_ids_N, position_ids_N: int64.
        lengths: tokens of each segment of the row: of each sequence or, from `pack_sets`, of each shared beginning
            and then of each sequence behind it.
        last_tokens_B: position in the row of each sequence's last token.
        groups: how attention is batched.
        keys_M: positions in the row of the groups' columns, sequence by sequence. Behind a short sequence its own last
            token repeats: a causal mask hides it from every real token, and no other sequence's value ever enters the
            group's row. None where that is the row as it is.
        queries_M: as `keys_M`, of the columns that are asked for.
        places_N: where each token of the row stands in `queries_M` as itself; None with `queries_M`.
    """

    token_ids_N: torch.Tensor
    position_ids_N: torch.Tensor
    lengths: tuple[int, ...]
    last_tokens_B: torch.Tensor
    groups: tuple[AttentionGroup, ...]
    keys_M: torch.Tensor | None
    queries_M: torch.Tensor | None
    places_N: torch.Tensor | None

    @property
    def shares(self) -> bool:
        """Whether a token of the row may be seen by more than one sequence."""
        return any(group.first_query for group in self.groups)


@dataclass(frozen=True)
class _Segments:
    """Where the row's segments stand, and which earlier tokens of the row each continues.

    Attributes:
        start_S, length_S: of the segment's own tokens in the row.
        shared_start_S, shared_S: of the beginning it continues; 0 tokens where it continues none.
    """

    start_S: np.ndarray
    length_S: np.ndarray
    shared_start_S: np.ndarray
    shared_S: np.ndarray

    @property
    def total_S(self) -> np.ndarray:
        """Tokens that a segment's last token can see, itself among them."""
        return self.shared_S + self.length_S


def pack(sequences: Sequence[np.ndarray], device: torch.device | str = "cpu") -> PackedBatch:
    """Pack int token arrays [T] (each of at least one token) into one row."""
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    if not lengths.size or lengths.min() < 1:
        raise ValueError("pack needs at least one sequence, each of at least one token")
    ends = np.cumsum(lengths)
    none = np.zeros_like(lengths)
    return _packed(sequences, _Segments(ends - lengths, lengths, none, none), ends - 1, device)


def pack_sets(sets: Sequence[Sequence[np.ndarray]], device: torch.device | str = "cpu") -> PackedBatch:
    """Pack sets of sequences, the tokens with which all of a set begin standing in the row once.

    Hidden states equal those of `pack` wherever a token's state depends on the tokens before it through attention and
    position ids alone (`layouts.shares_beginnings`). `last_tokens_B` follows the sets in order.
    """
    if not sets or any(not members or min(map(len, members)) < 1 for members in sets):
        raise ValueError("pack_sets needs at least one set, each of sequences of at least one token")
    shared = np.array([shared_beginning(members) for members in sets], dtype=np.int64)
    counts = [len(members) for members in sets]
    own = [member[tokens:] for members, tokens in zip(sets, shared, strict=True) for member in members]
    pieces = [members[0][:tokens] for members, tokens in zip(sets, shared, strict=True)] + own
    length_S = np.array([len(piece) for piece in pieces], dtype=np.int64)
    start_S = np.cumsum(length_S) - length_S
    none = np.zeros_like(shared)
    segments = _Segments(
        start_S,
        length_S,
        np.concatenate([none, np.repeat(start_S[: len(sets)], counts)]),
        np.concatenate([none, np.repeat(shared, counts)]),
    )
    last_S = np.where(length_S > 0, start_S + length_S, segments.shared_start_S + segments.shared_S) - 1
    filled = np.flatnonzero(length_S)
    kept = _Segments(start_S[filled], length_S[filled], segments.shared_start_S[filled], segments.shared_S[filled])
    return _packed([pieces[i] for i in filled], kept, last_S[len(sets) :], device)


def shared_beginning(sequences: Sequence[np.ndarray]) -> int:
    """How many tokens all sequences begin with."""
    shortest = min(map(len, sequences))
    head_BT = np.stack([sequence[:shortest] for sequence in sequences])
    differs_T = (head_BT != head_BT[0]).any(0)
    return int(differs_T.argmax()) if differs_T.any() else shortest


def plan_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split sequence indices into micro-batches of at most `max_tokens` tokens, similar lengths together.

    They are as few as filling them one after the other gives, and about as full as one another: the fullest says how
    much memory a step takes. A sequence longer than `max_tokens` gets a micro-batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    longest_first = [lengths[i] for i in order]
    fewest = len(_fill(longest_first, max_tokens))
    low, high = 1, max_tokens
    while low < high:
        middle = (low + high) // 2
        if len(_fill(longest_first, middle)) > fewest:
            low = middle + 1
        else:
            high = middle
    starts = _fill(longest_first, high)
    return [order[start:end] for start, end in pairwise([*starts, len(order)])]


def _fill(lengths: Sequence[int], max_tokens: int) -> list[int]:
    """Where each micro-batch starts, if one after the other is filled up to `max_tokens`."""
    starts: list[int] = []
    room = -1
    for place, length in enumerate(lengths):
        if length > room or not starts:
            starts.append(place)
            room = max_tokens
        room -= length
    return starts


def response_positions(lengths: Sequence[int], prompt_lengths: Sequence[int]) -> np.ndarray:
    """Positions in the packed row of the token *before* each response token, int64 [response tokens].

    The hidden state there predicts the response token at position + 1; the value V_t is read there
    (ALGORITHMS: the prompt's last token for t = 0).
    """
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1]
    spans = [
        np.arange(start + prompt - 1, start + length - 1)
        for start, length, prompt in zip(starts, lengths, prompt_lengths, strict=True)
    ]
    return np.concatenate(spans) if spans else np.zeros(0, dtype=np.int64)


def _packed(
    pieces: Sequence[np.ndarray], segments: _Segments, last_tokens_B: np.ndarray, device: torch.device | str
) -> PackedBatch:
    positions_N = np.arange(segments.length_S.sum()) + np.repeat(
        segments.shared_S - segments.start_S, segments.length_S
    )
    groups, keys_M, queries_M, places_N = _attention_groups(segments, torch.device(device).type)
    as_it_is = np.array_equal(queries_M, np.arange(len(positions_N)))
    shares = any(group.first_query for group in groups)

    def put(array: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(array, device=device)

    queries = None if as_it_is else put(queries_M)
    return PackedBatch(
        token_ids_N=put(np.concatenate(pieces).astype(np.int64)),
        position_ids_N=put(positions_N),
        lengths=tuple(segments.length_S.tolist()),
        last_tokens_B=put(last_tokens_B),
        groups=groups,
        keys_M=put(keys_M) if shares else queries,
        queries_M=queries,
        places_N=None if as_it_is else put(places_N),
    )


def _attention_groups(
    segments: _Segments, device: str
) -> tuple[tuple[AttentionGroup, ...], np.ndarray, np.ndarray, np.ndarray]:
    """The groups, and `keys_M`, `queries_M`, `places_N` of `PackedBatch`."""
    multiple = 16 if device == "cpu" and compiles_by_shape(torch.bfloat16) else 1
    groups, keys, queries = [], [], []
    places_N = np.empty(segments.length_S.sum(), dtype=np.int64)
    behind = 0
    for members in _alike(segments, multiple, PADDED_PLACES.get(device, OTHERS_PADDED_PLACES)):
        start, total = segments.start_S[members], segments.total_S[members]
        shared, shared_start = segments.shared_S[members, None], segments.shared_start_S[members, None]
        longest = -(-int(total.max()) // multiple) * multiple
        columns = np.minimum(np.arange(longest)[None, :], total[:, None] - 1)
        gather = np.where(columns < shared, shared_start + columns, start[:, None] + columns - shared)
        first_query = int(shared.min())
        asked = np.arange(first_query, longest)[None, :]
        itself = np.flatnonzero((asked >= shared) & (asked < total[:, None]))
        keys.append(gather.reshape(-1))
        queries.append(gather[:, first_query:].reshape(-1))
        places_N[queries[-1][itself]] = behind + itself
        behind += len(queries[-1])
        groups.append(AttentionGroup(len(members), longest, first_query))
    return tuple(groups), np.concatenate(keys), np.concatenate(queries), places_N


def _alike(segments: _Segments, multiple: int, padded_places: int) -> list[list[int]]:
    """Segments whose shared beginnings and whose totals differ by little, in the row's order within each group."""
    shared, total = segments.shared_S, segments.total_S
    slack = SHARED_SLACK * total.max()
    by_shared: list[list[int]] = []
    for index in sorted(range(len(total)), key=lambda i: (shared[i], i)):
        first = by_shared[-1][0] if by_shared else None
        if first is not None and shared[index] - shared[first] <= slack and bool(shared[index]) == bool(shared[first]):
            by_shared[-1].append(index)
        else:
            by_shared.append([index])
    groups: list[list[int]] = []
    width_S = -(-total // multiple) * multiple
    for indices in by_shared:
        places_S = (width_S * (width_S - shared[indices[0]])).tolist()
        members: list[int] = []
        padded = 0
        for index in sorted(indices, key=lambda i: (-total[i], i)):
            if members:
                padded += places_S[members[0]] - places_S[index]
            if members and padded > padded_places:
                groups.append(sorted(members))
                members, padded = [], 0
            members.append(index)
        groups.append(sorted(members))
    return groups
