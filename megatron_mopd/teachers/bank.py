"""Stores all teachers of a run, and makes one of them resident while the next is loaded.

Weights are kept in a store (`storage.py`). The device holds two teacher slots and a few head slots: byte
buffers as large as the largest teacher's stage and head. One module skeleton per architecture is bound to the
slot that holds its teacher. Device memory therefore depends neither on the number of teachers nor on the
number of architectures: the twelfth teacher costs no more than the second.

    bank.prefetch("code")               # returns immediately; loads into the slot that is not in use
    chunk = bank.make_resident("math")  # waits only if "math" is not loaded yet
    ...                                 # forward passes of "math", while "code" loads
    (head,) = bank.heads(["math"])      # the last stage's loss

Slots: `make_resident` makes a teacher the current one; a load goes into the slot that is not current, unless
the caller names one. Heads: as many slots as are read together (for a divergence between distributions, the
heads of the largest mixture of one sample; for log-probs of sampled tokens, one), plus one to load the next
head. Heads returned by `heads` stay valid until the next call. All methods are called from one thread, on all
ranks of a stage in the same order, because loads of `host_sharded` are collectives.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_mopd.backend.agreement import first_problem
from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.config import ModelConfig, TeacherStorageConfig, to_dict
from megatron_mopd.model.build import build_model
from megatron_mopd.model.checkpoint import find_checkpoint, load_weights
from megatron_mopd.model.gpt import HiddenStateGPT
from megatron_mopd.observe.progress import progress
from megatron_mopd.teachers import placement
from megatron_mopd.teachers.arrivals import Arrival, Traffic, open_arrivals
from megatron_mopd.teachers.encoding import Encoding
from megatron_mopd.teachers.layout import Segment, Skeleton
from megatron_mopd.teachers.storage import FileStore, HostStore, ShardedHostStore, Store, TeacherFileError


@dataclass(frozen=True)
class TeacherSource:
    """A teacher as the bank loads it: name, architecture, and location of its weights."""

    name: str
    model: ModelConfig
    """Architecture with the vocabulary size resolved; `load` names the checkpoint; `None` initializes from
    `seed`."""
    seed: int
    fingerprint: str = ""
    """SHA-256 of the weights; determines whether files from an earlier start (`mmap`) still match."""


@dataclass(eq=False)
class _Slot:
    buffer: Tensor
    occupant: str | None = None
    arrival: Arrival | None = None
    """The load in progress, until it has been waited for."""
    free: object = None
    """Mark after the last work that uses the occupant."""
    last_used: int = 0


class TeacherBank:
    """All teachers of a run. Construction is collective over all ranks: each rank reads its own slices of
    every teacher's checkpoint.

    Raises `ConfigError` for checkpoints that cannot be loaded and for hosts without enough memory for the
    storage mode. Collectives when teachers are loaded: only those of `ShardedHostStore`.
    """

    def __init__(
        self,
        sources: Iterable[TeacherSource],
        groups: ParallelGroups,
        params_dtype: str,
        max_sequence_length: int,
        storage: TeacherStorageConfig | None = None,
        directory: str | Path = "teachers",
        max_mixture: int = 1,
    ):
        """`directory`: where `mmap` stores its files if `storage` names no directory; `max_mixture`: maximum
        number of heads requested from `heads` at once (for a full-vocabulary divergence, the number of a
        sample's teachers)."""
        storage = storage or TeacherStorageConfig()
        sources = list(sources)
        self._groups, self._storage = groups, storage
        self._parts = placement.sharding(groups)
        self._skeletons: dict[str, Skeleton] = {}
        self._skeleton_of: dict[str, Skeleton] = {}
        self._encodings: dict[tuple[str, str], Encoding] = {}
        build = partial(
            build_model,
            groups=groups,
            params_dtype=params_dtype,
            max_sequence_length=max_sequence_length,
            frozen=True,
        )
        for source in sources:
            self._skeleton_of[source.name] = self._skeleton(source, build)
            for segment in self._segments(source.name):
                self._encodings[source.name, segment.name] = Encoding(
                    segment, storage.dtype, self._parts[segment.name]
                )
        placement.check_host_memory(storage.mode, self._payload_bytes(), self._parts, groups)

        self.store = self._open_store(directory, sources)
        self._arrivals = open_arrivals(groups.device, self.store.blocking)
        self._staging = self._new_staging()
        bodies = max((s.body_bytes for s in self._skeleton_of.values()), default=0)
        self._slots = [self._new_slot(bodies) for _ in range(min(2, len(sources)))]
        self._head_bytes = max((s.head_bytes for s in self._skeleton_of.values()), default=0)
        self._head_slots: list[_Slot] = []
        self._current_heads: list[_Slot] = []
        self.reserve_heads(min(max_mixture + 1, len(sources)))
        self._load(sources, build)
        for slot in (*self._slots, *self._head_slots):
            slot.free = self._arrivals.mark()
        self._current: _Slot | None = None
        self._clock = 0
        self._traffic = {source.name: Traffic() for source in sources}
        self._unmeasured: list[tuple[str, int, Arrival]] = []

    # Building

    def _skeleton(self, source: TeacherSource, build) -> Skeleton:
        architecture = dataclasses.replace(source.model, load=None)
        key = json.dumps(to_dict(architecture), sort_keys=True, default=str)
        if key not in self._skeletons:
            (chunk,) = build(architecture, where=f"teachers.{source.name}")
            self._skeletons[key] = Skeleton(chunk, self._groups.is_last_stage, self._parts)
        return self._skeletons[key]

    def _segments(self, name: str) -> list[Segment]:
        return list(self._skeleton_of[name].segments.values())

    def _payload_bytes(self) -> dict[str, int]:
        """Bytes of all teachers' payloads on this rank, by segment name."""
        result = dict.fromkeys(self._parts, 0)
        for (_, segment), encoding in self._encodings.items():
            result[segment] += encoding.num_bytes
        return result

    def _new_slot(self, num_bytes: int) -> _Slot:
        buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=self._groups.device)
        # On CUDA the zero fill, and earlier work on this memory, may still be pending in the caller's stream.
        return _Slot(buffer, free=self._arrivals.mark())

    def _new_staging(self) -> dict[str, Tensor]:
        """Buffers for encoded bytes before they are decoded into a slot, one per segment.

        Successive arrivals reuse them (see `arrivals.py`); the first arrival waits for its slot's mark, which
        is taken after these allocations.
        """
        sizes: dict[str, int] = {}
        for (_, segment), encoding in self._encodings.items():
            if not encoding.is_plain:
                sizes[segment] = max(sizes.get(segment, 0), encoding.num_bytes)
        device = self._groups.device
        return {name: torch.empty(size, dtype=torch.uint8, device=device) for name, size in sizes.items()}

    def _open_store(self, directory: str | Path, sources: list[TeacherSource]) -> Store:
        device = self._groups.device
        if self._storage.mode == "host":
            return HostStore(device)
        if self._storage.mode == "host_sharded":
            return ShardedHostStore(device, placement.gather_groups(self._groups))
        paths = placement.file_paths(
            Path(self._storage.mmap_directory or directory),
            {source.name: source.fingerprint for source in sources},
            {key: (e.segment.digest(), self._storage.dtype) for key, e in self._encodings.items()},
            self._groups,
        )
        return FileStore(device, paths.__getitem__)

    def _load(self, sources: list[TeacherSource], build) -> None:
        """Fill the store, one teacher after another, through the slots."""
        for source in progress(sources, "loading teachers"):
            name, skeleton = source.name, self._skeleton_of[source.name]
            keys = [(name, segment.name) for segment in skeleton.segments.values()]
            if placement.are_kept(self.store, {key: self._encodings[key].num_bytes for key in keys}):
                continue
            head = self._head_slots[0].buffer if skeleton.head is not None else None
            skeleton.bind(self._slots[0].buffer)
            if head is not None:
                skeleton.bind_head(head)
            where = f"teachers.{name}"
            if source.model.load is not None:
                checkpoint = find_checkpoint(source.model.load, where)
                load_weights([skeleton.chunk], checkpoint, self._groups, where, source.model)
            else:
                (drawn,) = build(dataclasses.replace(source.model), where=where, seed=source.seed)
                skeleton.chunk.load_state_dict(drawn.state_dict())
                del drawn
            parts = skeleton.parts(self._slots[0].buffer)
            if head is not None and skeleton.head.name not in parts:
                parts[skeleton.head.name] = head[: skeleton.head_bytes]
            payloads = {key: partial(self._encode, key, parts[key[1]]) for key in keys}
            placement.store_once(self.store, payloads, self._groups)
        for skeleton in self._skeletons.values():
            skeleton.release()

    def _encode(self, key: tuple[str, str], segment: Tensor) -> Tensor:
        encoding = self._encodings[key]
        if encoding.is_plain:
            return segment
        payload = torch.zeros(encoding.num_bytes, dtype=torch.uint8, device=segment.device)
        encoding.encode(segment, payload)
        return payload

    # Teachers

    @property
    def names(self) -> list[str]:
        return list(self._skeleton_of)

    def prefetch(self, name: str, slot: int | None = None) -> None:
        """Start loading teacher `name` and return immediately; does nothing if it is loaded or loading.

        It goes into `slot` (the plan's slot number, whose occupant the caller no longer needs), or into the
        slot that is not current.
        """
        if self._find(self._slots, name) is None:
            target = self._slots[slot] if slot is not None and slot < len(self._slots) else self._idle_slot()
            self._start(target, name, self._skeleton_of[name].parts(target.buffer))

    def config(self, name: str) -> TransformerConfig:
        """The transformer configuration of teacher `name`, resident or not."""
        return self._skeleton_of[name].chunk.config

    def make_resident(self, name: str) -> HiddenStateGPT:
        """The frozen model (this rank's stage) with the weights of teacher `name`, which becomes the current
        one.

        Starts the load if necessary and waits for it (on CUDA, the stream waits). Raises `TeacherFileError`
        if its file is missing or has changed (`mmap`).
        """
        self.prefetch(name)
        slot = self._find(self._slots, name)
        if self._current is not slot:
            if self._current is not None:
                self._current.free = self._arrivals.mark()
            self._current = slot
        self._wait(slot)
        return self._skeleton_of[name].bind(slot.buffer)

    def _idle_slot(self) -> _Slot:
        return next((slot for slot in self._slots if slot is not self._current), self._slots[0])

    # Heads

    def reserve_heads(self, count: int) -> None:
        """Ensure that there are at least `count` head slots (last stage only); the number never decreases."""
        while self._head_bytes and len(self._head_slots) < count:
            self._head_slots.append(self._new_slot(self._head_bytes))

    def prefetch_head(self, name: str, slot: int | None = None) -> None:
        """Start loading teacher `name`'s output head and return immediately; last stage only.

        It goes into `slot` (the plan's slot number), or into the least recently used slot.
        """
        if self._find(self._head_slots, name) is None:
            self._start_head(name, slot, keep=())

    def heads(self, names: Sequence[str]) -> list[Tensor]:
        """The output heads of one mixture's teachers, [padded vocabulary / tp, h_k] each; last stage only.

        They stay valid until the next call. Starts loads if necessary and waits for them.
        """
        self.reserve_heads(len(names))
        self._release_heads()
        for name in names:
            if self._find(self._head_slots, name) is None:
                self._start_head(name, None, keep=names)
        result = []
        for name in names:
            slot = self._find(self._head_slots, name)
            self._wait(slot)
            self._clock += 1
            slot.last_used = self._clock
            self._current_heads.append(slot)
            result.append(self._skeleton_of[name].head_view(slot.buffer))
        return result

    def head(self, name: str) -> Tensor:
        """`heads` of a single teacher."""
        return self.heads([name])[0]

    def _release_heads(self) -> None:
        mark = self._arrivals.mark()
        for slot in self._current_heads:
            slot.free = mark
        self._current_heads = []

    def _start_head(self, name: str, slot: int | None, keep: Sequence[str]) -> None:
        if slot is not None and slot < len(self._head_slots):
            target = self._head_slots[slot]
        else:
            free = [slot for slot in self._head_slots if slot not in self._current_heads]
            candidates = [slot for slot in free if slot.occupant not in keep]
            if not candidates:  # every slot is in use
                return
            target = min(candidates, key=lambda s: s.last_used)
        if target in self._current_heads:  # the caller no longer needs them
            self._release_heads()
        skeleton = self._skeleton_of[name]
        self._start(target, name, {skeleton.head.name: target.buffer[: skeleton.head_bytes]})

    # Arrivals

    def _find(self, slots: list[_Slot], name: str) -> _Slot | None:
        return next((slot for slot in slots if slot.occupant == name), None)

    def _start(self, slot: _Slot, name: str, parts: dict[str, Tensor]) -> None:
        if slot.arrival is not None:  # replaced before it was used; its transfer must finish first
            slot.arrival.wait()
        if slot is self._current:
            slot.free, self._current = self._arrivals.mark(), None
        beginnings, decoders, num_bytes = [], [], 0
        for segment, part in parts.items():
            encoding = self._encodings[name, segment]
            payload = part if encoding.is_plain else self._staging[segment][: encoding.num_bytes]
            beginnings.append(partial(self.store.begin, (name, segment), payload))
            if not encoding.is_plain:
                decoders.append(partial(encoding.decode, payload, part))
            num_bytes += encoding.num_bytes

        def decode() -> None:
            for decoder in decoders:
                decoder()

        slot.occupant = None  # in case starting the load raises
        slot.arrival = self._arrivals.start(beginnings, decode, slot.free)
        slot.occupant = name
        self._unmeasured.append((name, num_bytes, slot.arrival))

    def _wait(self, slot: _Slot) -> None:
        if slot.arrival is not None:
            try:
                slot.arrival.wait()
            except BaseException:
                slot.occupant = slot.arrival = None
                raise
            slot.arrival = None

    def close(self) -> None:
        """Wait for pending loads, so that the groups of their collectives can be destroyed. Every rank calls
        it at the end; no load can be started afterwards."""
        self._arrivals.close()

    # Watching

    def check_files(self, names: Iterable[str]) -> None:
        """Raise `TeacherFileError` on every rank if on any rank a file of these teachers is missing or has
        changed.

        Only `mmap` has files. One all-reduce of 8 bytes over all ranks. Call it before each batch, so that no
        rank waits for one that cannot read.
        """
        if not isinstance(self.store, FileStore):
            return
        keys = [(name, segment.name) for name in names for segment in self._segments(name)]
        if found := first_problem(self.store.problem(keys)):
            raise TeacherFileError(
                f"rank {found.rank}: {found.text} ({found.count} of {self._groups.world_size} ranks are "
                "affected). The run's last checkpoint is complete: resume from it, and missing files are "
                "rebuilt from the teacher's checkpoint"
            )

    def take_traffic(self) -> dict[str, Traffic]:
        """The cost of loads since the last call, by teacher; pending loads are counted next time."""
        pending = {id(slot.arrival) for slot in (*self._slots, *self._head_slots) if slot.arrival is not None}
        left = []
        for name, num_bytes, arrival in self._unmeasured:
            if id(arrival) in pending:
                left.append((name, num_bytes, arrival))
                continue
            load_seconds, wait_seconds = arrival.seconds()
            traffic = self._traffic[name]
            traffic.loads += 1
            traffic.num_bytes += num_bytes
            traffic.load_seconds += load_seconds
            traffic.wait_seconds += wait_seconds
        self._unmeasured = left
        taken = self._traffic
        self._traffic = {name: Traffic() for name in taken}
        return taken

    def device_bytes(self) -> int:
        """Device memory of all slots (and of the staging buffers for encoded weights) on this rank."""
        slots = [slot.buffer for slot in (*self._slots, *self._head_slots)]
        return sum(buffer.numel() for buffer in (*slots, *self._staging.values()))

    def host_bytes(self) -> int:
        """Host memory of all teachers on this rank."""
        return self.store.host_bytes()

    def host_bytes_by_mode(self) -> dict[str, int]:
        """The value of `host_bytes` in each storage mode (on the CPU; CUDA adds staging buffers of 128 MiB
        for `mmap`)."""
        return placement.bytes_per_mode(self._payload_bytes(), self._parts)

    def disk_bytes(self) -> int:
        """Bytes of the files that this rank reads (`mmap`)."""
        return self.store.disk_bytes()
