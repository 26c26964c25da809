"""Selects the implementation of the passes over logits: Triton on CUDA, PyTorch otherwise."""

from types import ModuleType

import torch

from megatron_mopd.objectives import torch_kernels


def kernels_for(device: torch.device) -> ModuleType:
    """The module that provides `statistics`, `mean_score` and `divergence` for tensors on `device`."""
    if device.type != "cuda":
        return torch_kernels
    try:
        from megatron_mopd.objectives import triton_kernels
    except ImportError:  # Triton is optional; without it CUDA uses the same path as the CPU
        return torch_kernels
    return triton_kernels
