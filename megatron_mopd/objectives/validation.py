"""Argument checks shared by the objectives; each raises ValueError with the expected and the actual value."""

import torch
from torch import Tensor


def check_pair(what: str, student: Tensor, teacher: Tensor) -> None:
    """Check for floating point, one dtype (a teacher rounded differently gives negative KL) and one
    device."""
    for name, side in (("student", student), ("teacher", teacher)):
        if not side.is_floating_point():
            raise ValueError(f"{name} {what} must be floating point, got {side.dtype}")
    for attribute in ("dtype", "device"):
        expected, actual = getattr(student, attribute), getattr(teacher, attribute)
        if expected != actual:
            raise ValueError(
                f"teacher {what} must have the student's {attribute}, {expected}, got {actual}: "
                "both models must use the same precision"
            )


def check_head(name: str, hidden: Tensor, weight: Tensor) -> None:
    """Check hidden [T, h] and weight [V/tp, h] for one floating-point dtype and device."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{name} hidden and weight must be [T, h] and [V/tp, h], "
            f"got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise ValueError(
            f"{name} hidden and weight must share one floating point dtype and one device, "
            f"got {hidden.dtype} on {hidden.device} and {weight.dtype} on {weight.device}"
        )


def check_chunk_size(chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 token, got {chunk_size}")


def check_per_token(name: str, values: Tensor, hidden: Tensor) -> None:
    """Check that values are [T] and on the device of hidden [T, h]."""
    if values.shape != hidden.shape[:1] or values.device != hidden.device:
        raise ValueError(
            f"{name} must be [T] = {[hidden.shape[0]]} on {hidden.device}, "
            f"got {list(values.shape)} on {values.device}"
        )


def check_token_weight(token_weight: Tensor, hidden: Tensor, finite: bool = True) -> None:
    """Check weights [T]; with `finite`, also that they are finite."""
    check_per_token("token_weight", token_weight, hidden)
    if finite and not bool(torch.isfinite(token_weight).all()):
        token = int(torch.isfinite(token_weight).logical_not().nonzero()[0])
        raise ValueError(f"token_weight must be finite, got {float(token_weight[token])} at token {token}")


def check_token_ids(name: str, token_ids: Tensor, in_use: Tensor | None, vocab_size: int) -> None:
    """Check for integer ids in [0, vocab_size) where `in_use` [T] is true (None: everywhere)."""
    if token_ids.is_floating_point() or token_ids.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {token_ids.dtype}")
    outside = (token_ids < 0) | (token_ids >= vocab_size)
    if in_use is not None:
        outside &= in_use
    if bool(outside.any()):
        token = int(outside.nonzero()[0])
        raise ValueError(f"{name} must be in [0, {vocab_size}), got {int(token_ids[token])} at token {token}")


def check_main_grad(weight: Tensor, accumulate_into_main_grad: bool) -> None:
    if accumulate_into_main_grad and getattr(weight, "main_grad", None) is None:
        raise ValueError(
            "accumulate_into_main_grad=True needs a weight with a main_grad buffer, "
            "which megatron-core's DistributedDataParallel creates"
        )
