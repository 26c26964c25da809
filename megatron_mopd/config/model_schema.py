"""Configuration keys of the models and of how they are laid out: student, teachers, parallelism.

Re-exported by `schema.py`, which has the other sections and says how a docstring names a key's resume class.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import model_validator

from megatron_mopd.choices import StorageMode
from megatron_mopd.config.transformer_fields import transformer_fields
from megatron_mopd.config.value_types import (
    Count,
    CountOrZero,
    FinitePositive,
    Minutes,
    Name,
    NonNegative,
    Real,
    Section,
    Text,
)


@dataclass(frozen=True)
class ParallelConfig(Section):
    """How the model and the batch are laid out over ranks; student and teachers share the layout."""

    tensor_model_parallel_size: Count = 1
    """Ranks that share each layer's matrices (TP). On resume: may change."""
    pipeline_model_parallel_size: Count = 1
    """Pipeline stages (PP). On resume: may change."""
    virtual_pipeline_model_parallel_size: Count | None = None
    """Model chunks per stage of the student (VPP); `None` or 1 means no interleaving. On resume: may
    change."""
    expert_model_parallel_size: Count = 1
    """Ranks that share the experts of each MoE layer (EP), taken out of the data-parallel ranks. On resume:
    may change."""
    expert_tensor_parallel_size: Count | None = None
    """Tensor parallelism inside each expert; default: `tensor_model_parallel_size`. On resume: may change."""
    context_parallel_size: Count = 1
    """Ranks that share each sequence (CP). On resume: may change."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions along the sequence; required by MoE with TP > 1. On
    resume: may change."""
    distributed_timeout_minutes: Minutes = 10.0
    """How long a rank waits at start-up and in a collective before the job is ended with an error. On resume:
    may change."""


_TRANSFORMER_FIELDS = transformer_fields(
    {item.name: f"parallel.{item.name}" for item in dataclasses.fields(ParallelConfig)}
    | dict.fromkeys(("params_dtype", "bf16", "fp16", "pipeline_dtype"), "params_dtype")
    | {"calculate_per_token_loss": "objective.reduction"}
)


@dataclass(frozen=True)
class ModelConfig(Section):
    """A GPT model: where its weights come from and what it looks like (`student`)."""

    load: Text | None = None
    """Checkpoint to start from: a directory with `latest_checkpointed_iteration.txt`, one `iter_*` of it, or
    a Hugging Face model. Its architecture is used; for a `torch_dist` checkpoint of Megatron-LM itself, which
    has none, the one given here. `None` initialises a new model from `seed`. On resume: must not change,
    judged by content."""
    vocab_size: Count | None = None
    """Number of real token ids; default: the tokenizer's. On resume: must not change."""
    make_vocab_size_divisible_by: Count = 128
    """The vocabulary is padded to a multiple of this times `tensor_model_parallel_size`, never sampled. On
    resume: may change."""
    max_position_embeddings: Count | None = None
    """Longest sequence the model was made for, as its checkpoint says; nothing here limits it. On resume: may
    change."""
    position_embedding_type: Literal["rope", "none"] = "rope"
    """`rope` or `none`. On resume: must not change."""
    rotary_base: FinitePositive = 10000.0
    """Base period of the rotary embedding. On resume: must not change."""
    rotary_percent: Real = 1.0
    """Share of each head's channels that is rotated. On resume: must not change."""
    rope_scaling: dict[Name, Any] | None = None
    """Stretches the rotary embedding: `rope_type` (`linear`, `llama3` or `yarn`), `factor` and what else that
    type needs, under the names of Hugging Face's `rope_parameters`. On resume: must not change."""
    attention_output_bias: bool = False
    """A bias on the attention's output projection alone (`add_bias_linear` puts one on every linear). On
    resume: must not change."""
    qk_layernorm_over_heads: bool = False
    """The norms of `qk_layernorm` run over all heads of a token together (OLMoE) instead of over each. On
    resume: must not change."""
    share_embeddings_and_output_weights: bool = False
    """Tie the output head to the input embedding. On resume: must not change."""
    transformer: Annotated[dict[str, Any], _TRANSFORMER_FIELDS] = field(default_factory=dict)
    """Any other field of megatron-core's `TransformerConfig`, by its own name, directly in the section. Those
    that say how the model is computed and not what it is (`recompute_*`, `moe_token_dispatcher_type`) may
    change on resume, the others not. On resume: must not change."""

    @model_validator(mode="before")
    @classmethod
    def _collect_transformer_fields(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        own = {item.name for item in dataclasses.fields(cls)} - {"transformer"}
        others = {key: value for key, value in values.items() if key not in own}
        return {key: value for key, value in values.items() if key in own} | {"transformer": others}


@dataclass(frozen=True)
class TeacherConfig(Section):
    """One frozen domain expert (an entry of the list `teachers`)."""

    name: Text = ""
    """Unique name, used in `routing` and in every metric. `self` is the student as it was at the start. On
    resume: must not change, judged by content."""
    load: Text | None = None
    """Checkpoint directory of the expert, as in `student.load`; one of Megatron-LM itself is built like the
    student. Must be left out for `self` and given for every other teacher. On resume: must not change, judged
    by content."""
    kl_floor: NonNegative = 1e-6
    """Mean KL per token at the first step below which an alarm says that the teacher equals the student. On
    resume: may change."""
    kl_ceiling: NonNegative = 5.0
    """Mean KL per token at the first step above which an alarm says that the teacher does not fit. On resume:
    may change."""


@dataclass(frozen=True)
class TeacherStorageConfig(Section):
    """Where the teachers' weights rest, and what is kept of their forward passes (`teacher_storage`)."""

    mode: StorageMode = "host"
    """`host`: every rank keeps its own shard of every teacher in (page-locked) host memory; `host_sharded`:
    every data-parallel replica keeps its part, an all-gather puts a teacher together when it arrives; `mmap`:
    files written once into `mmap_directory`, read when a teacher arrives. On resume: may change."""
    dtype: Literal["int8", "fp8"] | None = None
    """Resting form: `None` as computed with (`params_dtype`), or `int8` or `fp8` with a scale per 128
    weights. On resume: must not change."""
    mmap_directory: Text | None = None
    """Directory of the `mmap` files; default: `teachers` in the run directory. May be a disk of each host's
    own. On resume: may change."""
    hidden_cache_device: Literal["host", "device"] = "host"
    """Where last-layer hidden states wait for the loss: `host` memory, or the `device`. On resume: may
    change."""
    hidden_cache_dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = None
    """Precision they are kept in; `None`: that of the model (`params_dtype`), which loses nothing. On resume:
    must not change."""
    hidden_cache_bytes: CountOrZero | None = None
    """Most bytes of hidden states that a rank of the last stage keeps at once; `None`: no limit. A batch that
    needs more is processed in parts, with the same result. On resume: may change."""
