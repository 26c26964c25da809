"""Frozen teachers take no gradient memory, and their forward passes do not change the student's state."""

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_mopd.model.gpt import unwrap
from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from tests import _models
from tests._distributed import run_ranks
from tests._megatron_schedules import run_teacher

AUXILIARY = _models.MOE | dict(moe_aux_loss_coeff=0.1)


def _state(learner):
    """All of the student's state that a forward pass of a mixture of experts may write."""
    state = {"auxiliary loss scale": torch.as_tensor(MoEAuxLossAutoScaler.main_loss_backward_scale).clone()}
    for wrapped in learner.chunks:
        chunk = unwrap(wrapped)
        state |= {name: buffer.clone() for name, buffer in chunk.named_buffers()}
        state |= {f"gradient of {name}": p.main_grad.clone() for name, p in chunk.named_parameters()}
    return state


def _score_between_steps(rank, transformer):
    learner = _models.make_learner(transformer, schedule={"kind": "megatron", "micro_batch_size": 4})
    train_step(learner, [plan_step(learner, _models.batch(8))])
    batch = plan_step(learner, _models.batch(8, seed=1))
    # A forward pass of the student before its backward: the teachers must not change its token counts.
    learner.chunks[0](batch.student[0].tokens, batch.student[0].position_ids, None)
    before = _state(learner)
    trained = {id(p) for group in learner.optimizer.param_groups for p in group["params"]}
    teachers = {}
    for name, micro_batches in batch.teachers.items():
        teacher = learner.bank.make_resident(name)
        assert teacher.config is not unwrap(learner.chunks[0]).config, "the teacher shares a configuration"
        run_teacher(teacher, micro_batches, learner.groups, lambda *_: None)
        teachers[name] = [
            (p.requires_grad, p.grad is not None, hasattr(p, "main_grad"), id(p) in trained)
            for p in teacher.parameters()
        ]
    return before, _state(learner), teachers


@pytest.mark.parametrize("transformer", [AUXILIARY, _models.SHARED], ids=["auxiliary loss", "expert bias"])
def test_teachers_leave_no_trace(transformer):
    ((before, after, teachers),) = run_ranks(1, _score_between_steps, transformer)
    if transformer is _models.SHARED:
        assert any(b.any() for name, b in before.items() if "local_tokens_per_expert" in name)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    assert len(teachers) >= 2
    for parameters in teachers.values():
        assert len(parameters) > 10
        assert set(parameters) == {(False, False, False, False)}
