"""What the last pipeline stage minimises: student hidden states in, summed loss and per-domain sums out.

One composable loss for every objective. A micro-batch falls into runs of trajectories that share objective
and teachers; a run's loss is the weighted sum of its terms (`objective_terms.py`), with token weights of the
global batch times the correction for the distance between the sampler and the model in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.config import DomainObjectives, ObjectiveConfig
from megatron_mopd.config.objectives import (
    POLICY_KINDS,
    VOCABULARY_KINDS,
    compares_tokens_only,
    importance_band,
    kinds_of,
    needs_policy,
    needs_rewards,
    needs_teachers,
)
from megatron_mopd.data.batching import MicroBatch
from megatron_mopd.objectives import sampled_token_logprobs
from megatron_mopd.objectives.definitions import statistics_dtype
from megatron_mopd.objectives.importance import drift_gate, importance_weights
from megatron_mopd.objectives.micro_batch_head import MicroBatchHead, SharedGradient
from megatron_mopd.objectives.vocab_shard import Report
from megatron_mopd.teachers.bank import TeacherBank
from megatron_mopd.teachers.hidden_cache import HiddenCache
from megatron_mopd.teachers.routing import Mixture, Routing
from megatron_mopd.training.batch_facts import BatchFacts
from megatron_mopd.training.nonfinite import Findings
from megatron_mopd.training.objective_terms import (
    Policies,
    Teachers,
    policy_term,
    supervised_term,
    vocabulary_term,
)
from megatron_mopd.training.response_tokens import ResponseTokens, response_hidden, row_positions
from megatron_mopd.training.token_samples import TokenSamples

METRICS = ("kl", "ce", "entropy", "ratio", "in_band", "clipped", "advantage")
"""Per-domain token means: divergence from the teachers (sampled-token objectives: its one-sample estimate
log theta - log T), cross-entropy of given answers, entropy (one-sample estimate -log theta), theta / mu,
share of tokens with a ratio inside the band, share that PPO clipped, mean |advantage|."""


class BatchLoss:
    """The loss of one global batch; called for every micro-batch with the last stage's hidden states.

    Returns megatron-core's three values: the summed loss, the number of response tokens here, and a report
    whose sums `named_metrics` turns into metrics. Collectives beyond those of the objectives: with context
    parallelism, one all-reduce over CP of the run's response tokens for each run that needs log theta.
    """

    def __init__(
        self,
        objectives: DomainObjectives,
        groups: ParallelGroups,
        vocab_size: int,
        domains: Sequence[str],
        student: Any,
        facts: BatchFacts,
        *,
        findings: Findings,
        rollout_temperature: float = 1.0,
        routing: Routing | None = None,
        bank: TeacherBank | None = None,
        cache: HiddenCache | None = None,
        samples: TokenSamples | None = None,
    ):
        self._objectives, self._groups, self._student, self._facts = objectives, groups, student, facts
        self._rollout_temperature = rollout_temperature
        self._routing, self._bank, self._cache = routing, bank, cache
        self._samples, self._findings = samples, findings
        self._domain_ids = {domain: i for i, domain in enumerate(domains)}
        self._head_arguments = dict(
            group=groups.tp,
            vocab_size=vocab_size,
            chunk_size=objectives.default.chunk_size,
            reduce_hidden_grad=not groups.config.sequence_parallel,
        )

    def __call__(self, micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        rows = response_hidden(hidden, micro_batch, self._groups)
        sums = torch.zeros(len(self._domain_ids), len(METRICS), 2, dtype=torch.float64, device=rows.device)
        head = MicroBatchHead(
            rows,
            self._student.head_weight(),
            group=self._groups.tp,
            vocab_size=self._head_arguments["vocab_size"],
            reduce_hidden_grad=self._head_arguments["reduce_hidden_grad"],
        )
        states, total = rows.detach(), torch.zeros((), dtype=statistics_dtype(rows.dtype), device=rows.device)
        for objective, mixture, tokens in self._runs(micro_batch):
            part = self._run_loss(
                objective,
                mixture,
                tokens,
                states[tokens.rows],
                head.part(tokens.rows),
                micro_batch.target_ids[tokens.rows],
                sums,
            )
            if part is not None:
                total = total + part
        loss = head.loss(total)  # also of a micro-batch without a token, whose backward others wait for
        num_tokens = torch.tensor(rows.size(0), dtype=torch.int, device=rows.device)
        report = {"domain_sums": sums, "weighted_sum": loss.detach().double(), "tokens": num_tokens}
        return loss, num_tokens, report

    def _runs(self, micro_batch: MicroBatch) -> Iterator[tuple[ObjectiveConfig, Mixture, ResponseTokens]]:
        """Consecutive trajectories with the same objective and teachers, the same on every CP rank."""
        positions = row_positions(micro_batch)

        def key(item):
            domain = item[0].domain
            objective = self._objectives.of(domain)
            mixture = self._routing.mixture(domain) if needs_teachers(objective) else ()
            # Runs of one domain each would be right too; equal objectives of several domains share a run.
            return repr(objective), mixture, objective

        start = 0
        labelled = zip(micro_batch.trajectories, micro_batch.loss_counts)
        for (_, mixture, objective), members in groupby(labelled, key=key):
            trajectories, counts = zip(*members)
            rows = slice(start, start + sum(counts))
            yield (
                objective,
                mixture,
                ResponseTokens(trajectories, rows, positions[rows], counts, self._groups),
            )
            start = rows.stop

    def _run_loss(
        self,
        objective: ObjectiveConfig,
        mixture: Mixture,
        tokens: ResponseTokens,
        rows: Tensor,
        gradient: SharedGradient,
        target_ids: Tensor,
        sums: Tensor,
    ) -> Tensor | None:
        """The run's weighted loss, or `None` where this rank holds none of its tokens; adds to `gradient` and
        to `sums`."""
        like = torch.zeros((), dtype=statistics_dtype(rows.dtype), device=rows.device)
        head_arguments = self._head_arguments | {"shared_gradient": gradient}
        kinds, present = kinds_of(objective), rows.size(0) > 0
        weight = self._facts.token_weights
        base = tokens.mine(tokens.per_response([weight[t.index] for t in tokens.trajectories], like))
        base = base * objective.weight
        observe = _Observer(sums, tokens, self._domain_ids, self._samples)
        if objective.kind == "sft":
            if not present:
                return None
            loss, per_token = supervised_term(
                rows,
                self._student.head_weight(),
                target_ids,
                base,
                self._findings.report(tokens),
                head_arguments,
            )
            observe("ce", per_token)
            return loss

        names = tuple(name for name, _ in mixture)
        teachers = Teachers(tuple(weight for _, weight in mixture), (), (), names)
        if mixture and present and not compares_tokens_only(objective):
            teachers = teachers._replace(
                hidden=tuple(self._cached(tokens, name, self._cache.pop) for name in names),
                heads=tuple(self._bank.heads(list(names))),
            )
        policies = token_factor = policy_factor = None
        if needs_policy(objective):  # on every CP rank, also one without a row: it exchanges whole responses
            policies = self._policies(objective, tokens, rows, gradient, target_ids, mixture, teachers, like)
            token_factor, policy_factor = self._correction(objective, tokens, policies, observe)
        if not present:
            return None
        loss = None
        for kind, share in kinds.items():
            token_weight = share * base
            if kind in VOCABULARY_KINDS:
                if token_factor is not None:
                    token_weight = token_weight * token_factor
                part, divergence = vocabulary_term(
                    kind,
                    objective,
                    rows,
                    self._student.head_weight(),
                    teachers,
                    token_weight,
                    partial(self._findings.report, tokens),
                    head_arguments,
                )
                if kind == objective.kind:
                    observe("kl", divergence)
            else:
                outcome = [self._outcome_advantage(objective, t.index) for t in tokens.trajectories]
                part = policy_term(
                    kind,
                    objective,
                    tokens,
                    policies,
                    teachers.weights,
                    tokens.per_response(outcome, like),
                    token_weight * policy_factor,
                    observe,
                )
            loss = part if loss is None else loss + part
        if loss.requires_grad:  # through the log-probs of a policy-gradient term, into the shared gradient
            loss.backward()
        return loss.detach()

    def _outcome_advantage(self, objective: ObjectiveConfig, index: int) -> float:
        if not needs_rewards(objective):  # does not wait for anybody's verifiers
            return 0.0
        return self._facts.outcome_advantages().get(index, 0.0)

    def _cached(self, tokens: ResponseTokens, name: str, pop: Callable[[int, str], Tensor]) -> Tensor:
        """What the cache keeps of a teacher for this rank's rows of a run, which is not empty."""
        return torch.cat([pop(index, name) for index in tokens.held])

    def _policies(
        self,
        objective: ObjectiveConfig,
        tokens: ResponseTokens,
        rows: Tensor,
        gradient: SharedGradient,
        target_ids: Tensor,
        mixture: Mixture,
        teachers: Teachers,
        like: Tensor,
    ) -> Policies:
        """log-probs of the run's sampled tokens under every policy that the objective compares."""
        kinds = kinds_of(objective)

        def logprobs(hidden: Tensor, head: Tensor, report: Report, **options) -> Tensor:
            return sampled_token_logprobs(
                hidden,
                head,
                target_ids,
                temperature=self._rollout_temperature,
                report=report,
                **self._head_arguments,
                **options,
            )

        nothing = torch.zeros(0, dtype=like.dtype, device=like.device)
        current = nothing
        if rows.size(0) > 0:
            report = self._findings.report(tokens)
            with torch.set_grad_enabled(torch.is_grad_enabled() and any(k in POLICY_KINDS for k in kinds)):
                current = logprobs(rows, self._student.head_weight(), report, shared_gradient=gradient)
        whole = tokens.whole(current)
        behaviour = tokens.behaviour_logprobs(like)
        proximal = whole
        if objective.policy_loss == "ppo_clip":
            stored = self._facts.proximal_logprobs
            if objective.proximal == "behaviour":
                proximal = behaviour
            elif stored:
                proximal = torch.cat([stored[t.index].to(whole) for t in tokens.trajectories])
        teacher_logprobs = []
        if "sampled_token" in kinds:
            for k, (name, _) in enumerate(mixture):
                local = nothing
                if rows.size(0) > 0 and teachers.hidden:
                    report = self._findings.report_of_teacher(tokens, name)
                    local = logprobs(teachers.hidden[k], teachers.heads[k], report)
                elif rows.size(0) > 0:
                    local = self._cached(tokens, name, self._cache.pop_log_probs)
                teacher_logprobs.append(tokens.whole(local))
        return Policies(current, whole, proximal, behaviour, tuple(teacher_logprobs))

    def _correction(
        self, objective: ObjectiveConfig, tokens: ResponseTokens, policies: Policies, observe: _Observer
    ) -> tuple[Tensor, Tensor]:
        """Weights [n] of a divergence and of a policy-gradient term: they differ with `ppo_clip`, whose own
        ratio already goes from the proximal policy to the current one."""
        low, high = importance_band(objective)

        def weights(policy: Tensor) -> tuple[Tensor, Tensor]:
            log_ratio = policy - policies.behaviour
            result, inside = importance_weights(
                log_ratio, tokens.lengths, objective.rollout_correction, low, high
            )
            if objective.drift_gate_block > 0:
                sharpness = objective.drift_gate_sharpness or 1.0
                result = result * drift_gate(log_ratio, tokens.lengths, objective.drift_gate_block, sharpness)
            return tokens.mine(result), tokens.mine(inside.to(result.dtype))

        token_factor, inside = weights(policies.current_whole)
        policy_factor = token_factor
        if objective.policy_loss == "ppo_clip":
            policy_factor, _ = weights(policies.proximal)
        observe("ratio", tokens.mine((policies.current_whole - policies.behaviour).exp()))
        observe("in_band", inside)
        observe("entropy", -tokens.mine(policies.current_whole))
        return token_factor, policy_factor


class _Observer:
    """Adds per-token values to the sums of their domain: sum and count of every metric."""

    def __init__(
        self,
        sums: Tensor,
        tokens: ResponseTokens,
        domain_ids: Mapping[str, int],
        samples: TokenSamples | None = None,
    ):
        self._sums, self._tokens, self._samples = sums, tokens, samples
        domains = torch.tensor([domain_ids[t.domain] for t in tokens.trajectories], dtype=torch.long)
        self._domain = domains.repeat_interleave(torch.tensor(tokens.counts)).to(sums.device)

    def __call__(self, name: str, per_token: Tensor) -> None:
        values = torch.stack((per_token.detach().double(), torch.ones_like(per_token, dtype=torch.double)), 1)
        self._sums[:, METRICS.index(name)].index_add_(0, self._domain, values)
        if name == "kl" and self._samples is not None:
            self._samples.add(self._tokens, per_token)


def named_metrics(sums: Tensor, domains: Sequence[str]) -> dict[str, float]:
    """Per-domain means from summed reports [domains, metrics, 2]: `kl/math` and so on, where there is any;
    `tokens/math` is how many response tokens they are over."""
    metrics = {}
    for domain, row in zip(domains, sums.tolist()):
        if tokens := max(count for _, count in row):
            metrics[f"tokens/{domain}"] = tokens
        for name, (total, count) in zip(METRICS, row):
            if count:
                metrics[f"{name}/{domain}"] = total / count
    return metrics
