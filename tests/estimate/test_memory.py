"""The memory estimate against what one real step allocates, and for a world larger than any machine."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import time

import pytest

from megatron_mopd.backend.parallel import select_device
from megatron_mopd.commands import estimate
from megatron_mopd.config import DomainObjectives, config_from_dict
from megatron_mopd.estimate.memory import estimate_rank, imagined_groups
from megatron_mopd.teachers.bank import TeacherSource
from tests import _models, _runs
from tests._agent import Agent

DENSE = dict(
    num_layers=2,
    hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    ffn_hidden_size=96,
    make_vocab_size_divisible_by=8,
)
MOE = DENSE | dict(num_moe_experts=4, moe_router_topk=2, moe_ffn_hidden_size=32)
OVER_HEADS = dict(qk_layernorm=True, qk_layernorm_over_heads=True)


def in_a_process(function, *arguments):
    """Run `function` in a separate forked process, so that the imagined world leaves nothing behind here."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=lambda: queue.put(function(*arguments)))
    child.start()
    child.join(120)
    assert not queue.empty(), "the process exited without a result"
    return queue.get()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("memory")
    _runs.write_inputs(directory)
    return directory


def configuration(directory, student, **sections):
    values = _runs.values(
        directory,
        routing={"default": "self"},
        rollout={"max_new_tokens": 20},
        **{"objective": {"kind": "full_vocab_kl"}} | sections,
    )
    return config_from_dict(values | {"student": student, "teachers": [{"name": "self"}]})


TP2_PP2 = dict(tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2)
EP2_PP2 = dict(expert_model_parallel_size=2, pipeline_model_parallel_size=2)


@pytest.mark.parametrize(
    "student, parallel, sections",
    [
        (DENSE, {}, {}),
        (MOE, {}, dict(objective={"kind": "sampled_token", "temperature": 1.0})),
        (MOE | OVER_HEADS, {}, {}),
        (DENSE, TP2_PP2, dict(params_dtype="bfloat16", teacher_storage={"mode": "host_sharded"})),
        (MOE, EP2_PP2, dict(teacher_storage={"mode": "mmap"})),
    ],
    ids=["dense", "moe", "moe-norms-over-heads", "dense-tp2-pp2-bf16", "moe-ep2-pp2-files"],
)
def test_a_small_run_allocates_what_was_estimated(inputs, tmp_path, student, parallel, sections):
    """Every component of every rank agrees within 10%."""
    config = configuration(inputs, student, parallel=parallel, run_dir=str(tmp_path), **sections)
    statuses, printed = on_ranks(4 if parallel else 1, estimate.check, config)
    print(printed)
    assert set(statuses) == {0}, printed
    assert "bytes on rank 0" in printed and ("bytes on rank 2" in printed) == bool(parallel), "missing stage"


def on_ranks(count, function, *arguments):
    """Results of `function` on ranks forked as torchrun would start them, and the output of rank 0."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def rank_main(rank):
        agent.set_environment(rank, count)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = function(*arguments)
        time.sleep(0.3 * rank)  # rank 0 exits first; the others must not report it as failed
        answers.put((rank, status, out.getvalue()))

    with Agent() as agent:
        ranks = [context.Process(target=rank_main, args=(rank,)) for rank in range(count)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(280)
            process.kill()
    assert [process.exitcode for process in ranks] == [0] * count
    found = sorted(answers.get() for _ in ranks)
    return [status for _, status, _ in found], found[0][2]


def test_components_of_a_large_world_shrink_as_the_layout_says(inputs):
    parallel = dict(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        expert_model_parallel_size=4,
        expert_tensor_parallel_size=1,
    )
    config = configuration(
        inputs,
        MOE,
        parallel=parallel,
        schedule={"global_batch_size": 512},
        teacher_storage={"mode": "host_sharded"},
    )
    ranks = estimate.stage_ranks(config, 64)
    assert ranks == [0, 32]
    first, last = in_a_process(estimate.estimate, config, 64, ranks).values()
    whole = in_a_process(estimate.estimate, configuration(inputs, MOE), 1, [0])[0]
    both = first.device["student weights"] + last.device["student weights"]
    # Dense weights are split over TP 2, experts over EP 4; norms and the router are on every rank.
    assert whole.device["student weights"] / 4 < both < whole.device["student weights"] / 1.6
    assert "loss" not in first.device and last.device["loss"] > 0
    # The optimizer state of dense weights is sharded over 16 replicas, that of experts over 8.
    assert first.device["optimizer"] < first.device["gradients"] * 2 / 7
    assert first.host["teacher storage"] < first.device["student weights"] / 7


def head_slots(config):
    """Estimated head slots of four teachers, of which up to three score a sample."""
    select_device("cpu")
    model = _models.model_config(_models.DENSE)
    teachers = [TeacherSource(f"t{number}", model, number) for number in range(4)]
    with imagined_groups(config.parallel, 1, 0) as groups:
        slots = estimate_rank(config, model, teachers, 3, groups).device["teacher slots"]
        one = estimate_rank(config, model, teachers, 0, groups).device["teacher slots"]
    head = 88 * 32 * 4  # padded vocabulary, width, float32
    return (slots - one) // head + 2


def test_log_probs_of_sampled_tokens_need_one_head_at_a_time(inputs):
    """For every mixture. The run's bank is built with the same number."""
    for kind, heads, slots in (("full_vocab_kl", 3, 4), ("sampled_token", 1, 2)):
        config = configuration(inputs, DENSE, objective={"kind": kind, "temperature": 1.0})
        assert DomainObjectives(config.objective).heads_at_once(3) == heads
        assert in_a_process(head_slots, config) == slots
