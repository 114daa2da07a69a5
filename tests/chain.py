"""The Markov chain as a real model, the reward model on its body, and what both give in closed form."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

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
WORTH = np.array([0.0, 1.5, -2.0, 0.25, 3.0, -0.5, 0.75, 2.0])  # the reward of each last state
PROMPTS_TO_A = [f"{s} a" for s in "abcdefg"] + ["b c a", "c d a", "d e a"]  # all end in state a


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


def save_reward_model(chain: Path, folder: Path) -> Path:
    """Saves the chain's body under a head that reads a worth off the last state."""
    import torch
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification.from_pretrained(chain, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        scale = float(np.sqrt(1 / len(WORTH) + model.config.rms_norm_eps))
        model.score.weight.copy_(torch.from_numpy(WORTH[None] * scale))
    model.save_pretrained(folder)
    for file in chain.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def chain_policy(temperature: float, top_k: int) -> np.ndarray:
    """The chain's transition matrix under the policy, derived here from the logits alone."""
    logits = CHAIN_LOGITS / temperature
    if top_k:
        edge = np.sort(logits, axis=1)[:, -top_k][:, None]
        logits = np.where(logits >= edge, logits, -np.inf)
    weight = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weight / weight.sum(axis=1, keepdims=True)


def closed_form(policy: np.ndarray, start: int) -> dict[str, float]:
    """Expected totals through the fundamental matrix (I - Q)^-1, and the length's own entropy."""
    transient = policy[1:, 1:]
    visits = np.linalg.inv(np.eye(len(transient)) - transient)[start - 1]

    def entropy(p: np.ndarray) -> np.ndarray:
        return -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(axis=-1)

    ends = policy[1:, 0]
    reach, lengths = np.eye(len(transient))[start - 1], []
    for _ in range(3000):
        lengths.append(reach @ ends)
        reach = reach @ transient
    return {
        "ce_star": visits @ entropy(policy[1:]),
        "mean_length": visits.sum(),
        "stop_entropy": visits @ entropy(np.stack([ends, 1 - ends], axis=1)),
        "length_entropy": float(entropy(np.array(lengths))),
    }
