"""Average the weights of checkpoints of one architecture: the baseline that a merge has to beat.

    python tools/average_checkpoints.py --output runs/average runs/math/checkpoints runs/code/checkpoints
    torchrun --nproc-per-node 8 tools/average_checkpoints.py --output ... ...       # sharded over pipeline
    stages

Only the weights are averaged; the result has the first checkpoint's tokenizer and can be a `student.load`.
"""

from __future__ import annotations

import argparse
import os
import sys

from megatron_mopd.backend.parallel import build_parallel_groups, select_device, start_ranks
from megatron_mopd.config import ConfigError, ParallelConfig
from megatron_mopd.model.averaging import average_checkpoints


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", help="checkpoint directories")
    parser.add_argument("--output", required=True, help="directory of the averaged checkpoint")
    parser.add_argument("--weights", type=float, nargs="+", help="one per checkpoint; default: equal")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    arguments = parser.parse_args()
    try:
        device = select_device(arguments.device)
        parallel = ParallelConfig(pipeline_model_parallel_size=int(os.environ.get("WORLD_SIZE", "1")))
        start_ranks(device, parallel.distributed_timeout_minutes)
        groups = build_parallel_groups(parallel, device, seed=0)
        path = average_checkpoints(arguments.checkpoints, arguments.output, groups, weights=arguments.weights)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if groups.rank == 0:
        print(f"average of {len(arguments.checkpoints)} checkpoints: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
