"""A `linear_kl` problem described by a few numbers, so that every rank and the oracle build the same one."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_mopd.objectives import linear_kl


@dataclass(frozen=True)
class Case:
    """Shapes and options; `vocab_size` real columns are padded to `padded`, a multiple of 4."""

    tokens: int = 7
    student_width: int = 6
    teacher_widths: tuple[int, ...] = (5,)
    vocab_size: int = 29
    divergence: str = "reverse_kl"
    beta: float = 0.5
    temperature: float = 1.0
    chunk_size: int = 3
    top_k: int | None = None
    top_k_from: str = "teacher"
    mixture: str | None = None  # "shared": [K] weights; "per token": [T, K]
    dtype: torch.dtype = torch.float64
    logit_scale: float = 1.0
    seed: int = 0

    @property
    def padded(self):
        return 4 * -(-self.vocab_size // 4) + 4  # at TP 4, a shard may be all padding

    def but(self, **changes):
        return replace(self, **changes)


class Inputs(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    teacher_hiddens: list[torch.Tensor]
    teacher_weights: list[torch.Tensor]
    token_weight: torch.Tensor
    mixture_weight: torch.Tensor | None


def build(case):
    """The whole problem in `case.dtype`; padded weight rows hold large values that must not matter."""
    generator = torch.Generator().manual_seed(case.seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def head(width):
        weight = normal(case.padded, width) * case.logit_scale
        weight[case.vocab_size :] = 100.0
        return normal(case.tokens, width).to(case.dtype), weight.to(case.dtype)

    hidden, weight = head(case.student_width)
    teachers = [head(width) for width in case.teacher_widths]
    mixture = None
    if case.mixture is not None:
        shape = (case.tokens,) if case.mixture == "per token" else ()
        mixture = normal(*shape, len(teachers)).abs()
    token_weight = normal(case.tokens)
    return Inputs(hidden, weight, [h for h, _ in teachers], [w for _, w in teachers], token_weight, mixture)


def tp_group():
    """The tensor-parallel group of a test's ranks; None in a single process."""
    return dist.group.WORLD if dist.get_world_size() > 1 else None


def shard(weight, rank):
    """This rank's contiguous block of rows of [V, h]."""
    rows = weight.shape[0] // dist.get_world_size()
    return weight[rank * rows : (rank + 1) * rows].clone()


def run_linear_kl(rank, case, loss_scale=1.0):
    """loss, per_token, and the gradients of loss_scale * loss for hidden and for this rank's weight."""
    inputs = build(case)
    hidden, weight = inputs.hidden.requires_grad_(), shard(inputs.weight, rank).requires_grad_()
    loss, per_token = linear_kl(
        hidden,
        weight,
        inputs.teacher_hiddens,
        [shard(teacher, rank) for teacher in inputs.teacher_weights],
        token_weight=inputs.token_weight,
        group=tp_group(),
        divergence=case.divergence,
        beta=case.beta,
        temperature=case.temperature,
        vocab_size=case.vocab_size,
        chunk_size=case.chunk_size,
        mixture_weight=inputs.mixture_weight,
        top_k=case.top_k,
        top_k_from=case.top_k_from,
    )
    (loss_scale * loss).backward()
    return loss.detach(), per_token, hidden.grad, weight.grad


def assert_matches(results, expected, rtol=1e-9, atol=1e-10):
    """Compare each rank's loss, per_token and hidden gradient, and the joined weight gradients."""
    loss, per_token, hidden_grad, weight_grad = expected
    for result in results:
        torch.testing.assert_close(result[0].double(), loss, rtol=rtol, atol=atol)
        torch.testing.assert_close(result[1].double(), per_token, rtol=rtol, atol=atol)
        torch.testing.assert_close(result[2].double(), hidden_grad, rtol=rtol, atol=atol)
        assert torch.equal(result[0], results[0][0]), "ranks differ in the loss"
    joined = torch.cat([result[3] for result in results]).double()
    torch.testing.assert_close(joined, weight_grad, rtol=rtol, atol=atol)
