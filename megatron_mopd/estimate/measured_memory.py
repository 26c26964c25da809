"""Measures the memory that a real step allocates on this rank, by the components of `memory.py`."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mopd.config import Config
from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.training.learner import Learner
from megatron_mopd.training.step import build_loss, train_step
from megatron_mopd.training.step_batch import plan_step


def measure(learner: Learner, trajectories: Sequence[Trajectory]) -> dict[str, int]:
    """Bytes by component after one step on `longest_trajectories`. Collective over all ranks.

    Activations are the tensors that autograd saves for backward, at their peak, without parameters and the
    head tensors that the loss saves. The loss (last stage) is the peak of the tensors created by the loss's
    forward pass for one micro-batch.
    """
    batch = plan_step(learner, trajectories)
    saved = SavedBytes(learner)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        train_step(learner, [batch])
    found = {
        "student weights": sum(_bytes(p) for chunk in learner.chunks for p in chunk.parameters()),
        "gradients": sum(
            _bytes(buffer.grad_data)
            for chunk in learner.chunks
            for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)
        ),
        "optimizer": _optimizer_bytes(learner.optimizer),
        "activations": saved.peak,
        "hidden cache": batch.cache.peak_bytes,
    }
    if learner.groups.is_last_stage:
        found["loss"] = _loss_bytes(learner, trajectories)
    if learner.bank is not None:
        found |= {
            "teacher slots": learner.bank.device_bytes(),
            "teacher storage": learner.bank.host_bytes(),
            "teacher files": learner.bank.disk_bytes(),
        }
    return found


def longest_trajectories(config: Config, prompts: Sequence[Prompt], vocabulary: int) -> list[Trajectory]:
    """A batch of random tokens in which every prompt and response has the maximum configured length."""
    rng, result = np.random.default_rng(0), []
    for index in range(config.schedule.global_batch_size):
        ids = rng.integers(vocabulary, size=config.data.seq_length, dtype=np.int32)
        length = config.data.seq_length - config.rollout.max_new_tokens
        prompt = dataclasses.replace(prompts[index % len(prompts)], token_ids=ids[:length])
        logprobs = np.zeros(config.rollout.max_new_tokens)
        result.append(Trajectory(prompt, ids[length:], index, logprobs))
    return result


def _loss_bytes(learner: Learner, trajectories: Sequence[Trajectory]) -> int:
    """Peak memory of the loss of one micro-batch, on random hidden states of student and teachers."""
    batch = plan_step(learner, trajectories)

    def states(micro_batch, config) -> Tensor:
        rows, length = micro_batch.tokens.shape
        length //= learner.groups.tp_size if config.sequence_parallel else 1
        device = learner.groups.device
        return torch.randn(length, rows, config.hidden_size, device=device, dtype=config.params_dtype)

    for name, micro_batches in batch.teachers.items():
        for micro_batch in micro_batches:
            batch.scores.keep(name, micro_batch, states(micro_batch, learner.bank.config(name)))
    loss = build_loss(learner, batch)
    hidden = states(batch.student[0], unwrap(learner.chunks[-1]).config).requires_grad_()
    with MadeBytes() as made:
        loss(batch.student[0], hidden)
    return made.peak


class MadeBytes(TorchDispatchMode):
    """Peak memory of the tensors created while this mode is active."""

    def __init__(self):
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {_storage(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        result = function(*args, **(kwargs or {}))
        self._made = {key: item for key, item in self._made.items() if not item[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _storage(tensor) not in given | self._made.keys():
                storage = tensor.untyped_storage()
                self._made[_storage(tensor)] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return result


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


class SavedBytes:
    """Hooks that count the memory saved by autograd, each storage once."""

    def __init__(self, learner: Learner):
        parameters = [p for chunk in learner.chunks for p in chunk.parameters()]
        self._known = {p.untyped_storage().data_ptr() for p in parameters}
        self._head_bytes = 0
        if learner.groups.is_last_stage:
            self._head_bytes = _bytes(unwrap(learner.chunks[-1]).head_weight())
        self._held: dict[int, int] = {}
        self._now = 0
        self.peak = 0

    def pack(self, tensor: Tensor):
        storage = tensor.untyped_storage()
        pointer, size = storage.data_ptr(), storage.nbytes()
        holder = _Holder(tensor)
        if pointer not in self._known and size and size != self._head_bytes:
            if not self._held.get(pointer):
                self._now += size
                self.peak = max(self.peak, self._now)
            self._held[pointer] = self._held.get(pointer, 0) + 1
            weakref.finalize(holder, self._release, pointer, size)
        return holder

    def unpack(self, holder: _Holder) -> Tensor:
        return holder.tensor

    def _release(self, pointer: int, size: int) -> None:
        self._held[pointer] -= 1
        if not self._held[pointer]:
            self._now -= size


class _Holder:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def _optimizer_bytes(optimizer) -> int:
    """Moments and main parameters of all contained optimizers."""
    total, seen = 0, set()
    for single in getattr(optimizer, "chained_optimizers", [optimizer]):
        tensors = [t for state in single.optimizer.state.values() for t in state.values()]
        for groups in getattr(single, "shard_fp32_from_float16_groups", []):
            tensors += groups
        for groups in getattr(single, "fp32_from_float16_groups", []):
            tensors += groups
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.numel() > 1 and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                total += _bytes(tensor)
    return total


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
