"""Copies the companions of a Hugging Face model: everything besides the weights that we train.

Our checkpoints store them in the directory `hugging_face/`: configuration, tokenizer, chat template and all
other small files; `layout.json` with the headers of the weight files, from which the conversion back writes
identical files; and `untrained.safetensors`.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from megatron_mopd.backend.model_files import bare_name, read_mapping
from megatron_mopd.config import ConfigError
from megatron_mopd.model.families import Family, family_named
from megatron_mopd.model.hugging_face import CONFIG, HuggingFaceCheckpoint, is_hugging_face
from megatron_mopd.model.safetensors_files import FilePlan, FileWriter, SliceReader, read_header
from megatron_mopd.model.streamed_checkpoint import share_of
from megatron_mopd.model.travelling_files import copy_file, link_or_copy, travelling_files
from megatron_mopd.model.weight_source import Companions

LAYOUT = "layout.json"
UNTRAINED = "untrained.safetensors"


def write_companions(companions: Companions, family: Family, directory: Path) -> None:
    """Write all companions to `directory`. Collective over all ranks: rank 0 writes the small files, all
    ranks share the untrained tensors."""
    writer = FileWriter(directory, [FilePlan.of(UNTRAINED, companions.untrained)])
    if dist.get_rank() == 0:
        directory.mkdir(parents=True)
        if companions.directory is not None:
            copy_companion_files(companions.directory, directory)
        if companions.config is not None:
            (directory / CONFIG).write_text(json.dumps(companions.config, indent=2) + "\n")
        layout = {
            "family": family.model_type,
            "files": companions.headers,
            "aliases": companions.aliases,
        }
        (directory / LAYOUT).write_text(json.dumps(layout))
        if companions.untrained:
            writer.create()
    dist.barrier()
    write_untrained(companions, writer)
    writer.close()
    dist.barrier()


def write_untrained(companions: Companions, writer: FileWriter) -> None:
    """Write this rank's share of the untrained tensors."""
    names = list(companions.untrained)
    sizes = [companions.untrained[name].nbytes for name in names]
    for index in share_of(sizes, dist.get_rank(), dist.get_world_size()):
        writer.write(names[index], companions.read_untrained(names[index]))


def copy_companion_files(source: Path, target: Path) -> None:
    """Copy the travelling files of a model directory, except our own record; `ConfigError` for a link out of
    it."""
    for relative in travelling_files(source, str(source)):
        if relative.name != LAYOUT:
            copy_file(source, relative, target / relative)


def read_companions(directory: Path, where: str) -> tuple[Companions, Family] | None:
    """The companions that `write_companions` wrote, and the family; `None` if there are none. No collectives.

    Raises `ConfigError` (prefix `where`) for a damaged record, for a name in it that is not a plain file
    name, and for files that `travelling_files` refuses.
    """
    what = f"{where}: {directory / LAYOUT}"
    try:
        layout = read_mapping(directory, LAYOUT, where)
    except FileNotFoundError:
        return None
    family, headers, aliases = (layout.get(name) for name in ("family", "files", "aliases"))
    if type(aliases) is not dict or not all(type(name) is str for name in aliases.values()):
        raise ConfigError(f"{what} is not readable: it has no mapping of names in 'aliases'")
    if headers is not None:
        if type(headers) is not dict:
            raise ConfigError(f"{what} is not readable: it has no mapping of files in 'files'")
        for name, header in headers.items():
            if not bare_name(name, what).endswith(".safetensors") or type(header) is not str:
                raise ConfigError(f"{what} names {name[:80]!r}, which is not a safetensors file")
            FilePlan.from_header(name, header, what)
    travelling_files(directory, where)
    untrained = {}
    if (directory / UNTRAINED).exists():
        _, untrained = read_header(directory / UNTRAINED, where)
    companions = Companions(directory, headers, aliases, untrained, SliceReader(directory))
    return companions, family_named(family, where)


def take_over_companions(candidates: list[Path], target: Path) -> None:
    """Copy a model's companions from the first candidate that has them: a `hugging_face/` directory or a
    Hugging Face model.

    Collective over all ranks.
    """
    for candidate in candidates:
        if (candidate / LAYOUT).exists():
            if dist.get_rank() == 0:
                target.mkdir(parents=True)
                copy_companion_files(candidate, target)
                copy_file(candidate, LAYOUT, target / LAYOUT)
                if (candidate / UNTRAINED).exists():  # it can be large
                    link_or_copy(candidate, UNTRAINED, target / UNTRAINED)
            return
        if is_hugging_face(candidate):
            source = HuggingFaceCheckpoint.open(candidate, "student.load")
            write_companions(source.companions, source.family, target)
            return
