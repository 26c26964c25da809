"""The KV cache of in-process generation, one per batch that is being decoded."""

from __future__ import annotations

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor


class KeyValueCache(StaticInferenceContext):
    """Keys and values of every local layer, kept as [batch, groups/tp, max_sequence_length, d] each.

    Of one row and group, all positions lie together: that is how attention reads them, once per decoded
    token. All rows share one write position, `sequence_len_offset`; prompts are padded on the left, and the
    attention mask hides the padding. It is megatron-core's static context, so its modules accept it; storage
    and row handling are ours.
    """

    def __init__(self, batch_size: int, max_sequence_length: int):
        super().__init__(batch_size, max_sequence_length)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' key and value [new, b, g, d] and return all stored ones, [offset + new, b, g,
        d] (views of the cache).
        """
        if layer_number not in self._layers:
            self._layers[layer_number] = tuple(
                torch.empty(
                    (x.size(1), x.size(2), self.max_sequence_length, x.size(3)),
                    dtype=x.dtype,
                    device=x.device,
                )
                for x in (key, value)
            )
        keys, values = self._layers[layer_number]
        end = self.sequence_len_offset + key.size(0)
        assert end <= self.max_sequence_length, f"KV cache of {self.max_sequence_length} positions is full"
        keys[:, :, self.sequence_len_offset : end] = key.permute(1, 2, 0, 3)
        values[:, :, self.sequence_len_offset : end] = value.permute(1, 2, 0, 3)
        return keys[:, :, :end].permute(2, 0, 1, 3), values[:, :, :end].permute(2, 0, 1, 3)

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these batch rows [n], in this order and possibly repeated; the others' memory is freed.

        One layer at a time, and only the positions written so far: a long cache never exists twice.
        """
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = self._select(keys, rows), self._select(values, rows)
        self.max_batch_size = len(rows)

    def _select(self, stored: Tensor, rows: Tensor) -> Tensor:
        kept = torch.empty((len(rows), *stored.shape[1:]), dtype=stored.dtype, device=stored.device)
        written = self.sequence_len_offset
        kept[:, :, :written] = stored[rows, :, :written]
        return kept
