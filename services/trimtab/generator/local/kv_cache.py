"""The KV cache of the local engine: one preallocated buffer a layer, one row a live sequence.

Sequences lie flush right. The newest token of every row is in column `end - 1`; a row of length n fills the columns
[end - n, end) and everything left of it is masked. So a decode step writes one column for all rows at once, reads one
contiguous window as wide as the longest live sequence, and looks to the model exactly like a left-padded batch, the
one ragged layout every Hugging Face causal LM supports (rotary, learned and ALiBi positions, sliding windows and
grouped heads alike). Dead rows are filled from the tail, so live rows are always [0, rows).

Not here: which sequence sits in which row (slots.py) and running the model (runner.py).
"""

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

COLUMN_BUCKET = 64


class Window:
    """Where the live columns are, and what the forward in progress does; shared by all layers of one cache."""

    def __init__(self) -> None:
        self.start = 0
        self.end = 0
        self.column_capacity = 0
        self.row_capacity = 0
        # None during a decode step, else the rows [first, last) that a prefill writes.
        self.prefill_rows: tuple[int, int] | None = None
        # For each written row the row of the prefill batch it copies; None when they are the same.
        self.prefill_source: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Columns in use: the length in tokens of the longest live sequence."""
        return self.end - self.start


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [row_capacity, heads, column_capacity, head_dim], allocated at its first update."""

    is_sliding = False

    def __init__(self, window: Window) -> None:
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate zeroed buffers shaped after the first keys and values [batch, heads, tokens, head_dim]."""
        rows, columns = self.window.row_capacity, self.window.column_capacity

        def allocate(like: torch.Tensor) -> torch.Tensor:
            return torch.zeros(rows, like.shape[1], columns, like.shape[3], dtype=like.dtype, device=like.device)

        self.keys, self.values = allocate(key_states), allocate(value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store this forward's keys and values; return those to attend to, [batch, heads, kv_length, head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values, window = self.keys, self.values, self.window
        assert keys is not None and values is not None
        if window.prefill_rows is None:
            rows = key_states.shape[0]
            keys[:rows, :, window.end] = key_states[:, :, 0]
            values[:rows, :, window.end] = value_states[:, :, 0]
            live = slice(window.start, window.end + 1)
            return keys[:rows, :, live], values[:rows, :, live]
        first, last = window.prefill_rows
        columns = slice(window.end - key_states.shape[2], window.end)
        source = window.prefill_source
        keys[first:last, :, columns] = key_states if source is None else key_states.index_select(0, source)
        values[first:last, :, columns] = value_states if source is None else value_states.index_select(0, source)
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Tokens of the past: none for a prefill, the window for a decode step."""
        return 0 if self.window.prefill_rows is not None else self.window.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(kv_length, kv_offset) for transformers' mask functions."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum: the buffers grow."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The older name of get_max_length."""
        return -1

    def relocate(self, rows: int, live: slice, new_end: int) -> None:
        """Move the live columns of the first `rows` rows to end at `new_end`, in buffers of the window's capacity."""
        if not self.is_initialized:
            return
        target = slice(new_end - (live.stop - live.start), new_end)
        for name in ("keys", "values"):
            old: torch.Tensor = getattr(self, name)
            kept = old[:rows, :, live].clone()
            shape = (self.window.row_capacity, old.shape[1], self.window.column_capacity, old.shape[3])
            new = old if old.shape == shape else old.new_zeros(shape)
            new[:rows, :, target] = kept
            setattr(self, name, new)


class SlotCache(Cache):
    """A transformers Cache whose batch rows come and go between steps.

    A forward reads it either as an empty cache (inside `prefill`) or as the past of all live rows.
    """

    def __init__(self, max_rows: int) -> None:
        self.window = Window()
        self.rows = 0
        self.max_rows = max_rows
        super().__init__(layer_class_to_replicate=lambda: SlotLayer(self.window))  # type: ignore[arg-type]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the past; the same for all layers."""
        return 0 if self.window.prefill_rows is not None else self.window.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(kv_length, kv_offset) of the forward in progress; the same for all layers."""
        return self.get_seq_length() + query_length, 0

    @property
    def size_bytes(self) -> int:
        """Memory held by all buffers, bytes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers())

    def begin_prefill(self, first: int, length: int, source: torch.Tensor | None, count: int) -> None:
        """Open rows [first, first + count) for a prefill of `length` columns.

        `source` [count] names the prefill batch's row that each opened row copies, None when they are the same.
        """
        window = self.window
        if self.rows == 0:
            window.start = window.end = 0
        rows_needed = max(self.rows, first + count)
        fits = length <= window.end <= window.column_capacity and rows_needed <= window.row_capacity
        if not fits:
            self._relocate(rows_needed, max(length, window.length))
        window.start = min(window.start, window.end - length)
        window.prefill_rows, window.prefill_source = (first, first + count), source
        self.rows = rows_needed

    def end_prefill(self) -> None:
        """Close the prefill; the next forward is a decode step."""
        self.window.prefill_rows = self.window.prefill_source = None

    def begin_decode(self) -> None:
        """Make room for one more column."""
        if self.window.end == self.window.column_capacity:
            self._relocate(self.rows, self.window.length)

    def end_decode(self, longest: int) -> None:
        """Keep the column just written; `longest` is the longest live length in tokens, this one counted."""
        self.window.end += 1
        self.trim(longest)

    def trim(self, longest: int) -> None:
        """Forget the columns left of the longest live sequence."""
        self.window.start = self.window.end - longest

    def compact(self, survivors: Sequence[int]) -> None:
        """Keep rows `survivors`, in that order, as rows 0, 1, ...; rows that stay in place are not copied."""
        moves = [(source, row) for row, source in enumerate(survivors) if source != row]
        self.rows = len(survivors)
        if not moves:
            return
        live = slice(self.window.start, self.window.end)
        sources, targets = zip(*moves, strict=True)
        for buffer in self._buffers():
            buffer[list(targets), :, live] = buffer[list(sources), :, live]

    def clear_rows(self, rows: Sequence[int]) -> None:
        """Zero whole rows: a masked column must still be finite, or it poisons the row's next sequence."""
        for buffer in self._buffers():
            buffer[list(rows)] = 0

    def _buffers(self) -> list[torch.Tensor]:
        """Keys and values of every layer that has been run."""
        layers = [layer for layer in self.layers if isinstance(layer, SlotLayer)]
        return [buffer for layer in layers for buffer in (layer.keys, layer.values) if buffer is not None]

    def _relocate(self, rows_needed: int, new_end: int) -> None:
        """Move the live window to end at `new_end`, growing the buffers in buckets where they are too small."""
        window = self.window
        headroom = max(COLUMN_BUCKET, new_end // 4)
        if new_end + headroom > window.column_capacity:
            columns = new_end + max(COLUMN_BUCKET, new_end // 2)
            window.column_capacity = -(-columns // COLUMN_BUCKET) * COLUMN_BUCKET
        while window.row_capacity < rows_needed:
            window.row_capacity = min(max(8, 2 * window.row_capacity), max(self.max_rows, rows_needed))
        live = slice(window.start, window.end)
        for layer in self.layers:
            assert isinstance(layer, SlotLayer)
            layer.relocate(self.rows, live, new_end)
        window.start, window.end = new_end - window.length, new_end
