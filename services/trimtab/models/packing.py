"""Packing: sequences of different lengths in one row of tokens, without padding.

Position ids restart for each sequence; `attention` keeps sequences apart by the layout made here.
Suffixes: B sequences, N tokens of the packed row, T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

MAX_PADDING_SHARE = 0.15
"""Most padding inside one attention group, as a share of its longest sequence."""


@dataclass(frozen=True)
class AttentionGroup:
    """Sequences of similar length whose attention runs as one dense causal batch.

    Attributes:
        gather_BT: positions in the packed row. Behind a short sequence its own last token repeats: a causal
            mask hides it from every real token, and no other sequence's value ever enters the group's row.
        valid: positions of the flattened [B·T] that are real tokens; None when all are.
        contiguous_start: first token of the group when it is one slice of the packed row, else None.
    """

    gather_BT: torch.Tensor
    valid: torch.Tensor | None
    contiguous_start: int | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.gather_BT.shape[0], self.gather_BT.shape[1]


@dataclass(frozen=True)
class PackedBatch:
    """Tokens of B sequences in one row of N, on one device.

    Attributes:
        token_ids_N, position_ids_N: int64.
        lengths: tokens of each sequence.
        cu_seqlens: int32 [B + 1], start of each sequence and the end of the last.
        groups: how attention is batched; `order` maps the groups' valid tokens back to the row.
    """

    token_ids_N: torch.Tensor
    position_ids_N: torch.Tensor
    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    groups: tuple[AttentionGroup, ...]
    order: torch.Tensor | None

    @property
    def last_tokens_B(self) -> torch.Tensor:
        """Position in the row of each sequence's last token."""
        return self.cu_seqlens[1:].long() - 1

    @property
    def max_length(self) -> int:
        return max(self.lengths)


def pack(sequences: Sequence[np.ndarray], device: torch.device | str = "cpu") -> PackedBatch:
    """Pack int token arrays [T] (each of at least one token) into one row."""
    lengths = tuple(len(sequence) for sequence in sequences)
    if not lengths or min(lengths) < 1:
        raise ValueError("pack needs at least one sequence, each of at least one token")
    starts = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(starts[-1]) - np.repeat(starts[:-1], lengths)
    groups, order = _attention_groups(lengths, starts[:-1], device)
    return PackedBatch(
        token_ids_N=torch.as_tensor(np.concatenate(sequences).astype(np.int64), device=device),
        position_ids_N=torch.as_tensor(positions, device=device),
        lengths=lengths,
        cu_seqlens=torch.as_tensor(starts.astype(np.int32), device=device),
        groups=groups,
        order=order,
    )


def plan_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split sequence indices into micro-batches of at most `max_tokens` tokens, similar lengths together.

    A sequence longer than `max_tokens` gets a micro-batch of its own.
    """
    batches: list[list[int]] = []
    room = -1
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if lengths[index] > room or not batches:
            batches.append([])
            room = max_tokens
        batches[-1].append(index)
        room -= lengths[index]
    return batches


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


def _attention_groups(
    lengths: tuple[int, ...], starts: np.ndarray, device: torch.device | str
) -> tuple[tuple[AttentionGroup, ...], torch.Tensor | None]:
    by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    members: list[list[int]] = []
    for index in by_length:
        if members and lengths[index] >= (1 - MAX_PADDING_SHARE) * lengths[members[-1][0]]:
            members[-1].append(index)
        else:
            members.append([index])
    groups, tokens = [], []
    for indices in (sorted(group) for group in members):
        group_lengths = np.array([lengths[i] for i in indices])
        columns = np.arange(group_lengths.max())[None, :]
        gather = starts[indices][:, None] + np.minimum(columns, group_lengths[:, None] - 1)
        valid = columns < group_lengths[:, None]
        flat = gather[valid]
        tokens.append(flat)
        is_slice = bool(valid.all()) and bool((np.diff(gather.reshape(-1)) == 1).all())
        groups.append(
            AttentionGroup(
                gather_BT=torch.as_tensor(gather, device=device),
                valid=None if valid.all() else torch.as_tensor(np.flatnonzero(valid), device=device),
                contiguous_start=int(gather[0, 0]) if is_slice else None,
            )
        )
    emitted = np.concatenate(tokens)
    if np.array_equal(emitted, np.arange(emitted.size)):
        return tuple(groups), None
    order = np.empty_like(emitted)
    order[emitted] = np.arange(emitted.size)
    return tuple(groups), torch.as_tensor(order, device=device)
