"""Convert a Hugging Face model directory to a Megatron distributed checkpoint.

    python tools/convert_hf_to_megatron.py --hf DIR --output DIR
    torchrun --nproc-per-node N tools/convert_hf_to_megatron.py --hf DIR --output DIR

The result loads with any parallel layout: use it as `student.load` or as a teacher's `load`. Under torchrun
the ranks share the work by layers and experts; no rank holds more than a few tensors. Only safetensors are
read; no code in the directory is executed. (A training run can also load the Hugging Face directory itself.)
"""

import argparse
from pathlib import Path

from megatron_mopd.commands.ranks import run_on_ranks, say
from megatron_mopd.model.convert import require_empty, write_megatron
from megatron_mopd.model.hugging_face import HuggingFaceCheckpoint
from megatron_mopd.model.safetensors_files import named_dtype


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", required=True, help="Hugging Face model directory")
    parser.add_argument("--output", required=True, help="checkpoint directory to create")
    parser.add_argument("--dtype", help="float32 or bfloat16; default: unchanged")
    parser.add_argument("--overwrite", action="store_true", help="replace the output directory's contents")
    arguments = parser.parse_args()

    def work() -> None:
        output = Path(arguments.output)
        require_empty(output, arguments.overwrite, source=arguments.hf)
        dtype = named_dtype(arguments.dtype)
        source = HuggingFaceCheckpoint.open(arguments.hf, "--hf")
        if left := len(source.companions.untrained):
            say(f"{left} tensors are not trained here (multi-token prediction): kept for converting back")
        say(f"wrote {write_megatron(source, output, dtype=dtype)} ({source.family.architecture})")

    run_on_ranks(work, reads=[arguments.hf])


if __name__ == "__main__":
    main()
