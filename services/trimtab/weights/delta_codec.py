"""How the changed elements of one stretch of a tensor are written: positions and new values, or all values.

Elements are compared and copied as bits, so NaNs, signed zeros and any dtype come out as they went in. Overwriting
with new values does no harm when done twice. Positions are gaps in bytes (255 = 255 elements without a change, then
more), values lie in planes of equal significance, which compresses better; both are zstd frames.
"""

from dataclasses import dataclass

import numpy as np
import zstandard

from trimtab.weights.errors import CorruptVersionError

STRETCH_ELEMENTS = 1 << 22
DENSE_ABOVE = 0.4  # share of changed elements from which all values are smaller than positions with values
_LEVEL = 1
_ESCAPE = 255
_WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def element_bytes(dtype: str) -> int:
    """Bytes of what is compared as one element: the dtype's own width, 1 for narrower and unusual dtypes."""
    return _WIDTHS.get(dtype, 1)


def as_bits(data: bytes | bytearray | memoryview | np.ndarray, width: int) -> np.ndarray:
    """The same memory as unsigned integers of ``width`` bytes, shape (elements,)."""
    return np.frombuffer(data, dtype=f"<u{width}")


@dataclass(frozen=True)
class Stretch:
    """Changes of ``elements`` consecutive elements: at ``positions`` (int64, ascending), everywhere if None."""

    elements: int
    positions: np.ndarray | None
    values: np.ndarray

    @property
    def changed(self) -> int:
        """How many elements are overwritten."""
        return len(self.values)

    def apply(self, bits: np.ndarray) -> None:
        """Overwrites the changed elements of ``bits`` (elements,) in place."""
        if self.positions is None:
            bits[:] = self.values
        else:
            bits[self.positions] = self.values


def compare(old: np.ndarray, new: np.ndarray) -> Stretch | None:
    """What turns ``old`` into ``new``, both bits of one stretch; None if nothing does."""
    positions = np.flatnonzero(old != new)
    if not len(positions):
        return None
    if len(positions) > DENSE_ABOVE * len(new):
        return Stretch(len(new), None, new)
    return Stretch(len(new), positions, new[positions])


def encode(stretch: Stretch) -> tuple[bytes, bytes]:
    """The frames of positions (empty for all) and of values."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False)
    positions = b"" if stretch.positions is None else compressor.compress(_gaps(stretch.positions).tobytes())
    width = stretch.values.dtype.itemsize
    planes = stretch.values.view(np.uint8).reshape(-1, width).T
    return positions, compressor.compress(np.ascontiguousarray(planes).tobytes())


def decode(positions: bytes, values: bytes, elements: int, changed: int, width: int) -> Stretch:
    """The stretch that was encoded. Raises CorruptVersionError if the frames do not hold it."""
    try:
        planes = np.frombuffer(_inflated(values, changed * width), np.uint8)
        if len(planes) != changed * width:
            raise CorruptVersionError(f"a stretch of the delta holds {len(planes)} bytes, not {changed * width}")
        bits = np.ascontiguousarray(planes.reshape(width, changed).T).view(f"<u{width}").reshape(changed)
        if not positions:
            if changed != elements:
                raise CorruptVersionError(f"a stretch of the delta has {changed} values for {elements} elements")
            return Stretch(elements, None, bits)
        where = _positions(np.frombuffer(_inflated(positions, changed + elements // _ESCAPE + 1), np.uint8))
    except zstandard.ZstdError as error:
        raise CorruptVersionError(f"a stretch of the delta cannot be read: {error}") from error
    if len(where) != changed or (changed and where[-1] >= elements):
        raise CorruptVersionError("a stretch of the delta has positions that do not belong to its values")
    return Stretch(elements, where, bits)


def _inflated(frame: bytes, at_most: int) -> bytes:
    if not 0 <= zstandard.frame_content_size(frame) <= at_most:
        raise CorruptVersionError("a stretch of the delta claims more bytes than it can have")
    return zstandard.ZstdDecompressor().decompress(frame)


def _gaps(positions: np.ndarray) -> np.ndarray:
    """uint8 gaps between ascending positions, each gap g as g // 255 times 255 and then g % 255."""
    gaps = np.diff(positions, prepend=-1) - 1
    escapes = gaps // _ESCAPE
    out = np.full(len(gaps) + int(escapes.sum()), _ESCAPE, np.uint8)
    out[np.cumsum(escapes + 1) - 1] = gaps % _ESCAPE
    return out


def _positions(gaps: np.ndarray) -> np.ndarray:
    ends = np.flatnonzero(gaps != _ESCAPE)
    return np.cumsum(gaps, dtype=np.int64)[ends] + np.arange(len(ends))
