"""x · Wᵀ + b with W laid out once for the products of few rows, of which a decode step is made.

torch lays the weight out anew in every call: with 16 rows that takes as long as the product. With AVX2 alone and on
Intel's CPUs float32 lies as Wᵀ for MKL, whose calls cost 2 µs where oneDNN's cost 20; everywhere else in oneDNN's
blocks, where there are such. Which one is taken depends on the machine and the dtype alone, so that bits do not change
from one start to the next.
"""

from collections.abc import Sequence
from enum import Enum

import torch
from torch.nn import functional

from trimtab.models.cpu import is_intel, rounded_rows

ROWS_HINT = 64
"""Rows the layout is made for; others are computed with it too."""


class Layout(Enum):
    """How a weight [D_out, D_in] lies in memory."""

    AS_IT_IS = "as it is"
    TRANSPOSED = "transposed"
    ONEDNN = "oneDNN's blocks"


class PackedLinear:
    """One linear layer, or several of one input side by side.

    Args:
        weights: [D_out, D_in] each; their outputs stand one after the other.
        biases: [D_out] each, or None.
        block: so many rows are computed at a time, always: no row's bits depend on how many there are. A product may
            add up in another order when it has other rows. None computes all at once.
    """

    def __init__(
        self, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None], block: int | None = None
    ) -> None:
        self._block = block
        weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self.elements = weight.numel()
        self._bias = None
        if any(bias is not None for bias in biases):
            pairs = zip(weights, biases, strict=True)
            self._bias = torch.cat([of.new_zeros(len(of)) if bias is None else bias for of, bias in pairs])
        self._layout = layout_for(weight.dtype, weight.device)
        if self._layout is Layout.ONEDNN:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), ROWS_HINT)
        elif self._layout is Layout.TRANSPOSED:
            weight = weight.t().contiguous()
        self._weight = weight

    def __call__(self, x_ND: torch.Tensor) -> torch.Tensor:
        """[N, D_in] → [N, D_out]; with a block N is a whole number of them."""
        if self._block is None or len(x_ND) == self._block:
            return self._product(x_ND)
        return torch.cat([self._product(rows) for rows in x_ND.split(self._block)])

    def _product(self, x_ND: torch.Tensor) -> torch.Tensor:
        if self._layout is Layout.ONEDNN:
            return torch.ops.mkldnn._linear_pointwise(x_ND, self._weight, self._bias, "none", [], "")
        if self._layout is Layout.AS_IT_IS:
            return functional.linear(x_ND, self._weight, self._bias)
        return x_ND @ self._weight if self._bias is None else torch.addmm(self._bias, x_ND, self._weight)

    def rows_for(self, count: int) -> int:
        """How many rows to compute where `count` are wanted: whole blocks, or few numbers for oneDNN, which compiles a
        kernel for every one it meets."""
        if self._block is not None:
            return -(-count // self._block) * self._block
        return rounded_rows(count) if self._layout is Layout.ONEDNN else count


def layout_for(dtype: torch.dtype, device: torch.device) -> Layout:
    """The fastest one that torch has for weights of this dtype on this machine."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return Layout.AS_IT_IS
    if dtype is torch.bfloat16:
        return Layout.ONEDNN if torch.ops.mkldnn._is_mkldnn_bf16_supported() else Layout.AS_IT_IS
    if dtype is not torch.float32:
        return Layout.AS_IT_IS
    mkl_is_fast = is_intel() or torch.backends.cpu.get_cpu_capability() == "AVX2"
    return Layout.TRANSPOSED if torch.backends.mkl.is_available() and mkl_is_fast else Layout.ONEDNN
