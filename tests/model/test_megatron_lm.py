"""Checkpoints written by Megatron-LM's training, read with the architecture of the configuration."""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.transformer.enums import AttnBackend

from megatron_mopd.config import ConfigError
from megatron_mopd.model import pickled_files
from megatron_mopd.model.build import build_model
from megatron_mopd.model.checkpoint import find_checkpoint, load_weights, model_state, read_model_config
from megatron_mopd.model.convert import open_checkpoint
from megatron_mopd.model.gpt import unwrap
from megatron_mopd.model.megatron_arguments import read_arguments
from tests import _models
from tests._distributed import run_ranks
from tests._runs import MODEL, run_main, values, write_config, write_inputs

TRACKER = "latest_checkpointed_iteration.txt"


def arguments_of(transformer: dict) -> argparse.Namespace:
    """Arguments as `validate_args` leaves them: numbers, strings, and values of Megatron-LM's classes."""
    width = transformer["hidden_size"] // transformer["num_attention_heads"]
    return argparse.Namespace(
        **transformer,
        kv_channels=width,
        group_query_attention=transformer["num_query_groups"] != transformer["num_attention_heads"],
        num_experts=transformer.get("num_moe_experts"),
        position_embedding_type="rope",
        rotary_base=10000,
        rotary_percent=1.0,
        use_rope_scaling=False,
        normalization="RMSNorm",
        norm_epsilon=1e-5,
        swiglu=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        untie_embeddings_and_output_weights=True,
        multi_latent_attention=False,
        moe_router_score_function="softmax",
        moe_router_pre_softmax=False,
        moe_router_enable_expert_bias=False,
        params_dtype=torch.bfloat16,
        attention_backend=AttnBackend.auto,
        data_path=["a", "b"],
        iteration=10,
    )


def save(rank, directory, transformer, optimizer=False, prefix="", key_per_layer=False, vocab_size=None):
    """Save on one rank as `generate_state_dict` and `save_checkpoint` do; returns the weights by name."""
    learner = _models.make_learner(
        transformer, kind="sft", optimizer={"use_distributed_optimizer": True}, params_dtype="float32"
    )
    chunk = unwrap(learner.chunks[0])
    if vocab_size is not None:
        given = dataclasses.replace(learner.model, vocab_size=vocab_size)
        (chunk,) = build_model(given, learner.groups, "float32", max_sequence_length=64, seed=7)
    (model,) = model_state([chunk], learner.groups, key_per_layer=key_per_layer).values()
    state = {
        "args": arguments_of(transformer),
        "checkpoint_version": 3.0,
        "iteration": 10,
        "num_floating_point_operations_so_far": 1e9,
        "rng_state": ShardedObject(
            "rng_state",
            [{"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state()}],
            (1,),
            (0,),
            replica_id=0,
        ),
    }
    if optimizer:
        learner.optimizer.step()  # moments and the step count exist after the first step
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "dp_cp_group": learner.groups.collection.dp_cp,
        }
        state["optimizer"] = learner.optimizer.sharded_state_dict(model, metadata=metadata)
        state["opt_param_scheduler"] = learner.scheduler.state_dict()
    for key in [key for key in model if "_extra_state" in key]:
        del model[key]
    apply_prefix_mapping(model, {"": prefix})
    name = "core_attention._extra_state"
    extra = ShardedObject(f"{prefix}decoder.layers.0.{name}", argparse.Namespace(), (1,), (0,), replica_id=0)
    state["model"] = model | {name: extra}
    directory.mkdir(parents=True)
    dist_checkpointing.save(state, str(directory))
    return {name: tensor.detach().clone() for name, tensor in chunk.named_parameters()}


def load(rank, path, parallel, transformer, **model):
    """This rank's weights, or the error message."""
    groups = _models.groups_for(parallel)
    given = _models.model_config(transformer, **model)
    try:
        checkpoint = find_checkpoint(path, "student.load")
        found, fingerprint = read_model_config(checkpoint, "student.load", given)
        assert (found, fingerprint) == (given, None)
        chunks = build_model(given, groups, "float32", max_sequence_length=64)
        load_weights(chunks, checkpoint, groups, "student.load", given)
    except ConfigError as error:
        return str(error)
    return {name: tensor.detach().clone() for chunk in chunks for name, tensor in chunk.named_parameters()}


def load_without_arguments(rank, path, transformer):
    pickled_files.read_arguments = lambda data: {}
    try:
        return load(rank, path, dict(pipeline_model_parallel_size=2), transformer)
    finally:
        pickled_files.read_arguments = read_arguments


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with `iter_0000010`, including the optimizer, and its weights."""
    directory = tmp_path_factory.mktemp("megatron")
    (weights,) = run_ranks(1, save, directory / "iter_0000010", _models.MOE, True)
    (directory / TRACKER).write_text("10")
    return directory, weights


def same(found: dict, weights: dict) -> None:
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        rows = slice(_models.VOCAB) if "word_embeddings" in name or "output_layer" in name else slice(None)
        assert torch.equal(found[name][rows], tensor[rows]), name


def test_weights_are_read_with_the_configured_architecture(saved, pools):
    """From the directory and from one iteration of it, in a different layout from the one that wrote it."""
    directory, weights = saved
    (found,) = pools(1).run(load, directory, {}, _models.MOE)
    same(found, weights)
    parallel = dict(pipeline_model_parallel_size=2, expert_model_parallel_size=2)
    ranks = pools(4).run(load, directory / "iter_0000010", parallel, _models.MOE)
    assert not any(isinstance(found, str) for found in ranks), ranks
    first = ranks[0]
    name = "decoder.layers.1.mlp.experts.local_experts.1.linear_fc1.weight"
    assert torch.equal(first[name], weights[name]) and not any("layers.2" in name for name in first)


@pytest.mark.parametrize("prefix, key_per_layer", [("model.", False), ("module.", True)])
def test_names_of_other_versions(tmp_path, pools, prefix, key_per_layer):
    """A release without optimizer, with a prefix, with separate keys per layer or not, and with a vocabulary
    padded further than here."""
    (weights,) = run_ranks(1, save, tmp_path / "release", _models.GQA, False, prefix, key_per_layer, 120)
    (tmp_path / TRACKER).write_text("release")
    (found,) = pools(1).run(load, tmp_path, {}, _models.GQA)
    assert isinstance(found, dict), found
    for name, tensor in weights.items():
        assert torch.equal(found[name][: _models.VOCAB], tensor[: _models.VOCAB]), name
    assert not found["embedding.word_embeddings.weight"][_models.VOCAB :].any()


@pytest.mark.parametrize(
    "model, parts",
    [
        (dict(rotary_base=1e6), ["rotary_base=10000", "1000000.0", "set rotary_base"]),
        (dict(num_query_groups=4), ["num_query_groups=2", "says 4"]),
        (dict(num_layers=3), ["num_layers=4"]),
        (dict(qk_layernorm=False), ["qk_layernorm=True"]),
        (dict(share_embeddings_and_output_weights=True), ["untie_embeddings", "set share_embeddings"]),
        (dict(moe_shared_expert_intermediate_size=24), ["shared_experts", "is missing"]),
        (dict(moe_ffn_hidden_size=20), ["linear_fc1.weight has shape [4, 4, 48, 32], not [4, 4, 40, 32]"]),
    ],
    ids=str,
)
def test_another_architecture_is_refused(saved, pools, model, parts):
    """Even if every shape agrees."""
    directory, _ = saved
    (said,) = pools(1).run(load, directory, {}, _models.MOE | model)
    assert isinstance(said, str) and said.startswith("student.load: ") and "\n" not in said
    for part in parts:
        assert part in said, said


def test_a_tensor_without_a_place_is_refused_on_every_rank(saved, pools):
    """Even if Megatron-LM's arguments are not available."""
    directory, _ = saved
    without = {key: value for key, value in _models.MOE.items() if key != "qk_layernorm"}
    (said,) = {*pools(2).run(load_without_arguments, directory, without)}
    assert "k_layernorm" in said and "is not part of the model" in said


def test_what_needs_a_description_says_so(saved):
    directory, _ = saved
    for read in (open_checkpoint, lambda path, where: read_model_config(find_checkpoint(path, where), where)):
        with pytest.raises(
            ConfigError, match="--checkpoint: .* written by Megatron-LM .*model.json.* num_layers"
        ):
            read(directory, "--checkpoint")


class Hostile:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.makedirs, (str(self.path), 0o777, True)


def test_arguments_are_read_without_calling_what_they_name(tmp_path):
    file, marker = tmp_path / "common.pt", tmp_path / "executed"
    for hostile in (Hostile(marker), [Hostile(marker)], argparse.Namespace(x=Hostile(marker))):
        torch.save({"args": argparse.Namespace(num_layers=4, x=hostile), "other": hostile}, file)
        assert read_arguments(file.read_bytes()) == {"num_layers": 4}
        torch.save(hostile, file)
        assert read_arguments(file.read_bytes()) == {}
    for data in (b"", b"PK", file.read_bytes()[:-20], os.urandom(100)):
        assert read_arguments(data) == {}
    assert not marker.exists()


def test_a_run_starts_from_megatron_lm(tmp_path):
    """As student and teacher; both use the architecture that the configuration gives for the student."""
    write_inputs(tmp_path)
    start = tmp_path / "megatron" / "iter_0000010"
    transformer = {key: value for key, value in MODEL.items() if key != "make_vocab_size_divisible_by"}
    run_ranks(1, save, start, transformer, False, "", False, 300)
    (start.parent / TRACKER).write_text("10")
    configuration = values(
        tmp_path,
        student={"load": str(start.parent)},
        teachers=[{"name": "expert", "load": str(start)}],
        routing={"default": "expert"},
        objective={"kind": "full_vocab_kl"},
        schedule={"train_iters": 1},
    )
    outcome = run_main(write_config(tmp_path / "config.yaml", configuration))
    assert outcome.statuses == [0], outcome.printed
    assert "equals the student" in outcome.printed, "the teacher does not have the student's weights"
    del configuration["student"]["num_layers"]
    outcome = run_main(
        write_config(tmp_path / "config.yaml", configuration | {"run_dir": str(tmp_path / "x")})
    )
    assert outcome.statuses == [2] and "num_layers" in outcome.printed, outcome.printed
