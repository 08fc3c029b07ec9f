"""What every Triton kernel over the LM head shares: one tile of logits from hidden states and weight.

Tile sizes depend on the GPU's generation and the dtype alone, never on the number of rows, and no product is split
along D: a row's numbers are the same in any company. Suffixes: N rows, D hidden size, V vocabulary; inside kernels
a `_nv` tile holds BLOCK_N rows of BLOCK_V logits.
"""

from __future__ import annotations

import os
import threading
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ROW_GROUP_BYTES = 24 << 20  # hidden states of the row tiles that run side by side; they should stay in the L2 cache
ROW_ARGUMENTS = ("N", "row_tiles", "group")
"""Kernels are not compiled anew for special values of these: rows would get other code, and bits, by their number."""
_interpreter = threading.Lock()  # Triton's interpreter serves one thread at a time


@dataclass(frozen=True)
class Tile:
    """Shape of one program's work on a GPU generation.

    Attributes:
        bulk_copy: tiles are loaded by tensor descriptors (Hopper's copy engine) rather than by pointers.
    """

    block_n: int
    block_v: int
    block_d: int
    warps: int
    stages: int
    bulk_copy: bool = True


FLOAT32 = Tile(64, 64, 16, warps=8, stages=2, bulk_copy=False)
AMPERE = Tile(128, 128, 64, warps=8, stages=3, bulk_copy=False)
WIDE = Tile(128, 256, 64, warps=8, stages=3)
NARROW = Tile(128, 128, 64, warps=8, stages=4)
INTERPRETER = Tile(32, 128, 64, warps=4, stages=1)


def vetted_tile(dtype: torch.dtype, capability: tuple[int, int], *, long_epilogue: bool) -> Tile:
    """The tile of a dtype on a GPU generation: the widest whose values all stay in registers (`compile_targets`).

    One table in place of tuning at run time, which would make a row's numbers depend on its company.

    Args:
        long_epilogue: much is computed on a tile of logits: a soft-cap, or their gradient.
    """
    if dtype == torch.float32:
        return FLOAT32
    if capability < (9, 0):
        return AMPERE
    return WIDE if capability < (10, 0) and not long_epilogue else NARROW


@triton.jit
def rows_of(matrix, row, rows, d, D, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BULK_COPY: tl.constexpr):
    """[BLOCK, BLOCK_D] of a matrix of `rows` rows, zero outside; by a tensor descriptor or, without, by pointers."""
    if BULK_COPY:
        block = matrix.load([row, d])
    else:
        rows_n = row + tl.arange(0, BLOCK)
        columns_d = d + tl.arange(0, BLOCK_D)
        inside = (rows_n < rows)[:, None] & (columns_d < D)[None, :]
        block = tl.load(matrix + rows_n.to(tl.int64)[:, None] * D + columns_d[None, :], mask=inside, other=0.0)
    return block


@triton.jit
def capped_logits(
    x_ND, w_VD, bias_ptr, row, N, column, V, D,
    SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BULK_COPY: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """softcap · tanh((x · wᵀ + bias) / softcap) of BLOCK_N rows from `row`, BLOCK_V columns from `column`, float32."""
    z_nv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for d in range(0, D, BLOCK_D):
        x_nd = rows_of(x_ND, row, N, d, D, BLOCK_N, BLOCK_D, BULK_COPY)
        w_vd = rows_of(w_VD, column, V, d, D, BLOCK_V, BLOCK_D, BULK_COPY)
        if UPCAST:  # the interpreter multiplies the raw bits of bfloat16
            x_nd = x_nd.to(tl.float32)
            w_vd = w_vd.to(tl.float32)
        z_nv = tl.dot(x_nd, w_vd.T, z_nv, input_precision="ieee")
    if HAS_BIAS:
        columns = column + tl.arange(0, BLOCK_V)
        z_nv += tl.load(bias_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)[None, :]
    if SOFTCAP > 0.0:
        z_nv = SOFTCAP * (2.0 * tl.sigmoid(z_nv * (2.0 / SOFTCAP)) - 1.0)
    return z_nv


@triton.jit
def grouped_tile(program, row_tiles, column_tiles, group):
    """(row tile, column tile) of a program: `group` row tiles go through all columns before the next group."""
    first = (program // (group * column_tiles)) * group
    size = tl.minimum(group, row_tiles - first)
    within = program % (group * column_tiles)
    return first + within % size, within // size


@dataclass(frozen=True)
class HeadOperands:
    """Hidden states and LM head as the kernels read them: one dtype, rows of whole 16 bytes.

    Attributes:
        softcap: 0 for none.
    """

    x_ND: torch.Tensor
    weight_VD: torch.Tensor
    bias_V: torch.Tensor | None
    softcap: float

    @classmethod
    def of(
        cls, hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None, softcap: float | None
    ) -> HeadOperands:
        dtype = torch.promote_types(hidden_ND.dtype, weight_VD.dtype)
        return cls(_aligned(hidden_ND.to(dtype)), _aligned(weight_VD.to(dtype)), bias_V, softcap or 0.0)

    @property
    def vocab_size(self) -> int:
        return self.weight_VD.shape[0]

    def tile(self, *, long_epilogue: bool = False) -> Tile:
        """What to run this head with on its device."""
        if INTERPRETED:
            return INTERPRETER
        capability = torch.cuda.get_device_capability(self.x_ND.device)
        return vetted_tile(self.x_ND.dtype, capability, long_epilogue=long_epilogue or self.softcap > 0)

    @property
    def scratch_dtype(self) -> torch.dtype:
        """Of exponentials and logit gradients that go into a matrix product; the interpreter only truncates to bf16."""
        return torch.bfloat16 if self.x_ND.dtype == torch.bfloat16 and not INTERPRETED else torch.float32

    def arguments(self, tile: Tile, first_column: int = 0, columns: int | None = None) -> tuple[Any, ...]:
        """x_ND, w_VD, bias_ptr, N, V, D of the head's columns [first_column, first_column + columns)."""
        last = self.vocab_size if columns is None else first_column + columns
        weight, bias = self.weight_VD[first_column:last], self.bias_V
        return (
            TensorDescriptor.from_tensor(self.x_ND, [tile.block_n, tile.block_d]) if tile.bulk_copy else self.x_ND,
            TensorDescriptor.from_tensor(weight, [tile.block_v, tile.block_d]) if tile.bulk_copy else weight,
            self.x_ND if bias is None else bias[first_column:last],  # never read without a bias
            self.x_ND.shape[0],
            weight.shape[0],
            weight.shape[1],
        )

    def constants(self, tile: Tile) -> dict[str, Any]:
        """The compile-time arguments of `capped_logits`, and how many warps and stages to run."""
        return {
            "SOFTCAP": self.softcap,
            "HAS_BIAS": self.bias_V is not None,
            "BLOCK_N": tile.block_n,
            "BLOCK_V": tile.block_v,
            "BLOCK_D": tile.block_d,
            "BULK_COPY": tile.bulk_copy,
            "UPCAST": INTERPRETED,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

    def row_tiles(self, tile: Tile) -> int:
        return tiles(len(self.x_ND), tile.block_n)

    def row_group(self, tile: Tile) -> int:
        return max(1, ROW_GROUP_BYTES // (tile.block_n * self.x_ND.stride(0) * self.x_ND.itemsize))


def tiles(length: int, size: int) -> int:
    """How many pieces of `size` cover `length`."""
    return -(-length // size)


def launch(kernel: Any, programs: int, *arguments: Any, on: torch.Tensor, **constants: Any) -> None:
    """Run a kernel on a tensor's GPU, or under the interpreter, which takes one thread at a time."""
    guard: AbstractContextManager[Any] = nullcontext()
    if INTERPRETED:
        guard = _interpreter
    elif on.is_cuda:
        guard = torch.cuda.device_of(on)
    with guard:
        kernel[(programs,)](*arguments, **constants)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a · b in float32, added up in float32, by the vendor's matrix product."""
    if a.is_cuda and a.dtype == b.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _aligned(matrix: torch.Tensor) -> torch.Tensor:
    """Contiguous, each row on a 16-byte boundary: what bulk tensor copies need."""
    ragged = -matrix.shape[1] % (16 // matrix.itemsize)
    matrix = F.pad(matrix, (0, ragged)) if ragged else matrix.contiguous()
    return matrix if matrix.data_ptr() % 16 == 0 else matrix.clone()
