"""Upcycle a dense model to a mixture of experts: python tools/upcycle_to_moe.py --help"""

from megatron_mopd.commands.upcycle_to_moe import main

if __name__ == "__main__":
    main()
