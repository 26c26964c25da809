"""The KV cache of in-process generation, one per decoded batch."""

from __future__ import annotations

import torch
from megatron.core.inference.contexts import StaticInferenceContext
from torch import Tensor


class KeyValueCache(StaticInferenceContext):
    """Keys and values of every local layer, stored as [batch, groups/tp, max_sequence_length, d] each.

    All positions of one row and group are contiguous, because attention reads them together, once per decoded
    token. All rows share one write position, `sequence_len_offset`, so all prompts end at the same position,
    and the attention mask hides the positions before a shorter prompt. The prompts arrive packed in one row
    and are laid out here, so a forward pass computes neither padding nor a shared prefix twice. The class
    derives from megatron-core's static context so that its modules accept it; storage and row handling are
    ours.
    """

    def __init__(self, prompt_lengths: Tensor, max_sequence_length: int, shared: int = 0):
        """Create rows for prompts with `prompt_lengths` [rows], in tokens. All prompts share their first
        `shared` tokens, which arrive once, before the rest of each prompt."""
        super().__init__(len(prompt_lengths), max_sequence_length)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._bias: tuple[Tensor, Tensor] | None = None
        self.longest_prompt = int(prompt_lengths.max())
        # For every token of the packed prompts: its row, and its column if all prompts end at the same
        # column.
        device = prompt_lengths.device
        self._rows = torch.arange(len(prompt_lengths), device=device).repeat_interleave(prompt_lengths)
        shift = self.longest_prompt - prompt_lengths.cumsum(0)
        place = torch.arange(len(self._rows), device=device)
        self._columns = place + shift[self._rows]
        # Its position in the packed row, in which only the first prompt contains the shared tokens.
        start = (prompt_lengths.cumsum(0) - prompt_lengths)[self._rows]
        self._arrival = torch.where(place - start < shared, place - start, place - shared * self._rows)

    def append(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new tokens' keys and values, and return those that their queries may attend to.

        The first call passes all prompts, packed [tokens, 1, g, d], and returns them unchanged. Later calls
        pass one token per row, [1, b, g, d], and return all stored ones, [offset + 1, b, g, d] (views of the
        cache).
        """
        if self.sequence_len_offset > 0:
            stored = self.append_tokens(layer_number, key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3))
            return tuple(x.permute(2, 0, 1, 3) for x in stored)
        for kept, new in zip(self._storage(layer_number, key.size(2), key, value), (key, value)):
            kept[self._rows, :, self._columns] = new.squeeze(1)[self._arrival]
        return key, value

    def append_tokens(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store the key and value of one token per row after the prompts, [b, g, 1, d], and return all stored
        ones in the cache's memory layout, [b, g, offset + 1, d] (views of the cache)."""
        start, end = self.sequence_len_offset, self.sequence_len_offset + 1
        assert end <= self.max_sequence_length, f"KV cache of {self.max_sequence_length} positions is full"
        stored = self._storage(layer_number, key.size(1), key, value)
        for kept, new in zip(stored, (key, value)):
            kept.narrow(2, start, 1).copy_(new)
        return tuple(kept.narrow(2, 0, end) for kept in stored)

    def bias(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """The bias on attention scores for a `mask` (True: masked): 0 or -inf. Computed once for all layers
        with the same mask."""
        if self._bias is None or self._bias[0] is not mask:
            self._bias = mask, torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)
        return self._bias[1]

    def _storage(self, layer_number: int, groups: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's keys and values [b, groups, max_sequence_length, d], with the channels of `key` and
        `value` [..., d]."""
        if layer_number not in self._layers:
            shape = (self.max_batch_size, groups, self.max_sequence_length)
            self._layers[layer_number] = tuple(x.new_empty((*shape, x.size(3))) for x in (key, value))
            for stored in self._layers[layer_number]:
                # Masked values are still multiplied by 0, and 0 x NaN is NaN.
                stored[:, :, : self.longest_prompt] = 0
        return self._layers[layer_number]

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these batch rows [n], in this order and possibly repeated; free the memory of the others.

        Copies one layer at a time, and only the positions written so far, so a long cache never exists twice.
        """
        if torch.equal(rows, torch.arange(self.max_batch_size, device=rows.device)):
            return
        for layer, (keys, values) in self._layers.items():
            self._layers[layer] = self._select(keys, rows), self._select(values, rows)
        self.max_batch_size = len(rows)

    def _select(self, stored: Tensor, rows: Tensor) -> Tensor:
        kept = torch.empty((len(rows), *stored.shape[1:]), dtype=stored.dtype, device=stored.device)
        written = self.sequence_len_offset
        kept[:, :, :written] = stored[rows, :, :written]
        return kept
