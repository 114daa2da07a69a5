"""Sampling in rounds, until a metric's standard error is as small as asked for.

    pilot → (the pilot made larger, while it tells too little) → one round that is counted → commit

The rollouts of the pilot say how many each prompt needs, and only the round after it is counted (the
selection ``after_pilot``). How many those are depends on the pilot alone, so that given the pilot each
prompt's mean over them is that of a fixed number of fresh rollouts: no stopping biases it. A mean over
rollouts that also decided when to stop is too low wherever a sample of small spread has a small mean.

Every round follows from what is stored, so a run that was stopped goes on to the same rollouts. Rounds
are shards of their own, part-00000.round.parquet; the commit makes of them shards of whole prompts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from canopy_store import store
from canopy_store.errors import UsageError

Array = np.ndarray

# What is measured of a rollout: from its sum of entropies (nats) and its tokens.
METRICS = {
    "ce_star": lambda entropy, tokens: entropy,
    "entropy_rate": lambda entropy, tokens: entropy / tokens,
    "mean_length": lambda entropy, tokens: tokens,
}
SELECTION = "after_pilot"
FEWEST_PILOT = 8  # rollouts of a prompt, for a spread that is worth a plan
_FEWEST_COUNTED = 4  # of a prompt: a correlation loses three
_SURE = 0.9  # the chance that the rollouts counted show the standard error asked for
_NEAR = 1.35  # once the plan allows for so many times the pilot's variance, the pilot is large enough
_SHARE = 4  # a pilot of a quarter of what it asks for is large enough too
_WORTH = 0.2  # of the pilot: what a round that enlarges it must add to be worth its while


@dataclass(frozen=True)
class Target:
    """The standard error of a metric's mean over the prompts that there are.

    Parameters
    ----------
    metric : of METRICS
    se : in its unit
    pilot : rollouts of each prompt in the first round
    most : of a prompt in all
    """

    metric: str
    se: float
    pilot: int
    most: int

    def __post_init__(self) -> None:
        if self.pilot < FEWEST_PILOT:
            raise UsageError(
                f"--samples {self.pilot}: the pilot of --until-se needs at least {FEWEST_PILOT}"
            )
        if self.most < 2 * self.pilot:
            raise UsageError(f"--max-samples {self.most}: needs at least twice --samples")


def read_target(text: str, pilot: int, most: int | None) -> Target:
    """The target that METRIC=SE names; ``most`` is 16 times the pilot where it is None."""
    metric, _, size = text.partition("=")
    if metric not in METRICS:
        raise UsageError(f"--until-se {text}: needs METRIC=SE, METRIC one of {', '.join(METRICS)}")
    try:
        se = float(size)
    except ValueError:
        se = math.nan
    if not 0 < se < math.inf:
        raise UsageError(f"--until-se {text}: needs a standard error above 0, as in {metric}=0.5")
    return Target(metric, se, pilot, 16 * pilot if most is None else most)


@dataclass(frozen=True)
class Drawn:
    """What is stored of a prompt: the metric and the tokens (M,) of samples 0 to M - 1."""

    values: Array
    tokens: Array

    def first(self, samples: int) -> Drawn:
        return Drawn(self.values[:samples], self.tokens[:samples])


@dataclass(frozen=True)
class Round:
    """The samples of each prompt, in the order of the prompts, that a round draws."""

    samples: list[range]
    counted: bool = False

    @property
    def rollouts(self) -> int:
        return sum(map(len, self.samples))


def rounds(drawn: Sequence[Drawn], target: Target) -> list[Round]:
    """The rounds that follow from what is stored; the last is not yet stored, or is the one counted."""
    begun = np.zeros(len(drawn), int)
    pilot = np.full(len(drawn), target.pilot)
    plan = []
    while True:
        plan.append(_round(begun, pilot))
        if any(len(each.values) < m for each, m in zip(drawn, pilot, strict=True)):
            return plan
        known = [each.first(m) for each, m in zip(drawn, pilot, strict=True)]
        wanted, factor = sizes(known, target)
        larger = np.clip(-(-wanted // _SHARE), pilot, 2 * pilot)
        if factor <= _NEAR or (larger - pilot).sum() < _WORTH * pilot.sum():
            return [*plan, _round(pilot, pilot + wanted, counted=True)]
        begun, pilot = pilot, larger


def _round(start: Array, stop: Array, counted: bool = False) -> Round:
    return Round([range(a, b) for a, b in zip(start.tolist(), stop.tolist(), strict=True)], counted)


def sizes(pilot: Sequence[Drawn], target: Target) -> tuple[Array, float]:
    """How many rollouts (P,) each prompt is to have after its pilot, and how unsure that is.

    So many that they show the standard error asked for with a chance of 90%, in proportion to
    sd / √tokens: then they cost the fewest tokens (Neyman, 1934). The second is by how much their
    variance may exceed the pilot's: the quantile of F, with the degrees of freedom that the kurtosis
    of the pilot's rollouts leaves (Satterthwaite, 1946).
    """
    from scipy import stats

    m = np.array([len(each.values) for each in pilot])
    most = np.maximum(target.most - m, _FEWEST_COUNTED)
    own = np.array([each.values.var(ddof=1) for each in pilot])
    mean = own.mean()
    if mean == 0:
        return np.minimum(_FEWEST_COUNTED, most), 1.0
    unsure = (_kurtosis(pilot, mean) - (m - 3) / (m - 1)) / m  # Var(s²) / σ⁴
    # a prompt whose rollouts happen to be alike must not get too few of them: as far as the variances
    # differ by no more than chance, they are taken for the same (empirical Bayes)
    noise = unsure * mean**2
    apart = max(0.0, own.var(ddof=1) - noise.mean()) if len(pilot) > 1 else math.inf
    variance = own + (mean - own) * noise / (noise + apart)
    share = np.sqrt(variance / np.array([each.tokens.mean() for each in pilot]))
    weight = variance / share  # what each prompt's variance adds to that of the mean
    freedom = 2 / (unsure @ (weight / weight.sum()) ** 2)
    factor = float(stats.f.ppf(_SURE, freedom, freedom))
    wanted = (len(pilot) * target.se) ** 2 / factor

    def counts(scale: float) -> Array:
        return np.clip(np.ceil(scale * share), _FEWEST_COUNTED, most).astype(int)

    low, high = 0.0, float((most / share).max())
    for _ in range(60):  # the smallest scale that is enough
        middle = (low + high) / 2
        enough = (variance / counts(middle)).sum() <= wanted
        low, high = (low, middle) if enough else (middle, high)
    return counts(high), factor


def _kurtosis(pilot: Sequence[Drawn], variance: float) -> float:
    """Of rollouts about their prompt's mean, with one variance for all; at least the normal's 3.

    Scaled by its own few rollouts each prompt would seem to have lighter tails than it has.
    """
    apart = np.concatenate([each.values - each.values.mean() for each in pilot])
    return max(3.0, float(np.mean(apart**4)) / variance**2)


# ---------------------------------------------------------------- what is stored


def round_path(where: Path, number: int) -> Path:
    """The shard of this number of a run in rounds."""
    return where / f"part-{number:05d}.round.parquet"


def stored_rounds(where: Path) -> list[Path]:
    """The shards of rounds in a run's folder of rollouts."""
    return store.matching(where, "part-*.round.parquet")


def drawn_of(files: Sequence[Path], prompt_ids: Sequence[str], metric: str) -> list[Drawn]:
    """What these files have of each prompt, as far as no sample before is missing."""
    columns = ["prompt_id", "sample", "entropy_sum", "n_tokens"]
    place = {prompt_id: at for at, prompt_id in enumerate(prompt_ids)}
    of: list[dict[int, tuple[float, float]]] = [{} for _ in prompt_ids]
    for file in files:
        for prompt_id, sample, entropy, tokens in zip(
            *(store.read_rows(file, columns)[name].to_pylist() for name in columns), strict=True
        ):
            of[place[prompt_id]][sample] = METRICS[metric](entropy, tokens), tokens
    drawn = []
    for by_sample in of:
        length = next((m for m in range(len(by_sample)) if m not in by_sample), len(by_sample))
        both = np.array([by_sample[m] for m in range(length)], float).reshape(-1, 2)
        drawn.append(Drawn(both[:, 0], both[:, 1]))
    return drawn


Piece = tuple[int, range]  # a prompt's place, and samples of it


def shards_of(each: Round, at_once: int, prompts: int) -> list[list[Piece]]:
    """The pieces of each shard of a round: so many prompts a shard, and so many samples of each."""
    pieces = [
        (place, samples[at : at + at_once])
        for place, samples in enumerate(each.samples)
        for at in range(0, len(samples), at_once)
    ]
    return [pieces[at : at + prompts] for at in range(0, len(pieces), prompts)]


def write_whole(
    where: Path, prompt_ids: Sequence[str], shards: list[list[Piece]], size: int
) -> list[Path]:
    """The run's shards, written from those of rounds: ``size`` prompts each, with all their rollouts."""
    written = []
    for number, at in enumerate(range(0, len(prompt_ids), size)):
        mine = range(at, min(at + size, len(prompt_ids)))
        parts = []
        for source, pieces in enumerate(shards):
            if any(place in mine for place, _ in pieces):
                rows = store.read_rows(round_path(where, source))
                wanted = pa.array([prompt_ids[place] for place in mine])
                parts.append(rows.filter(pc.is_in(rows["prompt_id"], wanted)))
        rows = store.join_rows(parts, "rollouts")
        order = {prompt_ids[place]: place for place in mine}
        places = pa.array([order[prompt_id] for prompt_id in rows["prompt_id"].to_pylist()])
        keys = pa.table({"place": places, "sample": rows["sample"]})
        rows = rows.take(pc.sort_indices(keys, [("place", "ascending"), ("sample", "ascending")]))
        written.append(store.shard_path(where, number))
        store.write_table(written[-1], "rollouts", rows.combine_chunks())
    return written


def keep_counted(root: Path, run_id: str, target: Target) -> None:
    """Commits the selection of the rollouts that are counted, of a run that is committed."""
    keys = {"selection": SELECTION, "run": run_id}
    if store.record(root, "selections", **keys) is not None:
        return
    files, ids = _files_and_prompts(root, run_id)
    counted = rounds(drawn_of(files, ids, target.metric), target)[-1].samples
    rule = {"rule": SELECTION}
    store.plan(root, "selection", SELECTION, rule)
    chosen = [(ids[place], sample) for place, samples in enumerate(counted) for sample in samples]
    prompts, samples = zip(*sorted(chosen), strict=True)
    path = store.shard_path(store.folder(root, "selections", **keys), 0)
    columns = {"run_id": [run_id] * len(chosen), "prompt_id": prompts, "sample": samples}
    store.write_rows(path, "selections", columns)
    store.commit(root, "selections", keys, [path], rule)


def _files_and_prompts(root: Path, run_id: str) -> tuple[list[Path], list[str]]:
    """A committed run's files, and its prompts in their order."""
    record = store.record(root, "rollouts", run=run_id)
    files = [root / name for name in (record.of("rollouts") if record else ())]
    ids = [i for file in files for i in store.read_rows(file, ["prompt_id"])["prompt_id"].to_pylist()]
    return files, list(dict.fromkeys(ids))


@dataclass(frozen=True)
class Estimate:
    """A metric's mean over the run's prompts, its standard error with these prompts, and rollouts."""

    value: float
    se: float
    rollouts: int


@dataclass(frozen=True)
class Result:
    """What sampling until a standard error has given.

    Parameters
    ----------
    target : what was asked for
    counted : from the rollouts after the pilot, which no stopping biases
    every : from all rollouts, those too that decided how many there are
    capped : whether a prompt has the most rollouts that were allowed
    """

    target: Target
    counted: Estimate
    every: Estimate
    capped: bool


def result(root: str | Path, run_id: str) -> Result | None:
    """What a run sampled so has given; None of one that is not complete, or was not sampled so."""
    root = store.require(root)
    settings = store.read_plan(store.plan_path(root, "run", run_id))["settings"]
    target = stored_target(settings)
    if target is None or not store.is_complete(root, run_id):
        return None
    files, ids = _files_and_prompts(root, run_id)
    drawn = drawn_of(files, ids, target.metric)
    counted = rounds(drawn, target)[-1].samples
    after = [each.values[r.start : r.stop] for each, r in zip(drawn, counted, strict=True)]
    capped = any(each.stop == target.most for each in counted)
    return Result(target, _estimate(after), _estimate([each.values for each in drawn]), capped)


def in_words(of: Result) -> list[str]:
    """The estimates, a line each."""
    target, counted, every = of.target, of.counted, of.every
    why = "--max-samples stopped it" if of.capped else "they vary more than the pilot's did"
    return [
        f"{target.metric} {counted.value:.6g}, standard error {counted.se:.3g} where {target.se:g} was "
        f"asked for: {counted.rollouts} rollouts, selection {SELECTION}"
        + (f"; {why}" if counted.se > target.se else ""),
        f"{target.metric} {every.value:.6g}, standard error {every.se:.3g}: all {every.rollouts}, with "
        "the pilot that decided how many, which biases it",
    ]


def _estimate(of: Sequence[Array]) -> Estimate:
    """From the values of each prompt's rollouts."""
    variance = sum(values.var(ddof=1) / len(values) for values in of)
    means = [values.mean() for values in of]
    return Estimate(float(np.mean(means)), math.sqrt(variance) / len(of), sum(map(len, of)))


def stored_target(settings: dict[str, Any]) -> Target | None:
    """The target that a run's settings name; None where it was sampled to a fixed number."""
    said = settings.get("until_se")
    return said and Target(said["metric"], said["se"], settings["n_samples"], said["max_samples"])
