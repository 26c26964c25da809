"""Where the teachers' weights rest, and how one of them becomes resident.

Every rank keeps its own shard of every teacher in host memory, as one flat buffer a dtype (pinned on CUDA
machines). Teachers of equal architecture share one module skeleton on the device, whose parameters are views
into one flat device buffer: making a teacher resident is one copy, and the twelfth teacher takes no more
device memory than the first.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.config import ModelConfig, to_dict
from megatron_mopd.model.build import build_model
from megatron_mopd.model.checkpoint import find_checkpoint, load_weights
from megatron_mopd.model.gpt import HiddenStateGPT


@dataclass(frozen=True)
class TeacherSource:
    """A teacher as the bank loads it: its name, its architecture, and where its weights are."""

    name: str
    model: ModelConfig
    """Architecture with the vocabulary size resolved; `load` names the checkpoint, `None` draws from `seed`.
    """
    seed: int


class _Skeleton:
    """One frozen module on the device for all teachers of one architecture, its tensors views into flat
    buffers.
    """

    def __init__(self, chunk: HiddenStateGPT):
        self.chunk = chunk
        self.resident: str | None = None
        self._tensors = [*chunk.parameters(), *(b for b in chunk.buffers() if b is not None)]
        self.flat: dict[torch.dtype, Tensor] = {}
        for dtype in {t.dtype for t in self._tensors}:
            members = [t for t in self._tensors if t.dtype == dtype]
            self.flat[dtype] = torch.empty(
                sum(t.numel() for t in members), dtype=dtype, device=members[0].device
            )
            offset = 0
            for tensor in members:
                view = self.flat[dtype][offset : offset + tensor.numel()].view(tensor.shape)
                view.copy_(tensor.detach())
                tensor.data = view
                offset += tensor.numel()


class TeacherBank:
    """All teachers of a run: flat host buffers, one resident at a time per architecture, one head at a time.

    Building it is collective over all ranks (every teacher's checkpoint is read, each rank its own slices).
    """

    def __init__(
        self,
        sources: Iterable[TeacherSource],
        groups: ParallelGroups,
        params_dtype: str,
        max_sequence_length: int,
    ):
        self._groups = groups
        self._skeletons: dict[str, _Skeleton] = {}
        self._skeleton_of: dict[str, _Skeleton] = {}
        self._host: dict[str, dict[torch.dtype, Tensor]] = {}
        self._heads_host: dict[str, Tensor] = {}
        self._head: tuple[str, Tensor] | None = None
        self.loads = 0
        """Times a teacher's weights were copied to the device since the start."""
        for source in sources:
            self._add(source, params_dtype, max_sequence_length)

    def _add(self, source: TeacherSource, params_dtype: str, max_sequence_length: int) -> None:
        where = f"teachers.{source.name}"
        architecture = dataclasses.replace(source.model, load=None)
        key = json.dumps(to_dict(architecture), sort_keys=True, default=str)
        if key not in self._skeletons:
            (chunk,) = build_model(
                architecture,
                self._groups,
                params_dtype,
                max_sequence_length=max_sequence_length,
                frozen=True,
                where=where,
                seed=source.seed,
            )
            self._skeletons[key] = _Skeleton(chunk)
        skeleton = self._skeletons[key]
        if source.model.load is not None:
            load_weights([skeleton.chunk], find_checkpoint(source.model.load, where), self._groups, where)
        pin = self._groups.device.type == "cuda"
        host = {}
        for dtype, flat in skeleton.flat.items():
            host[dtype] = torch.empty(flat.shape, dtype=dtype, device="cpu", pin_memory=pin).copy_(flat)
        self._host[source.name] = host
        self._skeleton_of[source.name] = skeleton
        skeleton.resident = source.name
        if self._groups.is_last_stage:
            head = skeleton.chunk.head_weight().detach()
            offset = (head.data_ptr() - skeleton.flat[head.dtype].data_ptr()) // head.element_size()
            self._heads_host[source.name] = host[head.dtype][offset : offset + head.numel()].view(head.shape)

    @property
    def names(self) -> list[str]:
        return list(self._host)

    def make_resident(self, name: str) -> HiddenStateGPT:
        """The frozen model (this rank's stage) with the weights of teacher `name`. One host-to-device copy,
        if needed.
        """
        skeleton = self._skeleton_of[name]
        if skeleton.resident != name:
            for dtype, flat in skeleton.flat.items():
                flat.copy_(self._host[name][dtype], non_blocking=True)
            skeleton.resident = name
            self.loads += 1
        return skeleton.chunk

    def head(self, name: str) -> Tensor:
        """Teacher `name`'s output head on the device, [padded vocabulary / tp, h]; the previous one is
        dropped.

        Only on the last stage.
        """
        if self._head is None or self._head[0] != name:
            self._head = None
            self._head = (name, self._heads_host[name].to(self._groups.device, non_blocking=True))
        return self._head[1]

    def host_bytes(self) -> int:
        """Host memory of all teachers on this rank, in bytes."""
        return sum(
            flat.numel() * flat.element_size() for host in self._host.values() for flat in host.values()
        )
