"""The reference's one computation: log-probs of response tokens from hidden states, without forming the logits.

The trainer subtracts these from its own, made by the same kernel. Suffixes: N response tokens of the packed batch,
D hidden size, R response tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from trimtab.kernels.api import selected_logprobs
from trimtab.models.packing import pack, response_positions
from trimtab.models.policy import Policy


@dataclass(frozen=True)
class ReferenceItem:
    """One sequence of one call.

    `temperature` divides the logits; `with_hidden` asks for the hidden states too; `position` is its index in the call.
    """

    token_ids: np.ndarray
    prompt_length: int
    temperature: float
    with_hidden: bool
    position: int


@dataclass(frozen=True)
class ReferenceResult:
    """float32 [R] each, in nats; `hidden` is bfloat16 [R, D] as little-endian bytes, empty where not asked for."""

    logprobs: np.ndarray
    lse: np.ndarray
    entropy: np.ndarray
    hidden: bytes


def respond(policy: Policy, items: Sequence[ReferenceItem]) -> list[ReferenceResult]:
    """One packed forward over all items; results in their order. Device thread only."""
    lengths = [len(item.token_ids) for item in items]
    prompts = [item.prompt_length for item in items]
    responses = [length - prompt for length, prompt in zip(lengths, prompts, strict=True)]
    with torch.inference_mode():
        packed = pack([item.token_ids for item in items], policy.device)
        positions_N = torch.as_tensor(response_positions(lengths, prompts), device=policy.device)
        hidden_ND = policy.hidden(packed, positions_N)
        temperatures = np.repeat([item.temperature for item in items], responses)
        head = policy.head
        selected = selected_logprobs(
            hidden_ND if head.scale == 1.0 else hidden_ND * head.scale,
            head.weight_VD,
            packed.token_ids_N[positions_N + 1],
            temperature=torch.as_tensor(temperatures, dtype=torch.float32, device=policy.device),
            bias=None if head.bias is None else head.bias * head.scale,
            softcap=head.softcap,
        )
        columns = [column.float().cpu().numpy() for column in selected]
        wanted = any(item.with_hidden for item in items)
        bits_ND = hidden_ND.to(torch.bfloat16).view(torch.int16).cpu().numpy() if wanted else None
    ends = np.cumsum(responses)
    results = []
    for item, end, count in zip(items, ends.tolist(), responses, strict=True):
        rows = slice(end - count, end)
        hidden = bits_ND[rows].astype("<i2").tobytes() if item.with_hidden and bits_ND is not None else b""
        results.append(ReferenceResult(*(column[rows] for column in columns), hidden=hidden))
    return results
