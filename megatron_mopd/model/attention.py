"""Attention core based on `scaled_dot_product_attention`: padded, packed, context-parallel, or with a KV
cache.

PyTorch picks the kernel (FlashAttention or cuDNN on Hopper, its own on CPU). This module does not depend on
Transformer Engine.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_mopd.model.kv_cache import KeyValueCache
from megatron_mopd.model.norm import HeadsRMSNorm, RMSNorm
from megatron_mopd.model.packing import PackedDocuments
from megatron_mopd.model.rotary import rotate


class ScaledDotProductAttention(MegatronModule):
    """softmax(q k^T * scale) v with causal masking, in megatron-core's layout.

    Shapes: query [sq, b, heads/tp, d], key and value [sk, b, groups/tp, d]; returns [sq, b, heads/tp x d].

    Without context parallelism there is no communication. With it, key and value are all-gathered over the
    context-parallel group (2 x s x b x groups/tp x d elements received per layer) and their gradient is
    reduce-scattered; queries stay local.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
        **_unused,
    ):
        super().__init__(config=config)
        if config.window_size is not None:
            raise ValueError(
                "window_size: sliding-window attention is not supported by the local attention core"
            )
        if config.softmax_type != "vanilla":
            raise ValueError(f"softmax_type: {config.softmax_type!r} is not supported; only 'vanilla' is")
        self.cp_group = pg_collection.cp
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = 1.0 / math.sqrt(config.kv_channels) if softmax_scale is None else softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedDocuments | None = None,
    ) -> Tensor:
        if attention_mask is not None:  # decoding: [b, 1, sq, sk], True = masked, megatron-core's convention
            attend = self._decode if query.size(0) == 1 else self.attend
            output = attend(*map(_to_bhsd, (query, key, value)), mask=~attention_mask)
        elif packed_seq_params is not None and (packed_seq_params.whole or self.cp_group.size() == 1):
            output = self._packed(query, key, value, packed_seq_params)
        elif self.cp_group.size() > 1:
            output = self._context_parallel(query, key, value, packed_seq_params)
        else:
            output = self.attend(*map(_to_bhsd, (query, key, value)), causal=True)
        return output.permute(2, 0, 1, 3).flatten(2)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """[b, heads, sq, d] x [b, groups, sk, d] -> [b, heads, sq, d_v]."""
        dropout = self.dropout if self.training else 0.0
        kwargs = dict(attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=q.size(1) != k.size(1))
        if dropout == 0.0:
            return F.scaled_dot_product_attention(q, k, v, **kwargs)
        with get_cuda_rng_tracker().fork():
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **kwargs)

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """One query per row: [b, heads, 1, d] x [b, groups, sk, d] -> [b, heads, 1, d_v].

        The heads of a group are treated as queries of one head, so keys and values are read once for all of
        them and never repeated.
        """
        grouped = q.unflatten(1, (k.size(1), -1)).squeeze(3)  # [b, groups, heads per group, d]
        return self.attend(grouped, k, v, mask=mask).flatten(1, 2).unsqueeze(2)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments) -> Tensor:
        """Gather each bucket's documents into rows, attend causally, scatter back. All inputs [T, 1, heads,
        d]. Documents that continue a shared document also attend to it.
        """
        output = query.new_zeros(query.size(0), query.size(2), value.size(3))
        for number, (index, valid) in enumerate(documents.buckets):
            seen, how = index, {"causal": True}
            if documents.shared and number > 0:
                before = torch.arange(documents.shared, device=index.device).expand(len(index), -1)
                seen = torch.cat((before, index), dim=1)
                how = {"mask": causal_lower_right(index.size(1), seen.size(1))}
            rows = [x.squeeze(1)[i].transpose(1, 2) for x, i in ((query, index), (key, seen), (value, seen))]
            attended = self.attend(*rows, **how).transpose(1, 2)
            output.index_put_((index[valid],), attended[valid])
        return output.transpose(0, 1).unsqueeze(0)

    def _context_parallel(
        self, query: Tensor, key: Tensor, value: Tensor, documents: PackedDocuments | None
    ) -> Tensor:
        """Local zigzag queries against gathered keys; every query slice attends to the keys up to its end."""
        size, rank = self.cp_group.size(), self.cp_group.rank()
        gathered = _GatherSequence.apply(
            torch.cat((key, value), dim=-1), self.cp_group
        )  # [cp, s/cp, b, g, d + dv]
        lengths = documents.lengths if documents is not None else (query.size(0) * size,)
        pieces, start = [], 0
        for length in lengths:
            part = length // (2 * size)
            local = slice(start, start + 2 * part)
            # Rank r holds slices r and 2 cp - 1 - r of the document: put the 2 cp slices back in order.
            ordered = [gathered[r, local][:part] for r in range(size)]
            ordered += [gathered[r, local][part:] for r in reversed(range(size))]
            keys_values = torch.cat(ordered)
            for half, position in ((0, rank), (1, 2 * size - 1 - rank)):
                queries = query[start + half * part : start + (half + 1) * part]
                visible = keys_values[: (position + 1) * part]
                k, v = visible.split((key.size(-1), value.size(-1)), dim=-1)
                mask = causal_lower_right(part, visible.size(0))
                pieces.append(self.attend(*map(_to_bhsd, (queries, k, v)), mask=mask))
            start += 2 * part
        return torch.cat(pieces, dim=2)


def _to_bhsd(x: Tensor) -> Tensor:
    return x.permute(1, 2, 0, 3)


class _GatherSequence(torch.autograd.Function):
    """All-gather over a group, stacked on a new first dimension; backward sums all ranks' gradients of the
    local part.

    Forward: one all-gather, x.numel() elements sent per rank. Backward: one reduce-scatter of the same size.
    """

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        x = x.contiguous()
        output = torch.empty((group.size() * x.size(0), *x.shape[1:]), dtype=x.dtype, device=x.device)
        dist.all_gather_into_tensor(output, x, group=group)
        return output.view(group.size(), *x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        output = torch.empty(grad.shape[1:], dtype=grad.dtype, device=grad.device)
        dist.reduce_scatter_tensor(output, grad.flatten(0, 1).contiguous(), group=ctx.group)
        return output, None


class CachedSelfAttention(SelfAttention):
    """megatron-core's self attention with per-token rotary angles, and a KV cache of rotated keys.

    megatron-core's static cache stores unrotated keys and rotates the whole cache again at every decoded
    token. Here a key is rotated once, with the position in its own row, so prompts of different lengths can
    share a batch and use the same positions as in training.
    """

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None, *args, **kwargs):
        """megatron-core's forward, except when decoding one token per row on the CPU."""
        config = self.config
        if (
            kwargs.get("inference_context") is None
            or attention_mask is None
            or hidden_states.device.type != "cpu"
            or config.attention_output_gate
            or config.no_rope_freq
            or config.num_query_groups < self.world_size
            or isinstance(self.q_layernorm, HeadsRMSNorm)
        ):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        return self._decode(
            hidden_states, attention_mask, kwargs["inference_context"], kwargs.get("rotary_pos_emb")
        )

    def _decode(
        self, hidden: Tensor, mask: Tensor, cache: KeyValueCache, angles: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """[1, b, h] -> attention output of the same shape, and the output projection's bias.

        Computes the same values as megatron-core with a third of the calls: for the few rows of a decoding
        step, call overhead takes as long as the computation. A group's queries and key are rotated together,
        and a group's queries attend together.
        """
        mixed, _ = self.linear_qkv(hidden)
        channels = self.hidden_size_per_attention_head
        mixed = mixed.view(hidden.size(1), self.num_query_groups_per_partition, -1, channels)
        queries = mixed.size(2) - 2
        heads, value = mixed.split((queries + 1, 1), dim=2)  # [b, g, queries of a group + key, d]
        if isinstance(self.q_layernorm, RMSNorm):
            query, key = heads.split((queries, 1), dim=2)
            heads = torch.cat((self.q_layernorm(query), self.k_layernorm(key)), dim=2)
        if angles is not None:
            heads = rotate(heads, angles.transpose(1, 2), self.config.rotary_interleaved)
        query, key = heads.split((queries, 1), dim=2)
        keys, values = cache.append_tokens(self.layer_number, key, value)
        attended = self.core_attention.attend(query, keys, values, cache.bias(mask, query.dtype))
        return self.linear_proj(attended.flatten(1).unsqueeze(0))

    def _adjust_key_value_for_inference(
        self, inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
    ):
        if rotary_pos_emb is not None:
            angles = rotary_pos_emb[0]  # megatron-core passes the angles twice, for queries and for keys
            query = rotate(query, angles, self.config.rotary_interleaved)
            key = rotate(key, angles, self.config.rotary_interleaved)
        if inference_context is None:
            return query, key, value, None, self.attn_mask_type, None
        key, value = inference_context.append(self.layer_number, key, value)
        return query, key, value, None, AttnMaskType.no_mask, None
