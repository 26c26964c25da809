"""Students, prompts and engines of the rollout tests, the same in every layout."""

from __future__ import annotations

import random

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_mopd.backend import packed_weights
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.model.build import build_model
from megatron_mopd.rollout import megatron_engine
from megatron_mopd.rollout.engine import SamplingParams
from megatron_mopd.rollout.megatron_engine import MegatronEngine
from tests import _models

LONGEST = 40
STOPS = (3, 4, 5, 6, 7, 8, 9, 10)


def prompts(count: int = 9, shortest: int = 1, longest: int = 17, common: int = 0) -> list[Prompt]:
    """Prompts of different lengths, including the shortest and the longest possible, after `common` shared
    tokens."""
    rng = random.Random(count)
    lengths = [shortest, longest] + [rng.randint(shortest, longest) for _ in range(count)]
    return [
        Prompt(
            "",
            (*range(20, 20 + common), *(rng.randrange(_models.VOCAB) for _ in range(length))),
            "arith",
            None,
            "none",
            None,
            i,
            f"p{i}",
        )
        for i, length in enumerate(lengths[:count])
    ]


def engine(
    transformer: dict,
    parallel: dict | None = None,
    *,
    dtype: str = "float64",
    max_batch_size: int = 64,
    max_sequence_length: int = LONGEST,
    **model,
):
    """An engine on this rank's layout, and the chunks it samples from."""
    groups = _models.groups_for(parallel or {})
    config = _models.model_config(transformer, **model)
    chunks = build_model(config, groups, dtype, max_sequence_length=LONGEST, seed=7)
    made = MegatronEngine(
        chunks,
        groups,
        vocab_size=_models.VOCAB,
        max_sequence_length=max_sequence_length,
        max_batch_size=max_batch_size,
    )
    return made, chunks


def pack_everything(packed: bool = True) -> None:
    """From now on in this process, rollouts of any length pack weights of any size for any number of rows, or
    none do."""
    packed_weights._SMALLEST, packed_weights._ROWS = 0, range(1, 65)
    megatron_engine._STEPS_WORTH_PACKING = 1 if packed else 10**9
    megatron_engine._ROWS_WORTH_PACKING = 1


def sampling(**changes) -> SamplingParams:
    return SamplingParams(**({"max_new_tokens": 10, "stop_token_ids": STOPS} | changes))


def plain(trajectories) -> list[tuple]:
    """Plain values that a rank can send to the parent process and tests can compare, with the tokens of all
    data-parallel ranks, which must hold those that they sampled and no others. Collective over all ranks."""
    held = {t.index: (t.response_ids.tolist(), t.logprobs.tolist()) for t in trajectories if t.has_tokens}
    rank = parallel_state.get_data_parallel_rank()
    assert held.keys() == {t.index for t in trajectories if t.sampled_by == rank}
    everywhere = [held]
    if dist.get_world_size() > 1:
        everywhere = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everywhere, held)
    tokens = {index: pair for of_rank in everywhere for index, pair in of_rank.items()}
    assert all(len(tokens[t.index][0]) == t.response_length for t in trajectories)
    return [(t.index, t.prompt.index, *map(tuple, tokens[t.index]), t.finished) for t in trajectories]
