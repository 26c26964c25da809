"""Detects reads of uninitialized memory on any CPU. Importing this module turns the checks on for the process
and for all that are forked from it.

- Fresh tensors hold NaN (integers their largest value) instead of arbitrary data.
- A matrix product fails if memory that it may read next to the rows of an operand is not finite. With AMX,
  oneDNN multiplies bfloat16 in pairs and reads one element past a row of odd length, times 0: NaN if that
  element is NaN. Other CPUs and dtypes do not read past the row, so only this check finds the error there.
"""

import functools

import torch
from torch import Tensor

_FACTORS = {
    0: ("mm", "mm.out", "bmm", "bmm.out", "mv", "mv.out"),
    1: ("addmm", "addmm_", "addmm.out", "baddbmm", "baddbmm_", "baddbmm.out", "addmv", "addmv_", "addmv.out")
    + ("_addmm_activation", "_addmm_activation.out"),
}
"""Index of the first factor among the arguments -> the ATen operators that implement every product."""


def beside_rows(matrix: Tensor) -> list[Tensor]:
    """Views of the gaps between the rows of a matrix [..., m, n] (the columns, if it is transposed), and of
    the element after the last row if the row length is odd and the element belongs to the same storage."""
    if matrix.dim() < 2 or matrix.numel() == 0 or (matrix.size(-1) % 2 == 0 and matrix.is_contiguous()):
        return []
    if matrix.stride(-1) != 1:
        matrix = matrix.transpose(-1, -2)
    *outer, rows, length = matrix.shape
    *strides, pitch, unit = matrix.stride()
    if unit != 1 or (rows > 1 and pitch < length):  # the elements of a row are not adjacent, or rows overlap
        return []
    start, views = matrix.storage_offset() + length, []
    if rows > 1 and pitch > length:
        views.append(matrix.as_strided((*outer, rows - 1, pitch - length), (*strides, pitch, 1), start))
    last = start + (rows - 1) * pitch + sum((n - 1) * stride for n, stride in zip(outer, strides))
    if length % 2 and last < matrix.untyped_storage().nbytes() // matrix.element_size():
        views.append(matrix.as_strided(tuple(outer), tuple(strides), start + (rows - 1) * pitch))
    return views


def _checked(name: str, first: int, product, keys, *arguments, **options):
    for factor in arguments[first : first + 2]:
        beside = beside_rows(factor)
        # A factor that is not finite itself, such as a damaged weight, gives NaN anyway.
        if not all(view.isfinite().all() for view in beside) and factor.isfinite().all():
            raise AssertionError(
                f"{name}: unwritten memory next to the rows of {list(factor.shape)} with strides "
                f"{factor.stride()}: fill it, or multiply a contiguous matrix"
            )
    return product.call_boxed(keys, *arguments, **options)


def _make_visible() -> torch.library.Library:
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)  # without it torch fills nothing
    torch.are_deterministic_algorithms_enabled = lambda: False  # so that megatron-core takes its usual paths
    library = torch.library.Library("aten", "IMPL")
    for first, names in _FACTORS.items():
        for name in names:
            product = torch.library.get_kernel(f"aten::{name}", "CPU")
            library.impl(name, functools.partial(_checked, name, first, product), "CPU", with_keyset=True)
    return library


_library = _make_visible()  # deleting the library would unregister its kernels
