"""Upcycle a dense checkpoint to a mixture-of-experts student, which initially computes the same function.

    python tools/upcycle_to_moe.py --checkpoint DIR --output DIR --num-experts 8 --topk 2 --router-noise 0.01
    torchrun --nproc-per-node N tools/upcycle_to_moe.py ...

`--checkpoint` is a Hugging Face directory or one of our checkpoints, and `--format` is the format to write.
`--granularity G` splits the MLP into G finer experts, and `--shared-experts S` makes S of them shared instead
of routed: a copy of the MLP then consists of G - S routed experts, and `--num-experts` and `--topk` are
multiples of that.
"""

import argparse
from pathlib import Path

from megatron_mopd.commands.ranks import run_on_ranks, say
from megatron_mopd.model.convert import open_checkpoint, require_empty, write_hugging_face, write_megatron
from megatron_mopd.model.safetensors_files import named_dtype, parse_size
from megatron_mopd.model.upcycle import UpcycledModel, Upcycling


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", required=True, help="dense model, either format")
    parser.add_argument("--output", required=True, help="directory to create")
    parser.add_argument("--num-experts", type=int, required=True, help="routed experts per layer")
    parser.add_argument("--topk", type=int, required=True, help="routed experts per token")
    parser.add_argument("--granularity", type=int, default=1, help="slices of the MLP, one per expert")
    parser.add_argument("--shared-experts", type=int, default=0, help="slices used by every token")
    parser.add_argument("--router-noise", type=float, default=0.0, help="standard deviation of its weights")
    parser.add_argument("--seed", type=int, default=0, help="seed of the router's noise")
    parser.add_argument("--format", choices=("megatron", "hf"), default="megatron")
    parser.add_argument("--dtype", help="float32 or bfloat16; default: unchanged")
    parser.add_argument("--max-shard-size", help="maximum weight file of --format hf, for example 5GB")
    parser.add_argument("--overwrite", action="store_true", help="replace the output directory's contents")
    arguments = parser.parse_args()

    def work() -> None:
        output = Path(arguments.output)
        require_empty(output, arguments.overwrite, source=arguments.checkpoint)
        dtype, size = named_dtype(arguments.dtype), parse_size(arguments.max_shard_size)
        options = Upcycling(
            num_experts=arguments.num_experts,
            topk=arguments.topk,
            granularity=arguments.granularity,
            shared_experts=arguments.shared_experts,
            router_noise=arguments.router_noise,
            seed=arguments.seed,
        )
        source = UpcycledModel(open_checkpoint(arguments.checkpoint, "--checkpoint"), options, "--checkpoint")
        if arguments.format == "hf":
            written = write_hugging_face(source, output, dtype=dtype, max_shard_size=size)
        else:
            written = write_megatron(source, output, dtype=dtype)
        say(f"wrote {written} ({source.family.architecture})")

    run_on_ranks(work, reads=[arguments.checkpoint])


if __name__ == "__main__":
    main()
