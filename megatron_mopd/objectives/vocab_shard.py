"""One rank's shard of a vocab-parallel head: its real columns, and collectives over the shards.

Megatron pads the vocabulary to a multiple of the tensor-parallel size and gives rank r the contiguous block
[r * V/tp, (r + 1) * V/tp). Columns at or beyond `vocab_size` are padding: every function of this package
removes them (`[:valid]`) before any arithmetic, so they cannot affect a softmax, a mean or a metric.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class VocabShard:
    """Rank `rank` of `size` in `group`: `columns` local columns, the first `valid` of them real; `total`
    real columns on all ranks."""

    group: dist.ProcessGroup | None
    rank: int
    size: int
    columns: int
    valid: int
    total: int

    @classmethod
    def of(cls, columns: int, group: dist.ProcessGroup | None, vocab_size: int | None) -> "VocabShard":
        """The shard of this rank; `group=None` means that the vocabulary is not sharded.

        Raises:
            ValueError: `vocab_size` is below 1 or larger than all shards together, or this process is not in
                `group`.
        """
        rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        if rank < 0:
            raise ValueError(f"group must contain this process (global rank {dist.get_rank()}), it does not")
        padded = columns * size
        if vocab_size is None:
            vocab_size = padded
        if not 1 <= vocab_size <= padded:
            raise ValueError(
                f"vocab_size must be in [1, {padded}] ({size} shards of {columns} columns), got {vocab_size}"
            )
        valid = min(max(vocab_size - rank * columns, 0), columns)
        return cls(group, rank, size, columns, valid, vocab_size)

    @property
    def offset(self) -> int:
        """Global id of this shard's first column."""
        return self.rank * self.columns

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` in place over the tensor-parallel group (a no-op without one) and return it."""
        if self.size > 1 and tensor.numel() > 0:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_reduce_async(self, tensor: torch.Tensor) -> dist.Work | None:
        """Start a sum over the group; wait for the returned handle before reading `tensor`."""
        if self.size > 1 and tensor.numel() > 0:
            return dist.all_reduce(tensor, group=self.group, async_op=True)
        return None

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[...] on each rank -> [size, ...] on all."""
        if self.size == 1 or tensor.numel() == 0:
            return tensor.unsqueeze(0).expand(self.size, *tensor.shape)
        gathered = tensor.new_empty(self.size, *tensor.shape)
        dist.all_gather(list(gathered.view(self.size, -1)), tensor.reshape(-1), group=self.group)
        return gathered

    def local_ids(self, token_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Global ids [T] -> (local column [T], clamped to the shard; whether the id is in this shard [T])."""
        local = token_ids - self.offset
        is_here = (local >= 0) & (local < self.valid)
        return local.clamp(0, max(self.valid - 1, 0)), is_here


def merge_log_sum_exp(local: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Each rank's (maximum, sum of exponentials relative to it) [2, ...] -> log-sum-exp of all shards [...].

    Collective: all-gather of [2, ...] per rank.
    """
    gathered = shard.all_gather(local)
    maximum = gathered[:, 0].amax(0)
    return maximum + (gathered[:, 1] * (gathered[:, 0] - maximum).exp()).sum(0).log()


def agree(
    group: dist.ProcessGroup | None, check: Callable[[], dict[str, float | str]]
) -> dict[str, float | str]:
    """Run `check` on every rank of `group`, and raise on all of them if a check fails or the results differ.

    `check` raises ValueError on bad input or returns named facts (token count, shard width, temperature, ...)
    that must be equal on all ranks. If only one rank raised, its peers would hang in their next collective;
    here every rank raises the failing rank's message.

    Collectives: one all-reduce (MAX) of [2, 16] fp64, 256 bytes per call whatever the token count. Only on
    failure, one gather of the reports.
    """
    problem, facts = None, {}
    try:
        facts = check()
    except ValueError as error:
        problem = str(error)
    if group is None or dist.get_world_size(group) < 2:  # the world size is -1 in a process outside the group
        if problem is not None:
            raise ValueError(problem)
        return facts

    # A fixed number of slots lets a rank without facts take part; a value and its negative give both
    # extremes.
    values = [problem is not None, len(facts), *map(_as_number, facts.values())]
    assert len(values) <= _FACT_SLOTS, "raise _FACT_SLOTS"
    values += [0] * (_FACT_SLOTS - len(values))
    # The group's device, because a tensor on the wrong device is one of the mistakes to report.
    device = torch.device("cuda" if dist.get_backend(group) == "nccl" else "cpu")
    extremes = torch.tensor([values, [-value for value in values]], dtype=torch.float64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    largest, negated_smallest = extremes.tolist()
    if largest[0] == 0 and largest == [-value for value in negated_smallest]:
        return facts
    reports = [None] * dist.get_world_size(group)
    dist.all_gather_object(reports, (problem, facts), group=group)
    raise ValueError(_describe_disagreement(reports))


_FACT_SLOTS = 16


def _as_number(fact: float | str) -> float:
    return zlib.crc32(fact.encode()) if isinstance(fact, str) else fact


def _describe_disagreement(reports: list[tuple[str | None, dict[str, float | str]]]) -> str:
    """Summarize all ranks' reports in a sentence: the problems if there are any, else the facts that
    differ."""
    problems = [f"rank {rank}: {problem}" for rank, (problem, _) in enumerate(reports) if problem is not None]
    if problems:
        alike = len({problem for problem, _ in reports}) == 1
        return reports[0][0] if alike else "; ".join(problems)
    differing = []
    for name in reports[0][1]:
        values = [facts.get(name) for _, facts in reports]
        if len(set(values)) > 1:
            differing.append(f"{name} is {values} on ranks 0 to {len(values) - 1}")
    return "ranks of one tensor-parallel group must agree: " + "; ".join(differing)


@dataclass(frozen=True)
class NotFinite:
    """A token whose divergence or log-probability is NaN or infinite, and the logits that cause it."""

    what: str
    """Name of the quantity."""
    token: int
    """Row of the hidden states."""
    value: float
    logits: tuple[tuple[int, str, int, float], ...]
    """The first non-finite logit of each tensor-parallel rank and model that has one: (rank, model,
    vocabulary id, value)."""

    def __str__(self) -> str:
        lines = [
            f"rank {rank}: {model} logit of vocabulary id {column} is {value}"
            for rank, model, column, value in self.logits
        ]
        cause = "; ".join(lines) or f"it is {self.value}, and no single logit is the cause"
        return f"{self.what} is not finite at token {self.token} ({cause})"


Report = Callable[[NotFinite], None]
"""Called on every rank of the tensor-parallel group instead of raising a `ValueError`."""


def require_finite(
    shard: VocabShard,
    per_token: torch.Tensor,
    token_logits: Callable[[int], dict[str, torch.Tensor]],
    what: str,
    report: Report | None = None,
) -> None:
    """Raise ValueError naming token and rank if `per_token` [T], equal on all ranks, has a NaN or infinity;
    with `report`, call it with the first such token and return.

    `token_logits(t)` recomputes one token's local logits by model name ({"student": [V/tp], ...}). It is
    called only on failure, to find the rank with non-finite logits (one gather of a short list per rank).
    """
    if bool(torch.isfinite(per_token).all()):
        return
    token = int(torch.isfinite(per_token).logical_not().nonzero()[0])
    blame = []
    for model, logits in token_logits(token).items():
        bad = torch.isfinite(logits).logical_not().nonzero()
        if len(bad):
            column = int(bad[0])
            blame.append((shard.rank, model, shard.offset + column, float(logits[column])))
    blames = [blame]
    if shard.size > 1:
        blames = [None] * shard.size
        dist.all_gather_object(blames, blame, group=shard.group)
    logits = tuple(logit for blame in blames for logit in blame)
    found = NotFinite(what, token, float(per_token[token]), logits)
    if report is None:
        raise ValueError(str(found))
    report(found)
