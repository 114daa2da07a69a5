"""What is asked of an engine, and what it gives: known without torch, which takes seconds to import."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RECORD = ("logprob", "entropy", "eos_logprob")  # of every step
# Parts of a policy that came later, and their values where off: one that is off is not named, so that a
# policy without them keeps the id that it had.
ADDED = {"min_p": 0.0, "typical_p": 1.0, "repetition_penalty": 1.0}
CUT = ("log_mass", "n_kept")  # of a policy that cuts, too
COUNTS = ("n_kept",)


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
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0

    @property
    def cuts(self) -> bool:
        """Whether the policy gives some tokens no probability; not greedy, which has nothing to cut."""
        cuts = self.top_k > 0 or self.top_p < 1 or self.min_p > 0 or self.typical_p < 1
        return self.temperature > 0 and cuts

    @property
    def penalises(self) -> bool:
        """Whether the policy depends on which tokens stand before."""
        return self.repetition_penalty != 1

    @property
    def record(self) -> tuple[str, ...]:
        """What a step's record holds, by name."""
        return (*RECORD, *CUT) if self.cuts else RECORD

    @property
    def is_model(self) -> bool:
        """Whether the policy is the model's own softmax: temperature 1, all tokens kept."""
        return self.temperature == 1 and not self.cuts and not self.penalises


def added(policy: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a policy's parts that are in ADDED and on; one that is not there, or None, is off."""
    given = {name: policy.get(name) for name in ADDED}
    return {n: float(v) for n, v in given.items() if v is not None and v != ADDED[n]}


def named_record(sampling: Sampling, rows: np.ndarray) -> dict[str, Any]:
    """The rows of a record (R, N) by name: counts as int32, the others as they are."""
    named = zip(sampling.record, rows, strict=True)
    return {name: row.astype(np.int32) if name in COUNTS else row for name, row in named}


@dataclass
class Rollout:
    """One rollout: token ids, and per step logprob, entropy, eos_logprob, log_mass (nats, float32).

    What an engine does not give exactly is None, and then in every rollout of one call.
    """

    sample: int
    token_ids: np.ndarray | None
    logprob: np.ndarray | None
    entropy: np.ndarray | None
    eos_logprob: np.ndarray | None
    finish_reason: str
    top_token_ids: np.ndarray | list[list[int]] | None = None
    top_logprobs: np.ndarray | list[list[float]] | None = None
    text: str | None = None  # where None, token_ids are decoded
    n_tokens: int | None = None  # where none of the lists is known
    log_mass: np.ndarray | None = None  # of a policy that cuts
    n_kept: np.ndarray | None = None


def uniforms(run_id: str, seed: int, prompt_id: str, sample: int, steps: int) -> np.ndarray:
    """The random numbers (steps,) of one rollout, in [0, 1): they follow from these ids alone."""
    key = hashlib.sha256(f"{run_id}\0{seed}\0{prompt_id}\0{sample}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).random(steps)


@dataclass
class Job:
    """A prompt's rollouts to sample: token ids, sample numbers, their uniforms, its name in errors."""

    prompt_ids: list[int]
    samples: Sequence[int]
    draw: Callable[[int], np.ndarray]
    name: str = "prompt"
