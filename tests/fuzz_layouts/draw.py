"""A random case: a layout first, then models that fit it, objectives, data and settings."""

from __future__ import annotations

import copy
import math
from random import Random
from typing import Any

from megatron_mopd.teachers.routing import SELF
from tests.fuzz_layouts.case import Case
from tests.fuzz_layouts.draw_model import draw_model, draw_router_losses
from tests.fuzz_layouts.draw_objective import draw_objective

_RANKS = (1, 2, 2, 2, 2, 3, 4, 4, 4, 4, 6, 8)


def draw_case(seed: int, most_ranks: int = 8) -> Case:
    """The case of a seed; it depends on the arguments alone."""
    rng = Random(seed)
    ranks = rng.choice([number for number in _RANKS if number <= most_ranks])
    layout = draw_layout(rng, ranks)
    has_experts = layout["ep"] > 1 or rng.random() < 0.4
    student_has_experts = has_experts and not (layout["ep"] > 1 and rng.random() < 0.1)
    stages = layout["pp"] * layout["vpp"]
    student = draw_model(rng, layout, stages, student_has_experts)
    vocab_size = rng.choice([9, 13, 31, 37, 53, 83, 97])
    samples_per_prompt, temperature = rng.choice([1, 1, 2, 3]), rng.choice([1.0, 1.0, 0.8])
    domains = [f"d{number}" for number in range(rng.randint(1, 6))]
    teachers = _teachers(rng, layout, student, has_experts)
    steps_per_rollout = rng.choice([1, 1, 2])
    params_dtype = "float32" if rng.random() < 0.12 else "float64"
    schedule = _schedule(rng, stages)
    if student_has_experts:
        student = student | draw_router_losses(rng, student, schedule.get("micro_batch_size") == 1)
    return Case(
        ranks=ranks,
        vocab_size=vocab_size,
        make_vocab_size_divisible_by=rng.choice([1, 2, 8, 8, 64]),
        parallel=_parallel(rng, layout, has_experts) | _blocks(Random(f"blocks {seed}"), layout, ranks),
        student=student,
        domains=domains,
        teachers=teachers,
        routing={domain: _mixture(rng, list(teachers)) for domain in domains},
        objective=_objective(rng, domains, samples_per_prompt, temperature, vocab_size),
        batches=_batches(rng, domains, vocab_size, samples_per_prompt, steps_per_rollout),
        schedule=schedule,
        storage=_storage(rng),
        optimizer=_optimizer(rng, student_has_experts, params_dtype),
        rollout=dict(samples_per_prompt=samples_per_prompt, temperature=temperature),
        recompute=_recompute(rng, student),
        spare=_spare(rng),
        offered=rng.choice([1, 2, 2]),
        steps_per_rollout=steps_per_rollout,
        routing_replay=student_has_experts and rng.random() < 0.2,
        params_dtype=params_dtype,
    )


def draw_layout(rng: Random, ranks: int) -> dict[str, int]:
    """Sizes `tp`, `pp`, `vpp`, `cp`, `ep` and `etp` that fit this number of ranks."""

    def size(options: list[int], chance: float) -> int:
        return rng.choice([n for n in options if ranks % n == 0]) if rng.random() < chance else 1

    while True:
        tp, pp, cp = size([1, 2, 4], 0.55), size([1, 2, 3, 4], 0.55), size([1, 2, 3, 4], 0.4)
        ep = size([1, 2, 3, 4, 6, 8], 0.5)
        etp = rng.choice([tp, 1, 1, 2])
        if ranks % (tp * pp * cp) or (ranks // pp) % (ep * etp):
            continue
        if ranks > 1 and tp * pp * cp * ep == 1 and rng.random() < 0.6:
            continue  # pure data parallelism is the least interesting
        vpp = rng.choice([1, 1, 2, 3]) if pp > 1 else 1
        return dict(tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, etp=etp)


def _parallel(rng: Random, layout: dict[str, int], has_experts: bool) -> dict[str, Any]:
    parallel: dict[str, Any] = dict(
        tensor_model_parallel_size=layout["tp"],
        pipeline_model_parallel_size=layout["pp"],
        context_parallel_size=layout["cp"],
        expert_model_parallel_size=layout["ep"],
        expert_tensor_parallel_size=layout["etp"],
    )
    if layout["vpp"] > 1:
        parallel["virtual_pipeline_model_parallel_size"] = layout["vpp"]
    if layout["tp"] > 1 and (has_experts or rng.random() < 0.6):
        parallel["sequence_parallel"] = True
    return parallel


def _blocks(rng: Random, layout: dict[str, int], ranks: int) -> dict[str, int]:
    """A size of teacher blocks that is not the default, or nothing. Drawn from its own random stream, so that
    the other values of a seed are those of earlier versions."""
    replica, stage = layout["tp"] * layout["cp"], ranks // layout["pp"]
    smallest = math.lcm(replica, layout["ep"] * layout["etp"])
    sizes = [size for size in range(2 * smallest, stage + 1, smallest) if stage % size == 0]
    return dict(teacher_block_size=rng.choice(sizes) // replica) if sizes and rng.random() < 0.5 else {}


def _teachers(
    rng: Random, layout: dict[str, int], student: dict[str, Any], has_experts: bool
) -> dict[str, dict[str, Any]]:
    teachers: dict[str, dict[str, Any]] = {}
    for number in range(rng.randint(1, 5)):
        if rng.random() < 0.35:
            model = dict(student)
        else:
            model = draw_model(rng, layout, layout["pp"], has_experts and rng.random() < 0.7)
        teachers[f"t{number}"] = dict(model=model, seed=100 + number)
    if rng.random() < 0.4:
        teachers[SELF] = {}
    return teachers


def _mixture(rng: Random, teachers: list[str]) -> Any:
    """One domain's entry in `routing`: one teacher, several with weights, or a schedule of weights."""
    chosen = rng.sample(teachers, min(len(teachers), rng.choice([1, 1, 2, 3])))
    if len(chosen) == 1 and rng.random() < 0.7:
        return chosen[0]
    if rng.random() < 0.2:
        first, *others = chosen
        return {first: {"0": 1.0, "2": 0.4}} | {name: {"0": 0.0, "2": 1.0} for name in others}
    return {name: round(rng.uniform(0.1, 1.5), 2) for name in chosen}


def _objective(
    rng: Random, domains: list[str], samples_per_prompt: int, temperature: float, vocab_size: int
) -> dict[str, Any]:
    per_domain = {
        domain: draw_objective(rng, samples_per_prompt, temperature, vocab_size, rng.random() < 0.85)
        for domain in domains
    }
    if rng.random() < 0.3:  # the same objective in several domains
        for domain in domains[1:]:
            if rng.random() < 0.7:
                per_domain[domain] = copy.deepcopy(per_domain[domains[0]])
    return dict(
        kind="full_vocab_kl",
        reduction=rng.choice(["token_mean", "token_mean", "sequence_mean", "domain_mean"]),
        chunk_size=rng.choice([1, 3, 7, 1024]),
        per_domain=per_domain,
    )


def _batches(
    rng: Random, domains: list[str], vocab_size: int, samples_per_prompt: int, steps_per_rollout: int
) -> list[list[dict[str, Any]]]:
    """The samples of two steps, at most nine each: some domains rare, some responses equal."""
    most = max(1, 9 // samples_per_prompt)
    longest_prompt, longest_response = rng.choice([1, 4, 10]), rng.choice([1, 3, 8, 20])
    first = rng.randint(1, most)
    second = first if steps_per_rollout == 2 else rng.randint(1, most)
    batches = []
    for count in (first, second):
        batch: list[dict[str, Any]] = []
        for _ in range(count):
            domain = domains[int(rng.random() ** 2 * len(domains))]
            prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, longest_prompt))]
            for _ in range(samples_per_prompt):
                response = [rng.randrange(vocab_size) for _ in range(rng.randint(1, longest_response))]
                if batch and rng.random() < 0.1:
                    response = batch[-1]["response"]
                logprobs = [round(-math.log(vocab_size) + rng.gauss(0, 1), 3) for _ in response]
                batch.append(
                    dict(
                        prompt=prompt,
                        response=response,
                        domain=domain,
                        logprobs=logprobs,
                        reward=rng.choice([0.0, 1.0, 0.5, None]),
                    )
                )
        batches.append(batch)
    return batches


def _schedule(rng: Random, chunks: int) -> dict[str, Any]:
    kind = rng.choice(["bubble_fill", "bubble_fill", "bubble_fill", "back_to_back", "serial", "serial"])
    schedule: dict[str, Any] = dict(kind=kind)
    if rng.random() < 0.5:
        schedule["max_tokens_per_micro_batch"] = rng.choice([1, 17, 30, 40, 64])
    else:
        schedule["micro_batch_size"] = rng.choice([1, 2, 3, 4])
    if rng.random() < 0.15:
        schedule["max_activations"] = 2 * chunks + rng.choice([0, 1, 4])
    return schedule


def _storage(rng: Random) -> dict[str, Any]:
    storage: dict[str, Any] = dict(mode=rng.choice(["host", "host_sharded", "mmap"]))
    if rng.random() < 0.25:
        storage["dtype"] = rng.choice(["int8", "fp8"])
    if rng.random() < 0.3:
        storage["hidden_cache_device"] = "device"
    return storage


def _spare(rng: Random) -> dict[str, float]:
    if rng.random() < 0.35:
        return {"bytes": rng.choice([0, 0, 1, 3, 0.5])}
    return {"states": rng.choice([0, 1, 4])} if rng.random() < 0.15 else {}


def _optimizer(rng: Random, student_has_experts: bool, params_dtype: str) -> dict[str, Any]:
    optimizer: dict[str, Any] = dict(clip_grad=rng.choice([0.0, 0.0, 1.0, 0.1]))
    for chance, key, value in (
        (0.2, "weight_decay", 0.1),
        (0.3, "overlap_grad_reduce", True),
        (0.2 if student_has_experts else 0.0, "freeze_router", True),
        (0.1 if student_has_experts else 0.0, "freeze_expert_bias", True),
        (0.7 if params_dtype == "float32" else 0.0, "use_distributed_optimizer", True),
    ):
        if rng.random() < chance:
            optimizer[key] = value
    return optimizer


def _recompute(rng: Random, student: dict[str, Any]) -> dict[str, Any]:
    if rng.random() < 0.65:
        return {}
    if rng.random() < 0.4:
        method = rng.choice(["uniform", "block"])
        return dict(recompute_granularity="full", recompute_method=method, recompute_num_layers=1)
    modules = ["core_attn", "mlp", "layernorm"]
    modules += ["moe"] if student.get("num_moe_experts") else []
    modules += ["mla_up_proj"] if student.get("multi_latent_attention") else []
    modules += ["shared_experts"] if student.get("moe_shared_expert_intermediate_size") else []
    chosen = rng.sample(modules, rng.choice([1, 1, 2]))
    return dict(recompute_granularity="selective", recompute_modules=chosen)
