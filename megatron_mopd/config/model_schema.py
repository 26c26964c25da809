"""Configuration keys of the models and their parallel layout: student, teachers, parallelism.

Re-exported by `schema.py`, which has the other sections and explains how a docstring names a key's resume
class.
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
    """How the models and the batch are distributed over ranks; student and teachers share the layout."""

    tensor_model_parallel_size: Count = 1
    """Ranks that share each layer's matrices (TP). On resume: may change."""
    pipeline_model_parallel_size: Count = 1
    """Pipeline stages (PP). On resume: may change."""
    virtual_pipeline_model_parallel_size: Count | None = None
    """Model chunks per stage of the student (VPP); `None` or 1 means no interleaving. On resume: may
    change."""
    expert_model_parallel_size: Count = 1
    """Ranks that share the experts of each MoE layer (EP), a subset of the data-parallel ranks. On resume:
    may change."""
    expert_tensor_parallel_size: Count | None = None
    """Tensor parallelism inside each expert; default: `tensor_model_parallel_size`. On resume: may change."""
    context_parallel_size: Count = 1
    """Ranks that share each sequence (CP). On resume: may change."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions along the sequence; required by MoE with TP > 1. On
    resume: may change."""
    teacher_block_size: Count | None = None
    """Data-parallel ranks of a block, which get samples of the same teachers and run the same plan; blocks
    differ in their teachers. `None`: the ranks that share experts (1 for a dense model); with
    `teacher_storage.mode: host_sharded`, which shards teachers over a block, the ranks of a host; with
    `global_aux_loss`, all of them. On resume: may change."""
    distributed_timeout_minutes: Minutes = 10.0
    """How long a rank waits at start-up and in a collective before the job ends with an error. On resume: may
    change."""


_TRANSFORMER_FIELDS = transformer_fields(
    {item.name: f"parallel.{item.name}" for item in dataclasses.fields(ParallelConfig)}
    | dict.fromkeys(("params_dtype", "bf16", "fp16", "pipeline_dtype"), "params_dtype")
    | {"calculate_per_token_loss": "objective.reduction"}
)


@dataclass(frozen=True)
class ModelConfig(Section):
    """A GPT model: its initial weights and its architecture (`student`)."""

    load: Text | None = None
    """Checkpoint to start from: a directory with `latest_checkpointed_iteration.txt`, one of its `iter_*`
    directories, or a Hugging Face model. Its architecture is used, except that a `torch_dist` checkpoint
    written by Megatron-LM itself has none and uses the one given here. `None` initializes a new model from
    `seed`. On resume: must not change, judged by content."""
    vocab_size: Count | None = None
    """Number of real token ids; default: the tokenizer's. On resume: must not change."""
    make_vocab_size_divisible_by: Count = 128
    """The vocabulary is padded to a multiple of this times `tensor_model_parallel_size`; padding is never
    sampled. On resume: may change."""
    max_position_embeddings: Count | None = None
    """Longest sequence the model was built for, according to its checkpoint; informational only. On resume:
    may change."""
    position_embedding_type: Literal["rope", "none"] = "rope"
    """`rope` or `none`. On resume: must not change."""
    rotary_base: FinitePositive = 10000.0
    """Base period of the rotary embedding. On resume: must not change."""
    rotary_percent: Real = 1.0
    """Fraction of each head's channels that is rotated. On resume: must not change."""
    rope_scaling: dict[Name, Any] | None = None
    """Scaling of the rotary embedding: `rope_type` (`linear`, `llama3` or `yarn`), `factor` and the other
    parameters of that type, named as in Hugging Face's `rope_parameters`. On resume: must not change."""
    attention_output_bias: bool = False
    """Add a bias to the attention output projection only (`add_bias_linear` adds one to every linear layer).
    On resume: must not change."""
    qk_layernorm_over_heads: bool = False
    """Apply the norms of `qk_layernorm` over all heads of a token together (OLMoE) instead of per head. On
    resume: must not change."""
    share_embeddings_and_output_weights: bool = False
    """Tie the LM head to the input embedding. On resume: must not change."""
    transformer: Annotated[dict[str, Any], _TRANSFORMER_FIELDS] = field(default_factory=dict)
    """Any other field of megatron-core's `TransformerConfig`, by its own name, directly in the section.
    Fields that only affect how the model is computed (`recompute_*`, `moe_token_dispatcher_type`) may change
    on resume, the others may not. On resume: must not change."""

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
    """Unique name, used in `routing` and in every metric. `self` is the initial student. On resume: must not
    change, judged by content."""
    load: Text | None = None
    """Checkpoint directory of the expert, as in `student.load`; a checkpoint written by Megatron-LM itself is
    assumed to have the student's architecture. Must be omitted for `self` and given for every other teacher.
    On resume: must not change, judged by content."""
    kl_floor: NonNegative = 1e-6
    """Mean KL per token at the first step below which an alarm says that the teacher equals the student. On
    resume: may change."""
    kl_ceiling: NonNegative = 5.0
    """Mean KL per token at the first step above which an alarm says that the teacher does not fit. On resume:
    may change."""


@dataclass(frozen=True)
class TeacherStorageConfig(Section):
    """Storage of the teachers' weights and cache of their hidden states (`teacher_storage`)."""

    mode: StorageMode = "host"
    """`host`: every rank keeps its own shard of every teacher in (page-locked) host memory; `host_sharded`:
    every replica in a block (`parallel.teacher_block_size`) keeps a part, and an all-gather assembles a
    teacher when it is loaded; `mmap`: files written once into `mmap_directory`, read when a teacher is
    loaded. On resume: may change."""
    dtype: Literal["int8", "fp8"] | None = None
    """Storage format: `None` for the compute type (`params_dtype`), or `int8` or `fp8` with one scale per 128
    weights. On resume: must not change."""
    mmap_directory: Text | None = None
    """Directory of the `mmap` files; default: `teachers` in the run directory. May be on each host's local
    disk. On resume: may change."""
    hidden_cache_device: Literal["host", "device"] = "host"
    """Where last-layer hidden states are kept until the loss needs them: in `host` memory, or on the
    `device`. On resume: may change."""
    hidden_cache_dtype: Literal["bfloat16", "float16", "float32", "float64"] | None = None
    """Precision of the cached hidden states; `None`: the model's (`params_dtype`), which is lossless. On
    resume: must not change."""
    hidden_cache_bytes: CountOrZero | None = None
    """Maximum bytes of hidden states that a rank of the last stage keeps at once; `None`: no limit. A batch
    that needs more is processed in parts, with the same result. On resume: may change."""
