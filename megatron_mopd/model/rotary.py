"""Rotary position embeddings: frequencies for every supported scaling, per-token angles, and the rotation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# Keys of a `rope_scaling` mapping by `rope_type`: (required, optional).
SCALING_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
    ),
}


# Keys that some publishers write and that have no effect here: `_IGNORED` by `rope_type` for any value,
# `_DEFAULTS` for every type only at this value (other programs read them, and a different value would change
# the result).
_IGNORED: dict[str, tuple[str, ...]] = {
    "default": tuple({key for keys in SCALING_KEYS.values() for key in (*keys[0], *keys[1])}),
    "linear": ("original_max_position_embeddings",),
}
_DEFAULTS = {"attn_factor": 1, "extrapolation_factor": 1, "attention_factor": 1}


def effective_scaling(scaling: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A `rope_scaling` mapping without the keys that have no effect; `None` if there is no scaling.

    These are `finetuned` (whether weights were trained with it), the old name `type`, keys without a
    value, attention factors of 1 for types without such a factor, the original context of `linear`, and
    leftover keys of other types with `rope_type: default`. All other keys are kept for `check_scaling`.
    """
    if scaling is None:
        return None
    kind = scaling.get("rope_type", scaling.get("type"))
    if not isinstance(kind, str):
        return {**scaling, "rope_type": kind}
    known = {key for keys in SCALING_KEYS.get(kind, ((), ())) for key in keys}
    ignored = {"finetuned", "type", *_IGNORED.get(kind, ())}
    kept = {
        key: value
        for key, value in scaling.items()
        if key in known or not (key in ignored or value is None or _is_default(key, value))
    }
    kept = {"rope_type": kind} | kept
    return None if kept == {"rope_type": "default"} else kept


def _is_default(key: str, value: Any) -> bool:
    return key in _DEFAULTS and not isinstance(value, bool) and value == _DEFAULTS[key]


def check_scaling(scaling: Mapping[str, Any] | None) -> str | None:
    """A short description of the problem with a `rope_scaling` mapping; `None` if it is valid."""
    scaling = effective_scaling(scaling)
    if scaling is None:
        return None
    kind = scaling["rope_type"]
    if not isinstance(kind, str) or kind not in SCALING_KEYS:
        return f"rope_type {kind!r} is not one of {', '.join(SCALING_KEYS)}"
    needed, optional = SCALING_KEYS[kind]
    if missing := [key for key in needed if scaling.get(key) is None]:
        return f"rope_type {kind!r} needs {', '.join(missing)}"
    if unknown := sorted(scaling.keys() - {"rope_type", *needed, *optional}):
        return f"rope_type {kind!r} does not accept {', '.join(unknown)}"
    return None


def yarn_magnitude(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature as a factor on queries and keys: 0.1 m ln(s) + 1 (arXiv 2309.00071, 3.4)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def inverse_frequencies(channels: int, base: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """Radians per position for each pair of channels, [channels / 2] fp32.

    `linear` divides all by `factor`; `llama3` only those whose wavelength exceeds the original context, with
    a smooth transition (Llama 3.1); `yarn` blends by the number of turns within the original context (arXiv
    2309.00071, 3.2).
    """
    exponents = torch.arange(0, channels, 2, dtype=torch.int64).to(torch.float32) / channels
    periods = base**exponents  # in positions per radian
    kind = scaling["rope_type"] if scaling else "default"
    if kind == "default":
        return 1.0 / periods
    factor = scaling["factor"]
    if kind == "linear":
        return 1.0 / periods / factor
    original = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        frequencies = 1.0 / periods
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        wavelength = 2 * math.pi / frequencies
        keep = ((original / wavelength - low) / (high - low)).clamp(0, 1)
        blended = (1 - keep) * frequencies / factor + keep * frequencies
        return torch.where(keep == 1, frequencies, torch.where(keep == 0, frequencies / factor, blended))
    first, last = (
        channels * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1)
    )
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, channels - 1)
    last += 0.001 if first == last else 0
    ramp = ((torch.arange(channels // 2, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)
    keep = 1 - ramp
    return 1.0 / (factor * periods) * (1 - keep) + 1.0 / periods * keep


def attention_factor(scaling: Mapping[str, Any] | None) -> float:
    """YaRN's factor on the rotated channels of queries and keys; 1 for all other kinds."""
    if not scaling or scaling["rope_type"] != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    mscale, all_channels = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_channels:
        return yarn_magnitude(scaling["factor"], mscale) / yarn_magnitude(scaling["factor"], all_channels)
    return yarn_magnitude(scaling["factor"])


class RotaryAngles:
    """Cosines and sines for tokens at arbitrary positions, recomputed for every forward pass.

    A table over all positions would be larger than a batch needs and would limit the sequence length.
    """

    def __init__(self, channels: int, base: float, scaling: Mapping[str, Any] | None = None):
        self._frequencies = inverse_frequencies(channels, base, scaling)
        self._factor = attention_factor(scaling)

    def __call__(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Positions [b or 1, s] -> factors for `rotate`, [2, s, b or 1, 1, channels]: cosines, and sines that
        are negated for the first half of the channels.

        Computed in fp32 like every published implementation, then rounded to `dtype`.
        """
        if self._frequencies.device != position_ids.device:
            self._frequencies = self._frequencies.to(position_ids.device)
        angles = position_ids.transpose(0, 1).float().unsqueeze(-1) * self._frequencies
        cosines, sines = angles.cos() * self._factor, angles.sin() * self._factor
        factors = torch.stack((torch.cat((cosines, cosines), dim=-1), torch.cat((-sines, sines), dim=-1)))
        return factors.to(dtype).unsqueeze(3)


def rotate(x: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first c channels of x [s, b, heads, d] by `angles` [2, s, b or 1, 1, c]; the others are
    unchanged. Works for any shape to which `angles` can be broadcast.

    Channel i is paired with channel i + c/2, or with its neighbor if `interleaved` (the result then has the
    non-interleaved order, which is the same for queries and keys, as attention requires).
    """
    cosines, sines = angles.unbind(0)
    width = cosines.size(-1)
    turned = x if width == x.size(-1) else x[..., :width]
    if interleaved:
        turned = torch.cat((turned[..., 0::2], turned[..., 1::2]), dim=-1)
    partners = turned.roll(width // 2, dims=-1)
    turned = turned * cosines + partners * sines  # rounded as `transformers` rounds
    return turned if width == x.size(-1) else torch.cat((turned, x[..., width:]), dim=-1)
