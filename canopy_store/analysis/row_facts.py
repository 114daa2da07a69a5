"""What a row of a comparison must be read with: how many, how much was cut or left out, what differs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from canopy_store.analysis.bootstrap import Array
from canopy_store.analysis.pairing import Cells, Key, Side, drawn_together, without_baseline

_OF_A_RUN = ("cap", "allowed", "unrecorded")


class RowFacts:
    """The facts of any row, from the rows of ``prompt_metrics`` that it compares."""

    def __init__(
        self,
        prompts: pl.DataFrame,
        models: pl.DataFrame,
        names: Sequence[str],
        baseline: str,
        left_out: Mapping[Key, Array],
        parts_of: Mapping[str, str],
    ) -> None:
        self.names, self.left_out, self.parts_of = names, left_out, parts_of
        self.same = {
            "baseline_variant": baseline,
            "selection": prompts["selection"][0],
            "selection_rule": _column(prompts, "selection_rule")[0],
            "without_baseline": without_baseline(prompts, baseline),
        }
        self.treatments = {(m["family"], m["variant"]): m["treatment"] for m in models.to_dicts()}
        runs = {name: _column(prompts, name) for name in ("run_id", *_OF_A_RUN)}
        self.runs = {row["run_id"]: row for row in pl.DataFrame(runs).unique().to_dicts()}
        vendi = {name: _column(prompts, name) for name in ("rarefied_to", "vendi_reason")}
        keys = prompts.select("run_id", "prompt_id").rows()
        rarefied = zip(*(column.to_list() for column in vendi.values()), strict=True)
        self.vendi = {key: row for key, row in zip(keys, rarefied, strict=True) if row != (None, None)}

    def of(self, groups: Sequence[Cells], k: int, used: Array) -> dict[str, Any]:
        """The facts of the row that pools these cells in measure ``k``; a group a checkpoint.

        ``used`` (tasks,) counts the prompts in the row.
        """
        sides = [[cell[which] for group in groups for cell in group.values()] for which in (0, 1)]
        samples = [_median([self._sizes(groups, which, k)]) for which in (0, 1)]
        cut = [_share(side.cut[side.used[:, k]] for side in both) for both in sides]
        of_runs = [self.runs[side.run_id] for both in sides for side in both]
        caps = {run["cap"] for run in of_runs}
        prompts = int(used.sum())
        treatments = {self.treatments.get(key[:2]) for group in groups for key in group}
        return {
            **self.same,
            "treatment": treatments.pop() if len(treatments) == 1 else None,
            "n_prompts": prompts,
            "n_tasks": int((used > 0).sum()),
            "n_samples": min((m for m in samples if m is not None), default=None),
            "baseline_n_samples": samples[0],
            "treated_n_samples": samples[1],
            **self._left_out(groups, k, prompts),
            "baseline_cut": cut[0],
            "treated_cut": cut[1],
            "horizon": caps.pop() if len(caps) == 1 else None,
            **self._vendi(sides, k),
            "allowed": _joined((run["allowed"] for run in of_runs), "; "),
            "unrecorded": _joined((run["unrecorded"] for run in of_runs), ", "),
        }

    def rollouts(self, group: Cells, k: int) -> tuple[int, int]:
        """The rollouts of both sides that count in measure ``k``, and the prompts that they are of.

        A prompt counts once a side and family: each has a mean of its own.
        """
        sides = [side for cell in group.values() for side in cell]
        return (
            int(sum(side.n_rollouts @ side.used[:, k] for side in sides)),
            int(sum(side.used[:, k].sum() for side in sides)),
        )

    def _sizes(self, groups: Sequence[Cells], which: int, k: int) -> Array:
        """The rollouts, or units, of each prompt or cluster that counts in ``k``, on one side."""
        sizes: list[int] = []
        for group in groups:
            for tasks in drawn_together([group], self.parts_of):
                of_block: Counter[tuple[str, str]] = Counter()
                for (family, _, task), cell in group.items():
                    if task in tasks:
                        side, used = cell[which], cell[which].used[:, k]
                        for at in np.flatnonzero(used):
                            of_block[family, side.prompts[at]] += int(side.n_rollouts[at])
                sizes += of_block.values()
        return np.array(sizes)

    def _left_out(self, groups: Sequence[Cells], k: int, prompts: int) -> dict[str, Any]:
        counts, shares = [], []
        for group in groups:
            left, rollouts, every = np.sum([self.left_out[key][:, k] for key in group], 0)
            own = sum(
                len({p for key, c in group.items() if key[2] in tasks for p in _counted(c[0], k)})
                for tasks in drawn_together([group], self.parts_of)
            )
            apart = max(0, own - prompts) if len(groups) > 1 else 0  # that another checkpoint lacks
            counts.append(int(left) + apart)
            share = float(rollouts / every)
            shares.append(share + (1 - share) * apart / max(own, 1))
        return {"n_left_out": max(counts), "left_out_share": max(shares)}

    def _vendi(self, sides: Sequence[Sequence[Side]], k: int) -> dict[str, Any]:
        if self.names[k] != "vendi_score" or not self.vendi:
            return {"rarefied_to": None, "reason": None}
        of_prompts = [
            self.vendi.get((side.run_id, prompt), (None, None))
            for both in sides
            for side in both
            for prompt in side.prompts
        ]
        numbers = [np.array([m for m, _ in of_prompts if m is not None])]
        return {
            "rarefied_to": _median(numbers),
            "reason": next((reason for _, reason in of_prompts if reason), None),
        }


def _counted(side: Side, k: int) -> list[str]:
    """The prompts that count in measure ``k``."""
    return [prompt for prompt, used in zip(side.prompts, side.used[:, k], strict=True) if used]


def _column(rows: pl.DataFrame, name: str) -> pl.Series:
    """A column of the rows, NULLs where rows that were read otherwise have none of the name."""
    kind = pl.Int64 if name in ("cap", "rarefied_to") else pl.String
    return rows[name] if name in rows.columns else pl.Series(name, [None] * len(rows), dtype=kind)


def _median(parts: Iterable[Array]) -> int | None:
    values = np.concatenate(list(parts))
    return round(float(np.median(values))) if len(values) else None


def _share(parts: Iterable[Array]) -> float | None:
    values = np.concatenate(list(parts))
    return float(values.mean()) if len(values) and np.isfinite(values).all() else None


def _joined(texts: Iterable[str | None], by: str) -> str | None:
    """The different parts of texts, each once."""
    parts = dict.fromkeys(part for text in texts if text for part in text.split(by))
    return by.join(parts) or None
