"""A case: student, teachers, two steps' samples, and a layout whose results must equal those of one rank."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mopd.config import ModelConfig
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.teachers.bank import TeacherSource
from megatron_mopd.teachers.routing import SELF
from tests import _models

STUDENT_SEED = 7

_SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
_RECOMPUTED = ("recompute_method", "recompute_modules")


@dataclass(frozen=True)
class Case:
    """Everything that a run depends on, as JSON values. The sections are those of a configuration."""

    ranks: int
    vocab_size: int
    make_vocab_size_divisible_by: int
    parallel: dict[str, Any]
    student: dict[str, Any]
    """Architecture, as `tests._models.DENSE`."""
    domains: list[str]
    teachers: dict[str, dict[str, Any]]
    """Name -> {"model": architecture, "seed": of its weights}; "self" -> {}, the initial student."""
    routing: dict[str, Any]
    objective: dict[str, Any]
    batches: list[list[dict[str, Any]]]
    """The samples of each step: prompt and response (token ids), domain, logprobs, reward."""
    schedule: dict[str, Any]
    storage: dict[str, Any]
    """Section `teacher_storage`."""
    optimizer: dict[str, Any]
    rollout: dict[str, Any]
    recompute: dict[str, Any] = field(default_factory=dict)
    """Activation recomputation, which the reference does not use."""
    spare: dict[str, float] = field(default_factory=dict)
    """Limits of the hidden-state cache, in micro-batches above the minimum that a plan needs: "bytes" for
    `hidden_cache_bytes`, "states" for `max_cached_states`."""
    offered: int = 1
    """Number of upcoming steps that `train_step` sees; with 2, teachers may score ahead."""
    steps_per_rollout: int = 1
    routing_replay: bool = False
    params_dtype: str = "float64"
    """The dtype of the layout's run; the reference always uses float64."""

    @classmethod
    def load(cls, path: Path) -> Case:
        return cls(**json.loads(path.read_text()))

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    def with_(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    @property
    def models(self) -> list[dict[str, Any]]:
        """Architectures of the student and of all teachers except "self"."""
        return [self.student, *(teacher["model"] for teacher in self.teachers.values() if teacher)]

    @property
    def has_experts(self) -> bool:
        return any(model.get("num_moe_experts") for model in self.models)

    def size(self, short: str) -> int:
        """A size of the layout: `tp`, `pp`, `vpp`, `cp`, `ep` or `etp`."""
        return self.parallel.get(_SIZES[short]) or (self.size("tp") if short == "etp" else 1)

    def model_config(self, architecture: dict[str, Any]) -> ModelConfig:
        return _models.model_config(
            architecture,
            vocab_size=self.vocab_size,
            make_vocab_size_divisible_by=self.make_vocab_size_divisible_by,
        )

    def sources(self) -> list[TeacherSource]:
        return [
            TeacherSource(
                name,
                self.model_config(self.student if name == SELF else teacher["model"]),
                STUDENT_SEED if name == SELF else teacher["seed"],
            )
            for name, teacher in self.teachers.items()
        ]

    def config_values(self, run_dir: str, reference: bool) -> dict[str, Any]:
        """The configuration: the case's own, or the simplest one, for the reference on one rank."""
        adam = {"use_distributed_optimizer": False, "lr": 1e-2, "adam_eps": 1e-3}
        values = {
            "run_dir": run_dir,
            "params_dtype": self.params_dtype,
            "objective": self.objective,
            "rollout": self.rollout,
            "routing": self.routing,
            "parallel": self.parallel,
            "schedule": self.schedule,
            "teacher_storage": self.storage,
            "optimizer": adam | self.optimizer,
        }
        if reference:
            plain = {"use_distributed_optimizer": False, "overlap_grad_reduce": False}
            values |= {
                "params_dtype": "float64",
                "parallel": {},
                "schedule": {"micro_batch_size": 1},
                "teacher_storage": {},
                "optimizer": values["optimizer"] | plain,
            }
        values["schedule"] |= {
            "steps_per_rollout": self.steps_per_rollout,
            "global_batch_size": len(self.batches[0]),
        }
        return values

    def trajectories(self, step: int) -> tuple[list[Trajectory], dict[int, float | None]]:
        """The samples of a step, and their rewards by index."""
        first = len(self.batches[0]) * step if self.steps_per_rollout > 1 else 0
        trajectories, rewards = [], {}
        for index, sample in enumerate(self.batches[step], first):
            prompt = Prompt(
                text="",
                token_ids=tuple(sample["prompt"]),
                domain=sample["domain"],
                answer=None,
                verifier="exact_match",
                index=index,
                origin=f"sample {index}",
            )
            trajectories.append(
                Trajectory(prompt, tuple(sample["response"]), index, tuple(sample["logprobs"]))
            )
            rewards[index] = sample["reward"]
        return trajectories, rewards

    def __str__(self) -> str:
        """One line: the layout and the case's other distinctive settings."""
        student, schedule = self.student, self.schedule
        tokens = schedule.get("max_tokens_per_micro_batch")
        parts = [
            f"{self.ranks} ranks",
            *(f"{short}{self.size(short)}" for short in _SIZES if self.size(short) > 1 and short != "etp"),
            *[f"etp{self.size('etp')}"] * (self.size("etp") != self.size("tp")),
            *["sp"] * bool(self.parallel.get("sequence_parallel")),
            "moe" if student.get("num_moe_experts") else "dense",
            *["mla"] * bool(student.get("multi_latent_attention")),
            *["tied"] * bool(student.get("share_embeddings_and_output_weights")),
            *[f"{student.get('moe_router_load_balancing_type')}"] * bool(student.get("moe_aux_loss_coeff")),
            *["z loss"] * bool(student.get("moe_z_loss_coeff")),
            schedule["kind"],
            f"packed {tokens}" if tokens else f"micro-batches of {schedule['micro_batch_size']}",
            *map(str, self.storage.values()),
            *(f"cache {key}+{value:g}" for key, value in self.spare.items()),
            *["routing replay"] * self.routing_replay,
            *(f"recompute {self.recompute[key]}" for key in _RECOMPUTED if key in self.recompute),
            *(key for key, value in self.optimizer.items() if value is True),
            *[self.params_dtype] * (self.params_dtype != "float64"),
            "+".join(str(len(batch)) for batch in self.batches) + " samples",
        ]
        return ", ".join(parts)
