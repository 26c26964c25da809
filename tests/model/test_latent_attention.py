"""Multi-head latent attention has the same gradients in every layout."""

import functools

import pytest

from megatron_mopd.training.step import train_step
from megatron_mopd.training.step_batch import plan_step
from tests import _models
from tests._distributed import run_ranks
from tests.model.test_families import cp, pp, tp

MLA = dict(
    num_layers=2,
    hidden_size=32,
    num_attention_heads=4,
    ffn_hidden_size=48,
    init_method_std=0.3,
    multi_latent_attention=True,
    qk_layernorm=True,
    q_lora_rank=16,
    kv_lora_rank=12,
    qk_head_dim=8,
    qk_pos_emb_head_dim=8,
    v_head_dim=12,
)
PLAIN_QUERY = MLA | dict(q_lora_rank=None)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8, mscale=1.0, mscale_all_dim=0.7)


def first_gradients(rank, transformer, parallel, schedule):
    learner = _models.make_learner(
        transformer, parallel, kind="sft", model=dict(rope_scaling=YARN), schedule=schedule
    )
    metrics = train_step(learner, [plan_step(learner, _models.batch(8))])
    return metrics["loss"], metrics["grad_norm"], _models.pieces(learner, gradients=True)


@functools.cache
def reference(name):
    ((loss, norm, gradients),) = run_ranks(
        1, first_gradients, globals()[name], {}, dict(micro_batch_size=8), timeout=120
    )
    return loss, norm, _models.assemble([gradients])


@pytest.mark.parametrize(
    "ranks, name, parallel, schedule",
    [
        # Without sequence parallelism every rank has the rotary key, and its gradient is summed over ranks.
        (2, "MLA", tp(2, sp=False), dict(micro_batch_size=4)),
        (2, "MLA", tp(2), dict(max_tokens_per_micro_batch=40)),
        (2, "PLAIN_QUERY", tp(2), dict(micro_batch_size=2)),
        (4, "MLA", tp(2) | pp(2), dict(max_tokens_per_micro_batch=40)),
        (2, "MLA", cp(2), dict(micro_batch_size=2)),
    ],
    ids=str,
)
def test_gradients_do_not_depend_on_the_layout(ranks, name, parallel, schedule):
    loss, norm, expected = reference(name)
    results = run_ranks(ranks, first_gradients, globals()[name], parallel, schedule, timeout=120)
    assert all(
        r[0] == pytest.approx(loss, rel=1e-9) and r[1] == pytest.approx(norm, rel=1e-7) for r in results
    )
    found = _models.assemble([gradients for _, _, gradients in results])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert value.abs().max() > 0, key
        difference = (found[key] - value).abs().max().item()
        assert difference <= 1e-9 * value.abs().max().item(), f"{key}: {difference}"
