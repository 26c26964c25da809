"""Storage format of weights: unchanged, or as 8-bit numbers with a scale for every block of a row.

A block is 128 adjacent weights of one row of a matrix; its scale is the largest magnitude divided by the
format's largest number (127 for int8, 448 for fp8 e4m3). Blocks never span rows and start at column 0, so a
layout that splits columns into multiples of 128 quantizes exactly as a single rank would. Vectors, biases and
routers, which are small and sensitive, are stored unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mopd.teachers.layout import ALIGNMENT, Place, Segment, round_up

BLOCK = 128

_FORMATS = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}

_ROWS_BYTES = 16 << 20
"""Bytes of float32 rows per conversion step; a matrix is never converted to float32 as a whole."""


@dataclass(frozen=True)
class _Matrix:
    place: Place
    offset: int
    """Bytes from the start of the encoded segment: first the 8-bit numbers, then the scales."""

    @property
    def columns(self) -> int:
        return self.place.shape[-1]

    @property
    def rows(self) -> int:
        return self.place.num_bytes // self.place.dtype.itemsize // self.columns

    @property
    def blocks(self) -> int:
        return -(-self.columns // BLOCK)

    @property
    def scales_offset(self) -> int:
        return round_up(self.offset + self.rows * self.columns, ALIGNMENT)

    @property
    def end(self) -> int:
        return round_up(self.scales_offset + 4 * self.rows * self.blocks, ALIGNMENT)


class Encoding:
    """The stored form of one segment; `dtype` is `None` (unchanged), `int8` or `fp8`."""

    def __init__(self, segment: Segment, dtype: str | None, parts: int):
        self.segment = segment
        self.is_plain = dtype is None
        self.num_bytes = segment.num_bytes
        if dtype is None:
            return
        self._dtype, self._largest = _FORMATS[dtype]
        self._matrices: list[_Matrix] = []
        self._plain: list[tuple[Place, int]] = []
        offset = 0
        for place in segment.places:
            if len(place.shape) == 2 and place.dtype.is_floating_point and ".router." not in place.name:
                matrix = _Matrix(place, offset)
                self._matrices.append(matrix)
                offset = matrix.end
            else:
                self._plain.append((place, offset))
                offset = round_up(offset + place.num_bytes, ALIGNMENT)
        self.num_bytes = round_up(offset, ALIGNMENT * parts)

    def encode(self, segment: Tensor, payload: Tensor) -> None:
        """Write the stored form of `segment` [segment bytes] into `payload` [encoded bytes], on any device.

        No collectives.
        """
        if self.is_plain:
            payload.copy_(segment)
            return
        for place, offset in self._plain:
            payload[offset : offset + place.num_bytes].copy_(
                segment[place.offset : place.offset + place.num_bytes]
            )
        for matrix in self._matrices:
            for weights, numbers, scales in self._rows(matrix, segment, payload):
                for block, (first, last) in enumerate(_column_groups(matrix.columns)):
                    part = weights[:, first:last].float()
                    largest = part.abs().unflatten(1, (-1, min(BLOCK, last - first))).amax(2)
                    # A block of zeros gets scale 1 to avoid a division by zero.
                    scale = torch.where(largest > 0, largest / self._largest, torch.ones_like(largest))
                    part = part / scale.repeat_interleave(min(BLOCK, last - first), 1)
                    if self._dtype is torch.int8:
                        part = part.round_()
                    numbers[:, first:last].copy_(
                        part.clamp_(-self._largest, self._largest).to(self._dtype).view(torch.uint8)
                    )
                    scales[:, _scale_columns(matrix, block)].copy_(scale)

    def decode(self, payload: Tensor, segment: Tensor) -> None:
        """Decode `payload` into `segment`, on the device of both. No collectives."""
        if self.is_plain:
            segment.copy_(payload)
            return
        for place, offset in self._plain:
            segment[place.offset : place.offset + place.num_bytes].copy_(
                payload[offset : offset + place.num_bytes]
            )
        for matrix in self._matrices:
            for weights, numbers, scales in self._rows(matrix, segment, payload):
                for block, (first, last) in enumerate(_column_groups(matrix.columns)):
                    part = numbers[:, first:last].contiguous().view(self._dtype).float()
                    scale = scales[:, _scale_columns(matrix, block)].unsqueeze(2)
                    part = part.unflatten(1, (-1, min(BLOCK, last - first))).mul_(scale)
                    weights[:, first:last].copy_(part.flatten(1))

    def _rows(self, matrix: _Matrix, segment: Tensor, payload: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """(weights [r, c], 8-bit numbers [r, c] as bytes, scales [r, blocks]) for a few rows at a time."""
        rows, columns = matrix.rows, matrix.columns
        weights = matrix.place.view(segment).view(rows, columns)
        numbers = payload[matrix.offset : matrix.offset + rows * columns].view(rows, columns)
        start = matrix.scales_offset
        scales = payload[start : start + 4 * rows * matrix.blocks].view(torch.float32)
        scales = scales.view(rows, matrix.blocks)
        step = max(1, _ROWS_BYTES // (4 * columns))
        for first in range(0, rows, step):
            few = slice(first, first + step)
            yield weights[few], numbers[few], scales[few]


def _column_groups(columns: int) -> list[tuple[int, int]]:
    """The columns in whole blocks, then the shorter remaining block."""
    whole = columns // BLOCK * BLOCK
    groups = [(0, whole)] if whole else []
    return groups + ([(whole, columns)] if whole < columns else [])


def _scale_columns(matrix: _Matrix, group: int) -> slice:
    whole = matrix.columns // BLOCK
    return slice(0, whole) if group == 0 and whole else slice(whole, whole + 1)
