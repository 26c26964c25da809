"""The parts of a family's table: configuration fields and weight rules, both for either direction.

A rule lists the Hugging Face tensors of which one Megatron tensor consists. Every kind reduces to a list of
row ranges: rows `target ...` of the Megatron tensor are rows `source ...` of a Hugging Face tensor. Reading a
slice of either side follows from that list, so both conversions and loading one rank's shard share it.

Kinds: `replicated` (every tensor-parallel rank has all of it), `vocabulary` (rows are token ids), `column`
(split by output rows), `row` (split by input columns), `fused_qkv` (query, key and value interleaved by query
group), `gated_mlp` (gate above up). A name with `{expert}` is one tensor per expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from megatron_mopd.config import ConfigError, ModelConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors of which it consists."""

    kind: str
    megatron: str
    """Name, with `{layer}` and `{expert}` placeholders."""
    hugging_face: tuple[str, ...]
    shapes: tuple[Shape, ...]
    """Shape of each Hugging Face tensor."""
    layers: str = "all"
    """The layers that have it: `all`, `dense` or `moe` (for a name with `{layer}`)."""
    groups: int = 1
    """`fused_qkv`: number of query groups."""
    fused: str = ""
    """For a name with `{expert}`: the tensor that transformers 5 stores for all experts of a layer, which
    stacks the Megatron tensors of all experts."""

    def pieces(self) -> list[tuple[int, int, int, int]]:
        """(index of the Hugging Face tensor, its first row, the Megatron tensor's first row, number of
        rows)."""
        rows = [shape[0] // self.groups for shape in self.shapes]
        result, target = [], 0
        for group in range(self.groups):
            for tensor, count in enumerate(rows):
                result.append((tensor, group * count, target, count))
                target += count
        return result

    @property
    def shape(self) -> Shape:
        """Shape of the whole Megatron tensor, without layer and expert axes."""
        return sum(shape[0] for shape in self.shapes), *self.shapes[0][1:]


def replicated(megatron: str, hugging_face: str, *shape: int, layers: str = "all") -> Rule:
    return Rule("replicated", megatron, (hugging_face,), (shape,), layers)


def vocabulary(megatron: str, hugging_face: str, *shape: int) -> Rule:
    return Rule("vocabulary", megatron, (hugging_face,), (shape,))


def column(megatron: str, hugging_face: str, *shape: int, layers: str = "all") -> Rule:
    return Rule("column", megatron, (hugging_face,), (shape,), layers)


def row(megatron: str, hugging_face: str, *shape: int, layers: str = "all", fused: str = "") -> Rule:
    return Rule("row", megatron, (hugging_face,), (shape,), layers, fused=fused)


def fused_qkv(megatron: str, hugging_face: str, sizes: Sizes, *columns: int) -> Rule:
    """`hugging_face` contains `{}` as a placeholder for q, k and v."""
    names = tuple(hugging_face.replace("{}", letter) for letter in "qkv")
    shapes = tuple((rows, *columns) for rows in (sizes.query, sizes.key_value, sizes.key_value))
    return Rule("fused_qkv", megatron, names, shapes, groups=sizes.groups)


def gated_mlp(megatron: str, gate: str, up: str, *shape: int, layers: str = "all", fused: str = "") -> Rule:
    return Rule("gated_mlp", megatron, (gate, up), (shape, shape), layers, fused=fused)


@dataclass(frozen=True)
class Sizes:
    """The sizes of which weight shapes are composed."""

    hidden: int
    vocab: int
    groups: int
    head: int
    query: int
    """All query heads together."""
    key_value: int
    ffn: int
    expert_ffn: int
    shared_ffn: int
    experts: int

    @classmethod
    def of(cls, model: ModelConfig) -> Sizes:
        get = model.transformer.get
        heads, hidden = get("num_attention_heads"), get("hidden_size")
        groups, head = get("num_query_groups") or heads, get("kv_channels") or hidden // heads
        ffn = get("ffn_hidden_size") or 4 * hidden
        return cls(
            hidden=hidden,
            vocab=model.vocab_size,
            groups=groups,
            head=head,
            query=heads * head,
            key_value=groups * head,
            ffn=ffn,
            expert_ffn=get("moe_ffn_hidden_size") or ffn,
            shared_ffn=get("moe_shared_expert_intermediate_size") or 0,
            experts=get("num_moe_experts") or 0,
        )


@dataclass(frozen=True)
class Weight:
    """One Megatron tensor of one layer (and expert) of a model."""

    rule: Rule
    key: str
    """Canonical key in a distributed checkpoint."""
    offsets: Shape
    """Index along the leading axes of the key's tensor: layer and expert, if present."""
    axes: Shape
    """Length of those axes."""
    hugging_face: tuple[str, ...]
    fused: str = ""
    """For an expert: the tensor that may contain it together with the layer's other experts."""

    @property
    def shape(self) -> Shape:
        return self.rule.shape


def moe_layers(model: ModelConfig) -> list[bool]:
    """Which layers are mixture-of-experts layers."""
    count = model.transformer["num_layers"]
    if not model.transformer.get("num_moe_experts"):
        return [False] * count
    frequency = model.transformer.get("moe_layer_freq", 1)
    if isinstance(frequency, int):
        return [layer % frequency == 0 for layer in range(count)]
    return [bool(flag) for flag in frequency]


def expand(rules: tuple[Rule, ...], model: ModelConfig) -> Iterator[Weight]:
    """Every tensor of the model, in layer order.

    Keys are megatron-core's canonical keys: models whose layers are all alike have one tensor over all
    layers, others one key per layer; experts are always one tensor over all experts.
    """
    pattern = moe_layers(model)
    frequency = model.transformer.get("moe_layer_freq", 1)
    alike = isinstance(frequency, int) and frequency <= 1
    experts = model.transformer.get("num_moe_experts") or 0

    def weights(rule: Rule, layer: int | None) -> Iterator[Weight]:
        offsets, axes, key = (), (), rule.megatron
        if layer is not None:
            offsets, axes = ((layer,), (len(pattern),)) if alike else ((), ())
            key = key.replace("{layer}.", "" if alike else f"{layer}.")
        names = [name.replace("{layer}", str(layer)) for name in rule.hugging_face]
        if "{expert}" not in key:
            yield Weight(rule, key, offsets, axes, tuple(names))
            return
        key, fused = key.replace("{expert}.", ""), rule.fused.replace("{layer}", str(layer))
        for expert in range(experts):
            own = tuple(name.replace("{expert}", str(expert)) for name in names)
            yield Weight(rule, key, (*offsets, expert), (*axes, experts), own, fused)

    per_layer = [rule for rule in rules if "{layer}" in rule.megatron]
    outside = [rule for rule in rules if "{layer}" not in rule.megatron]
    for rule in outside[:1]:
        yield from weights(rule, None)
    for layer, is_moe in enumerate(pattern):
        for rule in per_layer:
            if rule.layers == "all" or is_moe == (rule.layers == "moe"):
                yield from weights(rule, layer)
    for rule in outside[1:]:
        yield from weights(rule, None)


@dataclass(frozen=True)
class Family:
    """One Hugging Face architecture."""

    model_type: str
    """`model_type` in `config.json`."""
    architecture: str
    """The class in `architectures`."""
    fields: Mapping[str, str]
    """Hugging Face configuration key -> field of `ModelConfig` or `TransformerConfig`, value unchanged."""
    constants: Mapping[str, Any]
    """Fields with the same value in all models of the family."""
    rules: Callable[[ModelConfig], tuple[Rule, ...]]
    to_megatron: Callable[[PretrainedConfig], dict[str, Any]]
    """The fields whose values are converted; `ConfigError` (via `refuse`) for unsupported configurations."""
    to_hugging_face: Callable[[ModelConfig], dict[str, Any]]
    """The inverse."""
    other_names: tuple[tuple[str, str], ...] = ()
    """Alternative parts of tensor names in files -> the parts that the rules use."""

    def model_config(self, config: PretrainedConfig, where: str) -> ModelConfig:
        """The architecture of a Hugging Face configuration; `ConfigError` (prefix `where`) if it is not
        supported."""
        try:
            changed = self.to_megatron(config)
            values = {ours: getattr(config, theirs) for theirs, ours in self.fields.items()}
        except Unsupported as problem:
            raise ConfigError(f"{where}: {problem}") from None
        except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            # transformers checks few types and ranges: a list instead of a number, zero attention heads.
            raise ConfigError(
                f"{where}: config.json has an invalid value: {type(error).__name__}: {error}"
            ) from None
        values = {**self.constants, **values, **changed}
        for name in [name for name, value in changed.items() if value is None]:
            del values[name]  # the field's own default
        own = {field.name for field in dataclasses.fields(ModelConfig)}
        return ModelConfig(
            **{name: value for name, value in values.items() if name in own},
            transformer={name: value for name, value in values.items() if name not in own},
        )

    def hugging_face_config(self, model: ModelConfig) -> dict[str, Any]:
        """`config.json` of a model of this family; the inverse of `model_config`."""
        own = {field.name: getattr(model, field.name) for field in dataclasses.fields(ModelConfig)}
        values = own.pop("transformer") | own
        config = {
            theirs: values[ours] for theirs, ours in self.fields.items() if values.get(ours) is not None
        }
        config |= self.to_hugging_face(model)
        return {"architectures": [self.architecture], "model_type": self.model_type} | config

    def weights(self, model: ModelConfig) -> list[Weight]:
        """Every tensor of a model, see `expand`."""
        return list(expand(self.rules(model), model))


class Unsupported(ValueError):
    """A configuration that this package does not support."""


def refuse(condition: Any, problem: str) -> None:
    """Raise `Unsupported` if `condition`."""
    if condition:
        raise Unsupported(problem)
