"""A malicious checkpoint cannot run code in the process that loads it."""

import io
import os
import pickle

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_mopd.config import ConfigError
from megatron_mopd.model.pickled_files import refuse_code


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def write(directory, extra=None, common=None, small=None, name="__0_0.distcp"):
    """Write a checkpoint's pickles: one tensor, one small object, the common state."""
    data = saved([None] if small is None else small)
    tensor = saved(torch.zeros(2, dtype=torch.bfloat16))
    (directory / "__0_0.distcp").write_bytes(data + tensor)
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    properties = TensorProperties(torch.bfloat16)
    metadata = Metadata(
        {
            "weight": TensorStorageMetadata(properties, torch.Size([2]), [chunk]),
            "state/shard_0_1": BytesStorageMetadata(),
        },
        extra,
        {
            MetadataIndex("state/shard_0_1"): _StorageInfo(name, 0, len(data)),
            MetadataIndex("weight", torch.Size([0])): _StorageInfo(name, len(data), len(tensor)),
        },
    )
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    (directory / "common.pt").write_bytes(saved({"iteration": 3} if common is None else common))


def test_what_a_run_writes_is_read(tmp_path):
    write(tmp_path)
    refuse_code(tmp_path, "student.load")
    (tmp_path / "common.pt").unlink()  # megatron-core 0.19 has none
    refuse_code(tmp_path, "student.load")


@pytest.mark.parametrize("place", ["extra", "common", "small"])
def test_code_is_refused_and_not_run(tmp_path, place):
    trace = tmp_path / "was here"
    write(tmp_path, **{place: {"x": Hostile(trace)}})
    with pytest.raises(ConfigError, match="^student.load: checkpoint .* is refused: .*cannot be read as"):
        refuse_code(tmp_path, "student.load")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Hostile(trace)))
    assert trace.exists(), "the pickle is harmless"


def test_damage_is_an_error_with_the_file_s_name(tmp_path):
    for name in (".metadata", "common.pt", "__0_0.distcp"):
        write(tmp_path)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        with pytest.raises(ConfigError, match=rf"refused: .*{name}"):
            refuse_code(tmp_path, "student.load")
    write(tmp_path, name="../other/__0_0.distcp")
    with pytest.raises(ConfigError, match="outside the checkpoint"):
        refuse_code(tmp_path, "student.load")
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"not": "metadata"}))
    with pytest.raises(ConfigError, match="not a list of tensors"):
        refuse_code(tmp_path, "student.load")
