"""Average the weights of checkpoints with the same architecture: the baseline that merging must beat.

    python tools/average_checkpoints.py --output runs/average runs/math/checkpoints runs/code/checkpoints
    torchrun --nproc-per-node 8 tools/average_checkpoints.py --output ... ...    # one pipeline stage per rank

Only the weights are averaged; the result has the first checkpoint's tokenizer and can be used as
`student.load`.
"""

from __future__ import annotations

import argparse
import os

from megatron_mopd.backend.parallel import build_parallel_groups, select_device
from megatron_mopd.commands.ranks import run_on_ranks, say
from megatron_mopd.config import ParallelConfig
from megatron_mopd.model.averaging import average_checkpoints


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", help="checkpoint directories")
    parser.add_argument("--output", required=True, help="directory of the averaged checkpoint")
    parser.add_argument("--weights", type=float, nargs="+", help="one per checkpoint; default: equal")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    arguments = parser.parse_args()
    device = select_device(arguments.device)

    def work() -> None:
        parallel = ParallelConfig(pipeline_model_parallel_size=int(os.environ.get("WORLD_SIZE", "1")))
        groups = build_parallel_groups(parallel, device, seed=0)
        path = average_checkpoints(arguments.checkpoints, arguments.output, groups, weights=arguments.weights)
        say(f"average of {len(arguments.checkpoints)} checkpoints: {path}")

    run_on_ranks(work, lambda: device, reads=arguments.checkpoints)


if __name__ == "__main__":
    main()
