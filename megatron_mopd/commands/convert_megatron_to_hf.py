"""Convert a Megatron distributed checkpoint to a Hugging Face model directory.

    python tools/convert_megatron_to_hf.py --checkpoint DIR --output DIR [--best]
    torchrun --nproc-per-node N tools/convert_megatron_to_hf.py --checkpoint DIR --output DIR

A model converted from Hugging Face is written back to files with the same names, dtypes and order, with its
configuration, tokenizer, chat template and generation configuration, unless `--dtype` or `--max-shard-size`
request otherwise. Any other model becomes the first supported architecture that can express it.
"""

import argparse
from pathlib import Path

from megatron_mopd.commands.ranks import run_on_ranks, say
from megatron_mopd.config import ConfigError
from megatron_mopd.model.checkpoint import find_checkpoint, iteration_directory
from megatron_mopd.model.convert import MegatronCheckpoint, require_empty, write_hugging_face
from megatron_mopd.model.hugging_face import is_hugging_face
from megatron_mopd.model.safetensors_files import named_dtype, parse_size
from megatron_mopd.run.best_checkpoint import best_iteration


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="checkpoint directory, or one of its iter_*")
    parser.add_argument(
        "--best", action="store_true", help="the checkpoint that evaluated best (best.json), not the newest"
    )
    parser.add_argument("--output", required=True, help="Hugging Face directory to create")
    parser.add_argument("--dtype", help="float32 or bfloat16; default: unchanged")
    parser.add_argument("--max-shard-size", help="maximum size of a weight file, for example 5GB or 500MB")
    parser.add_argument("--overwrite", action="store_true", help="replace the output directory's contents")
    arguments = parser.parse_args()

    def work() -> None:
        output = Path(arguments.output)
        require_empty(output, arguments.overwrite, source=arguments.checkpoint)
        dtype, size = named_dtype(arguments.dtype), parse_size(arguments.max_shard_size)
        path = find_checkpoint(arguments.checkpoint, "--checkpoint")
        if arguments.best:
            path = _best(arguments.checkpoint)
        if is_hugging_face(path):
            raise ConfigError(f"--checkpoint: {path} is already a Hugging Face model")
        source = MegatronCheckpoint(path, "--checkpoint")
        write_hugging_face(source, output, dtype=dtype, max_shard_size=size)
        say(f"wrote {output} ({source.family.architecture})")

    run_on_ranks(work, reads=[arguments.checkpoint])


def _best(directory: str) -> Path:
    iteration = best_iteration(directory)
    if iteration is None:
        raise ConfigError(
            f"--best: no checkpoint in {directory} was evaluated; omit --best for the newest, or train "
            "with data.eval and checkpoint.save_best=true"
        )
    say(f"iteration {iteration} evaluated best")
    return iteration_directory(directory, iteration)


if __name__ == "__main__":
    main()
