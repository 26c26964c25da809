"""A transformer and the MOPD loss in plain PyTorch and float64, from the published formulas.

It uses no code from the package or megatron-core: one sequence at a time, no cache, no batching, and
gradients by autograd. Weights are passed as a dictionary with the names of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class PlainTransformer:
    """Pre-norm decoder: RMSNorm, grouped-query attention with rotary embeddings, SwiGLU or experts of it."""

    def __init__(self, weights: Mapping[str, Tensor], model: Mapping[str, Any], tied: bool = False):
        self.weights, self.model, self.tied = weights, model, tied
        self.router_logits: list[list[Tensor]] = []
        """For every sequence so far, the logits [s, experts] of each router."""

    def layer_weight(self, layer: int, name: str) -> Tensor:
        """One layer's weight: homogeneous layers are stored stacked, others one by one."""
        stacked = self.weights.get(f"decoder.layers.{name}")
        return self.weights[f"decoder.layers.{layer}.{name}"] if stacked is None else stacked[layer]

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """[s, vocabulary]"""
        embedding = self.weights["embedding.word_embeddings.weight"]
        x = embedding[torch.tensor(tokens)]
        self.router_logits.append([])
        for layer in range(self.model["num_layers"]):
            x = x + self.attention(x, layer)
            x = x + self.feed_forward(x, layer)
        x = rms_norm(x, self.weights["decoder.final_layernorm.weight"])
        return x @ (embedding if self.tied else self.weights["output_layer.weight"]).T

    def attention(self, x: Tensor, layer: int) -> Tensor:
        heads, groups = self.model["num_attention_heads"], self.model["num_query_groups"]
        d = self.model["hidden_size"] // heads
        x = rms_norm(x, self.layer_weight(layer, "self_attention.linear_qkv.layer_norm_weight"))
        # One block of rows per group: its queries, its key, its value.
        qkv = self.layer_weight(layer, "self_attention.linear_qkv.weight").reshape(groups, -1, d, x.size(1))
        projected = torch.einsum("sh,gndh->sgnd", x, qkv)
        query, key, value = projected[:, :, :-2], projected[:, :, -2], projected[:, :, -1]
        if self.model.get("qk_layernorm"):
            over = 1 if self.model.get("qk_layernorm_over_heads") else -1
            weights = (self.layer_weight(layer, f"self_attention.{x}_layernorm.weight") for x in "qk")
            query, key = (
                rms_norm(x.flatten(over), weight).view_as(x) for x, weight in zip((query, key), weights)
            )
        query, key = rotate(query), rotate(key)
        scores = torch.einsum("sgnd,tgd->gnst", query, key) / math.sqrt(d)
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        probabilities = scores.masked_fill(future, -math.inf).softmax(dim=-1)
        output = torch.einsum("gnst,tgd->sgnd", probabilities, value).reshape(len(x), -1)
        return output @ self.layer_weight(layer, "self_attention.linear_proj.weight").T

    def feed_forward(self, x: Tensor, layer: int) -> Tensor:
        experts = self.model.get("num_moe_experts")
        frequency = self.model.get("moe_layer_freq", 1)
        if not experts or not (frequency == 1 or frequency[layer]):
            x = rms_norm(x, self.layer_weight(layer, "mlp.linear_fc1.layer_norm_weight"))
            return swiglu(
                x,
                self.layer_weight(layer, "mlp.linear_fc1.weight"),
                self.layer_weight(layer, "mlp.linear_fc2.weight"),
            )
        x = rms_norm(x, self.layer_weight(layer, "pre_mlp_layernorm.weight"))
        scores = x @ self.layer_weight(layer, "mlp.router.weight").T
        self.router_logits[-1].append(scores)
        top = self.model["moe_router_topk"]
        if self.model.get("moe_router_score_function") == "sigmoid":
            chosen, index = scores.sigmoid().topk(top, dim=1)
            chosen = chosen / chosen.sum(dim=1, keepdim=True)
        else:
            chosen, index = scores.topk(top, dim=1)
            chosen = chosen.softmax(dim=1)
        chosen = chosen * self.model.get("moe_router_topk_scaling_factor", 1.0)
        share = torch.zeros_like(scores).scatter(1, index, chosen)
        first = self.layer_weight(layer, "mlp.experts.experts.linear_fc1.weight")
        second = self.layer_weight(layer, "mlp.experts.experts.linear_fc2.weight")
        # Every expert runs on every token and is multiplied by zero where it was not chosen.
        output = sum(share[:, [e]] * swiglu(x, first[e], second[e]) for e in range(experts))
        if self.model.get("moe_shared_expert_intermediate_size"):
            output = output + swiglu(
                x,
                self.layer_weight(layer, "mlp.shared_experts.linear_fc1.weight"),
                self.layer_weight(layer, "mlp.shared_experts.linear_fc2.weight"),
            )
        return output


def z_loss(logits: Sequence[Tensor]) -> Tensor:
    """Mean of (logsumexp)^2 of one router over all tokens (ST-MoE, arXiv 2202.08906, equation 5)."""
    return torch.cat(list(logits)).logsumexp(dim=1).square().mean()


def load_balancing_loss(
    logits: Sequence[Tensor], units: Sequence[Sequence[int]], model: Mapping[str, Any]
) -> Tensor:
    """sum_u T_u / T (E sum_e f_e P_e) of one router (arXiv 2101.03961, equation 4; f_e: share of choices).

    `logits` are [s, experts] of every sequence, `units` lists of the sequences that are balanced together.
    """
    total = sum(map(len, logits))
    loss = torch.zeros((), dtype=torch.float64)
    for unit in filter(None, units):
        scores = torch.cat([logits[i] for i in unit])
        sigmoid = model.get("moe_router_score_function") == "sigmoid"
        scores = scores.sigmoid() / scores.sigmoid().sum(1, keepdim=True) if sigmoid else scores.softmax(1)
        experts = scores.topk(model["moe_router_topk"], dim=1).indices.flatten()
        fraction = experts.bincount(minlength=scores.size(1)) / len(experts)
        loss = loss + len(scores) / total * scores.size(1) * (fraction * scores.mean(0)).sum()
    return loss


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight


def swiglu(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    gate, up = (x @ first.T).chunk(2, dim=1)
    return (gate * gate.sigmoid() * up) @ second.T


def rotate(x: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of [s, ..., d]: channel i is rotated with channel i + d/2."""
    half = x.size(-1) // 2
    frequencies = 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
    angles = torch.arange(len(x), dtype=x.dtype)[:, None] * frequencies
    angles = angles.reshape(len(x), *(1,) * (x.dim() - 2), half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), dim=-1)


def mopd_loss(
    student: PlainTransformer,
    teachers: Mapping[str, PlainTransformer],
    mixtures: Mapping[str, Mapping[str, float]],
    samples: Sequence[tuple[Sequence[int], Sequence[int], str]],
) -> tuple[Tensor, dict[str, float]]:
    """sum_i w_i KL(student || teacher_i), averaged over all response tokens of the batch, and per domain.

    DeepSeek-V4, 5.1.2. `samples` are (prompt, response, domain); `mixtures` domain -> teacher -> weight.
    """
    total, tokens = 0.0, 0
    domains: dict[str, list[float]] = {}
    for prompt, response, domain in samples:
        ids = [*prompt, *response]
        # The distribution of response token t is predicted at the preceding position.
        rows = slice(len(prompt) - 1, len(ids) - 1)
        log_p = student.logits(ids)[rows].log_softmax(dim=1)
        divergence = torch.zeros(len(response), dtype=log_p.dtype)
        for name, weight in mixtures[domain].items():
            with torch.no_grad():
                log_q = teachers[name].logits(ids)[rows].log_softmax(dim=1)
            divergence = divergence + weight * (log_p.exp() * (log_p - log_q)).sum(dim=1)
        total, tokens = total + divergence.sum(), tokens + len(response)
        domains.setdefault(domain, []).extend(divergence.tolist())
    return total / tokens, {domain: sum(values) / len(values) for domain, values in domains.items()}
