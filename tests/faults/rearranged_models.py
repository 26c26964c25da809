"""Model directories as other programs and people leave them: duplicated, sharded, fused or moved weights, and
directories of other kinds."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OTHERS = (
    ("adapter_config.json", '{"base_model_name_or_path": "a/b"}'),
    ("adapter_config.json", "[1]"),
    ("adapter_model.safetensors", ""),
    ("Qwen3.gguf", "GGUF"),
    ("latest_checkpointed_iteration.txt", "release"),
    ("latest_checkpointed_iteration.txt", "7\x1b"),
    ("mp_rank_00/model_optim_rng.pt", ""),
    ("model_index.json", "{}"),
    ("pytorch_model.bin", "x"),
    ("snapshots/0a/config.json", "{}"),
    (".metadata", "x"),
)


def rearrange(directory: Path, rng: random.Random) -> tuple[str, bool]:
    """Rearrange the files of a Hugging Face model. Returns a description, and whether it must be rejected."""
    kind = rng.choice(["shards", "shards", "twice", "head", "fused", "other", "other"])
    if kind == "other":
        return _other(directory, rng)
    tensors = load_file(directory / SINGLE)
    if kind == "head":
        configuration = json.loads((directory / "config.json").read_text())
        is_tied, is_there, is_equal = (rng.random() < 0.5 for _ in range(3))
        configuration["tie_word_embeddings"] = is_tied
        (directory / "config.json").write_text(json.dumps(configuration))
        del tensors[HEAD]
        if is_there:
            tensors[HEAD] = tensors[EMBEDDING].clone() if is_equal else torch.randn_like(tensors[EMBEDDING])
        save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
        return f"tied={is_tied}, head there={is_there}, equal={is_equal}", not is_tied and not is_there
    if kind == "fused":
        _fuse(tensors, rng)
    return _shards(directory, tensors, kind == "twice", rng)


def _other(directory: Path, rng: random.Random) -> tuple[str, bool]:
    name, content = rng.choice(OTHERS)
    (directory / name).parent.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(content)
    gone = [file for file in ("config.json", SINGLE) if rng.random() < 0.5]
    for file in gone:
        (directory / file).unlink()
    return f"{name} added, without {gone}", bool(gone)


def _fuse(tensors: dict[str, torch.Tensor], rng: random.Random) -> None:
    """Fuse the experts of some layers into one tensor each, as transformers 5 stores them."""
    for layer in {match[1] for match in map(re.compile(r"model\.layers\.(\d+)\.").match, tensors) if match}:
        prefix = f"model.layers.{layer}.mlp.experts."
        names = sorted(name for name in tensors if name.startswith(prefix))
        if not names or rng.random() < 0.3:
            continue
        experts = len({name.split(".")[5] for name in names})
        gate, up, down = (
            torch.stack([tensors.pop(f"{prefix}{e}.{part}_proj.weight") for e in range(experts)])
            for part in ("gate", "up", "down")
        )
        tensors[prefix + "gate_up_proj"] = torch.cat([gate, up], dim=1)
        tensors[prefix + "down_proj"] = down


def _shards(
    directory: Path, tensors: dict[str, torch.Tensor], keep_single: bool, rng: random.Random
) -> tuple[str, bool]:
    """Write two or three shards and an index, perhaps with a duplicated tensor, a changed value or a missing
    shard."""
    count = rng.randint(2, 3)
    files = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    shards: dict[str, dict[str, torch.Tensor]] = {file: {} for file in files}
    for name, tensor in tensors.items():
        shards[rng.choice(files)][name] = tensor
    index = {name: file for file, shard in shards.items() for name in shard}
    done, must_refuse = [f"{count} shards"], False
    if rng.random() < 0.5:
        name = rng.choice(sorted(tensors))
        other = rng.choice([file for file in files if file != index[name]])
        copy = tensors[name].clone()
        if rng.random() < 0.5:
            copy.view(-1)[rng.randrange(copy.numel())] += 1
            must_refuse = True
        shards[other][name] = copy
        done.append(f"{name} twice, {'other' if must_refuse else 'equal'} values")
    if keep_single and rng.random() < 0.5:
        name = rng.choice(sorted(tensors))
        changed = tensors | {name: tensors[name] + 1}
        save_file(changed, directory / SINGLE, metadata={"format": "pt"})
        done.append(f"single file with another {name}")
        must_refuse = True
    elif keep_single:
        save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
        done.append("equal single file")
    else:
        (directory / SINGLE).unlink()
    for file, shard in shards.items():
        save_file(shard, directory / file, metadata={"format": "pt"})
    if rng.random() < 0.2:
        (directory / files[0]).unlink()
        must_refuse = must_refuse or files[0] in index.values()
        done.append("first shard missing")
    if rng.random() < 0.2:
        folder = rng.choice(["sub/", "../", "/", "./"])
        index = {name: folder + file for name, file in index.items()}
        must_refuse = True
        done.append(f"index names {folder}")
    (directory / INDEX).write_text(json.dumps({"weight_map": index}))
    return ", ".join(done), must_refuse
