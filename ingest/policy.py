"""The sampling policy and its exact statistics.

Repetition penalty, temperature, top-k, top-p, min-p, typical: each on what the one before left, and
renormalised at the end. Order and definitions are those of transformers' `generate`.

The sampler takes its tokens and its record from this one place, so what is logged is what is sampled.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from canopy_store.ingest.draw import Sampling


class Ends:
    """The tokens that end a rollout: their ``ids``, and the vocabulary's ``member`` (V,) they are."""

    def __init__(self, ids: Sequence[int], size: int, device: torch.device) -> None:
        inside = [i for i in ids if i < size]
        self.ids = torch.tensor(inside, dtype=torch.long, device=device)
        self.member = torch.zeros(size, dtype=torch.bool, device=device)
        self.member[inside] = True


@dataclass(frozen=True)
class Step:
    """One token of each row, with the exact statistics of the distribution that it came from.

    ``tokens`` (B,); ``record`` (R, B), float32: what `Sampling.record` names, nats and counts; the ids
    and log-probabilities (B, k) of the likeliest tokens, where they were asked for.
    """

    tokens: torch.Tensor
    record: torch.Tensor
    top: tuple[torch.Tensor, torch.Tensor] | None = None


def take_step(
    logits: torch.Tensor,
    sampling: Sampling,
    ends: Ends,
    *,
    uniform: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
    best: int = 0,
    seen: torch.Tensor | None = None,
) -> Step:
    """The step of ``logits`` (B, V) under the policy: ``tokens`` (B,), or drawn by ``uniform`` (B,).

    ``seen`` (B, V) marks each row's tokens of prompt and rollout so far, for a policy that penalises.

    On a GPU a policy that keeps all tokens is never whole in float32: its sums come from one pass.
    """
    if sampling.penalises:
        assert seen is not None
        logits = penalised(logits, seen, sampling.repetition_penalty)
    if fused(logits.device, sampling):
        from canopy_store.ingest import kernels

        tokens, record = kernels.softmax_steps(
            logits, sampling.temperature, ends.ids, uniform=uniform, tokens=tokens
        )
        top = None
        if best:
            found = logits.topk(min(best, logits.shape[-1]), dim=-1)
            values = found.values.float() / sampling.temperature - record[3][:, None]
            top = found.indices, values.clamp(max=0)
        return Step(tokens, record[:3], top)
    policy = sampling_policy(
        logits,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
        sampling.min_p,
        sampling.typical_p,
    )
    if tokens is None:
        assert uniform is not None
        tokens, logprob = policy.sample(uniform)
    else:
        logprob = policy.logprob(tokens)
    rows = [logprob, policy.entropy(), policy.event_logprob(ends.member)]
    if policy.log_mass is not None:
        rows += [policy.log_mass, policy.n_kept()]
    return Step(tokens, torch.stack(rows), policy.top(best) if best else None)


def fused(device: torch.device, sampling: Sampling) -> bool:
    """Whether the step is one of `canopy_store.ingest.kernels`: a softmax over all tokens, on a GPU."""
    plain = sampling.temperature > 0 and not sampling.cuts
    return plain and device.type == "cuda" and has_kernels()


@functools.cache
def has_kernels() -> bool:
    """Whether `canopy_store.ingest.kernels` run on this GPU and are right, which is tried once.

    They need Triton, which torch for NVIDIA and AMD brings on Linux, and a C compiler. Without them
    torch's own operations sample the same rollouts, slower.
    """
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    from canopy_store.ingest import kernels

    try:
        kernels.check(torch.device("cuda"))
    except Exception as error:  # whatever a compiler, a driver or a wrong sum raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        warnings.warn(f"sampling without the GPU's own kernels, slower: {reason}", stacklevel=2)
        return False
    return True


@dataclass(frozen=True)
class Policy:
    """A next-token distribution per row.

    ``logprobs`` (B, K) in nats: log π, -inf outside the support. ``ids`` (B, K): the token each
    column stands for, or None when column v is token v. ``log_mass`` (B,) in nats: log of what the
    uncut policy gives to the support; None where nothing is cut.
    """

    logprobs: torch.Tensor
    ids: torch.Tensor | None
    log_mass: torch.Tensor | None = None

    @functools.cached_property
    def probabilities(self) -> torch.Tensor:
        """π (B, K)."""
        return self.logprobs.exp()

    def entropy(self) -> torch.Tensor:
        """Entropy (B,) in nats over the whole support."""
        # the clamp makes 0 of 0 · -inf and leaves NaN; at its bound a probability is 0
        return -torch.linalg.vecdot(self.probabilities, self.logprobs.clamp(min=-1e4)).clamp(max=0)

    def n_kept(self) -> torch.Tensor:
        """Tokens (B,) that have a probability, as a float; exact below 2^24."""
        return torch.isfinite(self.logprobs).sum(-1).to(self.logprobs.dtype)

    def event_logprob(self, member: torch.Tensor) -> torch.Tensor:
        """Log-probability (B,) in nats of the set of tokens that ``member`` (V,) marks."""
        if self.ids is None:  # a few columns of many
            return self.logprobs[:, member].logsumexp(-1).clamp(max=0)
        inside = self.logprobs.masked_fill(~member[self.ids], -torch.inf)
        return inside.logsumexp(-1).clamp(max=0)

    def logprob(self, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (B,) of ``tokens`` (B,); -inf outside the support."""
        if self.ids is None:
            return self.logprobs.gather(-1, tokens[:, None])[:, 0]
        return self.logprobs.masked_fill(self.ids != tokens[:, None], -torch.inf).amax(-1)

    def sample(self, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (B,) and their log-probabilities (B,), by inversion of ``uniform`` (B,) in [0, 1).

        One number a row and step, so a rollout's randomness is a short list that follows from its
        seed on any device. A vocabulary is searched in two steps, first for a block of tokens, then
        inside it. Sums run in float64 where the device has it.
        """
        wide = torch.float32 if self.logprobs.device.type == "mps" else torch.float64
        mass, column = self.probabilities, torch.zeros_like(uniform, dtype=torch.long)[:, None]
        target = uniform.to(wide)[:, None]
        if mass.shape[-1] > 4 * _BLOCK:
            missing = -mass.shape[-1] % _BLOCK
            blocks = (torch.nn.functional.pad(mass, (0, missing)) if missing else mass).unflatten(
                -1, (-1, _BLOCK)
            )  # (B, V / _BLOCK, _BLOCK)
            column, target = _invert(blocks.sum(-1).to(wide), target)
            mass = blocks.gather(1, column[..., None].expand(-1, 1, _BLOCK))[:, 0]
        inside, _ = _invert(mass.to(wide), target)
        column = column * _BLOCK + inside
        logprob = self.logprobs.gather(-1, column)[:, 0]
        token = column if self.ids is None else self.ids.gather(-1, column)
        return token[:, 0], logprob

    def top(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and log-probabilities (B, k) of the likeliest tokens, best first."""
        best = self.logprobs.topk(min(k, self.logprobs.shape[-1]), dim=-1)
        ids = best.indices if self.ids is None else self.ids.gather(-1, best.indices)
        return ids, best.values


_BLOCK = 256  # tokens
_NUCLEUS = 1024  # tokens among which a top-p set is looked for before the whole vocabulary is sorted


def _invert(mass: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The column (B, 1) of ``mass`` (B, K) where ``uniform`` (B, 1) falls, and how far inside it."""
    cumulative = mass.cumsum(-1)
    total = cumulative[:, -1:]
    # below the total, whatever rounding does: the column found has mass. A NaN must stay in range
    target = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    column = torch.searchsorted(cumulative, target, right=True).clamp(max=mass.shape[-1] - 1)
    here = mass.gather(-1, column)
    return column, ((target - (cumulative.gather(-1, column) - here)) / here).clamp(min=0)


def penalised(logits: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Logits (B, V) float32, of the tokens ``seen`` (B, V) before divided by the penalty where above 0,
    and multiplied where below (Keskar et al. 2019, arXiv 1909.05858, equation 2, by sign).
    """
    logits = logits.float()
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def sampling_policy(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
) -> Policy:
    """The policy that ``logits`` (B, V) give: temperature, top-k, top-p, min-p, typical, renormalised.

    Parameters
    ----------
    logits : (B, V) of any float type; -inf is allowed, NaN and +inf surface as NaN statistics
    temperature : above 0, or 0 for greedy: the first likeliest token has probability 1
    top_k : tokens kept; 0 keeps all. Exactly k: of tokens tied at the edge the kernel picks
    top_p : keeps the smallest set of likeliest tokens whose probability reaches it; 1 keeps all
    min_p : keeps what is at least so likely, relative to the likeliest (arXiv 2407.01082); 0 keeps all
    typical_p : keeps those whose surprisal is nearest to the entropy until their probability reaches it,
        and what is as near as the last of them (arXiv 2202.00666); 1 keeps all
    """
    logits = logits.float()
    if temperature == 0:
        best = logits.max(-1, keepdim=True)
        # 0 for a finite maximum; NaN and infinities stay visible
        return Policy(best.values - best.values, best.indices)
    if temperature != 1:
        logits = logits / temperature
    ids = whole = None
    if top_k > 0 or top_p < 1 or min_p > 0 or typical_p < 1:
        whole = logits.logsumexp(-1)
    if 0 < top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k, dim=-1)
    if top_p < 1:
        total = logits.logsumexp(-1, keepdim=True)
        if ids is None:
            likely, ids = logits.topk(min(_NUCLEUS, logits.shape[-1]), dim=-1)
            if not ((likely - total).exp().sum(-1) > top_p).all():  # rare: so flat a distribution
                likely, ids = logits.sort(dim=-1, descending=True, stable=True)
            logits = likely
        probability = (logits - total).exp()
        before = probability.cumsum(-1) - probability
        logits = logits.masked_fill(before >= top_p, -torch.inf)
    if min_p > 0:
        relative = (logits - logits.amax(-1, keepdim=True)).exp()
        logits = logits.masked_fill(relative < min_p, -torch.inf)
    if typical_p < 1:
        logits = logits.masked_fill(~_typical(logits, typical_p), -torch.inf)
    if whole is None:
        return Policy(logits.log_softmax(-1), ids)
    kept = logits.logsumexp(-1)
    return Policy(logits.log_softmax(-1), ids, (kept - whole).clamp(max=0))


def _typical(logits: torch.Tensor, mass: float) -> torch.Tensor:
    """Which tokens (B, K) of ``logits`` (B, K) typical sampling keeps."""
    logprobs = logits.log_softmax(-1)
    probability = logprobs.exp()
    entropy = -(probability * logprobs.clamp(min=-1e4)).sum(-1, keepdim=True)
    far = (-logprobs - entropy).abs()  # infinite where a token was cut before
    order = far.sort(dim=-1)
    reached = probability.gather(-1, order.indices).cumsum(-1)
    last = (reached < mass).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return far <= order.values.gather(-1, last)
