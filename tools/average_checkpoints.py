"""Average the weights of several checkpoints: python tools/average_checkpoints.py --help"""

from megatron_mopd.commands.average_checkpoints import main

if __name__ == "__main__":
    main()
