"""Many rollouts of prompts, with the exact per-step record of the distribution they came from."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from canopy_store.errors import DataError
from canopy_store.ingest import shared_prompt
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
    """One rollout: token ids, and per step logprob, entropy, eos_logprob (nats, float32).

    What an engine does not give exactly is None.
    """

    sample: int
    token_ids: np.ndarray | None
    logprob: np.ndarray | None
    entropy: np.ndarray | None
    eos_logprob: np.ndarray | None
    finish_reason: str
    top_token_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None
    text: str | None = None  # where None, token_ids are decoded


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


@torch.inference_mode()
def sample_prompts(
    model: Any,
    jobs: Sequence[Job],
    sampling: Sampling,
    on_tokens: Callable[[int], None] | None = None,
) -> list[list[Rollout]]:
    """For each job one rollout for each of its sample numbers, in that order.

    A prompt is read once however many samples it has; the batch stays full across the jobs, since a
    finished rollout's slot is taken by the next at once; only the next step's logits are ever held.

    Parameters
    ----------
    model : causal model with transformers' interface
    jobs : prompts and samples
    sampling : the policy, the end tokens, the length limit and the batch width
    on_tokens : told how many tokens each step added

    Raises
    ------
    DataError
        Logits that are NaN or +inf; names the prompt, the sample and the step.
    """
    if shared_prompt.prepare(model):
        return _sample_shared(model, jobs, sampling, on_tokens)
    return [_sample_repeated(model, job, sampling, on_tokens) for job in jobs]


def _sample_shared(
    model: Any, jobs: Sequence[Job], sampling: Sampling, on_tokens: Callable[[int], None] | None
) -> list[list[Rollout]]:
    """The loop for models that share a prompt's cache: slots that are refilled."""
    queue = [(job, place) for job, todo in enumerate(jobs) for place in range(len(todo.samples))][::-1]
    done: list[list[Any]] = [[None] * len(job.samples) for job in jobs]
    width = min(sampling.width, len(queue))
    slots = shared_prompt.Slots(model, width)
    log = _Log(model.device, width, sampling)
    read: dict[int, shared_prompt.Prompt] = {}
    owner: list[tuple[int, int]] = []  # (job, place) of each slot; a slot that rests keeps its last
    logits: Any = None

    def take() -> tuple[int, int]:
        job, place = queue.pop()
        if job not in read:
            read[job] = slots.read(jobs[job].prompt_ids)
        return job, place

    while len(owner) < width:
        owner.append(take())
        log.begin(len(owner) - 1, jobs[owner[-1][0]], owner[-1][1])
    logits = torch.stack([read[job].logits for job, _ in owner])  # (W, V)
    slots.seat([read[job] for job, _ in owner])
    resting = torch.zeros(width, dtype=torch.bool, device=model.device)
    while True:
        token, ended = log.step(logits, resting, on_tokens)
        finished = ended.nonzero()[:, 0].tolist() if ended.any() else []
        refilled = []
        for slot in finished:
            job, place = owner[slot]
            done[job][place] = log.rollout(slot, jobs[job], place)
            if queue:
                owner[slot] = take()
                log.begin(slot, jobs[owner[slot][0]], owner[slot][1])
                refilled.append(slot)
            else:
                resting[slot] = True
        if resting.all():
            return done
        if finished:
            if int((~resting).sum()) <= 0.75 * len(owner):
                keep = (~resting).nonzero()[:, 0]
                owner = [owner[slot] for slot in keep.tolist()]
                token, resting = token[keep], resting[keep]
                place_of = {slot: i for i, slot in enumerate(keep.tolist())}
                refilled = [place_of[slot] for slot in refilled]
                slots.keep(keep)
                log.keep(keep)
            for job in set(read) - {job for job, _ in owner} - {job for job, _ in queue}:
                del read[job]  # all its rollouts are done
            slots.seat([read[job] for job, _ in owner])
        # a slot just refilled has no token yet: it writes where its first one will, and is not heard
        at = (log.length - 1).clamp(min=0)
        logits = slots.step(token, at)
        for slot in refilled:
            logits[slot] = read[owner[slot][0]].logits


def _sample_repeated(
    model: Any, job: Job, sampling: Sampling, on_tokens: Callable[[int], None] | None
) -> list[Rollout]:
    """The loop for any other model: a prompt's cache repeated over the batch, finished rows dropped."""
    prompt = torch.tensor([job.prompt_ids], device=model.device)  # (1, T)
    first = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    rollouts: list[Any] = [None] * len(job.samples)
    for start in range(0, len(job.samples), sampling.width):
        places = list(range(start, min(start + sampling.width, len(job.samples))))
        more = start + sampling.width < len(job.samples)
        cache = copy.deepcopy(first.past_key_values) if more else first.past_key_values
        cache.batch_repeat_interleave(len(places))
        logits = first.logits[:, -1].expand(len(places), -1)
        log = _Log(model.device, len(places), sampling)
        for row, place in enumerate(places):
            log.begin(row, job, place)
        while places:
            resting = torch.zeros(len(places), dtype=torch.bool, device=model.device)
            token, ended = log.step(logits, resting, on_tokens)
            if ended.any():
                for row in ended.nonzero()[:, 0].tolist():
                    rollouts[places[row]] = log.rollout(row, job, places[row])
                keep = (~ended).nonzero()[:, 0]
                places = [places[row] for row in keep.tolist()]
                if not places:
                    break
                token = token[keep]
                cache.batch_select_indices(keep)
                log.keep(keep)
            logits = model(
                input_ids=token[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1
            ).logits[:, -1]  # (B, V)
    return rollouts


class _Log:
    """The record of the rollouts under way, one row each, on the device until a rollout is finished."""

    def __init__(self, device: torch.device, width: int, sampling: Sampling) -> None:
        steps, best = sampling.max_new_tokens, sampling.top_logprobs
        if sampling.top_k > 0:
            best = min(best, sampling.top_k)
        self.sampling, self.best = sampling, best
        self.length = torch.zeros(width, dtype=torch.long, device=device)
        self.tokens = torch.zeros(width, steps, dtype=torch.int32, device=device)
        self.record = torch.zeros(width, 3, steps, device=device)  # logprob, entropy, eos_logprob
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.noise = torch.zeros(width, steps, dtype=wide, device=device)
        self.top_ids = torch.zeros(width, steps, best, dtype=torch.int32, device=device)
        self.top_logprobs = torch.full((width, steps, best), -torch.inf, device=device)
        self.is_end: torch.Tensor | None = None  # (V,)

    def begin(self, row: int, job: Job, place: int) -> None:
        """Gives a row to a new rollout."""
        self.noise[row] = torch.from_numpy(job.draw(job.samples[place])).to(self.noise)
        self.length[row] = 0

    def keep(self, rows: torch.Tensor) -> None:
        """Drops all rows but these."""
        for name in ("length", "tokens", "record", "noise", "top_ids", "top_logprobs"):
            setattr(self, name, getattr(self, name)[rows])

    def step(
        self, logits: torch.Tensor, resting: torch.Tensor, on_tokens: Callable[[int], None] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples a token (B,) for every row and logs it; and which rows (B,) end with it."""
        rows = torch.arange(len(logits), device=logits.device)
        at = self.length.clamp(max=self.sampling.max_new_tokens - 1)  # of a resting row: no matter
        policy = sampling_policy(
            logits, self.sampling.temperature, self.sampling.top_k, self.sampling.top_p
        )
        token, logprob = policy.sample(self.noise[rows, at])
        self.tokens[rows, at] = token.int()
        if self.is_end is None:
            self.is_end = torch.zeros(logits.shape[-1], dtype=torch.bool, device=logits.device)
            self.is_end[[i for i in self.sampling.end_ids if i < len(self.is_end)]] = True
        eos_logprob = policy.event_logprob(self.is_end)
        self.record[rows, :, at] = torch.stack([logprob, policy.entropy(), eos_logprob], -1)
        if self.best:
            ids, values = policy.top(self.best)
            self.top_ids[rows, at, : ids.shape[1]] = ids.int()
            self.top_logprobs[rows, at, : ids.shape[1]] = values
        self.length += ~resting
        if on_tokens:
            on_tokens(len(logits) - int(resting.sum()))
        over = self.is_end[token] | (self.length >= self.sampling.max_new_tokens)
        return token, over & ~resting

    def rollout(self, row: int, job: Job, place: int) -> Rollout:
        """The finished rollout of a row."""
        n = int(self.length[row])
        # copies: on the CPU a tensor's array is the tensor's own memory, which the next rollout takes
        tokens = self.tokens[row, :n].cpu().numpy().copy()
        logged = self.record[row, :, :n].cpu().numpy().copy()
        _check_finite(logged, job.samples[place], job.name)
        return Rollout(
            sample=job.samples[place], token_ids=tokens,
            logprob=logged[0], entropy=logged[1], eos_logprob=logged[2],
            finish_reason="stop" if int(tokens[-1]) in self.sampling.end_ids else "length",
            top_token_ids=self.top_ids[row, :n].cpu().numpy().copy() if self.best else None,
            top_logprobs=self.top_logprobs[row, :n].cpu().numpy().copy() if self.best else None,
        )  # fmt: skip


def _check_finite(logged: np.ndarray, sample: int, name: str) -> None:
    """Raises DataError for the first step of a record (3, N) that no policy can give."""
    bad = ~(np.isfinite(logged[0]) & np.isfinite(logged[1])) | np.isnan(logged[2])
    if bad.any():
        raise DataError(
            f"{name}, sample {sample}, step {int(np.argmax(bad)) + 1}: the model's logits are NaN or "
            "infinite; its weights are damaged, or the number format overflows: try --dtype float32"
        )
