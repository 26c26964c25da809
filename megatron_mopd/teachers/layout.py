"""Lays out one architecture's weights as flat bytes: the position of every tensor of this rank's stage.

The weights are grouped into segments, which are transferred as a whole and have the same replicas:

    dense    everything that is replicated over data-parallel (and context-parallel) ranks
    expert   the experts, which are replicated over expert-data-parallel ranks
    head     the output head (last stage): the loss needs it, the forward pass does not

A *body* (dense, expert) goes into a teacher slot and a *head* into a head slot. If the head is also the input
embedding of the same stage (tied weights without pipeline parallelism), it belongs to both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mopd.model.gpt import HiddenStateGPT, is_expert

DENSE, EXPERT, HEAD = "dense", "expert", "head"

ALIGNMENT = 256
"""Every tensor starts at a multiple of this many bytes, as if allocated separately: vectorized kernels rely
on it."""


@dataclass(frozen=True)
class Place:
    """The position of one tensor in its segment."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the segment."""

    @property
    def num_bytes(self) -> int:
        return _numel(self.shape) * self.dtype.itemsize

    def view(self, segment: Tensor) -> Tensor:
        """The tensor inside `segment` [bytes of the segment]."""
        return segment[self.offset : self.offset + self.num_bytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Segment:
    """Tensors that are transferred together."""

    name: str
    places: tuple[Place, ...]
    num_bytes: int
    """Rounded up so that the segment splits into aligned parts of equal size (`host_sharded`)."""

    def digest(self) -> str:
        """SHA-256 of names, dtypes, shapes and offsets: segments with equal digests have compatible bytes."""
        return hashlib.sha256(repr((self.name, self.places, self.num_bytes)).encode()).hexdigest()


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `number`."""
    return (number + multiple - 1) // multiple * multiple


class Skeleton:
    """The single frozen module of an architecture on this rank; it owns no weights but is bound to those in a
    slot.

    `chunk` has no storage: `bind` points its parameters and persistent buffers into a slot before each use,
    so teachers of one architecture share a module and all teachers share the slots.
    """

    def __init__(self, chunk: HiddenStateGPT, is_last_stage: bool, parts: Mapping[str, int]):
        """`parts`: for each segment, the number of equal parts into which it must split."""
        self.chunk = chunk
        head = chunk.head_weight() if is_last_stage else None
        members: dict[str, list[tuple[str, Tensor]]] = {DENSE: [], EXPERT: [], HEAD: []}
        for name, tensor in _weights(chunk).items():
            members[_segment_of(name, tensor, head)].append((name, tensor))
        self.segments: dict[str, Segment] = {}
        self._members: dict[str, list[Tensor]] = {}
        for segment, tensors in members.items():
            if tensors:
                self.segments[segment] = _lay_out(segment, tensors, parts[segment])
                self._members[segment] = [tensor for _, tensor in tensors]
        self._head_in_body = head is not None and chunk.pre_process and head is _embedding(chunk)
        self.body = [s for s in self.segments.values() if s.name != HEAD or self._head_in_body]
        """Segments that the forward pass needs, in slot order."""
        self.body_bytes = sum(segment.num_bytes for segment in self.body)
        self.head = self.segments.get(HEAD)
        self.head_bytes = self.head.num_bytes if self.head else 0
        self._bound: int | None = None
        self.release()

    def parts(self, slot: Tensor) -> dict[str, Tensor]:
        """The bytes of every body segment in a teacher slot."""
        result, start = {}, 0
        for segment in self.body:
            result[segment.name] = slot[start : start + segment.num_bytes]
            start += segment.num_bytes
        return result

    def bind(self, slot: Tensor) -> HiddenStateGPT:
        """Point the module's weights into `slot` (the head, which the forward pass does not use, stays
        empty)."""
        if self._bound != slot.data_ptr():
            for name, part in self.parts(slot).items():
                self._point(name, part)
            self._bound = slot.data_ptr()
        return self.chunk

    def bind_head(self, head_slot: Tensor) -> None:
        """Point the module's head parameter into a head slot; only needed while loading weights."""
        if self.head is not None and not self._head_in_body:
            self._point(HEAD, head_slot[: self.head_bytes])

    def release(self) -> None:
        """Release the module's reference to any storage."""
        for tensors in self._members.values():
            for tensor in tensors:
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        self._bound = None

    def head_view(self, head_slot: Tensor) -> Tensor:
        """The output head [padded vocabulary / tp, h] in a head slot."""
        return self.head.places[0].view(head_slot)

    def _point(self, segment: str, part: Tensor) -> None:
        for tensor, place in zip(self._members[segment], self.segments[segment].places):
            tensor.data = place.view(part)


def _weights(chunk: HiddenStateGPT) -> dict[str, Tensor]:
    """All tensors that a checkpoint contains: parameters and persistent buffers, each once, by name."""
    temporary = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in chunk.named_modules()
        for name in module._non_persistent_buffers_set
    }
    result = dict(chunk.named_parameters())
    result |= {name: buffer for name, buffer in chunk.named_buffers() if name not in temporary}
    return result


def _segment_of(name: str, tensor: Tensor, head: Tensor | None) -> str:
    if tensor is head:
        return HEAD
    return EXPERT if is_expert(name) else DENSE


def _embedding(chunk: HiddenStateGPT) -> Tensor:
    return chunk.embedding.word_embeddings.weight


def _lay_out(name: str, tensors: list[tuple[str, Tensor]], parts: int) -> Segment:
    places, offset = [], 0
    for tensor_name, tensor in tensors:
        place = Place(tensor_name, tensor.dtype, tuple(tensor.shape), offset)
        places.append(place)
        offset = round_up(offset + place.num_bytes, ALIGNMENT)
    return Segment(name, tuple(places), round_up(offset, ALIGNMENT * parts))


def _numel(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
