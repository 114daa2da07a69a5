"""Trains a small Llama from random weights on text of `texts.py`: python demo/tiny_model.py --out DIR

About a million parameters and a minute on two cores. It is no chat model: it continues a request the
way its training text does, and ends its answers by itself.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from texts import joint, pairs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from canopy_store.ingest.finetune import finetune

END = "<|end|>"


def corpus(count: int, seed: int) -> list[str]:
    """``count`` documents: mostly requests with loose answers, some answers alone."""
    return [
        request + joint(task) + answer if i % 5 else answer
        for i, (task, request, answer) in enumerate(pairs(count, "loose", seed))
    ]


def make_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that ``texts`` trained: any text can be encoded."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)


def untrained(
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    width: int,
    inner: int,
    layers: int,
    positions: int,
    spread: float = 0.02,
) -> LlamaForCausalLM:
    """A Llama of random weights, of so many layers of this width; ``spread`` is the weights' sd."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=positions,
            initializer_range=spread,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(out: Path, steps: int, seed: int) -> dict:
    """Saves the model in ``out``; what `finetune` says of its training."""
    transformers_logging.disable_progress_bar()
    print("a tokenizer is trained on 8,000 short texts, then the model from random weights", flush=True)
    texts = corpus(8000, seed)
    tokenizer = make_tokenizer(texts, 1200)
    model = untrained(tokenizer, seed, width=128, inner=344, layers=3, positions=512)
    with tempfile.TemporaryDirectory() as work:
        start = Path(work) / "untrained"
        model.save_pretrained(start)
        tokenizer.save_pretrained(start)
        data = Path(work) / "corpus.jsonl"
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        # from random weights, full fine-tuning is training from scratch
        return finetune(
            str(start),
            data,
            out,
            steps=steps,
            batch_size=24,
            learning_rate=4e-3,
            seed=seed,
            max_length=160,
            device="cpu",
            show_progress=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder for the model")
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    done = train(options.out, options.steps, options.seed)
    print(
        f"{options.out}: {done['steps']} steps in {done['wall_s']:.0f} s, "
        f"loss {done['final_loss']:.2f} nats per token"
    )


if __name__ == "__main__":
    main()
