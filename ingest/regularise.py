"""What holds a fine-tuned model near its parent: a penalty that is added to the loss at each step.

l2sp    λ/2 Σ (w − w₀)²           the distance of the weights from the parent's (arXiv 1802.01483)
ewc     λ/2 Σ F (w − w₀)²         the same, weighed by how much the parent's text needs each weight:
                                  F the mean squared gradient of its log-likelihood, a text at a time
                                  (arXiv 1612.00796)
kl      λ mean KL(p₀ ‖ p)         the distance of the distributions, over the tokens of a reference
                                  text, or of the batch that is trained on
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

REGULARISERS = ("l2sp", "ewc", "kl")
_FISHER_TEXTS = 128  # that F is estimated from, at most

Batch = Mapping[str, torch.Tensor]
Penalty = Callable[[Any, Batch], torch.Tensor]


def penalty_of(
    kind: str, model: Any, strength: float, reference: Iterator[Batch] | None, n_reference: int
) -> Penalty:
    """The penalty, a function of the model and of the batch that is trained on: a scalar, in nats.

    Parameters
    ----------
    kind : one of REGULARISERS
    model : the parent, before its first step
    strength : λ
    reference : batches of reference text without end: of one text each for ewc, which needs it
    n_reference : texts that there are
    """
    if kind == "kl":
        return _kl(copy.deepcopy(model).eval().requires_grad_(False), strength, reference)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    weigh = None
    if kind == "ewc":
        assert reference is not None  # checked by the caller
        weigh = fisher(model, reference, min(n_reference, _FISHER_TEXTS))

    def distance(model: Any, batch: Batch) -> torch.Tensor:
        parts = []
        for name, p in model.named_parameters():
            if name in start:
                squares = (p - start[name]).square()
                parts.append((squares if weigh is None else weigh[name] * squares).sum())
        return strength / 2 * torch.stack(parts).sum()

    return distance


def fisher(model: Any, texts: Iterator[Batch], number: int) -> dict[str, torch.Tensor]:
    """The diagonal of the empirical Fisher information of the weights, by name: mean over texts of the
    squared gradient of a text's log-likelihood."""
    summed = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    was = model.training
    model.eval()
    for _ in range(number):
        batch = next(texts)
        learnt = (batch["labels"][:, 1:] >= 0).sum()
        model.zero_grad()
        (model(**batch).loss * learnt).backward()
        for name, p in model.named_parameters():
            if name in summed and p.grad is not None:
                summed[name] += p.grad.square() / number
    model.zero_grad()
    model.train(was)
    return summed


def _kl(parent: Any, strength: float, reference: Iterator[Batch] | None) -> Penalty:
    def divergence(model: Any, batch: Batch) -> torch.Tensor:
        read = dict(batch if reference is None else next(reference))
        learnt = read.pop("labels")[:, 1:] >= 0  # (B, T - 1)
        with torch.no_grad():
            before = parent(**read).logits[:, :-1][learnt].float().log_softmax(-1)
        after = model(**read).logits[:, :-1][learnt].float().log_softmax(-1)
        return strength * (before.exp() * (before - after)).sum(-1).mean()

    return divergence
