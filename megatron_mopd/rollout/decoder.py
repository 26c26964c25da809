"""The decoding loop of one pipeline: batches circulate through its stages until all responses are
complete."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mopd.backend.packed_weights import PackedWeights
from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.model.gpt import HiddenStateGPT
from megatron_mopd.model.kv_cache import KeyValueCache
from megatron_mopd.model.packing import PackedDocuments
from megatron_mopd.model.router_replay import compact_dtype, routing_choices
from megatron_mopd.objectives.vocab_shard import VocabShard
from megatron_mopd.observe.progress import advance
from megatron_mopd.rollout.batches import DecodingBatch, Request, Response
from megatron_mopd.rollout.engine import SamplingParams
from megatron_mopd.rollout.sampling import sample_tokens
from megatron_mopd.rollout.write_ahead import RolloutLog

OnToken = Callable[[int, int], None]
"""Called with `Trajectory.index` and token id of every token as it is sampled, on every rank of the
pipeline."""


class Decoder:
    """Decodes batches on this rank's pipeline, in ticks.

    A model of `stages` = pp x vpp consecutive pieces has one batch per pipeline rank in flight, each in a
    *lane*: in tick t, lane l is in piece (t - l) mod stages, so every rank computes exactly one piece of one
    lane, and then all exchange their results in one group of sends and receives. Lane l samples when it
    leaves the last piece; the tokens go to every rank of the pipeline, each of which tracks the state of all
    lanes.
    """

    def __init__(
        self,
        chunks: Sequence[HiddenStateGPT],
        groups: ParallelGroups,
        vocab_size: int,
        sampling: SamplingParams,
        seed: int,
        weights: PackedWeights,
        on_token: OnToken | None = None,
        log: RolloutLog | None = None,
    ):
        self._weights, self._on_token, self._log = weights, on_token, log
        self._chunks, self._groups = chunks, groups
        self._sampling, self._seed, self._vocab_size = sampling, seed, vocab_size
        self._rank, self._size = groups.pp.rank(), groups.pp_size
        self._stages = groups.pp_size * len(chunks)
        self._expert_peers = _ranks_sharing_experts(groups)
        config = chunks[0].config
        self._hidden_size = config.hidden_size
        self._hidden_dtype = torch.float32 if config.fp32_residual_connection else config.params_dtype
        self._lanes: list[DecodingBatch | None] = [None] * groups.pp_size

    def run(self, batches: Sequence[Sequence[Request]]) -> list[tuple[Request, Response]]:
        """Every request of `batches` with its response. All ranks of a pipeline pass the same batches.

        A progress bar, if there is a terminal, counts this pipeline's complete responses. Collectives: see
        `MegatronEngine.generate`.
        """
        queue, done = deque(batches), []
        total = sum(map(len, batches))
        advance(0, total)
        if self._size > 1:
            # With NCCL, the first point-to-point call of a group must involve all its ranks.
            dist.all_reduce(torch.zeros(1, device=self._groups.device), group=self._groups.pp)
        tick, incoming = 0, None
        while True:
            first_lane = tick % self._stages
            if first_lane == 0 and not self._anyone_has_work(bool(queue) or any(self._lanes)):
                return done
            if first_lane < self._size and self._lanes[first_lane] is None and queue:
                self._lanes[first_lane] = DecodingBatch(queue.popleft(), self._sampling, self._groups.device)
            outgoing = self._compute(tick, incoming)
            incoming, sampled = self._exchange(tick, outgoing)
            if sampled is not None:
                number = (tick + 1) % self._stages
                batch = self._lanes[number]
                if self._on_token is not None:
                    for index, token in batch.new_tokens(sampled[0]):
                        self._on_token(index, token)
                is_complete = batch.advance(*sampled)
                if self._log is not None:
                    if is_complete:
                        self._log.append(batch.unlogged())
                    elif self._log.is_due():
                        self._log.append(
                            piece for other in filter(None, self._lanes) for piece in other.unlogged()
                        )
                if is_complete:
                    done += zip(batch.requests, batch.responses(), strict=True)
                    self._lanes[number] = None
                advance(len(done) + sum(lane.finished for lane in filter(None, self._lanes)), total)
            tick += 1

    def _anyone_has_work(self, here: bool) -> bool:
        """Whether to continue: a rank without work still computes its experts for the others (all-reduce of
        one integer)."""
        if self._expert_peers is None:
            return here
        flag = torch.tensor(int(here), dtype=torch.int32, device=self._groups.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._expert_peers)
        return bool(flag)

    def _unit(self, rank: int, tick: int) -> tuple[DecodingBatch | None, int | None]:
        """The work of pipeline rank `rank` in a tick: the batch (None if the lane is empty) and the piece."""
        lane = (tick - rank) % self._size
        if tick < lane:
            return None, None
        return self._lanes[lane], (tick - lane) % self._stages

    def _compute(self, tick: int, incoming: Tensor | None) -> Tensor | None:
        """Run one piece on `batch.input_ids` [rows, new]: hidden states [new, rows, h], or from the last
        piece tokens and log-probs [b, 2]."""
        batch, piece = self._unit(self._rank, tick)
        if batch is None:
            if piece is not None and self._expert_peers is not None:
                self._dummy_forward(self._chunks[piece // self._size])
            return None
        chunk = self._chunks[piece // self._size]
        choices = routing_choices(chunk) if self._sampling.keep_routing else []
        for choice in choices:
            choice.record()
        mask, documents = batch.attention_mask(), batch.documents
        hidden = _forward(chunk, incoming, batch.input_ids, batch.position_ids, mask, batch.cache, documents)
        if choices:
            compact = compact_dtype(chunk.config.num_moe_experts)
            batch.keep_routing(torch.stack([choice.take() for choice in choices]).to(compact))
        if piece < self._stages - 1:
            return hidden.contiguous()
        weight = chunk.head_weight()
        logits = batch.expand(self._weights.linear(batch.sampled_states(hidden), weight))
        sampled = sample_tokens(
            logits,
            VocabShard.of(weight.size(0), self._groups.tp, self._vocab_size),
            self._sampling,
            seed=self._seed,
            trajectories=batch.trajectories,
            position=batch.positions,
        )
        return torch.stack(sampled, dim=1).double() if self._size > 1 else sampled

    def _exchange(self, tick: int, outgoing) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """Exchange the tick's results: (hidden states for this rank's next piece, sampled tokens and
        log-probs).

        Point to point over the pipeline: new x rows x h elements to the next stage, 16 bytes per row from the
        last stage to each of the others. Every rank derives all sizes from its own copy of the state.
        """
        if self._size == 1:
            return None, outgoing
        device, group, transfers = self._groups.device, self._groups.pp, []

        def post(operation, tensor: Tensor, peer: int) -> Tensor:
            transfers.append(dist.P2POp(operation, tensor, dist.get_global_rank(group, peer), group))
            return tensor

        last, previous = self._size - 1, (self._rank - 1) % self._size
        incoming = sampled = None
        batch, piece = self._unit(previous, tick)
        if batch is not None and piece < self._stages - 1:
            shape = (*batch.input_ids.t().shape, self._hidden_size)
            incoming = post(dist.irecv, torch.empty(shape, dtype=self._hidden_dtype, device=device), previous)
        batch, piece = self._unit(last, tick)
        if batch is not None and piece == self._stages - 1:
            if self._rank == last:
                sampled = outgoing
                for peer in range(last):
                    post(dist.isend, sampled, peer)
            else:
                sampled = torch.empty((batch.samples, 2), dtype=torch.double, device=device)
                post(dist.irecv, sampled, last)
        if outgoing is not None and outgoing is not sampled:
            post(dist.isend, outgoing, (self._rank + 1) % self._size)
        if transfers:
            for work in dist.batch_isend_irecv(transfers):
                work.wait()
        return incoming, None if sampled is None else (sampled[:, 0].long(), sampled[:, 1])

    def _dummy_forward(self, chunk: HiddenStateGPT) -> None:
        """Run one dummy token, so that this rank's experts take part in the others' forward pass."""
        device = self._groups.device
        hidden = torch.zeros((1, 1, self._hidden_size), dtype=self._hidden_dtype, device=device)
        zero = torch.zeros((1, 1), dtype=torch.long, device=device)
        mask = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=device)
        _forward(chunk, hidden, zero, zero, mask, KeyValueCache(zero[0] + 1, 64))


def _forward(
    chunk: HiddenStateGPT,
    hidden: Tensor | None,
    input_ids: Tensor,
    position_ids: Tensor,
    attention_mask: Tensor,
    cache: KeyValueCache,
    documents: PackedDocuments | None = None,
) -> Tensor:
    if not chunk.pre_process:
        chunk.set_input_tensor(hidden)
    output = chunk(
        input_ids, position_ids, attention_mask, inference_context=cache, packed_seq_params=documents
    )
    if not chunk.pre_process:
        chunk.set_input_tensor(None)
    return output


def _ranks_sharing_experts(groups: ParallelGroups) -> dist.ProcessGroup | None:
    """Ranks that must run the same number of forward passes; None if their work is the same anyway.

    Tensor- and context-parallel ranks of one data-parallel rank, a block of consecutive ranks in each stage,
    do the same work. So do the ranks of an expert block (expert-tensor x expert-model parallel) inside such a
    block; an expert block that contains several of them couples them. Blocks that overlap without nesting
    couple all ranks.
    """
    experts, replica = groups.collection.tp_ep.size(), groups.tp_size * groups.cp_size
    if replica % experts == 0:
        return None
    return groups.collection.tp_ep if experts % replica == 0 else dist.group.WORLD
