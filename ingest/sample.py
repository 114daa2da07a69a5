"""Many rollouts of one prompt, with the exact per-step record of the distribution they came from."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from canopy_store.errors import DataError
from canopy_store.ingest.policy import sampling_policy


@dataclass(frozen=True)
class Sampling:
    """What decides a run's rollouts, beside the model and the prompts."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256
    end_ids: tuple[int, ...] = ()
    top_logprobs: int = 0
    width: int = 32


@dataclass
class Rollout:
    """One rollout: token ids, and per step logprob, entropy, eos_logprob (nats, float32)."""

    sample: int
    token_ids: np.ndarray
    logprob: np.ndarray
    entropy: np.ndarray
    eos_logprob: np.ndarray
    finish_reason: str
    top_token_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


def uniforms(run_id: str, seed: int, prompt_id: str, sample: int, steps: int) -> np.ndarray:
    """The random numbers (steps,) of one rollout, in [0, 1): they follow from these ids alone."""
    key = hashlib.sha256(f"{run_id}\0{seed}\0{prompt_id}\0{sample}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(steps)


@torch.inference_mode()
def sample_prompt(
    model: Any,
    prompt_ids: Sequence[int],
    samples: Sequence[int],
    draw: Callable[[int], np.ndarray],
    sampling: Sampling,
    name: str = "prompt",
    on_tokens: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """One rollout for each number in ``samples``, in that order.

    The prompt is read once; its cache is repeated over the batch, finished rows leave it, and only
    the next step's logits are ever held.

    Parameters
    ----------
    model : causal model with transformers' interface
    prompt_ids : (T,) token ids of the prompt
    draw : gives a sample number's uniforms (max_new_tokens,)
    sampling : the policy, the end tokens, the length limit and the batch width
    name : what errors call the prompt
    on_tokens : told how many tokens each step added

    Raises
    ------
    DataError
        Logits that are NaN or +inf; names the prompt, the sample and the step.
    """
    device = model.device
    prompt = torch.tensor([list(prompt_ids)], device=device)  # (1, T)
    first = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    rollouts: list[Rollout] = []
    for start in range(0, len(samples), sampling.width):
        batch = list(samples[start : start + sampling.width])
        more = start + sampling.width < len(samples)
        cache = copy.deepcopy(first.past_key_values) if more else first.past_key_values
        cache.batch_repeat_interleave(len(batch))
        noise = torch.from_numpy(np.stack([draw(s) for s in batch])).to(
            device, torch.float32 if device.type == "mps" else torch.float64
        )  # (B, max_new_tokens)
        logits = first.logits[:, -1].expand(len(batch), -1)
        rollouts += _continue(model, cache, logits, noise, batch, sampling, name, on_tokens)
    return rollouts


def _continue(
    model: Any, cache: Any, logits: torch.Tensor, noise: torch.Tensor, batch: list[int],
    sampling: Sampling, name: str, on_tokens: Callable[[int], None] | None,
) -> list[Rollout]:  # fmt: skip
    device, (width, steps) = logits.device, noise.shape
    ends = torch.zeros(logits.shape[-1], dtype=torch.bool, device=device)  # (V,)
    ends[[i for i in sampling.end_ids if i < len(ends)]] = True
    tokens = torch.zeros(width, steps, dtype=torch.int32, device=device)
    record = torch.zeros(3, width, steps, device=device)  # logprob, entropy, eos_logprob
    best = min(sampling.top_logprobs, logits.shape[-1])
    if sampling.top_k > 0:
        best = min(best, sampling.top_k)
    top_ids = torch.zeros(width, steps, best, dtype=torch.int32, device=device)
    top_logprobs = torch.full((width, steps, best), -torch.inf, device=device)
    lengths = np.zeros(width, np.int64)
    stopped = np.zeros(width, bool)
    rows = torch.arange(width, device=device)  # rows of the batch still going
    for step in range(steps):
        policy = sampling_policy(logits, sampling.temperature, sampling.top_k, sampling.top_p)
        token, logprob = policy.sample(noise[rows, step])
        tokens[rows, step] = token.int()
        record[:, rows, step] = torch.stack([logprob, policy.entropy(), policy.event_logprob(ends)])
        if best:
            ids, values = policy.top(best)
            top_ids[rows, step, : ids.shape[1]] = ids.int()
            top_logprobs[rows, step, : ids.shape[1]] = values
        ended = ends[token]
        lengths[rows.cpu().numpy()] += 1
        if on_tokens:
            on_tokens(len(rows))
        if ended.any():
            stopped[rows[ended].cpu().numpy()] = True
            keep = (~ended).nonzero()[:, 0]
            rows, token = rows[keep], token[keep]
            if not len(rows):
                break
            cache.batch_select_indices(keep)
        if step + 1 < steps:
            logits = model(
                input_ids=token[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]  # (B, V)
    logged = record.cpu().numpy()
    _check_finite(logged, lengths, batch, name)
    drawn = tokens.cpu().numpy()
    likeliest = (top_ids.cpu().numpy(), top_logprobs.cpu().numpy()) if best else None
    return [
        Rollout(
            sample=sample,
            token_ids=drawn[i, :n],
            logprob=logged[0, i, :n],
            entropy=logged[1, i, :n],
            eos_logprob=logged[2, i, :n],
            finish_reason="stop" if stopped[i] else "length",
            top_token_ids=likeliest[0][i, :n] if likeliest else None,
            top_logprobs=likeliest[1][i, :n] if likeliest else None,
        )
        for i, (sample, n) in enumerate(zip(batch, lengths, strict=True))
    ]


def _check_finite(logged: np.ndarray, lengths: np.ndarray, batch: list[int], name: str) -> None:
    within = np.arange(logged.shape[2])[None, :] < lengths[:, None]
    bad = within & ~(np.isfinite(logged[0]) & np.isfinite(logged[1]) & ~np.isnan(logged[2]))
    if bad.any():
        step, row = (int(x) for x in min((s, r) for r, s in np.argwhere(bad)))
        raise DataError(
            f"{name}, sample {batch[row]}, step {step + 1}: the model's logits are NaN or infinite; "
            "its weights are damaged, or the number format overflows: try --dtype float32"
        )
