"""Distillation diagnostics: entropies, agreement on the likeliest token, overlap of top-k sets."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mopd.objectives.definitions import DivergenceSpec, Moments
from megatron_mopd.objectives.vocab_shard import VocabShard


class DivergenceDiagnostics(NamedTuple):
    """Per-token diagnostics, each [T], detached, equal on every rank; at the divergence's temperature.

    With several teachers "teacher" is their geometric mixture, the softmax of the mixed logits.
    """

    student_entropy: Tensor  # nats
    teacher_entropy: Tensor  # nats
    teacher_prob_of_student_top1: Tensor  # teacher probability of the student's greedy token
    top1_agreement: Tensor  # 1 where both models' likeliest tokens are the same, else 0
    top_k_overlap: Tensor  # share of the student's top k that is in the teacher's top k
    student_top_k_mass: Tensor  # student's probability of its own top k
    teacher_top_k_mass: Tensor  # teacher's probability of its own top k


class DivergenceObserver:
    """Collects the diagnostics chunk by chunk, while the logits are in memory.

    Collectives: per chunk of c tokens an all-gather of [c, 4k + 1] per rank (each shard's k best logits and
    their ids, for both models, and the teacher's logit at the student's best); one sum of [2, T] at the end.
    """

    def __init__(self, top_k: int, like: Tensor):
        self._top_k = top_k
        self._values = DivergenceDiagnostics(*(torch.zeros_like(like) for _ in DivergenceDiagnostics._fields))

    def observe(
        self,
        rows: slice,
        student: Tensor,
        teacher: Tensor,
        statistics: Tensor,
        moments: Moments,
        shard: VocabShard,
        spec: DivergenceSpec,
    ) -> None:
        """Read one chunk's local logits [c, columns], their `statistics` [7, c], and the `moments` of the
        full vocabulary.
        """
        values = self._values
        values.student_entropy[rows] = _entropy(*statistics[[0, 2, 5]], moments.student_log_normalizer)
        values.teacher_entropy[rows] = _entropy(*statistics[[1, 3, 6]], moments.teacher_log_normalizer)

        k = self._top_k
        student_best, student_ids = self._local_best(student, shard)
        teacher_best, teacher_ids = self._local_best(teacher, shard)
        at_student_best = student_best.new_full((len(student_best), 1), -torch.inf)
        if student.shape[1] > 0:
            columns = student_ids[:, :1].long() - shard.offset
            at_student_best = teacher.gather(1, columns).to(student_best.dtype)
        packed = torch.cat([student_best, student_ids, teacher_best, teacher_ids, at_student_best], dim=1)
        gathered = shard.all_gather(packed).transpose(0, 1)  # [c, tp, 4k + 1]
        columns = gathered.split([k, k, k, k, 1], dim=2)
        student_best, student_ids, teacher_best, teacher_ids, at_student_best = (
            x.flatten(1) for x in columns
        )

        student_best, student_order = _descending(student_best, k)
        teacher_best, teacher_order = _descending(teacher_best, k)
        student_set, teacher_set = student_ids.gather(1, student_order), teacher_ids.gather(1, teacher_order)
        winner = student_order[:, :1] // k  # the rank that holds the student's likeliest token
        teacher_logit = at_student_best.gather(1, winner).squeeze(1)
        inverse = spec.inverse_temperature
        student_normalizer, teacher_normalizer = (
            moments.student_log_normalizer,
            moments.teacher_log_normalizer,
        )
        values.teacher_prob_of_student_top1[rows] = (teacher_logit * inverse - teacher_normalizer).exp()
        values.top1_agreement[rows] = (student_set[:, 0] == teacher_set[:, 0]).to(values.top1_agreement.dtype)
        real = student_best > -torch.inf  # fewer than k if the vocabulary is smaller
        shared = (student_set.unsqueeze(2) == teacher_set.unsqueeze(1)).any(2) & real
        values.top_k_overlap[rows] = shared.sum(1) / real.sum(1)
        values.student_top_k_mass[rows] = (student_best * inverse - student_normalizer[:, None]).exp().sum(1)
        values.teacher_top_k_mass[rows] = (teacher_best * inverse - teacher_normalizer[:, None]).exp().sum(1)

    def result(self, shard: VocabShard) -> DivergenceDiagnostics:
        entropies = shard.all_reduce(
            torch.stack([self._values.student_entropy, self._values.teacher_entropy])
        )
        return self._values._replace(student_entropy=entropies[0], teacher_entropy=entropies[1])

    def _local_best(self, logits: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor]:
        """This shard's k best logits and their global ids, both [c, k]; padded with -inf and -1.

        Ids are sent as floating-point numbers, which are exact up to 2^24 in fp32, more than any vocabulary
        needs.
        """
        dtype = self._values.student_entropy.dtype
        rows, local_k = logits.shape[0], min(self._top_k, logits.shape[1])
        best = logits.new_full((rows, self._top_k), -torch.inf, dtype=dtype)
        ids = torch.full_like(best, -1)
        values, columns = logits.topk(local_k, dim=1)
        best[:, :local_k] = values
        ids[:, :local_k] = (columns + shard.offset).to(dtype)
        return best, ids


def _entropy(maximum: Tensor, total: Tensor, score: Tensor, log_normalizer: Tensor) -> Tensor:
    """Local part of -sum_v p log p -> [rows], from local maximum a, sum and score (see `statistics`).

    log p = (z - a) + (a - log normalizer), and p = exp(z - a) exp(a - log normalizer).
    """
    shift = maximum - log_normalizer
    return -shift.exp() * (score + shift * total)


def _descending(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of [c, n] and their positions; in a tie the lower vocabulary id wins."""
    ordered = values.sort(dim=1, descending=True, stable=True)
    return ordered.values[:, :k], ordered.indices[:, :k]
