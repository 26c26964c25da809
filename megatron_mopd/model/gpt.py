"""A GPTModel that returns hidden states; the objective applies the output layer."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_mopd.backend.versions import complete_preprocessing
from megatron_mopd.model.rotary import RotaryAngles
from megatron_mopd.model.router import BalancedRouter


class HiddenStateGPT(GPTModel):
    """One pipeline stage (or virtual chunk) of a GPT model.

    `forward(tokens [b, s], position_ids [b or 1, s], attention_mask, ...)` returns the hidden states after
    the final norm on the last stage, [s, b, h] ([s/tp, b, h] under sequence parallelism), and the stage's
    output on other stages; never logits. `head_weight()` is this rank's shard of the output head, [padded
    vocabulary / tp, h].

    Rotary positions are given per token, so packed documents, context-parallel slices and decoded rows all
    use positions 0, 1, 2, ... within their own document.
    """

    def __init__(self, *args, rotary: RotaryAngles | None, **kwargs):
        # megatron-core's own tables count positions from the start of the row.
        super().__init__(*args, position_embedding_type="none", **kwargs)
        self._rotary = rotary
        self.routers = [module for module in self.modules() if isinstance(module, BalancedRouter)]

    def _preprocess(self, input_ids, position_ids, *args, padding_mask: Tensor | None = None, **kwargs):
        outputs = super()._preprocess(input_ids, position_ids, *args, padding_mask=padding_mask, **kwargs)
        rotary = None if self._rotary is None else self._rotary(position_ids, self.config.params_dtype)
        return complete_preprocessing(self, outputs, rotary, padding_mask)

    def _postprocess(self, hidden_states: Tensor, **_unused) -> Tensor:
        return hidden_states

    def head_weight(self) -> Tensor:
        """This rank's shard of the output head [padded vocabulary / tp, h]; last stage only."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def unwrap(module: torch.nn.Module) -> HiddenStateGPT:
    """The model inside DistributedDataParallel."""
    while not isinstance(module, HiddenStateGPT):
        module = module.module
    return module


def is_expert(name: str) -> bool:
    """Whether the parameter or buffer with this name belongs to a routed expert, and is replicated like
    one."""
    return ".experts." in name
