"""The packed training forward that SFT and PPO share: chosen tokens of some sequences, their log-probs, their values.

Suffixes: N tokens of a packed row, R response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from trimtab.kernels.api import ExactKl, PpoLoss, SelectedLogprobs, exact_kl, ppo_loss, selected_logprobs
from trimtab.kernels.ppo_terms import PpoSettings
from trimtab.models.errors import ModelLoadError
from trimtab.models.packing import PackedBatch, pack, response_positions
from trimtab.models.policy import LMHead, Policy
from trimtab.models.scalar_head import ScalarModel
from trimtab.models.sharded import whole_weights


@dataclass(frozen=True)
class TokenBatch:
    """Sequences, each a prompt and a response, with the flat layout of their response tokens.

    Attributes:
        sequences: int32 token ids, prompt and response together.
        prompt_lengths: tokens of each prompt, at least 1.
    """

    sequences: tuple[np.ndarray, ...]
    prompt_lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if any(not 1 <= p < len(s) for s, p in zip(self.sequences, self.prompt_lengths, strict=True)):
            raise ValueError("each sequence needs a prompt and a response of at least one token")

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def lengths(self) -> list[int]:
        return [len(sequence) for sequence in self.sequences]

    @property
    def response_lengths(self) -> np.ndarray:
        return np.array(self.lengths) - np.array(self.prompt_lengths)


@dataclass(frozen=True)
class Slice:
    """Some sequences of a TokenBatch, packed.

    Attributes:
        positions_R: where in the packed row each response token is predicted (the token before it).
        targets_R: the response tokens, int64.
        flat_R: where each of them stands in the batch's flat [all response tokens] layout.
    """

    packed: PackedBatch
    positions_R: torch.Tensor
    targets_R: torch.Tensor
    flat_R: torch.Tensor

    def take(self, *arrays: torch.Tensor) -> list[torch.Tensor]:
        """The part's response tokens of arrays [all response tokens, …] over the whole batch, on the part's device."""
        where = self.flat_R.cpu()
        return [array[where].to(self.flat_R.device) for array in arrays]


def slice_batch(batch: TokenBatch, indices: Sequence[int], device: torch.device | str = "cpu") -> Slice:
    """Pack the sequences `indices` of a batch; with none, one token of which nothing is asked (an idle rank's part)."""
    if not indices:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return Slice(pack([np.zeros(1, dtype=np.int64)], device), nothing, nothing, nothing)
    sequences = [batch.sequences[i] for i in indices]
    prompts = [batch.prompt_lengths[i] for i in indices]
    offsets = np.concatenate([[0], np.cumsum(batch.response_lengths)])
    flat = np.concatenate([np.arange(offsets[i], offsets[i + 1]) for i in indices])
    targets = np.concatenate([s[p:] for s, p in zip(sequences, prompts, strict=True)]).astype(np.int64)
    return Slice(
        packed=pack(sequences, device),
        positions_R=torch.as_tensor(response_positions([len(s) for s in sequences], prompts), device=device),
        targets_R=torch.as_tensor(targets, device=device),
        flat_R=torch.as_tensor(flat, device=device),
    )


def response_logprobs(policy: Policy, part: Slice, temperature: float = 1.0) -> SelectedLogprobs:
    """Log-prob, lse and entropy of each response token at `temperature`, [R]."""
    return whole_weights(
        policy.model, lambda: hidden_logprobs(policy, response_hidden(policy, part), part, temperature)
    )


def response_hidden(policy: Policy, part: Slice) -> torch.Tensor:
    """The hidden state that predicts each response token, [R, D]."""
    return policy.hidden(part.packed, part.positions_R)


def hidden_logprobs(policy: Policy, hidden_RD: torch.Tensor, part: Slice, temperature: float = 1.0) -> SelectedLogprobs:
    """`response_logprobs` from the part's `response_hidden`."""
    head = policy.head
    return selected_logprobs(hidden_RD, head.weight_VD, part.targets_R, **_head_options(head, temperature))


def hidden_ppo_loss(
    policy: Policy,
    hidden_RD: torch.Tensor,
    part: Slice,
    old_R: torch.Tensor,
    advantages_R: torch.Tensor,
    weights_R: torch.Tensor,
    old_lse_R: torch.Tensor | None,
    *,
    settings: PpoSettings,
    normalizer: float,
    temperature: float = 1.0,
) -> PpoLoss:
    """The PPO loss of the response tokens over `normalizer`, and their log-probs [R]; see `kernels.api.ppo_loss`."""
    head = policy.head
    return ppo_loss(
        hidden_RD,
        head.weight_VD,
        part.targets_R,
        old_R,
        advantages_R,
        weights_N=weights_R,
        hint_lse_N=old_lse_R,
        settings=settings,
        normalizer=normalizer,
        **_head_options(head, temperature),
    )


def hidden_exact_kl(
    policy: Policy,
    hidden_RD: torch.Tensor,
    part: Slice,
    reference: LMHead,
    reference_hidden_RD: torch.Tensor,
    temperature: float = 1.0,
) -> ExactKl:
    """KL(policy‖reference) of each response token over the whole vocabulary, [R]; see `kernels.api.exact_kl`.

    Args:
        reference: the reference's head, `scaled_like` the policy's.
        reference_hidden_RD: its hidden states, brought to the dtype of its weight.
    """
    head = policy.head
    return exact_kl(
        hidden_RD,
        head.weight_VD,
        reference_hidden_RD.to(reference.weight_VD.dtype),
        reference.weight_VD,
        part.targets_R,
        reference_bias=reference.bias,
        reference_softcap=reference.softcap,
        **_head_options(head, temperature),
    )


def scaled_like(reference: LMHead, policy: LMHead) -> LMHead:
    """The reference's head in units of the policy's logit scale, so that one temperature serves both."""
    factor = reference.scale / policy.scale
    return LMHead(
        weight_VD=reference.weight_VD if factor == 1.0 else reference.weight_VD * factor,
        bias=None if reference.bias is None else reference.bias * factor,
        softcap=None if reference.softcap is None else reference.softcap / policy.scale,
        scale=policy.scale,
    )


def _head_options(head: LMHead, temperature: float) -> dict[str, Any]:
    """Bias, soft-cap and temperature of logits that the head scales."""
    softcap = None if head.softcap is None else head.softcap / head.scale
    return {"temperature": temperature / head.scale, "bias": head.bias, "softcap": softcap}


def response_values(value_model: ScalarModel, part: Slice) -> torch.Tensor:
    """V_t of each response token, read at the token before it, normalised, [R]."""
    return value_model.normalized(value_model.scores(part.packed, part.positions_R))


def prepare_for_training(model: torch.nn.Module, *, activation_checkpointing: bool) -> None:
    """Switch every dropout off for good (ALGORITHMS 3) and activation checkpointing on where asked."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "attn_dropout_p"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    model.eval()
    if activation_checkpointing:
        trainable: Any = model
        trainable.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()  # transformers checkpoints in train mode only; no dropout is left in it


@contextmanager
def residual_dropout(policy: Policy, probability: float, generator: torch.Generator) -> Iterator[None]:
    """Drop out each sublayer's output before it joins the residual stream (InstructGPT's SFT: 0.2)."""
    if probability == 0:
        yield
        return
    layers: Any = getattr(policy.model.base_model, "layers", None) or getattr(policy.model.base_model, "h", None)
    if layers is None:
        raise ModelLoadError("dropout", f"{policy.architecture}: no layer list found, set dropout to 0")

    def drop(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        keep = torch.rand(hidden.shape, generator=generator).to(hidden.device) >= probability
        dropped = hidden * keep / (1 - probability)
        return (dropped, *output[1:]) if isinstance(output, tuple) else dropped

    names = {"self_attn", "attn", "mlp", "linear_attn"}
    sublayers = [child for layer in layers for name, child in layer.named_children() if name in names]
    handles = [sublayer.register_forward_hook(drop) for sublayer in sublayers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def negative_log_sigmoid(margin: torch.Tensor) -> torch.Tensor:
    """−log σ(margin), without overflow."""
    return F.softplus(-margin)
