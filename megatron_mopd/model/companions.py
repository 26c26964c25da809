"""What belongs to a Hugging Face model besides the weights that we train, and how it travels.

In a checkpoint of ours it is the directory `hugging_face/`: configuration, tokenizer, chat template and all
other small files; `layout.json` with the headers of the weight files, from which the way back writes the very
same files; and `untrained.safetensors`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import torch.distributed as dist

from megatron_mopd.config import ConfigError
from megatron_mopd.model.families import Family, family_named
from megatron_mopd.model.hugging_face import CONFIG, HuggingFaceCheckpoint, is_hugging_face
from megatron_mopd.model.safetensors_files import FilePlan, FileWriter, SliceReader, read_header
from megatron_mopd.model.streamed_checkpoint import share_of
from megatron_mopd.model.weight_source import Companions

LAYOUT = "layout.json"
UNTRAINED = "untrained.safetensors"
# Weights in any format, code, and indices of weights do not travel as files.
_STAY_BEHIND = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".py",
    ".pyc",
)


def write_companions(companions: Companions, family: Family, directory: Path) -> None:
    """Put everything into `directory`. Collective over all ranks: rank 0 writes the small files, all share
    the untrained tensors."""
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
    """This rank's share of the untrained tensors."""
    names = list(companions.untrained)
    sizes = [companions.untrained[name].nbytes for name in names]
    for index in share_of(sizes, dist.get_rank(), dist.get_world_size()):
        writer.write(names[index], companions.read_untrained(names[index]))


def copy_companion_files(source: Path, target: Path) -> None:
    """Every file of a model directory that is neither weights, nor code, nor our own record."""
    for file in sorted(source.rglob("*")):
        relative = file.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if file.is_file() and not hidden and file.suffix not in _STAY_BEHIND and file.name != LAYOUT:
            (target / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / relative)


def read_companions(directory: Path, where: str) -> tuple[Companions, Family] | None:
    """What `write_companions` wrote, and the family; `None` when it wrote nothing there. No collectives."""
    try:
        layout = json.loads((directory / LAYOUT).read_text())
        family, headers, aliases = layout["family"], layout["files"], layout["aliases"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where}: {directory / LAYOUT} is not readable: {error}") from None
    untrained = {}
    if (directory / UNTRAINED).exists():
        _, untrained = read_header(directory / UNTRAINED, where)
    companions = Companions(directory, headers, aliases, untrained, SliceReader(directory))
    return companions, family_named(family, where)


def take_over_companions(candidates: list[Path], target: Path) -> None:
    """Hand on what travels with a model, from the first of these places that has it: a `hugging_face/`
    directory, or a Hugging Face model.

    Collective over all ranks.
    """
    for candidate in candidates:
        if (candidate / LAYOUT).exists():
            if dist.get_rank() == 0:
                shutil.copytree(candidate, target, copy_function=_link_or_copy)
            return
        if is_hugging_face(candidate):
            source = HuggingFaceCheckpoint.open(candidate, "student.load")
            write_companions(source.companions, source.family, target)
            return


def _link_or_copy(source: str, target: str) -> None:
    try:  # untrained tensors can be large, and nobody writes to these files again
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
