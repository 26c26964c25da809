"""Multi-teacher on-policy distillation of mixture-of-experts models on megatron-core."""

import logging
import warnings

__version__ = "0.1.0"

# What megatron-core and torch say of their own insides, at every start and on every rank: two screens of it
# before the first step, and nobody who runs them can do anything about it. These sentences only; every other
# warning is shown. That Apex or Transformer Engine is not there is no fault either: what stands in for them
# is this package's own choice (`model/specs.py`).
for _message in (
    r"(Transformer Engine and Apex are|Apex is) not installed\. Falling back to ",
    r"full scope is deprecated\. Use empty cuda_graph_",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    r"`torch\.distributed\.(reduce_scatter|all_gather_into)_tensor` is deprecated",
    r"`load_state_dict` is deprecated and will be removed in future versions",
    r"MimoModelConfig is experimental",
    r"torch\.distributed is disabled, unavailable or uninitialized, assuming the intent is to ",
    r"The argument order of (load|save) has been changed",
    r"Please use DTensor instead and we are deprecating ShardedTensor",
):
    warnings.filterwarnings("ignore", message=_message)

# The same for what they log, which filters of warnings do not see: logger -> the sentence's beginning.
for _logger, _beginning in (
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCore's async save is deprecated"),
    ("megatron.core.distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout"),
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
):
    logging.getLogger(_logger).addFilter(
        lambda record, beginning=_beginning: not record.getMessage().startswith(beginning)
    )
