"""The in-process rollout engine: it decodes with the training weights, on the training layout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_mopd.backend.parallel import ParallelGroups
from megatron_mopd.data.arrays import joined, logprob_dtype
from megatron_mopd.data.exchange import share_endings
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.trajectory import Trajectory, sum_of
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.model.router_replay import compact_dtype, routing_choices
from megatron_mopd.rollout.batches import Request, Response, split_evenly
from megatron_mopd.rollout.decoder import Decoder, OnToken
from megatron_mopd.rollout.decoding_mode import decoding_mode
from megatron_mopd.rollout.engine import SamplingParams
from megatron_mopd.rollout.routing_records import RoutingRecords
from megatron_mopd.rollout.write_ahead import STOPPED, Known, RolloutLog

_STEPS_WORTH_PACKING, _ROWS_WORTH_PACKING = 32, 4
"""The number of decoding steps and rows from which repacking the weights into panels pays off."""


class MegatronEngine:
    """Samples from the student's chunks on this rank, with a KV cache; see `RolloutEngine`.

    Data-parallel ranks take every dp-th prompt in order of length. Tensor-parallel ranks share every matrix
    and the vocabulary. Context-parallel ranks all do the same work. Pipeline stages pass on hidden states,
    with one batch per stage in flight. Ranks that share experts run the same number of forward passes, with a
    dummy row on ranks that have no work left. Tokens do not depend on any of this (up to the rounding of
    logits).
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        groups: ParallelGroups,
        *,
        vocab_size: int,
        max_sequence_length: int,
        max_batch_size: int,
    ):
        """`chunks` are the student's model chunks of this rank, wrapped in DDP or not. `max_sequence_length`
        bounds prompt plus response; `max_batch_size` bounds the rows decoded at once on one data-parallel
        rank, over all batches in flight. No collectives."""
        self._chunks = [unwrap(chunk) for chunk in chunks]
        self._groups = groups
        self._vocab_size = vocab_size
        self._max_sequence_length = max_sequence_length
        self._max_batch_size = max_batch_size
        self.routing: RoutingRecords | None = None

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        seed: int,
        samples_per_prompt: int = 1,
        on_token: OnToken | None = None,
        log: RolloutLog | None = None,
    ) -> list[Trajectory]:
        """See `RolloutEngine.generate`; `on_token` receives this data-parallel rank's tokens as they are
        sampled.

        Sampling does not change the model: training mode, sequence parallelism and gradients are restored,
        also after an exception.

        Collectives: those of the model's layers; per token those of `sample_tokens`, and in a pipeline the
        hidden states to the next stage (b x h elements) and 16 bytes per row from the last stage to every
        other; one integer per step among ranks whose experts span data-parallel ranks; at the end one
        all-reduce of 16 bytes per response over data-parallel ranks. With `log`, those of
        `RolloutLog.deliver` before sampling. Raises `ValueError` on every rank if a log-prob is not finite,
        unless `sampling.allow_not_finite`.
        """
        requests = self._requests(prompts, sampling, samples_per_prompt)
        groups, known = self._groups, log.known if log is not None else {}
        rank, dtype = groups.dp.rank(), logprob_dtype(self._chunks[0].config.params_dtype)
        complete = [r.index for r in requests if r.index in known and known[r.index].is_complete]
        shares = self._shares(requests, complete, samples_per_prompt)
        owners = {request.index: owner for owner, share in enumerate(shares) for request in share}
        owners |= {index: place % groups.dp_size for place, index in enumerate(complete)}
        if log is not None:
            log.deliver(owners)
            known = log.known
        own = [_continued(request, known.get(request.index)) for request in shares[rank]]
        rows_per_lane = max(1, self._max_batch_size // groups.pp_size)
        batches = split_evenly(own, rows_per_lane, groups.pp_size)
        responses = {
            i: Response(known[i].token_ids, known[i].logprobs, known[i].state == STOPPED)
            for i in complete
            if owners[i] == rank
        }
        if any(shares):
            rows = max(map(len, batches), default=1)
            packed = rows >= _ROWS_WORTH_PACKING and sampling.max_new_tokens >= _STEPS_WORTH_PACKING
            with decoding_mode(self._chunks, packed) as weights:
                decoder = Decoder(
                    self._chunks, groups, self._vocab_size, sampling, seed, weights, on_token, log
                )
                decoded = decoder.run(batches)
            responses |= {request.index: response for request, response in decoded}
        mine = {i: (len(r.token_ids), r.finished, sum_of(r.logprobs)) for i, r in responses.items()}
        endings = share_endings(mine, len(requests), groups.dp, groups.device)
        if log is not None:
            log.close()
        self.routing = self._routing_records(responses) if sampling.keep_routing else None
        if not (sampling.allow_not_finite or all(math.isfinite(total) for *_, total in endings)):
            raise ValueError("rollout: the student's logits are not finite; its weights are damaged")
        ids = dict(zip(responses, joined([r.token_ids for r in responses.values()], np.int32)))
        logprobs = dict(zip(responses, joined([r.logprobs for r in responses.values()], dtype)))
        return [
            Trajectory(
                prompts[i // samples_per_prompt],
                ids.get(i),
                i,
                logprobs.get(i),
                is_finished,
                response_length=length,
                logprob_sum=total,
                sampled_by=owners[i],
            )
            for i, (length, is_finished, total) in enumerate(endings)
        ]

    def _routing_records(self, responses: Mapping[int, Response]) -> RoutingRecords | None:
        """This rank's expert choices; `None` on a stage without mixture-of-experts layers."""
        layers = sum(len(routing_choices(chunk)) for chunk in self._chunks)
        if layers == 0:
            return None
        config = self._chunks[0].config
        records = {index: response.routing for index, response in responses.items()}
        return RoutingRecords(
            records, (layers, config.moe_router_topk), compact_dtype(config.num_moe_experts)
        )

    def _requests(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, samples_per_prompt: int
    ) -> list[Request]:
        if samples_per_prompt < 1:
            raise ValueError(f"samples_per_prompt must be at least 1, got {samples_per_prompt}")
        requests = []
        for position, prompt in enumerate(prompts):
            room = self._max_sequence_length - len(prompt.token_ids)
            if room < 1 or len(prompt.token_ids) == 0:
                raise ValueError(
                    f"{prompt.origin}: a prompt of {len(prompt.token_ids)} tokens; it needs at least 1, "
                    f"and at most {self._max_sequence_length - 1} to leave room for a response"
                )
            if not 0 <= prompt.token_ids.min() <= prompt.token_ids.max() < self._vocab_size:
                raise ValueError(f"{prompt.origin}: token ids must be in [0, {self._vocab_size})")
            limit = min(sampling.max_new_tokens, room)
            first = position * samples_per_prompt
            requests += [Request(first + s, prompt.token_ids, limit) for s in range(samples_per_prompt)]
        return requests

    def _shares(
        self, requests: list[Request], complete: Sequence[int], samples_per_prompt: int
    ) -> list[list[Request]]:
        """The requests of each data-parallel rank, the same on every rank: whole prompts, the longest first,
        dealt in turn, without the `complete` ones."""
        done, prompts = set(complete), []
        for first in range(0, len(requests), samples_per_prompt):
            samples = requests[first : first + samples_per_prompt]
            prompts.append([request for request in samples if request.index not in done])
        prompts = [samples for samples in prompts if samples]
        prompts.sort(key=lambda samples: -len(samples[0].token_ids))
        dp = self._groups.dp_size
        return [[request for samples in prompts[rank::dp] for request in samples] for rank in range(dp)]


def _continued(request: Request, known: Known | None) -> Request:
    if known is None:
        return request
    return replace(request, given=known.token_ids, given_logprobs=known.logprobs)
