"""Estimate a run's memory before launch: python tools/estimate.py --help"""

from megatron_mopd.commands.estimate import main

if __name__ == "__main__":
    main()
