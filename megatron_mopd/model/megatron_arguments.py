"""Reads Megatron-LM's command-line arguments from its checkpoints, and compares them with an architecture.

Megatron-LM saves `args`, an `argparse.Namespace` with values of its own classes, in a checkpoint's common
state. They are read without instantiating these classes; only numbers and strings are used.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from typing import Any

from megatron_mopd.backend.messages import shown
from megatron_mopd.config import ConfigError, ModelConfig
from megatron_mopd.model.families.table import Sizes

NEEDED = ("num_layers", "hidden_size", "num_attention_heads")
"""The keys that a configuration must contain."""


def check_arguments(arguments: dict[str, Any], model: ModelConfig, what: str) -> None:
    """Compare an architecture with the arguments with which Megatron-LM trained it.

    Tensor shapes do not determine, for example, the rotary base or the grouping of heads. Raises
    `ConfigError` (prefix `what`) that names the difference.
    """
    for name, (key, ours) in _as_arguments(model, arguments).items():
        if name in arguments and (theirs := arguments[name]) != ours:
            raise ConfigError(
                f"{what} was trained by Megatron-LM with {name}={shown(theirs)}, the configuration says "
                f"{shown(ours)}; set {key} under student to that value"
            )


def _as_arguments(model: ModelConfig, arguments: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Megatron-LM's argument -> our key, and the argument's value for this model."""
    get, sizes = model.transformer.get, Sizes.of(model)
    result = {name: (name, get(name)) for name in NEEDED}
    result |= {
        "ffn_hidden_size": ("ffn_hidden_size", sizes.ffn),
        "normalization": ("normalization", get("normalization", "RMSNorm")),
        "norm_epsilon": ("layernorm_epsilon", get("layernorm_epsilon", 1e-5)),
        "swiglu": ("gated_linear_unit", bool(get("gated_linear_unit", True))),
        "add_bias_linear": ("add_bias_linear", bool(get("add_bias_linear"))),
        "add_qkv_bias": ("add_qkv_bias", bool(get("add_qkv_bias"))),
        "qk_layernorm": ("qk_layernorm", bool(get("qk_layernorm"))),
        "num_experts": ("num_moe_experts", get("num_moe_experts")),
        "position_embedding_type": ("position_embedding_type", model.position_embedding_type),
        "multi_latent_attention": ("multi_latent_attention", bool(get("multi_latent_attention"))),
        "untie_embeddings_and_output_weights": (
            "share_embeddings_and_output_weights, its opposite,",
            not model.share_embeddings_and_output_weights,
        ),
    }
    if not get("multi_latent_attention"):
        result["kv_channels"] = ("kv_channels", sizes.head)
        if arguments.get("group_query_attention"):
            result["num_query_groups"] = ("num_query_groups", sizes.groups)
        else:
            result["group_query_attention"] = ("num_query_groups", sizes.groups != get("num_attention_heads"))
    if model.position_embedding_type == "rope":
        result["rotary_base"] = ("rotary_base", model.rotary_base)
        result["rotary_percent"] = ("rotary_percent", model.rotary_percent)
        result["use_rope_scaling"] = ("rope_scaling", bool(model.rope_scaling))
    if get("num_moe_experts"):
        defaults = {
            "moe_router_topk": 2,
            "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": False,
            "moe_router_enable_expert_bias": False,
            "moe_router_topk_scaling_factor": None,
            "moe_router_num_groups": None,
            "moe_router_group_topk": None,
            "moe_shared_expert_intermediate_size": None,
        }
        result |= {name: (name, get(name, default)) for name, default in defaults.items()}
    return result


def read_arguments(data: bytes) -> dict[str, Any]:
    """The arguments in a checkpoint's common state, as written by `torch.save`: only numbers and strings.

    Empty if they cannot be read. Nothing that the file names is called.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            (entry,) = (e for e in archive.infolist() if e.filename.split("/")[1:] == ["data.pkl"])
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > len(data):
                return {}
            common = _Inert(io.BytesIO(archive.read(entry))).load()
        if type(common) is list:  # megatron-core 0.19
            common = common[0]
        arguments = common["args"].state if type(common["args"]) is _Namespace else {}
        plain = (type(None), bool, int, float, str)
        return {
            name: value for name, value in arguments.items() if type(name) is str and type(value) in plain
        }
    except Exception:  # unreadable arguments only mean fewer checks
        return {}


class _Nothing:
    """Stands in for every class and function that a pickle names, and for the objects they would create."""

    def __new__(cls, *arguments: Any, **named: Any) -> _Nothing:
        return object.__new__(cls)

    def __init__(self, *arguments: Any, **named: Any):
        self.state: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state if type(state) is dict else {}

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        pass


class _Namespace(_Nothing):
    """Stands in for `argparse.Namespace`."""


# The pure-Python implementation, for the reason given in `pickled_files`.
class _Inert(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> type[_Nothing]:
        return _Namespace if (module, name) == ("argparse", "Namespace") else _Nothing

    def persistent_load(self, pid: Any) -> _Nothing:
        return _Nothing()
