"""Smaller cases that fail in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

from megatron_mopd.teachers.routing import SELF
from tests.fuzz_layouts.case import Case
from tests.fuzz_layouts.judge import Verdict

_PLAIN = {"kind": "full_vocab_kl"}
_ARCHITECTURE = {
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "ffn_hidden_size",
    "init_method_std",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_aux_loss_coeff",
    "multi_latent_attention",
}
"""Keys that an architecture cannot do without."""


def shrink(case: Case, verdict: Verdict, judge: Callable[[Case], Verdict], minutes: float) -> Case:
    """The smallest case found within `minutes` for which `judge` gives a verdict of the same signature."""
    deadline = time.monotonic() + 60 * minutes
    progressing = True
    while progressing:
        progressing = False
        for smaller in simpler(case):
            if time.monotonic() > deadline:
                return case
            if judge(smaller).signature == verdict.signature:
                case, progressing = smaller, True
                break
    return case


def simpler(case: Case) -> Iterator[Case]:
    """Cases one simplification away from `case`, those that save most first. Some are refused."""
    yield from _less_data(case)
    yield from _fewer_domains_and_teachers(case)
    yield from _plainer_settings(case)
    yield from _smaller_layout(case)
    yield from _simpler_student(case)


def without(mapping: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key not in keys}


def _less_data(case: Case) -> Iterator[Case]:
    one_by_one = case.steps_per_rollout == 1
    if len(case.batches) > 1 and one_by_one:
        yield case.with_(batches=case.batches[:1], offered=1)
    if not one_by_one:
        yield case.with_(steps_per_rollout=1)
    size = case.rollout["samples_per_prompt"]
    if size > 1:
        batches = [batch[::size] for batch in case.batches]
        yield case.with_(batches=batches, rollout=case.rollout | {"samples_per_prompt": 1})
    for number, batch in enumerate(case.batches):
        for first in range(0, len(batch), size) if len(batch) > size and one_by_one else ():
            yield _with_batch(case, number, batch[:first] + batch[first + size :])
        if any(len(sample["prompt"]) > 1 for sample in batch):
            yield _with_batch(case, number, [s | {"prompt": s["prompt"][:1]} for s in batch])
        if any(len(sample["response"]) > 1 for sample in batch):
            yield _with_batch(case, number, [_half(sample) for sample in batch])


def _with_batch(case: Case, number: int, batch: list[dict]) -> Case:
    return case.with_(batches=[*case.batches[:number], batch, *case.batches[number + 1 :]])


def _half(sample: dict[str, Any]) -> dict[str, Any]:
    length = max(1, len(sample["response"]) // 2)
    return sample | {"response": sample["response"][:length], "logprobs": sample["logprobs"][:length]}


def _fewer_domains_and_teachers(case: Case) -> Iterator[Case]:
    per_domain = case.objective.get("per_domain", {})
    used = {sample["domain"] for batch in case.batches for sample in batch}
    if unused := set(case.domains) - used:
        yield case.with_(
            domains=sorted(used),
            routing=without(case.routing, *unused),
            objective=case.objective | {"per_domain": without(per_domain, *unused)},
        )
    for domain, objective in per_domain.items():
        if objective != _PLAIN:
            for plainer in (_PLAIN, *(without(objective, key) for key in objective if key != "kind")):
                yield case.with_(objective=case.objective | {"per_domain": per_domain | {domain: plainer}})
    for domain, entry in case.routing.items():
        if isinstance(entry, dict):
            yield case.with_(routing=case.routing | {domain: next(iter(entry))})
    named = {name for e in case.routing.values() for name in ([e] if isinstance(e, str) else e)}
    if unnamed := case.teachers.keys() - named:
        yield case.with_(teachers=without(case.teachers, *unnamed))
    if len(case.teachers) > 1:
        yield case.with_(routing=dict.fromkeys(case.routing, next(iter(case.teachers))))
    for name, teacher in case.teachers.items():
        if name != SELF and teacher["model"] != case.student:
            alike = teacher | {"model": deepcopy(case.student)}
            yield case.with_(teachers=case.teachers | {name: alike})


def _plainer_settings(case: Case) -> Iterator[Case]:
    kind = case.schedule["kind"]
    for key in case.spare:
        yield case.with_(spare=without(case.spare, key))
    if "max_activations" in case.schedule:
        yield case.with_(schedule=without(case.schedule, "max_activations"))
    if kind in ("bubble_fill", "serial"):
        yield case.with_(schedule=case.schedule | {"kind": "back_to_back"})
    if case.schedule != {"kind": kind, "micro_batch_size": 1}:
        yield case.with_(schedule={"kind": kind, "micro_batch_size": 1})
    for name in ("storage", "recompute", "optimizer"):
        section = getattr(case, name)
        if section and section != {"mode": "host"}:
            yield case.with_(**{name: {"mode": "host"} if name == "storage" else {}})
            for key in section:
                yield case.with_(**{name: without(section, key)})
    modules = case.recompute.get("recompute_modules", ())
    for module in modules if len(modules) > 1 else ():
        yield case.with_(recompute=case.recompute | {"recompute_modules": [module]})
    if case.routing_replay:
        yield case.with_(routing_replay=False)
    if case.offered > 1:
        yield case.with_(offered=1)
    if case.params_dtype != "float64" and not case.optimizer.get("use_distributed_optimizer"):
        yield case.with_(params_dtype="float64")
    for key in ("reduction", "chunk_size"):
        if key in case.objective:
            yield case.with_(objective=without(case.objective, key))


def _smaller_layout(case: Case) -> Iterator[Case]:
    for key, size in case.parallel.items():
        if size in (None, False, 1):
            continue
        fewer = without(case.parallel, key)
        if size is True:
            yield case.with_(parallel=fewer)
            continue
        if key == "tensor_model_parallel_size":
            fewer = without(fewer, "sequence_parallel")
        if key == "pipeline_model_parallel_size":
            fewer = without(fewer, "virtual_pipeline_model_parallel_size")
        if case.ranks % size == 0:
            yield case.with_(parallel=fewer, ranks=case.ranks // size)
        yield case.with_(parallel=fewer)
    for divisor in (2, 3):
        if case.ranks % divisor == 0:
            yield case.with_(ranks=case.ranks // divisor)


def _simpler_student(case: Case) -> Iterator[Case]:
    """Simplify the student, along with the teachers that have the same architecture."""

    def with_student(student: dict[str, Any], **changes: Any) -> Case:
        teachers = {
            name: teacher | {"model": deepcopy(student)}
            if teacher and teacher["model"] == case.student
            else teacher
            for name, teacher in case.teachers.items()
        }
        return case.with_(student=student, teachers=teachers, **changes)

    if case.student.get("num_moe_experts"):
        dense = {key: value for key, value in case.student.items() if "moe" not in key}
        optimizer = without(case.optimizer, "freeze_router", "freeze_expert_bias")
        yield with_student(dense, routing_replay=False, optimizer=optimizer)
    chunks = case.size("pp") * case.size("vpp")
    if case.student["num_layers"] > chunks:
        yield with_student(without(case.student, "moe_layer_freq") | {"num_layers": chunks})
    for key in case.student:
        if key not in _ARCHITECTURE and not key.endswith(("head_dim", "lora_rank")):
            yield with_student(without(case.student, key))
