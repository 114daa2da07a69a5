"""A tiny Llama with random weights, and texts that its tokenizer knows."""

from __future__ import annotations

from pathlib import Path

WINDOW = 32
TEXTS = {
    "fox": "The quick brown fox jumps over 13 lazy dogs.\n\nIt is 7, and they sleep.",
    "café": "naïve café — 東京 🙂 ends here",
    "code": "def f(x):\n    return x + 1\n",
}
LONG = " ".join(f"word{i} is the {i}th," for i in range(12))


def save_tiny(folder: Path, seed: int, bos: bool = True, window: int = WINDOW) -> Path:
    """Saves a random Llama with a byte-level tokenizer that was trained on the texts above."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    words.train_from_iterator(
        [*TEXTS.values(), LONG],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", **({"bos_token": "<s>"} if bos else {})
    )
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=window,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
