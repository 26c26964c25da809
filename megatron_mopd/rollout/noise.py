"""Counter-based random numbers: a function of their purpose, not of the rank or the order of draws."""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN_64 = 0x9E3779B97F4A7C15
_GOLDEN_32 = 0x9E3779B9


def _signed(value: int, bits: int) -> int:
    """The two's complement integer with the same bits; torch's integers are signed and wrap around."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def _mix_64(x: Tensor) -> Tensor:
    """splitmix64's finalizer (Steele, Lea, Flood 2014): every input bit affects every output bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor, 64)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _mix_32_(x: Tensor) -> Tensor:
    """The 32-bit mixer "lowbias32" (Wellons 2018), in place on int32."""
    scratch = torch.empty_like(x)

    def fold(shift: int) -> None:  # x ^= x >>> shift; torch's >> repeats the sign bit, the mask removes it
        torch.bitwise_right_shift(x, shift, out=scratch)
        x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))

    fold(16)
    x.mul_(_signed(0x7FEB352D, 32))
    fold(15)
    x.mul_(_signed(0x846CA68B, 32))
    fold(16)
    return x


def gumbel_noise(
    seed: int, trajectories: Tensor, position: int | Tensor, first_id: int, columns: int
) -> Tensor:
    """Standard Gumbel noise for each (seed, trajectory, response position, vocabulary id): [b, columns] fp32.

    `trajectories` [b] int64 identifies the rows, `position` is one number for all rows or [b], and the
    columns are the ids `first_id`, `first_id + 1`, ...: the same four keys give the same number for any
    tensor-parallel shard, batch or order of work. The two 32-bit words of a 64-bit key of (seed, trajectory,
    position) enter the hash of each id. The noise ranges from about -3.1 to 21.5, so events rarer than about
    5e-10 do not occur.
    """
    key = _mix_64(_mix_64(trajectories + _signed(seed * _GOLDEN_64, 64)) + position)
    low, high = ((key << 32) >> 32).to(torch.int32), (key >> 32).to(torch.int32)
    ids = torch.arange(first_id, first_id + columns, device=key.device, dtype=torch.int64) * _GOLDEN_32
    bits = low.unsqueeze(1) + ((ids << 32) >> 32).to(torch.int32)
    bits = _mix_32_(_mix_32_(bits).bitwise_xor_(high.unsqueeze(1)))
    uniform = bits.bitwise_and_(0x7FFFFFFF).to(torch.float32).mul_(2.0**-31).add_(2.0**-32)
    # -log(-log(1 - u)): small u, which gives large noise, keeps its full relative precision. The clamp keeps
    # 1 - u above zero where u was rounded to one.
    return uniform.clamp_(max=1 - 2.0**-24).neg_().log1p_().neg_().log_().neg_()
