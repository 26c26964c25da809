"""Everything that one optimizer step touches: models, optimizer, teachers, pipeline."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.config import Config, DomainObjectives, ModelConfig
from megatron_mopd.config.objectives import rollout_sizes
from megatron_mopd.data.position import DataPosition
from megatron_mopd.losses.batch_loss import LossSettings
from megatron_mopd.losses.targets import Targets, resolve_targets
from megatron_mopd.model.flops import ForwardCost, forward_cost
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.pipeline.driver import PipelineDriver
from megatron_mopd.pipeline.problem import Limits
from megatron_mopd.teachers.bank import TeacherBank
from megatron_mopd.teachers.routing import Routing
from megatron_mopd.training.skipped_steps import SkippedSteps
from megatron_mopd.training.teacher_blocks import balances_over_all_ranks


@dataclass
class Learner:
    """Models, optimizer, teachers and pipeline of one run, on this rank."""

    config: Config
    groups: ParallelGroups
    chunks: list[torch.nn.Module]
    """The student's chunks on this rank, wrapped in DistributedDataParallel."""
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    model: ModelConfig
    """The student's fully resolved architecture."""
    manifest: dict[str, Any]
    """Fingerprints that a resumed run must match: tokenizer, student, teachers, prompts."""
    domains: list[str]
    """All domains of the run, sorted: the order of per-domain sums on all ranks."""
    routing: Routing | None = None
    """`None` when no domain's objective has teachers."""
    bank: TeacherBank | None = None
    vocab_size: int | None = None
    """Number of ids, starting at 0, in every softmax: the tokenizer's; default: all rows of the model. Rows
    beyond, which pad models to round sizes, are not tokens: they are never sampled and are in no
    distribution, neither the student's nor a teacher's."""
    skipped: SkippedSteps = field(default_factory=SkippedSteps)
    sampled_from: dict[int, int] = field(default_factory=dict)
    """Rollout batch -> identity of the weights that it is sampled from (`run.rollout_logs`)."""
    position: DataPosition = field(init=False)
    """How iterations correspond to rollout batches and prompts."""
    pipeline: PipelineDriver = field(init=False)

    def __post_init__(self):
        """Collective over all ranks: the pipeline's communicators."""
        assert self.groups.block.count == 1 or not balances_over_all_ranks(self.model)
        self.vocab_size = self.vocab_size or self.model.vocab_size
        schedule = self.config.schedule
        self.position = DataPosition(*rollout_sizes(self.config))
        self.pipeline = PipelineDriver(
            self.groups,
            dict.fromkeys(self.bank.names if self.bank else (), 1.0),
            kind=schedule.kind,
            limits=Limits(activations=schedule.max_activations, cached_states=schedule.max_cached_states),
            cache_bytes=self.config.teacher_storage.hidden_cache_bytes,
            timeout=timedelta(minutes=self.config.parallel.distributed_timeout_minutes),
        )

    @cached_property
    def objectives(self) -> DomainObjectives:
        """The objective of every domain."""
        return DomainObjectives(self.config.objective)

    @cached_property
    def forward_costs(self) -> tuple[ForwardCost, dict[str, ForwardCost]]:
        """FLOPs of forward passes of the student, and of every teacher."""
        vocabulary, names = self.model.vocab_size, self.bank.names if self.bank else ()
        return (
            forward_cost(unwrap(self.chunks[0]).config, vocabulary),
            {name: forward_cost(self.bank.config(name), vocabulary) for name in names},
        )

    @cached_property
    def loss_settings(self) -> LossSettings:
        """Settings shared by all losses of the run."""
        return LossSettings(
            self.groups,
            self.domains,
            self.vocab_size,
            self.config.objective.chunk_size,
            self.config.rollout.temperature,
        )

    def targets(self, iteration: int = 0) -> Targets:
        """Every domain's target in the step that follows `iteration` steps."""
        return resolve_targets(self.objectives, self.routing, self.domains, iteration)
