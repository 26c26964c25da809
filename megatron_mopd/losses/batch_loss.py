"""The loss of the last pipeline stage: student hidden states in, summed loss and per-domain sums out.

One composable loss for every objective. A micro-batch is split into parts, consecutive trajectories with the
same target; a part's loss is the weighted sum of its terms: divergences and cross-entropy here, policy
gradients in `policy_terms.py`. Token weights are those of the global batch times the correction for the
mismatch between the sampler and the model in training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.config import ObjectiveConfig
from megatron_mopd.config.objectives import (
    POLICY_KINDS,
    TOKEN_KINDS,
    VOCABULARY_KINDS,
    kinds_of,
    needs_policy,
    needs_rewards,
)
from megatron_mopd.data.batching import MicroBatch
from megatron_mopd.losses.batch_facts import BatchFacts
from megatron_mopd.losses.domain_sums import METRICS, TokenObserver
from megatron_mopd.losses.policy_terms import Policies, correction_weights, policy_term
from megatron_mopd.losses.response_tokens import ResponseTokens, response_hidden, row_positions
from megatron_mopd.losses.targets import Target
from megatron_mopd.model.gpt import HiddenStateGPT
from megatron_mopd.objectives import linear_cross_entropy, linear_kl, sampled_token_logprobs
from megatron_mopd.objectives.definitions import statistics_dtype
from megatron_mopd.objectives.micro_batch_head import MicroBatchHead, SharedGradient
from megatron_mopd.objectives.vocab_shard import Report
from megatron_mopd.teachers.bank import TeacherBank


@dataclass(frozen=True)
class LossSettings:
    """Settings shared by all losses of a run."""

    groups: ParallelGroups
    domains: Sequence[str]
    """All domains of the run, in the order of the per-domain sums."""
    vocab_size: int
    chunk_size: int
    """Tokens whose logits exist at the same time."""
    rollout_temperature: float

    @property
    def reduce_hidden_grad(self) -> bool:
        """Whether a loss sums the gradient of hidden states over tensor-parallel ranks; under sequence
        parallelism the model does that."""
        return not self.groups.config.sequence_parallel

    @property
    def head_options(self) -> dict[str, Any]:
        """Keyword arguments of every loss that applies an LM head."""
        return dict(
            group=self.groups.tp,
            vocab_size=self.vocab_size,
            chunk_size=self.chunk_size,
            reduce_hidden_grad=self.reduce_hidden_grad,
        )


@dataclass(frozen=True)
class LossPart:
    """Consecutive trajectories of a micro-batch that share a target; n response tokens on this rank."""

    target: Target
    tokens: ResponseTokens
    hidden: Tensor
    """The student's [n, h], detached: gradients go to `gradient`."""
    gradient: SharedGradient
    target_ids: Tensor
    """[n], the sampled (or given) token of each row."""

    @property
    def objective(self) -> ObjectiveConfig:
        return self.target.objective

    @property
    def like(self) -> Tensor:
        """A scalar with the loss's dtype and device."""
        return torch.zeros((), dtype=statistics_dtype(self.hidden.dtype), device=self.hidden.device)


@dataclass(frozen=True)
class TeacherStates:
    """The K teachers of a part, with their hidden states and LM heads."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    hidden: tuple[Tensor, ...] = ()
    """K tensors [n, h_k], last-layer states of this rank's rows; empty if log-probs were kept instead."""
    heads: tuple[Tensor, ...] = ()
    """K tensors [V/tp, h_k]; empty whenever `hidden` is."""


class BatchLoss:
    """The loss of one global batch; called for every micro-batch with the last stage's hidden states.

    Returns the three values that megatron-core expects: the summed loss, the number of response tokens on
    this rank, and a report whose sums `named_metrics` turns into metrics. Collectives besides those of the
    objectives: under context parallelism, one all-reduce over CP of a part's response tokens for each part
    that needs log theta.
    """

    def __init__(
        self, settings: LossSettings, student: HiddenStateGPT, bank: TeacherBank | None, facts: BatchFacts
    ):
        self._settings, self._student, self._bank, self._facts = settings, student, bank, facts
        self._domain_ids = {domain: i for i, domain in enumerate(settings.domains)}

    def __call__(self, micro_batch: MicroBatch, hidden: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        rows = response_hidden(hidden, micro_batch, self._settings.groups)
        sums = torch.zeros(len(self._domain_ids), len(METRICS), 2, dtype=torch.float64, device=rows.device)
        head = MicroBatchHead(
            rows,
            self._student.head_weight(),
            group=self._settings.groups.tp,
            vocab_size=self._settings.vocab_size,
            reduce_hidden_grad=self._settings.reduce_hidden_grad,
        )
        total = torch.zeros((), dtype=statistics_dtype(rows.dtype), device=rows.device)
        for part in self._parts(micro_batch, rows.detach(), head):
            observe = TokenObserver(sums, part.tokens, self._domain_ids, self._facts.samples)
            loss = self._part_loss(part, observe)
            if loss is not None:
                total = total + loss
        loss = head.loss(total)  # even without tokens: other ranks wait for this micro-batch's backward
        num_tokens = torch.tensor(rows.size(0), dtype=torch.int, device=rows.device)
        report = {"domain_sums": sums, "weighted_sum": loss.detach().double(), "tokens": num_tokens}
        return loss, num_tokens, report

    def _parts(self, micro_batch: MicroBatch, hidden: Tensor, head: MicroBatchHead) -> Iterator[LossPart]:
        """The same parts on every CP rank, each with that rank's rows."""
        positions, start = row_positions(micro_batch), 0

        # Parts of one domain each would be correct too, but fewer parts are faster.
        def order(item: tuple) -> tuple:
            return self._facts.targets[item[0].domain].order

        for _, members in groupby(zip(micro_batch.trajectories, micro_batch.loss_counts), key=order):
            trajectories, counts = zip(*members)
            rows = slice(start, start + sum(counts))
            tokens = ResponseTokens(trajectories, rows, positions[rows], counts, self._settings.groups)
            target = self._facts.targets[trajectories[0].domain]
            yield LossPart(target, tokens, hidden[rows], head.part(rows), micro_batch.target_ids[rows])
            start = rows.stop

    def _part_loss(self, part: LossPart, observe: TokenObserver) -> Tensor | None:
        """The part's weighted loss, or `None` if this rank holds none of its tokens; accumulates into the
        part's gradient."""
        objective, tokens, is_here = part.objective, part.tokens, part.hidden.size(0) > 0
        base = self._token_weights(part)
        if objective.kind == "sft":
            return self._cross_entropy(part, base, observe) if is_here else None

        teachers = self._teacher_states(part)
        policies = token_factor = policy_factor = None
        if needs_policy(objective):  # on every CP rank, even without rows: exchanges whole responses
            policies = self._policies(part, teachers)
            token_factor, policy_factor = correction_weights(objective, tokens, policies, observe)
        if not is_here:
            return None
        loss = None
        for kind, share in kinds_of(objective).items():
            weight = share * base
            if kind in VOCABULARY_KINDS:
                weight = weight if token_factor is None else weight * token_factor
                term, per_token = self._divergence(kind, part, teachers, weight)
                if kind == objective.kind:
                    observe("kl", per_token)
            else:
                outcome = tokens.per_response(self._outcome_advantages(part), part.like)
                weight = weight * policy_factor
                term = policy_term(kind, part, policies, teachers.weights, outcome, weight, observe)
            loss = term if loss is None else loss + term
        if loss.requires_grad:  # a policy-gradient term: its log-probs propagate to the part's gradient
            loss.backward()
        return loss.detach()

    def _token_weights(self, part: LossPart) -> Tensor:
        """[n], the global batch's weights times the objective's."""
        weight, tokens = self._facts.token_weights, part.tokens
        weights = tokens.per_response([weight[t.index] for t in tokens.trajectories], part.like)
        return tokens.mine(weights) * part.objective.weight

    def _outcome_advantages(self, part: LossPart) -> list[float]:
        """One per trajectory."""
        if not needs_rewards(part.objective):  # avoids waiting for the verifiers
            return [0.0] * len(part.tokens.trajectories)
        advantages = self._facts.outcome_advantages()
        return [advantages.get(t.index, 0.0) for t in part.tokens.trajectories]

    def _cross_entropy(self, part: LossPart, token_weight: Tensor, observe: TokenObserver) -> Tensor:
        loss, per_token = linear_cross_entropy(
            part.hidden,
            self._student.head_weight(),
            part.target_ids,
            token_weight=token_weight,
            report=self._facts.findings.report(part.tokens),
            shared_gradient=part.gradient,
            **self._settings.head_options,
        )
        observe("ce", per_token)
        return loss

    def _teacher_states(self, part: LossPart) -> TeacherStates:
        """The part's teachers with their cached states and LM heads; without both if the objective compares
        only log-probs, or if this rank has no rows."""
        names, weights = zip(*part.target.mixture) if part.target.mixture else ((), ())
        if not names or part.target.keeps_log_probs or part.hidden.size(0) == 0:
            return TeacherStates(names, weights)
        hidden = tuple(self._cached(part, name, self._facts.cache.pop) for name in names)
        return TeacherStates(names, weights, hidden, tuple(self._bank.heads(list(names))))

    def _cached(self, part: LossPart, name: str, pop: Callable[[int, str], Tensor]) -> Tensor:
        """A teacher's cache entries for this rank's rows of a part, of which there must be some."""
        return torch.cat([pop(index, name) for index in part.tokens.held])

    def _divergence(
        self, kind: str, part: LossPart, teachers: TeacherStates, token_weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A divergence between whole distributions: (weighted sum, per token [n]).

        `full_vocab_kl`: sum_k w_k KL(theta || T_k) (DeepSeek-V4, 5.1.2), with all teachers in one student
        softmax. The other kinds have no such form: they sum one weighted divergence per teacher.
        """
        objective, head, report = part.objective, self._student.head_weight(), self._facts.findings.report
        options = self._settings.head_options | dict(
            temperature=objective.temperature, shared_gradient=part.gradient
        )
        if kind == "full_vocab_kl":
            shares = torch.tensor(teachers.weights, dtype=token_weight.dtype, device=part.hidden.device)
            return linear_kl(
                part.hidden,
                head,
                list(teachers.hidden),
                list(teachers.heads),
                token_weight=token_weight,
                mixture_weight=shares,
                report=report(part.tokens, teachers.names),
                **options,
            )
        options |= _kind_options(kind, objective)
        loss, per_token = torch.zeros_like(token_weight[0]), torch.zeros_like(token_weight)
        for share, hidden, teacher_head, name in zip(
            teachers.weights, teachers.hidden, teachers.heads, teachers.names
        ):
            term, divergence = linear_kl(
                part.hidden,
                head,
                hidden,
                teacher_head,
                token_weight=share * token_weight,
                report=report(part.tokens, [name]),
                **options,
            )
            loss, per_token = loss + term, per_token + share * divergence
        return loss, per_token

    def _policies(self, part: LossPart, teachers: TeacherStates) -> Policies:
        """log-probs of the part's sampled tokens under every policy that the objective needs."""
        tokens, objective = part.tokens, part.objective
        is_differentiated = any(kind in POLICY_KINDS for kind in kinds_of(objective))
        current = part.like.new_zeros(0)
        if part.hidden.size(0) > 0:
            with torch.set_grad_enabled(torch.is_grad_enabled() and is_differentiated):
                current = self._logprobs(
                    part,
                    part.hidden,
                    self._student.head_weight(),
                    self._facts.findings.report(tokens),
                    shared_gradient=part.gradient,
                )
        whole = tokens.whole(current)
        behaviour = tokens.behaviour_logprobs(part.like)
        proximal = whole
        if objective.policy_loss == "ppo_clip":
            stored = self._facts.proximal_logprobs
            if objective.proximal == "behaviour":
                proximal = behaviour
            elif stored:
                proximal = torch.cat([stored[t.index].to(whole) for t in tokens.trajectories])
        of_teachers = ()
        if any(kind in TOKEN_KINDS for kind in kinds_of(objective)):
            of_teachers = tuple(self._teacher_logprobs(part, teachers))
        return Policies(current, whole, proximal, behaviour, of_teachers)

    def _teacher_logprobs(self, part: LossPart, teachers: TeacherStates) -> Iterator[Tensor]:
        """log T_k [sum |y|] of the sampled tokens."""
        for k, name in enumerate(teachers.names):
            mine = part.like.new_zeros(0)
            if teachers.hidden:
                report = self._facts.findings.report_of_teacher(part.tokens, name)
                mine = self._logprobs(part, teachers.hidden[k], teachers.heads[k], report)
            elif part.hidden.size(0) > 0:
                mine = self._cached(part, name, self._facts.cache.pop_log_probs)
            yield part.tokens.whole(mine)

    def _logprobs(self, part: LossPart, hidden: Tensor, head: Tensor, report: Report, **options) -> Tensor:
        """[n], of the sampled tokens under one model."""
        return sampled_token_logprobs(
            hidden,
            head,
            part.target_ids,
            temperature=self._settings.rollout_temperature,
            report=report,
            **self._settings.head_options,
            **options,
        )


def _kind_options(kind: str, objective: ObjectiveConfig) -> dict[str, Any]:
    """The arguments of `linear_kl` for a single-teacher divergence."""
    match kind:
        case "top_k_kl":
            return dict(top_k=objective.top_k, top_k_from=objective.top_k_from or "teacher")
        case "forward_kl":
            return dict(divergence="forward_kl")
        case "jsd":
            return dict(divergence="jsd", beta=0.5 if objective.beta is None else objective.beta)
    raise AssertionError(f"no divergence of linear_kl is assigned to kind {kind}")
