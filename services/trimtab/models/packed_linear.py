"""x · Wᵀ + b with W laid out once for oneDNN, which a decode step of few rows gains most from.

torch lays the weight out anew in every call: with 16 rows that takes as long as the product. Where torch has no oneDNN
for the dtype the product is torch's own.
"""

from collections.abc import Sequence

import torch
from torch.nn import functional

ROWS_HINT = 64
"""Rows the layout is made for; others are computed with it too."""


class PackedLinear:
    """One linear layer, or several of one input side by side.

    Args:
        weights: [D_out, D_in] each; their outputs stand one after the other.
        biases: [D_out] each, or None.
    """

    def __init__(self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]) -> None:
        weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self.elements = weight.numel()
        self._bias = None
        if any(bias is not None for bias in biases):
            pairs = zip(weights, biases, strict=True)
            self._bias = torch.cat([of.new_zeros(len(of)) if bias is None else bias for of, bias in pairs])
        self._packed = packs(weight.dtype, weight.device)
        if self._packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)
        self._weight = weight

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        """[N, D_in] → [N, D_out]."""
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise(x_ND, self._weight, self._bias, "none", [], "")
        return functional.linear(x_ND, self._weight, self._bias)


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch can lay weights of this dtype out for oneDNN on this machine."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype is torch.float32
