"""Answer prompts with a checkpoint: python tools/generate.py --help"""

from megatron_mopd.commands.generate import main

if __name__ == "__main__":
    main()
