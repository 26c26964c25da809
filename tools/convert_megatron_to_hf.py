"""Convert a Megatron checkpoint to a Hugging Face model: python tools/convert_megatron_to_hf.py --help"""

from megatron_mopd.commands.convert_megatron_to_hf import main

if __name__ == "__main__":
    main()
