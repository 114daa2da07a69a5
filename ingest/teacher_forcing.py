"""Given tokens read by a model: each one's log-probability, with the exact statistics of its step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch

from canopy_store.errors import DataError
from canopy_store.ingest.draw import Sampling
from canopy_store.ingest.number_formats import Emulation
from canopy_store.ingest.policy import Ends, take_step


@torch.inference_mode()
def score_tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    rollouts: Sequence[Sequence[int]],
    sampling: Sampling,
    chunk_tokens: int = 512,
    on_tokens: Callable[[int], None] | None = None,
    names: Sequence[str] | None = None,
    batch_tokens: int | None = None,
    emulation: Emulation | None = None,
) -> list[np.ndarray]:
    """Per rollout what `Sampling.record` names (R, N), float32, exact over the vocabulary.

    In a number format that is emulated they are of that, and one more row is each step's KL(plain ||
    emulated), both distributions given the same tokens before.

    The model's body runs once over each batch; its head runs over ``chunk_tokens`` steps at a time,
    so that (steps, vocabulary) logits are never held for more.

    Parameters
    ----------
    model : causal model with transformers' interface
    prompts, rollouts : token ids, one list each per rollout
    sampling : the policy, the end tokens and the batch width
    on_tokens : told how many rollout tokens each batch had
    names : what errors call each rollout
    batch_tokens : bounds a batch beside the width: its rollouts times the longest one's tokens
    emulation : of the same model; None: as it is

    Raises
    ------
    DataError
        Logits that are NaN or +inf; names the rollout and the step. A model whose head cannot be run
        apart from its body.
    """
    split = _SplitModel(model)
    emulated = emulation.on if emulation else nullcontext
    ends: Ends | None = None
    scores: list[np.ndarray] = [np.empty(0)] * len(rollouts)
    # rollouts of like length share a batch: little padding
    lengths = [len(p) + len(r) for p, r in zip(prompts, rollouts, strict=True)]
    order = sorted(range(len(rollouts)), key=lengths.__getitem__)
    for batch in _batches(order, lengths, sampling.width, batch_tokens):
        read = [prompts[i] for i in batch], [rollouts[i] for i in batch]
        with emulated():
            states = split.states(*read)  # (S, d)
        plain = split.states(*read) if emulation else None
        tokens = torch.tensor([t for i in batch for t in rollouts[i]], device=model.device)  # (S,)
        steps = []
        for at in range(0, len(tokens), chunk_tokens):
            part = slice(at, at + chunk_tokens)
            with emulated():
                logits = split.logits(states[part])
            ends = ends or Ends(sampling.end_ids, logits.shape[-1], logits.device)
            seen = None
            if sampling.penalises:
                seen = _seen(*read, at, len(logits), logits.shape[-1]).to(logits.device)
            record = take_step(logits, sampling, ends, tokens=tokens[part], seen=seen).record
            if plain is not None:
                kl = _divergence(split.logits(plain[part]), logits)
                record = torch.cat([record, kl[None].to(record)])
            steps.append(record)
        rows = torch.cat(steps, dim=1).cpu().numpy()
        stops = np.cumsum([len(rollouts[i]) for i in batch])
        for i, row in zip(batch, np.split(rows, stops[:-1], axis=1), strict=True):
            _check_finite(row, names[i] if names else f"rollout {i}")
            scores[i] = row
        if on_tokens:
            on_tokens(len(tokens))
    return scores


def _seen(
    prompts: Sequence[Sequence[int]],
    rollouts: Sequence[Sequence[int]],
    first: int,
    steps: int,
    size: int,
) -> torch.Tensor:
    """Which tokens stand before each of S ``steps`` from ``first``, of rollouts end to end: (S, V)."""
    seen = torch.zeros(steps, size, dtype=torch.bool)
    begins = -first  # the rollout's first step, among these
    for prompt, rollout in zip(prompts, rollouts, strict=True):
        low, high = max(begins, 0), min(begins + len(rollout), steps)
        if low < high:
            seen[low:high, [*prompt, *rollout[: low - begins]]] = True
            for row in range(low + 1, high):
                seen[row:high, rollout[row - 1 - begins]] = True
        begins += len(rollout)
    return seen


def _divergence(plain: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL (S,) in nats of softmax(other) from softmax(plain), both logits (S, V)."""
    first, second = plain.float().log_softmax(-1), other.float().log_softmax(-1)
    return (first.exp() * (first - second)).sum(-1).clamp_min(0)


def _batches(order: list[int], lengths: list[int], width: int, most: int | None) -> Iterator[list[int]]:
    """The rollouts in batches of up to ``width``, and of up to ``most`` tokens where more than one."""
    batch: list[int] = []
    for i in order:  # shortest first: the next one is the longest so far
        if batch and (len(batch) == width or (most and (len(batch) + 1) * lengths[i] > most)):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


class _SplitModel:
    """A causal model whose body and head run apart, each by the model's own code.

    The head is what the model's forward does after its body: scaling and soft caps included, which a
    plain call of its output projection would miss.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.body = model, model.get_decoder()
        self.output: Any = None
        self.checked = False

    def states(
        self, prompts: Sequence[Sequence[int]], rollouts: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Last hidden states (S, d) at the S steps of all rollouts, end to end."""
        lengths = [len(p) + len(r) - 1 for p, r in zip(prompts, rollouts, strict=True)]
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.long)  # (B, T)
        for row, (prompt, rollout) in enumerate(zip(prompts, rollouts, strict=True)):
            ids[row, : lengths[row]] = torch.tensor([*prompt, *rollout][:-1])
        # Padding stands on the right alone, where no causal model sees it from an earlier position,
        # and positions count from 0 in every row: neither a mask nor position ids are needed.
        hook = self.body.register_forward_hook(lambda _m, _a, output: setattr(self, "output", output))
        try:
            last = self.model(
                input_ids=ids.to(self.model.device), use_cache=False, logits_to_keep=1
            ).logits[:, -1]  # (B, V)
        finally:
            hook.remove()
        hidden = getattr(self.output, "last_hidden_state", None)
        if hidden is None or hidden.shape[:2] != ids.shape:
            raise DataError(f"{type(self.model).__name__}: its hidden states cannot be had; not scored")
        if not self.checked:
            self._check(last, hidden[:, -1])
        steps = [
            hidden[row, len(p) - 1 : lengths[row]] for row, p in enumerate(prompts)
        ]  # of each row: where its first token is predicted, up to its last
        return torch.cat(steps)

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits (S, V) of hidden states (S, d)."""
        output = type(self.output)(**{**self.output, "last_hidden_state": states[None]})
        forward = self.body.__dict__.get("forward")
        self.body.forward = lambda *_, **__: output
        try:
            blank = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
            return self.model(input_ids=blank, use_cache=False).logits[0]
        finally:
            if forward is None:
                del self.body.forward
            else:
                self.body.forward = forward

    def _check(self, logits: torch.Tensor, states: torch.Tensor) -> None:
        """The head on its own must give what the whole model gave (B, V), to rounding."""
        again = self.logits(states)
        finite = torch.isfinite(logits)
        room = 0.05 * logits[finite].abs().amax() if finite.any() else 0.0
        if again.shape != logits.shape or ((again - logits)[finite].abs() > room).any():
            raise DataError(
                f"{type(self.model).__name__}: its head does not run apart from its body; not scored"
            )
        self.checked = True


def _check_finite(row: np.ndarray, name: str) -> None:
    bad = np.isnan(row).any(axis=0) | ~np.isfinite(row[1])
    if bad.any():
        raise DataError(
            f"{name}, step {int(np.argmax(bad)) + 1}: the scorer's logits are NaN or infinite; its "
            "weights are damaged, or the number format overflows: try --dtype float32"
        )
