"""Keys and values of the live sequences, each from column 0 of its row on.

A row of length n fills the columns [0, n); what lies right of them is masked when it is read. Live rows are always
[0, rows): the last ones fill holes. A row begins at a multiple of 64 bytes, so that no number depends on where it lies.
Which sequence sits in which row is slots.py's, running the model llama.py's.
"""

from collections.abc import Sequence

import numpy as np
import torch

COLUMN_BUCKET = 64
FIRST_ROWS = 8


class RowCache:
    """One buffer, [layers, keys and values, rows, heads, columns, head_dim], that grows when it must.

    It is zeroed where no sequence has written: a masked column must still be finite.
    """

    def __init__(self, layers: int, heads: int, head_dim: int, max_rows: int, dtype: torch.dtype) -> None:
        self._max_rows = max_rows
        self._hold(torch.zeros(layers, 2, 0, heads, 0, head_dim, dtype=dtype))

    def _hold(self, data: torch.Tensor) -> None:
        """Take `data` as the buffer, and the views of it that every decode step reads."""
        self._data = data
        self._past = [layer.flatten(1, 2).unbind() for layer in data]
        self._tokens = [layer.view(-1, data.shape[-1]) for layer in data]

    @property
    def row_capacity(self) -> int:
        """Rows that need no growth."""
        return self._data.shape[2]

    @property
    def column_capacity(self) -> int:
        """Tokens a row that need no growth."""
        return self._data.shape[4]

    @property
    def size_bytes(self) -> int:
        """Memory held."""
        return self._data.numel() * self._data.element_size()

    def keys(self, layer: int) -> torch.Tensor:
        """[row_capacity, heads, column_capacity, head_dim]; written in place."""
        return self._data[layer, 0]

    def values(self, layer: int) -> torch.Tensor:
        """As `keys`."""
        return self._data[layer, 1]

    def slots(self, columns_B: np.ndarray) -> torch.Tensor:
        """Where `write` puts one token a row of rows 0, 1, ..., given each one's column."""
        _, two, rows, heads, columns, _ = self._data.shape
        starts = np.arange(two * rows * heads).reshape(two, rows, heads)[:, : len(columns_B)] * columns
        return torch.from_numpy((starts + columns_B[:, None]).swapaxes(0, 1).reshape(-1))

    def write(self, layer: int, slots: torch.Tensor, kv: torch.Tensor) -> None:
        """Keys and values of one token a row, [B, twice heads, head_dim]."""
        self._tokens[layer].index_copy_(0, slots, kv.reshape(-1, kv.shape[-1]))

    def past(self, layer: int, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the first `width` columns of rows 0, 1, ..., [rows times heads, width, head_dim]."""
        keys, values = self._past[layer]
        filled = (slice(rows * self._data.shape[3]), slice(width))
        return keys[filled], values[filled]

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for that many rows and tokens a row; what is there stays."""
        if rows <= self.row_capacity and columns <= self.column_capacity:
            return
        old = self._data
        new_rows = max(self.row_capacity, FIRST_ROWS)
        while new_rows < rows:
            new_rows *= 2
        new_rows = max(rows, min(new_rows, self._max_rows))
        new_columns = self.column_capacity
        if columns > new_columns:
            new_columns = -(-(columns + columns // 2) // COLUMN_BUCKET) * COLUMN_BUCKET
        layers, two, _, heads, _, head_dim = old.shape
        new = old.new_zeros(layers, two, new_rows, heads, new_columns, head_dim)
        new[:, :, : old.shape[2], :, : old.shape[4]] = old
        self._hold(new)

    def copy(self, sources: Sequence[int], targets: Sequence[int], columns: int) -> None:
        """Copy the first `columns` tokens of rows `sources` to rows `targets`."""
        if sources:
            self._data[:, :, list(targets), :, :columns] = self._data[:, :, list(sources), :, :columns]

    def clear(self, rows: Sequence[int]) -> None:
        """Zero whole rows."""
        self._data[:, :, list(rows)] = 0
