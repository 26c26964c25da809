"""Estimate the cost of a pipeline plan and draw its timeline: python tools/plan_pipeline.py --help"""

import sys

from megatron_mopd.commands.plan_pipeline import main

if __name__ == "__main__":
    sys.exit(main())
