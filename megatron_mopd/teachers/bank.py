"""All teachers of a run: where they rest, and how one of them becomes resident while the next arrives.

Weights rest in a store (`storage.py`); on the device there are two teacher slots and a few head slots, raw
bytes as large as the largest teacher's stage and head. One module skeleton per architecture is pointed into
the slot that holds its teacher. So device memory depends neither on the number of teachers nor on the number
of architectures, and the twelfth teacher costs what the second did.

    bank.prefetch("code")               # returns at once; arrives in the slot that is not in use
    chunk = bank.make_resident("math")  # waits only if "math" is not there yet
    ...                                 # forward passes of "math", while "code" arrives
    (head,) = bank.heads(["math"])      # the last stage's loss

Slots. `make_resident` makes a teacher the current one; an arrival goes into the slot that is not current,
unless the caller names one. Heads: as many slots as are read together (by a divergence of distributions,
those of the largest mixture of one sample; where log-probs of sampled tokens are taken, one), plus one in
which the next may arrive. Heads returned by `heads` stay until the next call. Everything is called from one
thread, on all ranks of a stage in the same order: arrivals of `host_sharded` are collectives.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

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
    """A teacher as the bank loads it: its name, its architecture, and where its weights are."""

    name: str
    model: ModelConfig
    """Architecture with the vocabulary size resolved; `load` names the checkpoint, `None` draws from `seed`.
    """
    seed: int
    fingerprint: str = ""
    """SHA-256 of the weights; tells whether files of an earlier start (`mmap`) still hold them."""


@dataclass(eq=False)
class _Slot:
    buffer: Tensor
    occupant: str | None = None
    arrival: Arrival | None = None
    """Not yet waited for."""
    free: object = None
    """Mark after the last work that used the occupant."""
    last_used: int = 0


class TeacherBank:
    """Building it is collective over all ranks: every teacher's checkpoint is read, each rank its own
    slices.

    Raises `ConfigError` for checkpoints that do not load and for hosts without the memory that the storage
    mode needs. Collectives when teachers arrive: only those of `ShardedHostStore`.
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
        """`directory`: where `mmap` keeps its files when `storage` names none; `max_mixture`: most heads
        that `heads` is asked for (by a full-vocabulary divergence as many as a sample has teachers)."""
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
        # On CUDA the zeros, and whatever had this memory before, may still be ahead in the caller's stream.
        return _Slot(buffer, free=self._arrivals.mark())

    def _new_staging(self) -> dict[str, Tensor]:
        """Where encoded bytes of a segment land before they are decoded into a slot: one buffer a segment.

        Arrivals use it one after another (see `arrivals.py`); the first waits for its slot's mark, taken
        later than these allocations.
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
        """Start teacher `name`'s arrival and return at once; nothing happens when it is there or on its way.

        It goes into `slot` (a plan's number: the caller no longer needs that slot's occupant), or into the
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

        Waits for its arrival if that is still under way (on CUDA the stream does), and starts it if it is
        not. Raises `TeacherFileError` when its file is gone or changed (`mmap`).
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
        """Have at least `count` head slots (last stage only); they never become fewer."""
        while self._head_bytes and len(self._head_slots) < count:
            self._head_slots.append(self._new_slot(self._head_bytes))

    def prefetch_head(self, name: str, slot: int | None = None) -> None:
        """Start the arrival of teacher `name`'s output head and return at once; only on the last stage.

        It goes into `slot` (a plan's number), or into the slot whose head was used longest ago.
        """
        if self._find(self._head_slots, name) is None:
            self._start_head(name, slot, keep=())

    def heads(self, names: Sequence[str]) -> list[Tensor]:
        """The output heads of one mixture's teachers, [padded vocabulary / tp, h_k] each; only on the last
        stage.

        They stay valid until the next call. Arrivals that are not there yet are started and waited for.
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
            if not candidates:  # every slot is in use, and none of them by what is asked for
                return
            target = min(candidates, key=lambda s: s.last_used)
        if target in self._current_heads:  # the caller says that it has done with them
            self._release_heads()
        skeleton = self._skeleton_of[name]
        self._start(target, name, {skeleton.head.name: target.buffer[: skeleton.head_bytes]})

    # Arrivals

    def _find(self, slots: list[_Slot], name: str) -> _Slot | None:
        return next((slot for slot in slots if slot.occupant == name), None)

    def _start(self, slot: _Slot, name: str, parts: dict[str, Tensor]) -> None:
        if slot.arrival is not None:  # replaced before it was ever used; its bytes must land first
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

        slot.occupant = None  # until it is on its way, whatever happens
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
        """Let the arrivals that are under way land, so that the groups of their collectives can be destroyed;
        every rank calls it at the end, and nothing can arrive any more."""
        self._arrivals.close()

    # Watching

    def check_files(self, names: Iterable[str]) -> None:
        """Raise `TeacherFileError` on every rank when, on any, a file of these teachers is gone or changed.

        Only `mmap` has files. One all-gather of a short text over all ranks; call it before each batch, so
        that no rank is left waiting for one that cannot read.
        """
        if not isinstance(self.store, FileStore):
            return
        keys = [(name, segment.name) for name in names for segment in self._segments(name)]
        problems: list[str | None] = [None] * self._groups.world_size
        dist.all_gather_object(problems, self.store.problem(keys))
        found = [f"rank {rank}: {problem}" for rank, problem in enumerate(problems) if problem]
        if found:
            raise TeacherFileError(
                f"{found[0]} ({len(found)} of {len(problems)} ranks are affected). The run's last checkpoint "
                "is complete: resume from it, and what is missing is made again from the teacher's checkpoint"
            )

    def take_traffic(self) -> dict[str, Traffic]:
        """What arrivals cost since the last call, by teacher; arrivals still on their way count next time."""
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
        """Device memory of all slots (and of the landing place of encoded weights) on this rank."""
        slots = [slot.buffer for slot in (*self._slots, *self._head_slots)]
        return sum(buffer.numel() for buffer in (*slots, *self._staging.values()))

    def host_bytes(self) -> int:
        """Host memory of all teachers on this rank."""
        return self.store.host_bytes()

    def host_bytes_by_mode(self) -> dict[str, int]:
        """What `host_bytes` is, or would be, in each storage mode (on the CPU; CUDA adds a landing place of
        128 MiB for `mmap`)."""
        return placement.bytes_per_mode(self._payload_bytes(), self._parts)

    def disk_bytes(self) -> int:
        """Bytes of the files that this rank reads (`mmap`)."""
        return self.store.disk_bytes()
