"""Upcycles a dense model to a mixture of experts that computes the same function.

Every expert is a copy of the dense MLP, or of a slice of it: with granularity G the MLP's hidden channels are
split into G slices, of which shared experts hold the first S and routed experts the others, R = G - S for
each copy. For a token that is routed to whole copies the result is the dense MLP:

    sum over copies c of p_c sum over slices s of MLP_s(x) = MLP(x),        sum of p_c = 1

because the slices' outputs add up (the down projection is linear) and all copies are equal. Slices of a copy
have the same row in the router, so they are chosen together, with probability p_c / R each; the router's
scaling factor compensates for R, or, if an architecture has none, the down projections do (Komatsuzaki et al.
2022, arXiv 2212.05055; He et al. 2024, arXiv 2410.07524, for slices and virtual groups).
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mopd.backend.model_files import read_mapping
from megatron_mopd.config import ConfigError
from megatron_mopd.model.families import Weight, matching_family
from megatron_mopd.model.families.table import Sizes, moe_layers
from megatron_mopd.model.hugging_face import CONFIG
from megatron_mopd.model.weight_source import Companions, WeightSource

_LAYER = "decoder.layers.{layer}."
_FC1, _FC2 = _LAYER + "mlp.linear_fc1.weight", _LAYER + "mlp.linear_fc2.weight"
# Keys of the dense configuration file that are not part of the architecture but belong to the model.
_KEPT_CONFIG = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")


@dataclass(frozen=True)
class Upcycling:
    """Options for the mixture of experts."""

    num_experts: int
    """Routed experts in each layer."""
    topk: int
    """Routed experts for each token."""
    granularity: int = 1
    """Number of slices of the dense MLP; an expert is one slice."""
    shared_experts: int = 0
    """Slices that process every token, without routing."""
    router_noise: float = 0.0
    """Standard deviation of the router's weights; with 0 all experts are equally likely."""
    seed: int = 0
    """Seed of the router noise."""

    @property
    def routed_slices(self) -> int:
        """R: number of routed experts in one copy."""
        return self.granularity - self.shared_experts

    @property
    def copies(self) -> int:
        return self.num_experts // self.routed_slices

    def check(self, ffn_hidden_size: int) -> None:
        """Raise `ConfigError` for an invalid option, naming it."""
        if self.granularity < 1 or ffn_hidden_size % self.granularity:
            raise ConfigError(
                f"--granularity: {self.granularity} does not divide the MLP's {ffn_hidden_size} channels"
            )
        if not 0 <= self.shared_experts < self.granularity:
            raise ConfigError(
                f"--shared-experts: {self.shared_experts} must be below --granularity={self.granularity}: "
                "shared experts are slices of the MLP, and at least one slice is routed"
            )
        for name, value in (("--num-experts", self.num_experts), ("--topk", self.topk)):
            if value < 1 or value % self.routed_slices:
                raise ConfigError(
                    f"{name}: {value} is not a multiple of {self.routed_slices}, the routed slices of one "
                    "copy of the MLP (--granularity minus --shared-experts)"
                )
        if not 2 <= self.topk <= self.num_experts:
            raise ConfigError(f"--topk: {self.topk} is not in [2, {self.num_experts}]")
        if not 0 <= self.router_noise < float("inf"):
            raise ConfigError(f"--router-noise: {self.router_noise} is not a standard deviation")
        if self.routed_slices > 1 and self.topk < self.num_experts and self.router_noise == 0:
            raise ConfigError(
                "--router-noise: must be above 0 when copies consist of several routed experts, because the "
                "experts of a copy are chosen together only if copies differ"
            )


class UpcycledModel(WeightSource):
    """`dense` as a mixture of experts; tensors are created on demand.

    The architecture is the first supported one with the dense model's attention: Mixtral for Llama, Qwen3-MoE
    for Qwen3, and GLM-4.5 with its sigmoid router if there are shared experts or biases. Raises `ConfigError`
    if there is none.
    """

    def __init__(self, dense: WeightSource, options: Upcycling, where: str):
        if any(moe_layers(dense.model)):
            raise ConfigError(f"{where}: the model is already a mixture of experts")
        sizes = Sizes.of(dense.model)
        options.check(sizes.ffn)
        self._dense, self._options = dense, options
        self._width = sizes.ffn // options.granularity
        self._dense_weights = {(w.rule.megatron, w.offsets[:1]): w for w in dense.weights}
        self.model, self.family = self._architecture(where)
        self.weights = self.family.weights(self.model)
        self.companions = Companions(dense.companions.directory, config=self._config())

    def _architecture(self, where: str):
        options, scale = self._options, self._options.routed_slices
        common = self._dense.model.transformer | dict(
            num_moe_experts=options.num_experts,
            moe_router_topk=options.topk,
            moe_ffn_hidden_size=self._width,
            # Copies may differ by less than the resolution of bfloat16.
            moe_router_dtype="fp32",
        )
        sigmoid = dict(
            moe_router_score_function="sigmoid",
            moe_router_enable_expert_bias=True,
            moe_router_topk_scaling_factor=float(scale),
        )
        if options.shared_experts:
            sigmoid["moe_shared_expert_intermediate_size"] = options.shared_experts * self._width
        softmax_is_exact = scale & (scale - 1) == 0  # scaled weights are exact for powers of two only
        candidates = [{}] if softmax_is_exact and not options.shared_experts else []
        for router in (*candidates, sigmoid):
            model = dataclasses.replace(self._dense.model, load=None, transformer=common | router)
            try:
                return model, matching_family(model, where)
            except ConfigError as problem:
                last = problem
        raise last

    def _config(self) -> dict[str, Any]:
        config = self.family.hugging_face_config(self.model)
        directory = self._dense.companions.directory
        if directory is not None and (directory / CONFIG).exists():
            dense = read_mapping(directory, CONFIG, "config.json")
            config |= {key: dense[key] for key in _KEPT_CONFIG if key in dense}
        return config

    def tokenizer_directory(self) -> Path | None:
        return self._dense.tokenizer_directory()

    def dtype(self, weight: Weight) -> torch.dtype:
        name = weight.rule.megatron
        if name.endswith("router.expert_bias"):
            return torch.float32
        return self._dense.dtype(self._origin(weight))

    def _origin(self, weight: Weight) -> Weight:
        """The dense tensor that contains this one, or from which it takes its dtype."""
        name, layer = weight.rule.megatron, weight.offsets[:1]
        if (name, layer) in self._dense_weights:
            return self._dense_weights[name, layer]
        if name.endswith("pre_mlp_layernorm.weight"):
            return self._dense_weights[_LAYER + "mlp.linear_fc1.layer_norm_weight", layer]
        return self._dense_weights[_FC2 if name.endswith("linear_fc2.weight") else _FC1, layer]

    def slice_of(self, weight: Weight, start: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        name, origin = weight.rule.megatron, self._origin(weight)
        index = tuple(slice(s, s + n) for s, n in zip(start, size))
        if ".experts.{expert}." in name:
            first = self._options.shared_experts + weight.offsets[-1] % self._options.routed_slices
            return self._slices(origin, name, first, 1)[index] * self._output_scale(name)
        if ".shared_experts." in name:
            return self._slices(origin, name, 0, self._options.shared_experts)[index]
        if name.endswith("router.weight"):
            return self._router(weight).to(self.dtype(weight))[index]
        if name.endswith("router.expert_bias"):
            return torch.zeros(size)
        return self._dense.slice_of(origin, start, size)

    def _slices(self, origin: Weight, name: str, first: int, count: int) -> Tensor:
        """`count` slices from `first` of a projection of the dense MLP: of gate and up, or of down."""
        start, width = first * self._width, count * self._width
        hidden = self._dense.model.transformer["hidden_size"]
        if name.endswith("linear_fc2.weight"):
            return self._dense.slice_of(origin, (0, start), (hidden, width))
        up = origin.shape[0] // 2
        parts = [self._dense.slice_of(origin, (row, 0), (width, hidden)) for row in (start, up + start)]
        return torch.cat(parts)

    def _output_scale(self, name: str) -> float:
        """Compensates for the probability that the slices of a copy share, if the router does not."""
        routes_with_factor = self.model.transformer.get("moe_router_topk_scaling_factor") is not None
        is_output = name.endswith("linear_fc2.weight")
        return float(self._options.routed_slices) if is_output and not routes_with_factor else 1.0

    def _router(self, weight: Weight) -> Tensor:
        """Router weights [experts, h]: one random row per copy, the same for all its slices."""
        digest = hashlib.sha256(f"{self._options.seed}/{weight.offsets}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        rows = torch.empty((self._options.copies, weight.shape[1]))
        rows.normal_(0.0, 1.0, generator=generator).mul_(self._options.router_noise)
        return rows.repeat_interleave(self._options.routed_slices, dim=0)
