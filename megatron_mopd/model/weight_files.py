"""Finds the weight files of a Hugging Face directory and their tensors.

A directory can contain a tensor twice: in two shards, or in a single file and in shards. Programs differ in
which copy they use (transformers uses the single file, and the last of two shards), so copies must be equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_mopd.backend.messages import visible
from megatron_mopd.backend.model_files import bare_name, open_file, read_mapping
from megatron_mopd.config import ConfigError
from megatron_mopd.model.directory_kinds import without_weights
from megatron_mopd.model.safetensors_files import FilePlan, TensorInfo, read_header

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_BLOCK = 1 << 24


@dataclass(frozen=True)
class _Copy:
    """A tensor in one file."""

    info: TensorInfo
    offset: int
    """Position of its first byte in the file."""


@dataclass
class WeightFiles:
    """The weight files of a directory; a tensor that is in several of them is equal in all."""

    directory: Path
    headers: dict[str, str]
    """File -> its header, in file order."""
    _copies: dict[str, _Copy]

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by name, in file order."""
        return {name: copy.info for name, copy in self._copies.items()}

    def are_equal(self, first: str, second: str) -> bool:
        """Whether two tensors have the same dtype, shape and bitwise equal values; reads both."""
        return _are_equal(self.directory, self._copies[first], self._copies[second])


def has_weights(directory: Path) -> bool:
    """Whether the directory has weights or an index of weights."""
    return (directory / INDEX).exists() or (directory / SINGLE_FILE).exists()


def open_weights(directory: Path, where: str) -> WeightFiles:
    """Read the headers of a directory's weights, and the values of tensors that it contains twice.

    No collectives. Raises `ConfigError` (prefix `where`) if there are no weights, if a file is missing,
    truncated or does not match the index, or if two copies of a tensor or of the model differ.
    """
    if not has_weights(directory):
        raise without_weights(directory, where)
    if not (directory / INDEX).exists():
        return _read(directory, [SINGLE_FILE], {}, where)
    promised = _read_index(directory, where)
    files = sorted(set(promised.values()))
    alone = directory / SINGLE_FILE
    is_twice = alone.exists() and SINGLE_FILE not in files
    for file in files:
        if not (directory / file).exists() and not (directory / file).is_symlink():
            raise _missing(directory, file, is_twice, where)
    shards = _read(directory, files, promised, where)
    if is_twice and (problem := _difference(shards, _read(directory, [SINGLE_FILE], {}, where))):
        raise ConfigError(
            f"{where}: {directory} holds two sets of weights, {SINGLE_FILE} and the shards of {INDEX}, and "
            f"they differ: {problem}; remove one of them"
        )
    return shards


def _read_index(directory: Path, where: str) -> dict[str, str]:
    """Tensor -> file, according to the index."""
    what = f"{where}: {directory / INDEX}"
    promised = read_mapping(directory, INDEX, where).get("weight_map")
    if type(promised) is not dict or not promised:
        raise ConfigError(f"{what} is not readable: it has no mapping 'weight_map'")
    for file in promised.values():
        if type(file) is str and "/" in file and ".." not in file.split("/") and not file.startswith("/"):
            raise ConfigError(
                f"{what} names {file[:80]!r}, a file in a subfolder, which is not supported: move all shards "
                "next to the index and remove the folder from its names"
            )
        if not bare_name(file, what).endswith(".safetensors"):
            raise ConfigError(f"{what} names {file[:80]!r}, which is not a safetensors file")
    return promised


def _missing(directory: Path, file: str, has_other: bool, where: str) -> ConfigError:
    problem = f"{where}: {directory / file} is missing"
    if has_other:
        return ConfigError(
            f"{problem}, which {INDEX} names, and {SINGLE_FILE} exists too; remove {INDEX} if the single "
            "file is the model, or else the single file"
        )
    elsewhere = next((folder for folder in sorted(directory.iterdir()) if (folder / file).is_file()), None)
    if elsewhere is not None:
        return ConfigError(f"{problem}; there is one in {elsewhere.name}/: move all shards next to {INDEX}")
    return ConfigError(f"{problem}; {INDEX} names it")


def _read(directory: Path, files: list[str], promised: dict[str, str], where: str) -> WeightFiles:
    headers: dict[str, str] = {}
    copies: dict[str, _Copy] = {}
    for file in files:
        headers[file], infos = read_header(directory / file, where)
        offsets = FilePlan.from_header(file, headers[file], file).offsets
        for name, info in infos.items():
            copy = _Copy(info, offsets[name])
            if name not in copies:
                copies[name] = copy
                continue
            if not _are_equal(directory, copies[name], copy):
                raise ConfigError(
                    f"{where}: tensor {name} is in {directory / copies[name].info.file} and in "
                    f"{directory / file}, and the two differ: remove one of them"
                )
            if promised.get(name) == file:
                copies[name] = copy
    for name, file in promised.items():
        if name not in copies or copies[name].info.file != file:
            found = f"; {copies[name].info.file} has it" if name in copies else ""
            raise ConfigError(
                f"{where}: {directory / INDEX} lists {visible(name[:80])} in {file}, which does not have "
                f"it{found}"
            )
    return WeightFiles(directory, headers, copies)


def _difference(shards: WeightFiles, alone: WeightFiles) -> str | None:
    """The first difference between two sets of weights of a directory; `None` if they are equal."""
    left, right = shards._copies, alone._copies
    if only := sorted(left.keys() ^ right.keys()):
        return f"only the {'shards have' if only[0] in left else 'single file has'} {only[0]}"
    for name, copy in left.items():
        if (copy.info.dtype, copy.info.shape) != (right[name].info.dtype, right[name].info.shape):
            return f"{name} has a different shape or dtype"
    for name, copy in left.items():
        if not _are_equal(shards.directory, copy, right[name]):
            return f"{name} has different values"
    return None


def _are_equal(directory: Path, first: _Copy, second: _Copy) -> bool:
    if (first.info.dtype, first.info.shape) != (second.info.dtype, second.info.shape):
        return False
    left_file, right_file = (open_file(directory, copy.info.file) for copy in (first, second))
    with left_file as left, right_file as right:
        left.seek(first.offset)
        right.seek(second.offset)
        missing = first.info.nbytes
        while missing:
            block = left.read(min(missing, _BLOCK))
            if not block or block != right.read(len(block)):
                return False
            missing -= len(block)
    return True
