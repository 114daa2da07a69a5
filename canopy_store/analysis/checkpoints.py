"""A change over several checkpoints of one variant: training seeds are a source of error of their own.

The change of checkpoint s at prompt p is an entry of a table (S, P), both of them drawn, with one entry
a cell. The variance of its mean has a part of each, by the mean squares of the two-way analysis of
variance: Var = (MS_seed + MS_prompt - MS_residual) / (S P), degrees of freedom by Satterthwaite, and
never below the larger of the two parts. Where a measure is no plain mean over prompts, the entries are
the jackknife's pseudo-values, which linearise it. Tasks are fixed: prompts vary within them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from canopy_store.analysis import bootstrap
from canopy_store.analysis.bootstrap import Array
from canopy_store.analysis.intervals import (
    PLAIN,
    RATIO,
    Scale,
    Units,
    is_correlation,
    percent_change,
    scale_of,
    t_interval,
    tests,
    z_interval,
)
from canopy_store.analysis.pairing import Cells, drawn_together

_LOG = Scale(np.log, np.exp)


def two_way(table: Array, task_of: Array) -> tuple[float, float]:
    """Standard error of the mean of a table (S, P), and its degrees of freedom; ``task_of`` is (P,).

    NaN and 0 where a task has a single prompt each, or there is a single checkpoint.
    """
    checkpoints, prompts = table.shape
    tasks = np.unique(task_of)
    free = prompts - len(tasks)
    if checkpoints < 2 or free < 1:
        return np.nan, 0.0
    of_prompts, residual = 0.0, 0.0
    for task in tasks:
        own = table[:, task_of == task]
        by_prompt, by_seed = own.mean(0), own.mean(1)
        of_prompts += checkpoints * ((by_prompt - own.mean()) ** 2).sum()
        residual += ((own - by_prompt - by_seed[:, None] + own.mean()) ** 2).sum()
    squares = np.array(
        [
            prompts * table.mean(1).var(ddof=1),
            of_prompts / free,
            residual / (free * (checkpoints - 1)),
        ]
    )
    freedom = np.array([checkpoints - 1, free, free * (checkpoints - 1)])
    total = squares @ [1, 1, -1]
    larger = int(squares[:2].argmax())
    if total <= squares[larger]:
        return float(np.sqrt(squares[larger] / table.size)), float(freedom[larger])
    return float(np.sqrt(total / table.size)), float(total**2 / (squares**2 / freedom).sum())


def over_checkpoints(
    groups: Sequence[Cells],
    names: Sequence[str],
    confidence: float,
    margins: dict[str, Any],
    parts_of: Mapping[str, str] | None = None,
) -> tuple[list[dict[str, Any]], Array]:
    """The columns of `summary` for each measure, over all checkpoints; and the prompts used (tasks, K).

    Parameters
    ----------
    groups : per checkpoint the cells that its row pools
    parts_of : as of `drawn_together`, whose parts count as one task here
    """
    sums, task_of = _tables(
        groups, len(names), drawn_together(groups, parts_of or {})
    )  # (S, 2, X, P, K)
    used = sums[0, 0, 1] > 0
    total = sums.sum(3, keepdims=True)
    whole, less = (bootstrap.pooled(np.moveaxis(x, 2, 0), names) for x in (total, total - sums))
    rows = []
    for k, name in enumerate(names):
        at = used[:, k]
        parts = _Parts(whole[..., 0, k], less[:, :, at, k], task_of[at], confidence)
        rows.append(_summary(name, parts, margins.get(name)))
    counts = np.array([used[task_of == task].sum(0) for task in np.unique(task_of)])
    return rows, counts


class _Parts:
    """Values (S, 2) of a measure's two sides, and those that leave one prompt out (S, 2, P)."""

    def __init__(self, whole: Array, less: Array, task_of: Array, confidence: float) -> None:
        self.whole, self.less, self.task_of, self.confidence = whole, less, task_of, confidence

    def error(self, scale: Scale, weights: Sequence[float]) -> tuple[float, Units]:
        """se of the sides' values on a scale, by these weights; and its degrees of freedom."""
        prompts = len(self.task_of)
        with np.errstate(invalid="ignore", divide="ignore"):
            pseudo = prompts * scale.to(self.whole)[..., None] - (prompts - 1) * scale.to(self.less)
        se, freedom = two_way(np.tensordot(weights, pseudo, (0, 1)), self.task_of)
        return se, Units(freedom, freedom, self.confidence)

    def mean(self, scale: Scale) -> Array:
        """(2,) the sides' values, each the mean over checkpoints on the measure's own scale."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(scale.back(scale.to(self.whole).mean(0)))


def _summary(name: str, parts: _Parts, margin: float | str | None) -> dict[str, Any]:
    own = scale_of(name)
    values = parts.mean(own)
    row: dict[str, Any] = {}
    for part, value, weights in zip(("baseline", "treated"), values, ((1, 0), (0, 1)), strict=True):
        scaled, units = parts.error(own, weights)
        row |= t_interval(part, value, parts.error(PLAIN, weights)[0], scaled, units, own)
    change = (-1, 1)
    se, units = parts.error(PLAIN, change)
    row |= t_interval("delta", values[1] - values[0], se, se, units)
    if is_correlation(name):
        se, units = parts.error(own, change)
        row |= z_interval(values, se, units)
    percent = float(percent_change(name, *values))
    scaled, of_ratio = parts.error(_LOG, change)
    percent_se = scaled * abs(100 + percent)  # d (100 e^x) is 100 e^x dx
    row |= t_interval("percent_delta", percent, percent_se, scaled, of_ratio, RATIO)
    return row | tests(name, values, se if np.isfinite(se) else None, units, margin)


def _tables(groups: Sequence[Cells], width: int, tasks: Sequence[Sequence[str]]) -> tuple[Array, Array]:
    """The sums (S, 2, X, P, K) of the prompts that every checkpoint has, and their tasks (P,)."""
    blocks, task_of = [], []
    for number, together in enumerate(tasks):
        of_task = [[cell for key, cell in group.items() if key[2] in together] for group in groups]
        # of a task that a checkpoint lacks there is no prompt that all have
        shared = [{p for first, *_ in cells for p in first.prompts} for cells in of_task]
        prompts = sorted(set.intersection(*shared))
        place = {prompt: at for at, prompt in enumerate(prompts)}
        sums = np.zeros((len(groups), 2, bootstrap.SUMS, len(prompts), width))
        for s, cells in enumerate(of_task):
            for cell in cells:
                kept = [i for i, prompt in enumerate(cell[0].prompts) if prompt in place]
                at = [place[cell[0].prompts[i]] for i in kept]
                for which, side in enumerate(cell):
                    sums[s, which][:, at] += side.sums[:, kept]
        blocks.append(sums * (sums[:, 0, 1] > 0).all(0))  # a value that one lacks counts in none
        task_of.append(np.full(len(prompts), number))
    return np.concatenate(blocks, 3), np.concatenate(task_of)
