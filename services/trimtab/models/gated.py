"""The gated MLP of Llama and its kin, which keeps half as much for its backward pass.

Autograd keeps gate and up, silu(gate), and its product with up. Here the last two are made again from the first two.
`shorten` puts this in place of every such MLP.
Suffixes: N tokens, D hidden size, F intermediate size.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaMLP

from trimtab.models.last_layer import instructions


class GatedDown(torch.autograd.Function):
    """y = (silu(g) ⊙ u) Wᵀ (SwiGLU, arXiv:2002.05202, eq. 6) of g and u [..., F] and W [D, F]."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, weight_DF: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up, weight_DF)
        return functional.linear(functional.silu(gate) * up, weight_DF)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """With p = silu(g) ⊙ u and dp = dy W: dW = dyᵀ p, du = dp ⊙ silu(g), dg = dp ⊙ u ⊙ silu′(g)."""
        (dy,), (gate, up, weight_DF) = upstream, ctx.saved_tensors
        activated = functional.silu(gate)
        dweight_DF = None
        if ctx.needs_input_grad[2]:
            dweight_DF = dy.flatten(0, -2).T @ (activated * up).flatten(0, -2)
        dproduct = dy @ weight_DF
        dup = activated.mul_(dproduct)
        return torch.ops.aten.silu_backward(dproduct.mul_(up), gate), dup, dweight_DF


def shorten(model: torch.nn.Module) -> None:
    """Let every MLP with LlamaMLP's forward and a SiLU run by `GatedDown`; others stay as they are."""
    for module in model.modules():
        if _is_gated(module):
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]


def keeps_half(block: torch.nn.Module) -> bool:
    """Whether a block's MLP, once shortened, keeps gate and up alone."""
    return any(_is_gated(module) and _is_plain(module.down_proj) for module in block.modules())


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    down = module.down_proj
    if not _is_plain(down) or not torch.is_grad_enabled():
        return type(module).forward(module, x)
    return GatedDown.apply(module.gate_proj(x), module.up_proj(x), down.weight)  # type: ignore[return-value]


def _is_gated(module: Any) -> bool:
    return instructions(type(module)) == instructions(LlamaMLP) and _is_silu(module.act_fn)


def _is_plain(down: Any) -> bool:
    """Whether it is no more than a product with its weight: neither biased nor an adapter."""
    return type(down) is torch.nn.Linear and down.bias is None


@torch.no_grad()
def _is_silu(activation: Any) -> bool:
    x = torch.linspace(-4, 4, 33)
    return torch.equal(activation(x), functional.silu(x))
