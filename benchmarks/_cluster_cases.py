"""Layouts, teachers and random batches for `cluster_scale.py`, with their assumptions about hardware."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mopd.data.batching import BatchShape
from megatron_mopd.pipeline.costs import CostModel

LONGEST = 32_000
FLOPS = 0.4 * 989e12
"""Sustained by one GPU: 40% of an H100's bfloat16 peak."""
LOAD_BYTES_PER_SECOND = 40e9
"""From host memory to one GPU."""


@dataclass(frozen=True)
class Model:
    """Student and teachers alike, in bfloat16; a forward pass takes 2 FLOPs a parameter that a token uses, a
    backward pass twice that."""

    name: str
    experts: float
    """Parameters in experts."""
    dense: float
    """Parameters elsewhere."""
    active: float
    """Parameters that one token uses."""


SMALL = Model("Qwen3-30B-A3B", experts=29.0e9, dense=1.5e9, active=3.3e9)
LARGE = Model("Qwen3-235B-A22B", experts=227e9, dense=8e9, active=22e9)


@dataclass(frozen=True)
class Sample:
    """A trajectory of which only index, domain and length matter."""

    index: int
    domain: str
    length: int

    def __len__(self) -> int:
        return self.length


@dataclass(frozen=True)
class Case:
    """A layout with teachers and a distribution of lengths."""

    dp: int
    block: int = 1
    teachers: int = 12
    shares: str = "equal"
    lengths: str = "3k"
    budget: int = 16_384
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    model: Model = SMALL
    samples: int = 16
    """Of each data-parallel rank; the batch has at least 512."""

    @classmethod
    def of_layout(cls, gpus: int, tp: int, pp: int, ep: int, cp: int = 1, **rest) -> Case:
        """A case with the data-parallel size and the block of a layout."""
        return cls(gpus // (tp * pp * cp), max(1, ep // (tp * cp)), tp=tp, pp=pp, ep=ep, cp=cp, **rest)

    @property
    def blocks(self) -> int:
        return self.dp // self.block

    def draw(self, seed: int) -> list[Sample]:
        """A random batch. Lengths are log-normal with the stated mean, or for `long tail` three quarters of
        1k and a quarter of 16k; cut at `LONGEST`. With `zipf` the n-th domain is 1/n as frequent as the
        first."""
        rng = np.random.default_rng(seed)
        count = max(512, self.samples * self.dp)
        weights = 1 / np.arange(1, self.teachers + 1) ** (1.0 if self.shares == "zipf" else 0.0)
        domains = rng.choice(self.teachers, count, p=weights / weights.sum())
        if self.lengths == "long tail":
            means = rng.choice([1_000, 16_000], count, p=[0.75, 0.25])
        else:
            means = np.full(count, 1_000 * int(self.lengths.removesuffix("k")))
        sigma = 0.8
        drawn = rng.lognormal(np.log(means) - sigma**2 / 2, sigma)
        lengths = np.clip(drawn.astype(int), 64, LONGEST).tolist()
        return [Sample(i, f"d{d:02}", n) for i, (d, n) in enumerate(zip(domains.tolist(), lengths))]

    def shape(self, batch: Sequence[Sample]) -> BatchShape:
        """The shape of packed micro-batches of this layout."""
        longest = max(map(len, batch))
        alignment = self.tp * (2 * self.cp if self.cp > 1 else 1)
        budget = -(-max(self.budget, longest) // alignment) * alignment
        return BatchShape(1, budget, longest, alignment, self.cp, 0)

    def teacher_bytes(self) -> tuple[float, float]:
        """Bytes of one teacher on one GPU: its experts, and the rest."""
        experts = 2 * self.model.experts / (self.pp * self.ep)
        return experts, 2 * self.model.dense / (self.pp * self.tp)

    def costs(self) -> CostModel:
        """Seconds a token and stage."""
        forward = 2 * self.model.active / (self.tp * self.cp * self.pp) / FLOPS
        names = [f"d{number:02}" for number in range(self.teachers)]
        load = sum(self.teacher_bytes()) / LOAD_BYTES_PER_SECOND
        return CostModel.build(
            self.pp,
            student_forward=forward,
            student_backward=2 * forward,
            teacher_forward=dict.fromkeys(names, forward),
            teacher_load=dict.fromkeys(names, load),
        )


GRID = [(8, 1), (8, 4), (32, 1), (32, 8), (64, 8), (128, 8), (128, 32), (512, 1), (512, 8), (512, 64)]


def sharing_cases(full: bool) -> list[Case]:
    """Sharing and packing alone."""
    cases = [Case(dp, block, shares=shares) for shares in ("equal", "zipf") for dp, block in GRID]
    others = GRID if full else [(8, 4), (64, 8), (512, 8)]
    for teachers in (4, 24, 48):
        cases += [Case(dp, block, teachers, "zipf") for dp, block in others]
        if full:
            cases += [Case(dp, block, teachers) for dp, block in others]
    lengths = [("2k", 16_384), ("8k", 16_384), ("long tail", 16_384), ("8k", 32_768), ("long tail", 32_768)]
    for name, budget in lengths if full else lengths[1:3]:
        for dp, block in others:
            cases.append(Case(dp, block, shares="zipf", lengths=name, budget=budget))
    return cases


def layout_cases(full: bool) -> list[Case]:
    """The layouts of docs/cluster.md, one of 2,048 GPUs, and deeper pipelines with m >= 2p."""
    small = [(32, 2, 2, 8), (32, 1, 1, 8), (32, 1, 1, 32), (32, 4, 1, 8), (16, 2, 2, 8), (32, 2, 2, 8, 2)]
    large = [(256, 4, 2, 32), (256, 4, 2, 64), (256, 4, 2, 128), (128, 4, 2, 64), (256, 8, 2, 32)]
    large += [(256, 4, 2, 64, 2)]
    cases = [Case.of_layout(*layout, shares="zipf") for layout in small]
    cases += [Case.of_layout(*layout, shares="zipf", model=LARGE, samples=32) for layout in large]
    cases += [Case.of_layout(2048, 4, 4, 64, shares="zipf", model=LARGE, samples=64)]
    for shares in ("equal", "zipf"):
        cases += [Case.of_layout(64, 1, 8, 1, shares=shares, samples=192)]
        cases += [Case.of_layout(512, 1, 8, 8, shares=shares, samples=192)]
    if full:
        cases += [Case.of_layout(256, 1, 16, 8, shares="zipf", samples=384)]
        cases += [Case.of_layout(512, 1, 4, 8, teachers=48, shares="zipf", samples=96)]
    return cases
