"""Definitions shared by the PyTorch and Triton implementations: a divergence's parameters, formulas and row
scalars.

With p and q the student's and the teacher's probabilities and d = log q - log p, all divergences are built
from the pointwise generalized KL divergence of two masses,

    D(w || r) = w log(w / r) - w + r = w (expm1(d) - d),    d = log(r / w),

which is never negative and zero only for w = r. Its sum over the vocabulary is the divergence, because p and
q have equal sums; unlike sum p (log p - log q), it has no cancellation near convergence:

    reverse KL   sum_v D(p || q)                                  d/dz_v = p (-d - E_p[-d])
    forward KL   sum_v D(q || p)                                  d/dz_v = p - q
    JSD(beta)    sum_v beta D(q || m) + (1 - beta) D(p || m)      d/dz_v = (1 - beta) p (-l - E_p[-l])

with m = beta q + (1 - beta) p and l = log m - log p: the generalized Jensen-Shannon divergence of Agarwal et
al. (arXiv 2306.13649, equation 1, with the teacher as P). As there, beta = 0 and beta = 1, for which the
formula is constantly zero, select its limits: forward and reverse KL. z are the student's logits divided by
the temperature.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")

# Replaces -inf in arithmetic: its exponential is exactly zero, and zero times it is zero instead of NaN.
LOGIT_FLOOR = -1e30

# expm1(d) - d = d^2 (1/2 + d/6 + d^2/24 + ...): coefficients, highest power first.
SERIES = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2)


def series_limit(dtype: torch.dtype) -> float:
    """|d| below which D(w || r) is computed by the series, because r - w - w d has lost half of its digits.

    At the limit the relative error of the series is 2 d^5 / 5040 (4e-9 and 4e-14) and that of the direct form
    about 4 eps / d^2 (2e-5 and 9e-12), which becomes smaller in a sum over the vocabulary.
    """
    return 0.01 if dtype == torch.float64 else 0.1


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Softmax statistics are fp32, or fp64 for fp64 logits, whatever the logits' dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class DivergenceSpec:
    """A validated divergence: `kind` is one of DIVERGENCES; logits are divided by `temperature`.

    Raises:
        ValueError: unknown divergence, beta outside [0, 1], temperature not above 0.
    """

    divergence: str = "reverse_kl"
    beta: float = 0.5
    temperature: float = 1.0
    kind: str = field(init=False)

    def __post_init__(self):
        if self.divergence not in DIVERGENCES:
            raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {self.divergence!r}")
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta must be in [0, 1], got {self.beta}")
        check_temperature(self.temperature)
        limits = {0.0: "forward_kl", 1.0: "reverse_kl"}
        kind = limits.get(self.beta, "jsd") if self.divergence == "jsd" else self.divergence
        object.__setattr__(self, "kind", kind)

    @property
    def inverse_temperature(self) -> float:
        return 1.0 / self.temperature

    def facts(self) -> dict[str, float | str]:
        """Values that must be equal on all ranks of a group (see `vocab_shard.agree`)."""
        return {"divergence": self.kind, "beta": self.beta, "temperature": self.temperature}


def check_temperature(temperature: float) -> None:
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature}")


class Moments(NamedTuple):
    """Per-row scalars known to every rank of the group; each [rows] in the statistics' dtype."""

    student_log_normalizer: Tensor  # log sum_v exp(z_v)
    teacher_log_normalizer: Tensor  # log sum_v exp(u_v)
    log_ratio_offset: Tensor  # their difference, so that d = u - z + log_ratio_offset
    mean_score: Tensor  # reverse KL: E_p[-d]; JSD: E_p[-l]; forward KL does not use it

    def rows(self, rows: slice) -> "Moments":
        return Moments(*(moment[rows] for moment in self))
