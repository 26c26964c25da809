"""The KV cache of in-process generation, one per batch that is being decoded."""

from __future__ import annotations

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor


class KeyValueCache(StaticInferenceContext):
    """Keys and values of every local layer, kept as [batch, groups/tp, max_sequence_length, d] each.

    Of one row and group, all positions lie together: that is how attention reads them, once per decoded
    token. All rows share one write position, `sequence_len_offset`, so prompts end at the same one, and the
    attention mask hides what lies before a shorter prompt. The prompts themselves arrive packed, end to end
    in one row, and are laid out here: no forward pass computes padding, nor twice what all prompts begin
    with. It is megatron-core's static context,
    so its modules accept it; storage and row handling are ours.
    """

    def __init__(self, prompt_lengths: Tensor, max_sequence_length: int, shared: int = 0):
        """Rows for as many prompts as there are `prompt_lengths` [rows], in tokens. Their first `shared`
        tokens are the same, and arrive once, before the rest of each."""
        super().__init__(len(prompt_lengths), max_sequence_length)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.longest_prompt = int(prompt_lengths.max())
        # Of every token of the packed prompts: its row, and its column when all prompts end at the same one.
        device = prompt_lengths.device
        self._rows = torch.arange(len(prompt_lengths), device=device).repeat_interleave(prompt_lengths)
        shift = self.longest_prompt - prompt_lengths.cumsum(0)
        place = torch.arange(len(self._rows), device=device)
        self._columns = place + shift[self._rows]
        # The same of the packed row, where only the first prompt brings the shared tokens.
        start = (prompt_lengths.cumsum(0) - prompt_lengths)[self._rows]
        self._arrival = torch.where(place - start < shared, place - start, place - shared * self._rows)

    def append(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' key and value, and return those that their queries may look at.

        First all prompts at once, packed [tokens, 1, g, d], which come back as they are; from then on one
        token a row, [1, b, g, d], and all stored ones come back, [offset + 1, b, g, d] (views of the cache).
        """
        if layer_number not in self._layers:
            # Zeros, because what is masked is still multiplied by 0, and 0 x NaN is NaN.
            self._layers[layer_number] = tuple(
                torch.zeros(
                    (self.max_batch_size, x.size(2), self.max_sequence_length, x.size(3)),
                    dtype=x.dtype,
                    device=x.device,
                )
                for x in (key, value)
            )
        keys, values = self._layers[layer_number]
        if self.sequence_len_offset == 0:
            keys[self._rows, :, self._columns] = key.squeeze(1)[self._arrival]
            values[self._rows, :, self._columns] = value.squeeze(1)[self._arrival]
            return key, value
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
