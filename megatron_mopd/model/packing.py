"""Describes a micro-batch of packed documents to the attention core."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class PackedDocuments(PackedSeqParams):
    """Documents concatenated in one row; attention does not cross document boundaries.

    megatron-core passes it through as its `packed_seq_params`. `qkv_format` is not "thd", so that
    megatron-core keeps the [tokens, 1, heads, channels] layout and leaves rotary positions (given per token
    by `HiddenStateGPT`) and document boundaries to us. Under context parallelism every length is a multiple
    of 2 x cp, and the rank holds the two zigzag slices of each document that megatron-core's convention
    assigns to it.
    """

    lengths: tuple[int, ...] = ()
    """Length of every document in tokens, including padding, before the split over context-parallel ranks."""
    buckets: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Without context parallelism: documents of similar length, as (index [n, L] into the row, valid [n, L]).
    """
    whole: bool = False
    """Whether every context-parallel rank holds whole documents, as during sampling."""
    shared: int = 0
    """All documents continue the first document, which has this many tokens and is the only one in the first
    bucket; 0 if no document is shared."""

    @classmethod
    def from_lengths(
        cls, lengths: list[int], device: torch.device, *, whole: bool = False, first_is_shared: bool = False
    ) -> PackedDocuments:
        """Group documents into buckets padded to the longest member, which is at most twice as long as the
        shortest. With `first_is_shared` the other documents continue the first and also attend to it.
        """
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        groups: dict[int, list[int]] = {}
        for document, length in enumerate(lengths):
            bucket = -1 if first_is_shared and document == 0 else max(length - 1, 0).bit_length()
            groups.setdefault(bucket, []).append(document)
        buckets = []
        for _, documents in sorted(groups.items()):
            longest = max(lengths[d] for d in documents)
            offset = torch.arange(longest)
            length = torch.tensor([lengths[d] for d in documents]).unsqueeze(1)
            start = torch.tensor([starts[d] for d in documents]).unsqueeze(1)
            # Positions past a document's end repeat its last token; causal masking hides them.
            index = start + torch.minimum(offset, length - 1)
            buckets.append((index.to(device), (offset < length).to(device)))
        cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
        longest = max(lengths)
        return cls(
            qkv_format="sbhd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            lengths=tuple(lengths),
            buckets=buckets,
            whole=whole,
            shared=lengths[0] if first_is_shared else 0,
        )
