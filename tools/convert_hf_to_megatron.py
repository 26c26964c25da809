"""Convert a Hugging Face model to a Megatron checkpoint: python tools/convert_hf_to_megatron.py --help"""

from megatron_mopd.commands.convert_hf_to_megatron import main

if __name__ == "__main__":
    main()
