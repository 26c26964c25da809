"""Silences what torch and megatron-core report about themselves: two screens of it on every rank before the
first step, about which a user can do nothing.

Only the messages listed here are silenced; every other warning is shown. That Apex or Transformer Engine is
not installed is no fault either: what replaces them is this package's own choice (`model/specs.py`).
"""

import logging
import warnings

_WARNINGS = (
    r"(Transformer Engine and Apex are|Apex is) not installed\. Falling back to ",
    r"full scope is deprecated\. Use empty cuda_graph_",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    r"`torch\.distributed\.(reduce_scatter|all_gather_into)_tensor` is deprecated",
    r"`load_state_dict` is deprecated and will be removed in future versions",
    r"MimoModelConfig is experimental",
    r"torch\.distributed is disabled, unavailable or uninitialized, assuming the intent is to ",
    r"The argument order of (load|save) has been changed",
    r"Please use DTensor instead and we are deprecating ShardedTensor",
)

_LOG_RECORDS = (
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
    ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout"),
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
)
"""(logger, beginning of the message); warning filters do not see what is logged."""


def silence_dependencies() -> None:
    """Add the filters to this process. Call it once, before megatron-core is imported: it warns then."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for logger, beginning in _LOG_RECORDS:
        logging.getLogger(logger).addFilter(
            lambda record, beginning=beginning: not record.getMessage().startswith(beginning)
        )
