"""Several weighted teachers at the cost of one softmax.

With weights w_k that sum to one and mixed logits m = sum_k w_k u_k,

    sum_k w_k KL(p || q_k) = KL(p || softmax(m)) + sum_k w_k lse(u_k) - lse(m).

The last two terms do not depend on the student (and are never negative: log-sum-exp is convex), so K teachers
cost K head products, one softmax and one gradient. Weights with a different sum W multiply everything by W.
"""

import torch
from torch import Tensor

from megatron_mopd.objectives.chunked_head import LogitsBuffer
from megatron_mopd.objectives.definitions import DivergenceSpec, statistics_dtype
from megatron_mopd.objectives.torch_kernels import softmax_statistics
from megatron_mopd.objectives.vocab_shard import VocabShard, merge_log_sum_exp


def check_mixture(
    hiddens: int,
    weights: int,
    mixture_weight: Tensor | None,
    student_hidden: Tensor,
    spec: DivergenceSpec,
    top_k: int | None,
) -> None:
    """Raise ValueError for a mixture that is inconsistent or has no one-softmax form."""
    if hiddens == 0 or hiddens != weights:
        raise ValueError(
            f"need one teacher hidden per teacher weight and at least one, got {hiddens} and {weights}"
        )
    if hiddens > 1 and (spec.kind != "reverse_kl" or top_k is not None):
        raise ValueError(
            "several teachers share one softmax only under reverse_kl over the full vocabulary, "
            f"got {spec.divergence} with top_k={top_k}: call once per teacher and add the losses"
        )
    if mixture_weight is None:
        return
    shapes = [[hiddens], [student_hidden.shape[0], hiddens]]
    if list(mixture_weight.shape) not in shapes or mixture_weight.device != student_hidden.device:
        raise ValueError(
            f"mixture_weight must be [K] or [T, K], {shapes[0]} or {shapes[1]}, on {student_hidden.device}, "
            f"got {list(mixture_weight.shape)} on {mixture_weight.device}"
        )
    if not bool(((mixture_weight >= 0) & (mixture_weight < torch.inf)).all()):
        raise ValueError("mixture_weight must be finite and not negative")


class TeacherMixture:
    """The teacher side of `linear_kl`: computes each chunk's (mixed) logits and completes the divergence.

    `upcast` requests logits in the statistics' dtype, because the caller will write into them.
    """

    def __init__(
        self,
        hiddens: list[Tensor],
        weights: list[Tensor],
        mixture_weight: Tensor | None,
        chunk_size: int,
        shard: VocabShard,
        spec: DivergenceSpec,
        upcast: bool,
    ):
        self._hiddens, self._weights, self._shard, self._spec = hiddens, weights, shard, spec
        tokens, count = hiddens[0].shape[0], len(hiddens)
        dtype = statistics_dtype(hiddens[0].dtype)
        self._raw = LogitsBuffer(hiddens[0], chunk_size, shard)
        self._mixed = self._normalised = self._total = None
        if upcast and dtype != hiddens[0].dtype or count > 1:
            self._mixed = LogitsBuffer(hiddens[0].new_empty(tokens, 0, dtype=dtype), chunk_size, shard)
        if mixture_weight is not None:
            mixture_weight = mixture_weight.detach().to(dtype).expand(tokens, count)
            self._total = mixture_weight.sum(-1)
            self._normalised = mixture_weight / self._total.clamp(min=torch.finfo(dtype).tiny).unsqueeze(-1)
        elif count > 1:
            self._normalised = torch.full((tokens, count), 1 / count, dtype=dtype, device=hiddens[0].device)
        if count > 1:  # local maximum and sum of exponentials of each teacher, then of the mixture
            self._statistics = torch.zeros(2, count + 1, tokens, dtype=dtype, device=hiddens[0].device)

    def logits(self, rows: slice) -> Tensor:
        """The chunk's teacher logits [c, valid]; for several teachers sum_k w_k u_k in the statistics'
        dtype."""
        if len(self._hiddens) == 1:
            raw = self._raw.fill(self._hiddens[0][rows], self._weights[0])
            return raw if self._mixed is None else self._mixed.rows(len(raw)).copy_(raw)
        for k, (hidden, weight) in enumerate(zip(self._hiddens, self._weights)):
            raw = self._raw.fill(hidden[rows], weight)
            self._statistics[:, k, rows] = softmax_statistics(raw, self._spec.inverse_temperature)
            mixed = self._mixed.rows(len(raw))
            share = self._normalised[rows, k : k + 1]
            if k == 0:
                torch.mul(raw, share, out=mixed)
            else:
                mixed.addcmul_(raw, share)
        self._statistics[:, -1, rows] = softmax_statistics(mixed, self._spec.inverse_temperature)
        return mixed

    def total_weight(self, rows: slice) -> Tensor | float:
        """Sum of the chunk's mixture weights, [c] or 1."""
        return 1.0 if self._total is None else self._total[rows]

    def complete(self, per_token: Tensor) -> Tensor:
        """KL(p || softmax(m)) [T], summed over ranks -> sum_k w_k KL(p || q_k) [T].

        Collective for K > 1 teachers: all-gather of [2, K + 1, T] per rank.
        """
        if len(self._hiddens) > 1:
            normalizers = merge_log_sum_exp(self._statistics, self._shard)
            disagreement = (self._normalised.t() * normalizers[:-1]).sum(0) - normalizers[-1]
            # Tokens with zero total weight have no mixture; for agreeing teachers rounding may give a
            # negative value.
            per_token = per_token + disagreement.clamp(min=0)
        return per_token if self._total is None else per_token * self._total

    def token_logits(self, token: int) -> dict[str, Tensor]:
        """One token's local logits for each teacher, for error messages."""
        heads = enumerate(zip(self._hiddens, self._weights))
        name = "teacher" if len(self._hiddens) == 1 else "teacher {}"
        return {name.format(k): h[token] @ w[: self._shard.valid].t() for k, (h, w) in heads}
