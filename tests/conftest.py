"""Small real models, saved as safetensors and loaded by the real loader; and the command line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Logits of the next state (column) given the present one (row); state 0 ends the rollout.
CHAIN_LOGITS = np.array(
    [
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [-1.0, 0.5, 1.5, 0.0, -0.5, 0.3, -2.0, 0.1],
        [-0.5, 1.0, -1.0, 2.0, 0.0, -0.3, 0.4, -1.5],
        [-2.0, 0.2, 0.7, 0.1, 1.1, 0.9, -0.4, 0.6],
        [0.3, -0.8, 0.5, 1.4, -1.2, 0.0, 0.8, 0.2],
        [-1.5, 0.6, 0.0, -0.7, 1.9, 0.4, 0.3, -0.2],
        [0.0, 1.2, -0.6, 0.8, 0.1, -1.0, 0.5, 0.9],
        [-0.7, 0.4, 0.3, -0.1, 0.6, 1.3, -0.9, 0.0],
    ]
)
STATES = ["<eos>", "a", "b", "c", "d", "e", "f", "g"]

# Files of few and slow tests, begun first so that no process is left alone with one at the end.
SLOW = ("test_docs", "test_crash", "test_executors", "test_object_storage", "test_wheel", "test_views")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in SLOW)


def save_chain(folder: Path, logits: np.ndarray = CHAIN_LOGITS, eos: bool = True, **config) -> Path:
    """Saves a Llama whose next-token logits depend on the last token alone: a Markov chain.

    One-hot embeddings pass the block unchanged, its two output projections being zero, so the head
    reads the chain's row for the last token.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    size = len(logits)
    settings = {
        "vocab_size": size,
        "hidden_size": size,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0 if eos else None,
        "pad_token_id": None,
        **config,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings))
    epsilon = model.config.rms_norm_eps
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        scale = float(np.sqrt(1 / size + epsilon))  # what the final norm divides a one-hot by
        model.lm_head.weight.copy_(torch.from_numpy(np.asarray(logits).T * scale))
    model.generation_config.eos_token_id = 0 if eos else None
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({s: i for i, s in enumerate(STATES)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # no padding token on purpose: nothing here may need one
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="a", **({"eos_token": "<eos>"} if eos else {})
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Path:
    """The folder of the Markov chain model."""
    return save_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture
def canopy(capfd):
    """Calls the command line: (exit code, stdout, stderr)."""
    from canopy_store.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


def write_prompts(path: Path, *texts: str) -> Path:
    """A JSONL file of these prompts."""
    import json

    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path
