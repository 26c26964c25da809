"""Averaged checkpoints: weighted sums in every layout, and what is refused."""

import pytest
import torch

from megatron_mopd.config import ConfigError
from megatron_mopd.data.tokenizer import load_tokenizer, train_sentencepiece
from megatron_mopd.model.averaging import average_checkpoints
from megatron_mopd.model.background_save import write_checkpoint
from megatron_mopd.model.build import build_model
from megatron_mopd.model.checkpoint import load_weights, model_state
from tests import _models
from tests._distributed import run_ranks

PADDED_VOCAB = 88


def average(rank, tmp_path, layout, refusals):
    groups = _models.groups_for(layout)
    tokenizer = load_tokenizer(tmp_path / "t.model")
    config = _models.model_config(_models.MOE)
    directories, expected = [], None
    for seed, weight in ((1, 0.75), (2, 0.25)):
        chunks = build_model(config, groups, "float32", max_sequence_length=64, seed=seed)
        directories.append(tmp_path / f"{len(layout)}-{seed}")
        state = model_state(chunks, groups)
        write_checkpoint(directories[-1], 5, state, config, tokenizer.fingerprint(), tokenizer.save)
        parts = [weight * p.detach().double() for chunk in chunks for p in chunk.parameters()]
        expected = parts if expected is None else [a + b for a, b in zip(expected, parts)]
    path = average_checkpoints(directories, tmp_path / f"{len(layout)}-out", groups, weights=[3, 1])
    load_weights(chunks, path, groups, "test")
    for found, value in zip((p for chunk in chunks for p in chunk.parameters()), expected, strict=True):
        rows = slice(_models.VOCAB if len(value) == PADDED_VOCAB else None)  # padding is not stored
        torch.testing.assert_close(found.detach()[rows], value.float()[rows], rtol=1e-6, atol=1e-7)
    messages = []
    if refusals:
        other = build_model(
            _models.model_config(_models.DENSE), groups, "float32", max_sequence_length=64, seed=1
        )
        state = model_state(other, groups)
        write_checkpoint(
            tmp_path / "other", 5, state, _models.model_config(_models.DENSE), "x", tokenizer.save
        )
        for checkpoints, weights in (
            ([directories[0], tmp_path / "other"], None),
            ([], None),
            (directories, [1.0]),
            (directories, [1.0, -1.0]),
            ([tmp_path / "nowhere"], None),
        ):
            with pytest.raises(ConfigError) as error:
                average_checkpoints(checkpoints, tmp_path / "refused", groups, weights=weights)
            messages.append(str(error.value))
        assert not (tmp_path / "refused").exists()
    return messages


@pytest.fixture
def tokenizer_directory(tmp_path):
    train_sentencepiece(["a b c d"] * 20, tmp_path / "t.model", 300)
    return tmp_path


def test_average_and_refusals(tokenizer_directory):
    (messages,) = run_ranks(1, average, tokenizer_directory, {}, True)
    assert "different architecture or tokenizer" in messages[0]
    assert all("as many weights" in message for message in messages[1:4])
    assert "not found" in messages[4]


def test_average_over_pipeline_stages(tokenizer_directory):
    run_ranks(2, average, tokenizer_directory, {"pipeline_model_parallel_size": 2}, False)
