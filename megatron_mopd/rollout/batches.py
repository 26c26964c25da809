"""A batch of rows that are decoded together, with their responses so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megatron_mopd.data.arrays import id_array, joined
from megatron_mopd.model.kv_cache import KeyValueCache
from megatron_mopd.model.packing import PackedDocuments
from megatron_mopd.rollout.engine import SamplingParams
from megatron_mopd.rollout.write_ahead import CONTINUES, CUT, STOPPED, Piece

_SHORTEST_SHARED = 8
"""The shortest common prefix of prompts, in tokens, that is computed only once."""
_CACHE_GRANULARITY = 64
"""Cache lengths are multiples of this, so that megatron-core rebuilds its length-dependent tables only a few
times."""


@dataclass(frozen=True, eq=False)
class Request:
    """One response to produce: a row of a decoding batch."""

    index: int
    """`Trajectory.index` of the response; keys its random numbers."""
    token_ids: np.ndarray
    """The prompt, int32."""
    limit: int
    """The maximum number of response tokens."""
    given: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """Response tokens that already exist, from an interrupted start."""
    given_logprobs: np.ndarray = field(default_factory=lambda: np.zeros(0))

    @property
    def read_ids(self) -> np.ndarray:
        """The tokens of the first forward pass."""
        return np.concatenate((id_array(self.token_ids), self.given))


@dataclass(frozen=True, eq=False)
class Response:
    """A finished row."""

    token_ids: np.ndarray
    """[|y|] int32."""
    logprobs: np.ndarray
    """[|y|] float64."""
    finished: bool
    """Ended by a stop token."""
    routing: Tensor | None = None
    """[prompt + response - 1, layers of this stage, k] experts of every token that went through the model, in
    host memory; only with `SamplingParams.keep_routing`."""


def split_evenly(requests: Sequence[Request], most_rows: int, lanes: int) -> list[Sequence[Request]]:
    """Split into consecutive batches of at most `most_rows` rows and nearly equal size; at least `lanes`
    batches if there are enough rows, so that every pipeline stage has one."""
    count = max(-(-len(requests) // most_rows), min(lanes, len(requests)))
    bounds = [len(requests) * i // count for i in range(count + 1)] if count else [0]
    return [requests[start:end] for start, end in zip(bounds, bounds[1:])]


class DecodingBatch:
    """Packed prompts, then one token per row; with their KV cache and the responses so far.

    Its state is a function of the requests and the sampled tokens, so every rank of a pipeline keeps its own
    copy and only hidden states and sampled tokens are communicated. The first forward pass computes each
    distinct prompt once, packed without padding, and the common prefix of all prompts (a system prompt,
    examples) only once; afterwards rows and caches are repeated for the samples of each prompt. Finished rows
    are removed once they make up an eighth of the batch: below that, copying the cache costs more than
    computing the rows.
    """

    def __init__(self, requests: Sequence[Request], sampling: SamplingParams, device: torch.device):
        self.requests = requests
        read = [request.read_ids for request in requests]
        prompts = list({ids.tobytes(): ids for ids in read}.values())
        row_of = {prompt.tobytes(): row for row, prompt in enumerate(prompts)}
        longest = max(map(len, prompts))
        self.position = 0
        """Number of tokens sampled so far for every row."""
        self.finished = 0
        """Number of complete responses."""
        self._sampling, self._device = sampling, device
        self._stop = torch.tensor(sampling.stop_token_ids, dtype=torch.long, device=device)

        def per_row(values) -> Tensor:
            return torch.as_tensor(values, dtype=torch.long, device=device)

        # For each row in the batch: its request, and (for the prefill) the row of its prompt.
        self._slots = torch.arange(len(requests), device=device)
        self._source = per_row([row_of[ids.tobytes()] for ids in read])
        self._alive = torch.ones(len(requests), dtype=torch.bool, device=device)
        self._limits = per_row([request.limit - len(request.given) for request in requests])
        self._starts = per_row([len(request.given) for request in requests])  # for all requests
        self._prompt_lengths = per_row([len(prompt) for prompt in prompts])
        self._indices = per_row([request.index for request in requests])
        self._routing: list[tuple[int, Tensor, Tensor]] = []  # forward pass, its rows' slots, their experts
        # For all requests, finished or not.
        steps = max(request.limit - len(request.given) for request in requests)
        # Given tokens end at column `first`; the values before them are distinct, so they form no repetition.
        self._first = first = int(self._starts.max())
        self._tokens = (-1 - torch.arange(first + steps, device=device)).repeat(len(requests), 1)
        for row, request in enumerate(requests):
            self._tokens[row, first - len(request.given) : first] = per_row(request.given)
        self._logged = torch.zeros(len(requests), dtype=torch.long)
        self._logprobs = torch.zeros((len(requests), steps), dtype=torch.double, device=device)
        self._lengths = torch.zeros(len(requests), dtype=torch.long, device=device)
        self._stopped = torch.zeros(len(requests), dtype=torch.bool, device=device)

        total = -(-(longest + steps) // _CACHE_GRANULARITY) * _CACHE_GRANULARITY
        self._shared = shared = _shared_length(prompts)
        self.cache = KeyValueCache(self._prompt_lengths, total, shared)
        before = (longest - self._prompt_lengths).unsqueeze(1)
        self._is_before_prompt = torch.arange(total, device=device) < before
        documents = [range(shared)] * (shared > 0) + [range(shared, len(prompt)) for prompt in prompts]
        self.documents: PackedDocuments | None = PackedDocuments.from_lengths(
            list(map(len, documents)), device, whole=True, first_is_shared=shared > 0
        )
        """Boundaries of the prompts for the prefill, `None` afterwards."""
        parts = [prompts[0][:shared], *(prompt[shared:] for prompt in prompts)]
        self.input_ids = per_row(np.concatenate(parts)).unsqueeze(0)
        """Tokens of the next forward pass: [1, all prompts' tokens], then [rows, 1]."""
        positions = [np.arange(document.start, document.stop) for document in documents]
        self.position_ids = per_row(np.concatenate(positions)).unsqueeze(0)
        """Positions of these tokens in their own document, same shape."""

    @property
    def trajectories(self) -> Tensor:
        """`Trajectory.index` of every sampled row, [b]."""
        return self._indices[self._slots]

    @property
    def positions(self) -> Tensor:
        """Position, in its response, of the token that each row samples next, [b]."""
        return self._starts[self._slots] + self.position

    def attention_mask(self) -> Tensor | None:
        """[rows, 1, 1, stored + 1], True where a query must not attend: before the prompt. `None` for the
        prefill, where `documents` are the boundaries."""
        if self.documents is not None:
            return None
        return self._is_before_prompt[:, None, None, : self.cache.sequence_len_offset + 1]

    def sampled_states(self, hidden: Tensor) -> Tensor:
        """Final hidden states [new, rows, h] -> those to sample from, one per response [b, h]."""
        if self.documents is None:
            return hidden[0]
        return hidden[self._shared - 1 + (self._prompt_lengths - self._shared).cumsum(0), 0]

    def expand(self, logits: Tensor) -> Tensor:
        """Expand the logits of the forward pass's rows to one row per sampled response [b, V/tp]."""
        return logits[self._source] if self.position == 0 else logits

    @property
    def samples(self) -> int:
        """Number of tokens that the current step samples."""
        return len(self._slots)

    def new_tokens(self, tokens: Tensor) -> list[tuple[int, int]]:
        """(`Trajectory.index`, token) of every unfinished row, given the step's tokens [b]."""
        return list(zip(self.trajectories[self._alive].tolist(), tokens[self._alive].tolist(), strict=True))

    def advance(self, tokens: Tensor, logprobs: Tensor) -> bool:
        """Append the sampled tokens and fp64 log-probs [b]; True when every response is complete.

        No collectives.
        """
        self.cache.sequence_len_offset += 1 if self.documents is None else self.cache.longest_prompt
        self.documents = None
        alive = self._alive
        slots = self._slots[alive]
        self._tokens[slots, self._first + self.position] = tokens[alive]
        self._logprobs[slots, self.position] = logprobs[alive]
        self._lengths[slots] += 1
        stops = alive & torch.isin(tokens, self._stop)
        self._stopped[self._slots] |= stops
        self.position += 1
        self._alive = alive & ~stops & ~self._repeating() & (self._limits > self.position)
        count = int(self._alive.sum())
        self.finished = len(self.requests) - count
        if count == 0:
            self.cache = None
            return True
        first = self.position == 1
        if first or count <= 7 * len(self._slots) // 8:
            tokens = self._keep(tokens, source=self._source if first else None)
        # A finished row that stays is still decoded, at its last position, so that none exceeds the rotary
        # table.
        self.input_ids = tokens.unsqueeze(1)
        position = self._prompt_lengths + torch.clamp(self._limits, max=self.position) - 1
        self.position_ids = position.unsqueeze(1)
        return False

    def _repeating(self) -> Tensor:
        """Rows [b] whose last tokens repeat one pattern `repetition_stop` times in a row."""
        times, have = self._sampling.repetition_stop, self._first + self.position
        repeating = torch.zeros_like(self._alive)
        longest = min(self._sampling.repetition_max_period, have // times) if times > 1 else 0
        if longest:
            last = self._tokens[self._slots, have - longest * times : have]
        for period in range(1, longest + 1):
            window = last[:, (longest - period) * times :]
            repeating |= (window[:, period:] == window[:, :-period]).all(dim=1)
        return repeating

    def _keep(self, tokens: Tensor, source: Tensor | None) -> Tensor:
        """Drop finished rows; after the prefill, `source` [b] is the row of each response's prompt."""
        keep = self._alive.nonzero().squeeze(1)
        rows = keep if source is None else source[keep]
        self.cache.keep_rows(rows)
        self._is_before_prompt = self._is_before_prompt[rows]
        self._prompt_lengths = self._prompt_lengths[rows]
        self._slots, self._alive, self._limits = self._slots[keep], self._alive[keep], self._limits[keep]
        return tokens[keep]

    def keep_routing(self, experts: Tensor) -> None:
        """Record the experts chosen in one forward pass of one model chunk: [layers, tokens, k]."""
        self._routing.append((self.position, self._slots, experts))

    def responses(self) -> list[Response]:
        """The response to every request, in the order of `requests`: views of one flat array of tokens and
        one of log-probs."""
        lengths = self._lengths.tolist()
        tokens, logprobs = self._tokens.to(torch.int32).cpu().numpy(), self._logprobs.cpu().numpy()
        ids, values = [], []
        for row, (request, length) in enumerate(zip(self.requests, lengths)):
            ids.append(tokens[row, self._first - len(request.given) : self._first + length])
            values.append(np.concatenate((request.given_logprobs, logprobs[row, :length])))
        rows = zip(
            joined(ids, np.int32),
            joined(values, np.float64),
            self._stopped.tolist(),
            self._routes(lengths),
            strict=True,
        )
        return [Response(*row) for row in rows]

    def unlogged(self) -> list[Piece]:
        """Everything sampled since the last call."""
        going_on = torch.zeros_like(self._stopped)
        going_on[self._slots[self._alive]] = True
        pieces, lengths = [], self._lengths.cpu()
        state = torch.where(going_on, CONTINUES, torch.where(self._stopped, STOPPED, CUT)).tolist()
        for row in (lengths > self._logged).nonzero().flatten().tolist():
            request, start, end = self.requests[row], int(self._logged[row]), int(lengths[row])
            tokens = self._tokens[row, self._first + start : self._first + end].to(torch.int32)
            logprobs = self._logprobs[row, start:end]
            place = len(request.given) + start
            pieces.append(
                Piece(request.index, place, tokens.cpu().numpy(), logprobs.cpu().numpy(), state[row])
            )
        self._logged = lengths.clone()  # on the CPU, `lengths` is the counter itself
        return pieces

    def _routes(self, lengths: list[int]) -> list[Tensor | None]:
        """`Response.routing` of every request, from the records of all forward passes and chunks."""
        if not self._routing:
            return [None] * len(self.requests)
        prefill = torch.cat([experts for step, _, experts in self._routing if step == 0])  # [L, tokens, k]
        layers, _, k = prefill.shape
        steps = max(lengths)
        decoded = prefill.new_zeros((len(self.requests), max(steps - 1, 0), layers, k))
        layer_of = dict.fromkeys(range(1, steps), 0)  # chunks come in order within a forward pass
        for step, slots, experts in self._routing:
            if step == 0:
                continue
            first = layer_of[step]
            layer_of[step] = last = first + len(experts)
            decoded[slots, step - 1, first:last] = experts.transpose(0, 1)
        prefill, decoded = prefill.cpu(), decoded.cpu()
        of_request = [id_array(request.token_ids).tobytes() for request in self.requests]
        prompts = {key: len(request.token_ids) for key, request in zip(of_request, self.requests)}
        shared, *parts = prefill.transpose(0, 1).split(
            [self._shared, *(length - self._shared for length in prompts.values())]
        )
        of_prompt = {prompt: torch.cat((shared, part)) for prompt, part in zip(prompts, parts, strict=True)}
        return [
            torch.cat([of_prompt[key], decoded[i, : length - 1]])
            for i, (key, length) in enumerate(zip(of_request, lengths))
        ]


def _shared_length(prompts: Sequence[Sequence[int]]) -> int:
    """Number of tokens that all prompts share as a prefix and that are computed once: never a whole prompt,
    and 0 where it would save little."""
    if len(prompts) < 2:
        return 0
    first, common = id_array(prompts[0]), min(map(len, prompts)) - 1
    for prompt in prompts[1:]:
        differ = np.flatnonzero(first[:common] != id_array(prompt)[:common])
        common = int(differ[0]) if len(differ) else common
    return common if common >= _SHORTEST_SHARED else 0
