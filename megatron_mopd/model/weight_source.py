"""One view of a model's weights for all that reads them: Megatron tensors by rule, slices on demand."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mopd.config import ModelConfig
from megatron_mopd.model.families import Family, Weight
from megatron_mopd.model.safetensors_files import SliceReader, TensorInfo


@dataclass
class Companions:
    """What belongs to a Hugging Face model besides the weights that we train."""

    directory: Path | None = None
    """Where configuration, tokenizer, chat template and other small files are; `None` when there are none."""
    headers: dict[str, str] | None = None
    """Weight file -> its header, from which the way back writes the very same files."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Tensors that repeat another one: name -> the other's name."""
    untrained: dict[str, TensorInfo] = field(default_factory=dict)
    """Tensors that are no part of the model we train (multi-token-prediction layers, old buffers)."""
    reader: SliceReader | None = None
    """Reads the untrained tensors."""
    config: dict[str, Any] | None = None
    """Contents of a `config.json` that stands in for the directory's own."""

    def read_untrained(self, name: str) -> Tensor:
        return self.reader.read(self.untrained[name].file, name, ())


class WeightSource(ABC):
    """A model on disk, whatever its format."""

    model: ModelConfig
    family: Family
    weights: list[Weight]
    companions: Companions

    @abstractmethod
    def dtype(self, weight: Weight) -> torch.dtype:
        """The dtype that holds all of a Megatron tensor without loss."""

    @abstractmethod
    def slice_of(self, weight: Weight, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """The part of a Megatron tensor that begins at `start` and has shape `size`, nothing else being
        read."""

    @abstractmethod
    def tokenizer_directory(self) -> Path | None:
        """Where the tokenizer is, if there is one."""

    def whole(self, weight: Weight) -> Tensor:
        """All of a Megatron tensor."""
        return self.slice_of(weight, (0,) * len(weight.shape), weight.shape)

    def hugging_face_tensors(self, weight: Weight) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors that one Megatron tensor consists of, one after the other."""
        whole = self.whole(weight)
        if len(weight.hugging_face) == 1:
            yield weight.hugging_face[0], whole
            return
        for number, (name, shape) in enumerate(zip(weight.hugging_face, weight.rule.shapes, strict=True)):
            part = torch.empty(shape, dtype=whole.dtype)
            for tensor, first, target, rows in weight.rule.pieces():
                if tensor == number:
                    part[first : first + rows] = whole[target : target + rows]
            yield name, part
