"""Files are written completely or not at all."""

import errno
import os

import pytest

from megatron_mopd.backend import whole_files
from megatron_mopd.backend.whole_files import disk_problem, naming, write_whole


def test_the_old_text_stays_when_the_new_one_does_not_fit(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    write_whole(path, "old")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(whole_files.os, "fsync", full)
    with pytest.raises(OSError) as raised:
        write_whole(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["config.yaml"]
    assert disk_problem(raised.value) == f"{path}: no space is left on its disk"


def test_disk_problems_are_told_from_other_errors(tmp_path):
    with pytest.raises(OSError) as raised, naming("metrics.jsonl"):
        raise OSError(errno.EDQUOT, "quota")
    assert disk_problem(raised.value) == "metrics.jsonl: the disk quota is used up"
    with pytest.raises(RuntimeError) as wrapped:
        raise RuntimeError("writing failed") from raised.value
    assert disk_problem(wrapped.value) == "metrics.jsonl: the disk quota is used up"
    assert disk_problem(FileNotFoundError(errno.ENOENT, "no such file", "x")) is None
    assert disk_problem(ValueError("x")) is None and disk_problem(None) is None
