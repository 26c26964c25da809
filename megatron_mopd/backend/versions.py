"""Differences between the megatron-core releases we support (>= 0.16.1, < 0.20)."""

from __future__ import annotations

import functools
import inspect
import queue

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlock
from torch import Tensor

_ROTARY, _PADDING_MASK = 1, 5
"""Places in what `GPTModel._preprocess` returns."""

_installed = False


def install() -> None:
    """Patch bugs of supported releases. Idempotent; detects features, so newer releases are unchanged."""
    global _installed
    if _installed:
        return
    _installed = True
    if not hasattr(moe_utils, "te_general_gemm"):
        # 0.16.1 without transformer-engine: the router's GEMM looks up the name before deciding not to use
        # it.
        moe_utils.te_general_gemm = None
    if multi_latent_attention.HAVE_TE and not isinstance(multi_latent_attention.TELinear, type):
        # 0.16.1 without transformer-engine: latent attention tests its layers against a class that does not
        # exist.
        multi_latent_attention.HAVE_TE = False
    if getattr(filesystem_async, "_results_queue", 0) is None:
        # The checkpoint writer passes results through a manager process, which imports everything again
        # (6 s), to support writers in other processes. Ours runs in this process.
        filesystem_async._results_queue = queue.Queue()
    if hasattr(TopKRouter, "_apply_expert_bias"):
        TopKRouter._apply_expert_bias = _with_column_mask(TopKRouter._apply_expert_bias)
    if hasattr(TransformerBlock, "_checkpointed_forward"):
        TransformerBlock._checkpointed_forward = _with_padding_mask(TransformerBlock._checkpointed_forward)
    if CheckpointWithoutOutput(fp8=False).fp8:
        CheckpointWithoutOutput.__init__ = _without_fp8(CheckpointWithoutOutput.__init__)
    DistributedOptimizer._set_main_param_and_optimizer_states = _with_step(
        DistributedOptimizer._set_main_param_and_optimizer_states
    )


def _with_step(original):
    """Loading copies every entry of a parameter's state from the checkpoint, but the step of torch's Adam is
    not among them: it is stored once and has already been set.
    """

    @functools.wraps(original)
    def wrapper(self, model_param, tensors):
        group, place = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][place]]
        if "step" in state and "step" not in tensors:
            tensors = tensors | {"step": state["step"].clone()}
        return original(self, model_param, tensors)

    return wrapper


def _with_column_mask(original):
    """Both releases combine the [tokens, experts] routing map with a [tokens] padding mask, which must be a
    column.
    """

    @functools.wraps(original)
    def wrapper(self, routing_map, padding_mask=None, **kwargs):
        if padding_mask is not None and padding_mask.dim() == 1:
            padding_mask = padding_mask.unsqueeze(-1)
        return original(self, routing_map, padding_mask=padding_mask, **kwargs)

    return wrapper


def _with_padding_mask(original):
    """0.16.1's `recompute_method: block` calls layers without recomputation without the padding mask, so that
    their routers count padding in statistics and losses.
    """

    @functools.wraps(original)
    def wrapper(self, *args, padding_mask=None, **kwargs):
        def give_mask(layer, arguments, named):
            return arguments, named | {"padding_mask": padding_mask}

        hooks = []
        if padding_mask is not None and self.config.recompute_method == "block":
            hooks = [layer.register_forward_pre_hook(give_mask, with_kwargs=True) for layer in self.layers]
        try:
            return original(self, *args, padding_mask=padding_mask, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()

    return wrapper


def _without_fp8(original):
    """In both releases, recomputing norms or latent attention's projections mistakes "no fp8" for fp8, and
    then needs transformer-engine.
    """

    @functools.wraps(original)
    def wrapper(self, fp8=False):
        original(self, fp8=fp8 or None)

    return wrapper


def backward_step(input_tensor, output_tensor, output_gradient, config):
    """megatron-core's backward pass of one micro-batch through one stage.

    Older releases take the model's type as well.
    """
    parameters = inspect.signature(schedules.backward_step).parameters
    model_type = (ModelType.encoder_or_decoder,) if "model_type" in parameters else ()
    return schedules.backward_step(input_tensor, output_tensor, output_gradient, *model_type, config)


def complete_preprocessing(
    model: GPTModel, outputs: tuple, rotary: Tensor | None, padding_mask: Tensor | None
) -> tuple:
    """What `GPTModel._preprocess` returns, with these rotary angles, and the padding mask as layers need it.

    padding_mask [b, s]. The stock model scatters it over tensor-parallel ranks on the first stage only, where
    it scatters the embeddings. No collectives.
    """
    completed = list(outputs)
    if rotary is not None:
        completed[_ROTARY] = rotary
    if padding_mask is not None and not model.pre_process and model.config.sequence_parallel:
        scattered = scatter_to_sequence_parallel_region(
            padding_mask.transpose(0, 1).contiguous(), group=model.pg_collection.tp
        )
        completed[_PADDING_MASK] = scattered.transpose(0, 1).contiguous()
    return tuple(completed)


def moe_submodules(layer_spec) -> MoESubmodules:
    """The submodules in the spec of a mixture-of-experts layer, which is a partial from 0.19 on."""
    if isinstance(layer_spec, functools.partial):
        return layer_spec.keywords["submodules"]
    return layer_spec.submodules
