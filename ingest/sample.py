"""Many rollouts of prompts, with the exact per-step record of the distribution they came from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import torch

from canopy_store.errors import DataError
from canopy_store.ingest import captured, shared_prompt
from canopy_store.ingest.draw import Job, Rollout, Sampling, named_record
from canopy_store.ingest.policy import Ends, fused, has_kernels, take_step


def width_for(
    model: Any, sampling: Sampling, prompt_lengths: Sequence[int], budget: int | None = None
) -> int:
    """The number of rollouts to sample side by side in ``budget`` bytes above the weights, at least 1.

    The same for the same arguments; where the budget is not given, half of the memory now free on
    the model's device.

    Parameters
    ----------
    prompt_lengths : tokens of each prompt that is sampled in one call of `sample_prompts`
    """
    if budget is None:
        if model.device.type == "cuda":
            # what torch holds and does not use is free to it
            held = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
            free = torch.cuda.mem_get_info(model.device)[0] + held
        else:
            free = psutil.virtual_memory().available
        budget = free // 2
    fixed, slot = footprint(model, sampling, prompt_lengths)
    width = max(1, min((budget - fixed) // slot, _WIDEST.get(model.device.type, 512)))
    return width - width % 8 if width > 8 else width


# Wider is no quicker on a CPU (docs/performance.md). The bound elsewhere is a guess.
_WIDEST = {"cpu": 128}


def footprint(model: Any, sampling: Sampling, prompt_lengths: Sequence[int]) -> tuple[int, int]:
    """Bytes above the weights that sampling will take at its peak: in all, and more for each slot."""
    config, size = model.config.get_text_config(), model.dtype.itemsize
    heads, hidden = config.num_attention_heads, config.hidden_size
    per_head = getattr(config, "head_dim", None) or hidden // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    token = 2 * config.num_hidden_layers * shared * per_head * size  # keys and values of one
    longest, steps = max(prompt_lengths), sampling.max_new_tokens
    best = min(sampling.top_logprobs, sampling.top_k or sampling.top_logprobs)
    # float32 arrays of the vocabulary's size that live at once in `sampling_policy` and `Policy`
    arrays = 2 if sampling.top_k else 6 if sampling.cuts else 4
    arrays += 6 if sampling.typical_p < 1 and not sampling.top_k else 0  # sorted, with places as int64
    arrays += 2 if sampling.penalises else 0
    vocabulary = config.vocab_size * (size + 4 * arrays + sampling.penalises)
    log = steps * (4 + 4 * len(sampling.record) + 8 + 8 * best)
    # a layer's scores, weights and their parts in float32; its states and its two inner products
    layer = 4 * 4 * heads * (longest + steps) + size * (6 * hidden + 3 * inner)
    reading = longest * size * (6 * hidden + 3 * inner)  # of one prompt at a time
    if _loop_for(model) is _sample_captured:
        own, prompts = token * steps, token * sum(prompt_lengths)
        if fused(model.device, sampling):  # the logits, and once more where a step is made ready
            vocabulary = 2 * config.vocab_size * size
        layer = size * (8 * hidden + 3 * inner) + 4 * heads * per_head
    elif shared_prompt.prepare(model):
        room = -(-steps // shared_prompt.GROWTH) * shared_prompt.GROWTH
        own, prompts = token * room, token * sum(prompt_lengths)
    else:  # the prompt's are copied for each rollout, and each layer's once more when a step adds to it
        layers = config.num_hidden_layers
        own, prompts = token * (longest + steps) * (layers + 1) // layers, token * longest
    return prompts + reading, own + vocabulary + log + layer


@torch.inference_mode()
def sample_prompts(
    model: Any,
    jobs: Sequence[Job],
    sampling: Sampling,
    on_tokens: Callable[[int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[list[Rollout]]:
    """For each job one rollout for each of its sample numbers, in that order.

    A prompt is read once however many samples it has; the batch stays full across the jobs, since a
    finished rollout's slot is taken by the next at once; only the next step's logits are ever held.
    Out of memory, the width is halved and what is unfinished begins again, with the same random
    numbers: another width gives other bits only where rounding tips a near-tie.

    Parameters
    ----------
    model : causal model with transformers' interface
    jobs : prompts and samples
    sampling : the policy, the end tokens, the length limit and the batch width
    on_tokens : told how many tokens each step added
    say : told in a line that the width was halved

    Raises
    ------
    DataError
        Logits that are NaN or +inf; names the prompt, the sample and the step. Out of memory at a
        width of 1.
    """
    loop = _loop_for(model)
    done: list[list[Any]] = [[None] * len(job.samples) for job in jobs]
    width = max(1, min(sampling.width, sum(len(job.samples) for job in jobs)))
    while True:
        try:
            loop(model, jobs, replace(sampling, width=width), done, on_tokens, say)
            return done
        except (RuntimeError, MemoryError) as error:
            if not _out_of_memory(error):
                raise
            if width == 1:
                raise DataError(
                    f"{jobs[0].name}: out of memory at one rollout at a time; lower --max-new-tokens, "
                    "shorten the prompt or free memory"
                ) from None
        # only here have the loop that failed, and the memory that it held, gone
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
        if say:
            say(f"{jobs[0].name}: out of memory at {width} rollouts side by side; trying {width // 2}")
        width //= 2


def _loop_for(model: Any) -> Callable[..., None]:
    if not shared_prompt.prepare(model):
        return _sample_repeated
    return _sample_captured if model.device.type == "cuda" and has_kernels() else _sample_shared


def _out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    words = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc")
    return any(word in str(error) for word in words)


def _sample_captured(
    model: Any,
    jobs: Sequence[Job],
    sampling: Sampling,
    done: list[list[Any]],
    on_tokens: Callable[[int], None] | None,
    say: Callable[[str], None] | None = None,
) -> None:
    """The loop on a GPU, for the models of `_sample_shared`."""

    def keep(j: int, place: int, log: np.ndarray) -> None:
        whole = log.view(np.int32)
        first = 1 + len(sampling.record)  # of the likeliest
        best = (log.shape[1] - first) // 2
        done[j][place] = _rollout(
            jobs[j],
            place,
            sampling,
            whole[:, 0].copy(),
            log[:, 1:first].T.copy(),
            (whole[:, first : first + best].copy(), log[:, first + best :].copy()) if best else None,
        )

    captured.sample(model, jobs, sampling, _missing(done), keep, on_tokens, say)


def _sample_shared(
    model: Any,
    jobs: Sequence[Job],
    sampling: Sampling,
    done: list[list[Any]],
    on_tokens: Callable[[int], None] | None,
    say: Callable[[str], None] | None = None,
) -> None:
    """The loop for models that share a prompt's cache: slots that are refilled."""
    queue = _missing(done)[::-1]
    width = min(sampling.width, len(queue))
    slots = shared_prompt.Slots(model)
    log = _Log(model.device, width, sampling)
    read: dict[int, shared_prompt.Prompt] = {}
    owner = [(0, 0)] * width  # (job, place) of each slot; a slot that rests keeps its last
    free = list(range(width))  # slots without a rollout: to refill, or to rest

    def finish(ended: list[int]) -> list[int]:
        for slot in ended:
            job, place = owner[slot]
            done[job][place] = log.rollout(slot, jobs[job], place)
        return ended

    with shared_prompt.weights_first(model):
        while True:
            changed = bool(free)
            while free and queue:  # a first token follows from the prompt alone, and may be the last
                fresh, free = free[: len(queue)], free[len(queue) :]
                for slot in fresh:
                    owner[slot] = job, place = queue.pop()
                    if job not in read:
                        read[job] = slots.read(jobs[job].prompt_ids)
                    log.begin(slot, jobs[job], place)
                first = torch.stack([read[owner[slot][0]].logits for slot in fresh])  # (fresh, V)
                free += finish(log.step(first, fresh, on_tokens))
                del first
            live = sorted(set(range(len(owner))) - set(free))
            if not live:
                return
            if len(live) <= 0.75 * len(owner):
                owner, free = [owner[slot] for slot in live], []
                slots.keep(torch.tensor(live, device=model.device))
                log.keep(live)
                live = list(range(len(owner)))
            if changed:
                for job in set(read) - {job for job, _ in owner} - {job for job, _ in queue}:
                    del read[job]  # all its rollouts are done
                slots.seat([read[job] for job, _ in owner])
            logits = slots.step(log.last, log.length - 1)
            free += finish(log.step(logits[live] if free else logits, live, on_tokens))
            del logits  # not to be held beside the next


def _sample_repeated(
    model: Any,
    jobs: Sequence[Job],
    sampling: Sampling,
    done: list[list[Any]],
    on_tokens: Callable[[int], None] | None,
    say: Callable[[str], None] | None = None,
) -> None:
    """The loop for any other model: a prompt's cache repeated over the batch, finished rows dropped."""
    for number, job in enumerate(jobs):
        todo = [place for j, place in _missing(done) if j == number]
        if not todo:
            continue
        prompt = torch.tensor([job.prompt_ids], device=model.device)  # (1, T)
        first = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        while todo:
            places, todo = todo[: sampling.width], todo[sampling.width :]
            cache = copy.deepcopy(first.past_key_values) if todo else first.past_key_values
            cache.batch_repeat_interleave(len(places))
            logits = first.logits[:, -1].expand(len(places), -1)
            log = _Log(model.device, len(places), sampling)
            for row, place in enumerate(places):
                log.begin(row, job, place)
            while True:
                ended = log.step(logits, list(range(len(places))), on_tokens)
                for row in ended:
                    done[number][places[row]] = log.rollout(row, job, places[row])
                if ended:
                    keep = sorted(set(range(len(places))) - set(ended))
                    places = [places[row] for row in keep]
                    if not places:
                        break
                    cache.batch_select_indices(torch.tensor(keep, device=model.device))
                    log.keep(keep)
                logits = model(
                    input_ids=log.last[:, None], past_key_values=cache, use_cache=True, logits_to_keep=1
                ).logits[:, -1]  # (B, V)


def _missing(done: list[list[Any]]) -> list[tuple[int, int]]:
    """(job, place) of every rollout that is not there yet."""
    return [
        (j, p) for j, rollouts in enumerate(done) for p, found in enumerate(rollouts) if found is None
    ]


class _Log:
    """The record of the rollouts under way, one row each, on the device until a rollout is finished."""

    def __init__(self, device: torch.device, width: int, sampling: Sampling) -> None:
        steps, best = sampling.max_new_tokens, sampling.top_logprobs
        if sampling.top_k > 0:
            best = min(best, sampling.top_k)
        self.sampling, self.best, self.device = sampling, best, device
        self.length = np.zeros(width, dtype=np.int64)  # known without asking the device
        self.last = torch.zeros(width, dtype=torch.long, device=device)
        self.tokens = torch.zeros(width, steps, dtype=torch.int32, device=device)
        self.record = torch.zeros(width, len(sampling.record), steps, device=device)
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.noise = torch.zeros(width, steps, dtype=wide, device=device)
        self.top_ids = torch.zeros(width, steps, best, dtype=torch.int32, device=device)
        self.top_logprobs = torch.full((width, steps, best), -torch.inf, device=device)
        self.ends: Ends | None = None
        self.seen: torch.Tensor | None = None  # (width, V): the row's tokens, of a policy that penalises
        self.prompts: dict[int, list[int]] = {}  # of rows that have not taken a step

    def begin(self, row: int, job: Job, place: int) -> None:
        """Gives a row to a new rollout; `step` with it must come before `keep`."""
        self.prompts[row] = job.prompt_ids
        self.noise[row] = torch.from_numpy(job.draw(job.samples[place])).to(self.noise)
        self.length[row] = 0

    def keep(self, rows: list[int]) -> None:
        """Drops all rows but these."""
        self.length = self.length[rows]
        for name in ("last", "tokens", "record", "noise", "top_ids", "top_logprobs"):
            setattr(self, name, getattr(self, name)[rows])
        if self.seen is not None:
            self.seen = self.seen[rows]

    def step(
        self, logits: torch.Tensor, rows: list[int], on_tokens: Callable[[int], None] | None
    ) -> list[int]:
        """Samples a token for each of ``rows`` from its ``logits`` (B, V) and logs it; rows that end."""
        row = torch.tensor(rows, device=self.device)
        at = torch.from_numpy(self.length[rows]).to(self.device)
        self.ends = self.ends or Ends(self.sampling.end_ids, logits.shape[-1], self.device)
        seen = self._seen(rows, logits.shape[-1])
        step = take_step(
            logits,
            self.sampling,
            self.ends,
            uniform=self.noise[row, at],
            best=self.best,
            seen=None if seen is None else seen[row],
        )
        if seen is not None:
            seen[row, step.tokens] = True
        self.last[row] = step.tokens
        self.tokens[row, at] = step.tokens.int()
        self.record[row, :, at] = step.record.T
        if step.top is not None:
            ids, values = step.top
            self.top_ids[row, at, : ids.shape[1]] = ids.int()
            self.top_logprobs[row, at, : ids.shape[1]] = values
        self.length[rows] += 1
        if on_tokens:
            on_tokens(len(rows))
        over = self.ends.member[step.tokens].tolist()  # the one thing a step waits for
        return [
            r
            for r, stop in zip(rows, over, strict=True)
            if stop or self.length[r] >= self.sampling.max_new_tokens
        ]

    def _seen(self, rows: list[int], size: int) -> torch.Tensor | None:
        """Which tokens each row has, with the prompts of the new ones; None where it does not matter."""
        begun = [(row, self.prompts.pop(row)) for row in rows if row in self.prompts]
        if not self.sampling.penalises:
            return None
        if self.seen is None:
            self.seen = torch.zeros(len(self.length), size, dtype=torch.bool, device=self.device)
        for row, ids in begun:
            self.seen[row] = False
            self.seen[row, ids] = True
        return self.seen

    def rollout(self, row: int, job: Job, place: int) -> Rollout:
        """The finished rollout of a row."""
        n = int(self.length[row])
        # copies: on the CPU a tensor's array is the tensor's own memory, which the next rollout takes
        tokens = self.tokens[row, :n].cpu().numpy().copy()
        logged = self.record[row, :, :n].cpu().numpy().copy()
        top = None
        if self.best:
            top = (
                self.top_ids[row, :n].cpu().numpy().copy(),
                self.top_logprobs[row, :n].cpu().numpy().copy(),
            )
        return _rollout(job, place, self.sampling, tokens, logged, top)


def _rollout(
    job: Job,
    place: int,
    sampling: Sampling,
    tokens: np.ndarray,
    logged: np.ndarray,
    top: tuple[np.ndarray, np.ndarray] | None,
) -> Rollout:
    """The rollout of ``tokens`` (N,), its record ``logged`` (R, N) and its likeliest tokens (N, k)."""
    _check_finite(logged, job.samples[place], job.name)
    return Rollout(
        sample=job.samples[place],
        token_ids=tokens,
        **named_record(sampling, logged),
        finish_reason="stop" if int(tokens[-1]) in sampling.end_ids else "length",
        top_token_ids=top[0] if top else None,
        top_logprobs=top[1] if top else None,
    )


def _check_finite(logged: np.ndarray, sample: int, name: str) -> None:
    """Raises DataError for the first step of a record (R, N) that no policy can give."""
    bad = ~(np.isfinite(logged[0]) & np.isfinite(logged[1])) | np.isnan(logged[2])
    if bad.any():
        raise DataError(
            f"{name}, sample {sample}, step {int(np.argmax(bad)) + 1}: the model's logits are NaN or "
            "infinite; its weights are damaged, or the number format overflows: try --dtype float32"
        )
