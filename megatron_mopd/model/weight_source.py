"""A common interface to a model's weights on disk: Megatron tensors by rule, slices on demand."""

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
    """Everything that belongs to a Hugging Face model besides the weights that we train."""

    directory: Path | None = None
    """Directory of configuration, tokenizer, chat template and other small files; `None` if there are
    none."""
    headers: dict[str, str] | None = None
    """Weight file -> its header, from which the conversion back writes identical files."""
    aliases: dict[str, str] = field(default_factory=dict)
    """Tensors that duplicate another one: name -> the other's name."""
    untrained: dict[str, TensorInfo] = field(default_factory=dict)
    """Tensors that are not part of the model we train (multi-token-prediction layers, old buffers)."""
    reader: SliceReader | None = None
    """Reads the untrained tensors."""
    config: dict[str, Any] | None = None
    """Contents of a `config.json` that replaces the directory's own."""

    def read_untrained(self, name: str) -> Tensor:
        return self.reader.read(self.untrained[name].file, name, ())


class WeightSource(ABC):
    """A model on disk, in any format."""

    model: ModelConfig
    family: Family
    weights: list[Weight]
    companions: Companions

    @abstractmethod
    def dtype(self, weight: Weight) -> torch.dtype:
        """The dtype that represents all of a Megatron tensor without loss."""

    @abstractmethod
    def slice_of(self, weight: Weight, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """The part of a Megatron tensor that starts at `start` and has shape `size`; reads only this part."""

    @abstractmethod
    def tokenizer_directory(self) -> Path | None:
        """The tokenizer's directory, if there is one."""

    def whole(self, weight: Weight) -> Tensor:
        """All of a Megatron tensor."""
        return self.slice_of(weight, (0,) * len(weight.shape), weight.shape)

    def hugging_face_tensors(self, weight: Weight) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors of which a Megatron tensor consists, one by one."""
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
