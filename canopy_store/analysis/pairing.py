"""Cells of a comparison: the prompts that two variants share, and their pooled values by bootstrap."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from canopy_store.analysis import bootstrap
from canopy_store.analysis.bootstrap import SUMS, Array, Rollouts
from canopy_store.errors import DataError

LEVELS = ("task", "family", "all")
POOLED = "(all)"
Key = tuple[str, str, str]  # family, variant, task
Draw = Callable[[int, Any], tuple[Array, Array]]


@dataclass(frozen=True)
class Side:
    """One variant's prompts of a cell, in order, and their summands (SUMS, P, K): w f(x), then w.

    ``n_rollouts`` (P,) counts each prompt's, ``cut`` (P,) is the share of them cut, NaN where unknown.
    """

    run_id: str
    prompts: list[str]
    n_rollouts: Array
    cut: Array
    sums: Array

    @property
    def used(self) -> Array:
        """(P, K) whether a prompt counts in a measure."""
        return self.sums[1] > 0


Cells = dict[Key, tuple[Side, ...]]  # the baseline's side and the treated one, or one side alone


def no_baseline(rows: pl.DataFrame, baseline: str) -> str | None:
    """What is said where no row is of the baseline."""
    variants = sorted(rows["variant"].unique())
    if baseline in variants:
        return None
    return f"--baseline {baseline}: no such variant here; there is {', '.join(variants)}"


def unpaired(rows: pl.DataFrame, baseline: str) -> str | None:
    """Why no row of prompt_metrics can be compared with the baseline; None where some can."""
    if reason := no_baseline(rows, baseline):
        return reason
    if rows["variant"].n_unique() == 1:
        return f"{baseline} is the only variant: there is nothing to compare it with"
    is_baseline = pl.col("variant") == baseline
    same = ["family", "task", "prompt_id"]
    if rows.filter(~is_baseline).join(rows.filter(is_baseline), on=same, how="semi").is_empty():
        return (
            f"no prompt is in both {baseline} and another variant of its family: comparisons are "
            "paired by task and prompt_id, so sample both from the same prompts"
        )
    return None


def without_baseline(rows: pl.DataFrame, baseline: str) -> str | None:
    """The variants whose family and task has no baseline, so that no row compares them; or None."""
    keys = rows.select("family", "task", "variant").unique().sort("family", "task", "variant")
    based = keys.filter(variant=baseline).select("family", "task")
    left = keys.join(based, on=["family", "task"], how="anti")
    return ", ".join(f"{v} of {f} on {t}" for f, t, v in left.iter_rows()) or None


class _Prompts:
    """Rows of prompt_metrics by family, variant, task and prompt; their summands (SUMS, rows, K)."""

    def __init__(self, rows: pl.DataFrame, names: Sequence[str]) -> None:
        # prompts numbered by an importer keep the order of their numbers
        rows = rows.sort(pl.col("prompt_id").str.len_chars(), "prompt_id")
        self.sums = bootstrap.weighted_values(bootstrap.columns_of(rows), names)
        self.n_rollouts = rows["n_rollouts"].to_numpy()
        self.cut = rows["truncation_rate"].cast(pl.Float64).fill_null(np.nan).to_numpy()
        self.run_ids = rows["run_id"].to_list()
        self.parts: dict[Key, dict[str, int]] = {}
        keys = rows.select("family", "variant", "task", "prompt_id")
        for at, (family, variant, task, prompt) in enumerate(keys.iter_rows()):
            self.parts.setdefault((family, variant, task), {})[prompt] = at

    def sides(self, keys: Sequence[Key], prompts: list[str]) -> tuple[Side, ...]:
        """These prompts of each key; a value that one of them lacks counts in none."""
        places = [[self.parts[key][prompt] for prompt in prompts] for key in keys]
        known = np.logical_and.reduce([self.sums[1, at] > 0 for at in places])  # (P, K)
        return tuple(
            Side(
                self.run_ids[at[0]],
                prompts,
                self.n_rollouts[at],
                self.cut[at],
                self.sums[:, at] * known,
            )
            for at in places
        )

    def count(self, key: Key) -> int:
        """The rollouts of a key."""
        return int(self.n_rollouts[list(self.parts[key].values())].sum())


def paired_cells(
    rows: pl.DataFrame, baseline: str, names: Sequence[str], order: Sequence[str] = ()
) -> tuple[Cells, dict[Key, Array]]:
    """Per (family, variant, task): the prompts both variants have, and what is left out (3, K).

    Left out are prompts, and of all the rollouts of both (the third row) those of the second. Variants
    come in ``order``, and otherwise by name.

    Raises
    ------
    DataError
        No such baseline, no other variant, no prompt in common.
    """
    reason = unpaired(rows, baseline)
    if reason is not None:
        raise DataError(reason)
    prompts = _Prompts(rows, names)
    cells: Cells = {}
    left_out = {}
    place = {variant: at for at, variant in enumerate(order)}
    for family, variant, task in sorted(
        prompts.parts, key=lambda key: (key[0], place.get(key[1], 0), key)
    ):
        base = prompts.parts.get((family, baseline, task))
        if variant == baseline or base is None:
            continue
        treated = prompts.parts[family, variant, task]
        common = [prompt for prompt in base if prompt in treated]
        if common:
            pair = prompts.sides([(family, baseline, task), (family, variant, task)], common)
            apart = len(base) + len(treated) - 2 * len(common)
            unused = ~pair[0].used
            every = sum(prompts.count((family, which, task)) for which in (baseline, variant))
            kept = sum(side.n_rollouts @ side.used for side in pair)
            left_out[family, variant, task] = np.array(
                [apart + unused.sum(0), every - kept, np.full(len(names), every)]
            )
            cells[family, variant, task] = pair
    return cells, left_out


def single_cells(rows: pl.DataFrame, names: Sequence[str]) -> Cells:
    """Per (family, variant, task): one side, all its prompts."""
    prompts = _Prompts(rows, names)
    return {key: prompts.sides([key], list(prompts.parts[key])) for key in sorted(prompts.parts)}


def grouped(cells: Cells, level: str) -> dict[Key, Cells]:
    """The cells that each row of a level pools."""
    groups: dict[Key, Cells] = {}
    for (family, variant, task), cell in cells.items():
        where = {
            "task": (family, variant, task),
            "family": (family, variant, POOLED),
            "all": (POOLED, variant, POOLED),
        }[level]
        groups.setdefault(where, {})[family, variant, task] = cell
    return groups


def variant_order(models: pl.DataFrame, rows: pl.DataFrame, baseline: str) -> list[str]:
    """The variants of rows: the baseline, then by generation, step of training, and name.

    The step is that of a model's row, else ``step`` or ``steps`` of its hyperparameters; numbers in
    names count as numbers.
    """
    steps: dict[str, tuple[int, float]] = {}
    for model in models.to_dicts():
        said = json.loads(model["hyperparameters"] or "{}")
        step = model.get("step")
        if step is None:
            step = next((said[key] for key in ("step", "steps") if key in said), 0)
        place = (model["generation"], float(step) if isinstance(step, int | float) else 0.0)
        steps[model["variant"]] = min(place, steps.get(model["variant"], place))

    def key(variant: str) -> Any:
        return variant != baseline, steps.get(variant, (0, 0.0)), _natural(variant)

    return sorted(rows["variant"].unique(), key=key)


def _natural(name: str) -> list[tuple[bool, str, int]]:
    """What sorts names by letters, and the numbers in them as numbers."""
    parts = re.split(r"(\d+)", name)  # texts and numbers in turn
    return [(True, "", int(x)) if i % 2 else (False, x, 0) for i, x in enumerate(parts) if x]


def without_repeats(frame: pl.DataFrame) -> pl.DataFrame:
    """Leaves out a pooled row that pools one cell only: it would be counted twice among the tests."""
    keys = [name for name in ("variant", "checkpoint", "metric") if name in frame.columns]
    families = frame.filter(level="task").group_by(*keys, "family").len()
    single = families.filter(pl.col("len") == 1).select(*keys, "family", level=pl.lit("family"))
    frame = frame.join(single, on=[*keys, "family", "level"], how="anti", maintain_order="left")
    alone = families.group_by(keys).len().filter(pl.col("len") == 1).select(*keys, level=pl.lit("all"))
    return frame.join(alone, on=[*keys, "level"], how="anti", maintain_order="left")


def widest(frame: pl.DataFrame) -> pl.DataFrame:
    """Each variant's and metric's row that pools the most: all families, else all tasks, else one."""
    rank = pl.col("level").replace_strict(LEVELS, range(len(LEVELS)), return_dtype=pl.Int64)
    frame = frame.filter(pl.col("level").is_in(LEVELS))  # not those of single seeds or prompts
    by_width = frame.sort(rank, descending=True, maintain_order=True)
    return by_width.unique(["variant", "metric"], keep="first", maintain_order=True)


def drawn_together(groups: Sequence[Cells], parts_of: Mapping[str, str]) -> list[list[str]]:
    """The tasks of cells in order, each by itself but for parts of one task that share clusters.

    What is drawn is a cluster with all that is of it: items on one fact stand or fall together in every
    part that asks for the fact.

    Parameters
    ----------
    groups : the cells; several for the checkpoints of one variant
    parts_of : the task that a part is of, by the part's name; other tasks have no parts
    """
    prompts: dict[str, set[str]] = {}
    for group in groups:
        for (_, _, task), cell in group.items():
            prompts.setdefault(task, set()).update(cell[0].prompts)
    together: list[tuple[list[str], set[str]]] = []
    for task, own in prompts.items():
        joined, apart = ([task], own), []
        for tasks, others in together:
            if parts_of.get(task) == parts_of.get(tasks[0]) is not None and own & others:
                joined = ([*tasks, *joined[0]], others | joined[1])
            else:
                apart.append((tasks, others))
        together = [*apart, joined]
    place = {task: at for at, task in enumerate(prompts)}
    return sorted(
        (sorted(tasks, key=place.__getitem__) for tasks, _ in together), key=lambda t: place[t[0]]
    )


def drawing(replicates: int, resample: str = "prompts") -> Draw:
    """The draws (B, P) of a number of prompts under a key, and their counts (B, P); drawn once a key."""

    @functools.cache
    def draw(prompts: int, key: Any) -> tuple[Array, Array]:
        drawn = np.tile(np.arange(prompts), (replicates, 1))
        if resample != "rollouts":
            drawn = bootstrap.draw_prompts(prompts, replicates, key)
        return drawn, bootstrap.counts_of(drawn)

    return draw


def evaluate(
    group: Cells,
    names: Sequence[str],
    draw: Draw,
    replicates: int,
    seed: int,
    kernels: Mapping[tuple[str, str], Rollouts],
    parts_of: Mapping[str, str] | None = None,
) -> tuple[Array, Array, Array]:
    """Values (S, K) of each side, replicates (S, B, K), and prompts used (tasks, K).

    Parts of a task that are `drawn_together`, by ``parts_of``, count as one task here.
    Each metric is summed by itself, so that its last bits do not depend on which others there are.
    """
    width, sides = len(names), len(next(iter(group.values())))
    point = np.zeros((SUMS, sides, width))
    drawn_point = np.zeros((SUMS, sides, replicates, width))
    used = []
    tasks = drawn_together([group], parts_of or {})
    for number, together in enumerate(tasks):
        cells = [cell for key, cell in group.items() if key[2] in together]
        prompts = list(dict.fromkeys(p for first, *_ in cells for p in first.prompts))
        place = {p: i for i, p in enumerate(prompts)}
        # tasks are drawn independently; one task alone is drawn from the seed itself
        drawn, counts = draw(len(prompts), seed if len(tasks) == 1 else (seed, number))
        sums = np.zeros((SUMS, sides, width, len(prompts)))
        for family, cell in enumerate(cells):
            for which, side in enumerate(cell):
                at = [place[p] for p in side.prompts]
                own = sums[:, which]
                own[..., at] += side.sums.swapaxes(1, 2)
                if kernels:
                    of_prompts = [kernels.get((side.run_id, p)) for p in prompts]
                    known = np.zeros((len(prompts), width))
                    known[at] = side.sums[1] > 0
                    # families share the prompts drawn, not the rollouts
                    key = [seed, number, which, *([family] if family else [])]
                    slots = _second_level(of_prompts, drawn, names, key)
                    for k in range(width):
                        drawn_point[:, which, :, k] += (slots[..., k] * known[drawn, k]).sum(-1)
        point += sums.sum(-1)
        used.append((sums[1] > 0).any(0).sum(-1))
        if not kernels:
            for part, which, k in np.ndindex(SUMS, sides, width):
                if sums[part, which, k].any():
                    drawn_point[part, which, :, k] += counts @ sums[part, which, k]
    return (
        bootstrap.pooled(point, names),
        bootstrap.pooled(drawn_point, names),
        np.array(used),
    )


def _second_level(
    of_prompts: list[Rollouts | None], drawn: Array, names: Sequence[str], seed: list[int]
) -> Array:
    """The summands (SUMS, B, P, K) of every drawn slot, its rollouts drawn anew."""
    present = [rollouts for rollouts in of_prompts if rollouts is not None]
    here = np.array([rollouts is not None for rollouts in of_prompts])
    place = np.cumsum(here) - 1
    slots = np.where(here[drawn], place[drawn], -1)
    columns = bootstrap.redraw_slots(present, slots, np.random.default_rng(seed))
    return bootstrap.weighted_values(columns, names)
