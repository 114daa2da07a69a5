"""The ingest of clusters: the judged rollouts of a prompt by what they mean, from stored verdicts."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from canopy_store import store
from canopy_store.errors import DataError, UsageError
from canopy_store.ingest.jobs import Columns, Job, Unit, rollout_groups, run_job
from canopy_store.ingest.progress import Progress

METHODS = ("components", "strict", "loose")
# How far a verdict says that the second follows from the first, as entailment models number it.
CONTRADICTION, NEUTRAL, ENTAILMENT = 0, 1, 2
_IMPLIES = {
    "similar": ENTAILMENT,
    "different": CONTRADICTION,
    "entailment": ENTAILMENT,
    "neutral": NEUTRAL,
    "contradiction": CONTRADICTION,
}

Array = np.ndarray


# ---------------------------------------------------------------- samples, likeness, clusters


def subsample(n: int, most: int, seed: int) -> list[int]:
    """The places, in order, of the rollouts that are judged: ``most`` of n by a seeded permutation.

    All n where there are no more. The permutation is that of torch.randperm under torch.manual_seed,
    as the code of arXiv 2605.30844 draws it: Fisher and Yates over numbers of the Mersenne Twister.
    """
    if n <= most:
        return list(range(n))
    numbers = np.random.RandomState(seed % 2**32).randint(0, 2**32, n, dtype=np.uint32)
    order = np.arange(n)
    for at in range(n - 1):
        other = at + int(numbers[at]) % (n - at)
        order[at], order[other] = order[other], order[at]
    return sorted(int(place) for place in order[:most])


def alike(implication: Array, method: str) -> Array:
    """(m, m) whether two rollouts mean the same, by the verdicts of both directions.

    components, strict : each follows from the other
    loose : neither contradicts the other, and they are not both neutral

    Parameters
    ----------
    implication : (m, m), in row i and column j what follows for j from i: 0 contradiction, 1 neutral,
        2 entailment
    """
    other = implication.T
    if method == "loose":
        against = (implication == CONTRADICTION) | (other == CONTRADICTION)
        same = ~against & ~((implication == NEUTRAL) & (other == NEUTRAL))
    else:
        same = (implication == ENTAILMENT) & (other == ENTAILMENT)
    return np.asarray(same | np.eye(len(implication), dtype=bool))


def components(same: Array) -> list[int]:
    """The cluster of each rollout (m): what is joined by a chain of pairs (m, m) that are alike."""
    labels = [-1] * len(same)
    count = 0
    for first in range(len(same)):
        if labels[first] >= 0:
            continue
        reached = [first]
        labels[first] = count
        while reached:
            for other in np.flatnonzero(same[reached.pop()]):
                if labels[other] < 0:
                    labels[other] = count
                    reached.append(int(other))
        count += 1
    return labels


def greedy(same: Array) -> list[int]:
    """The cluster of each rollout (m): that of the last first member it is alike with.

    As published (Kuhn, Gal and Farquhar 2023, and the code of Farquhar et al. 2024): each rollout that
    is in no cluster yet begins one, and is held against all after it, those that are in an earlier
    cluster too, which it then takes over.
    """
    labels = [-1] * len(same)
    count = 0
    for first in range(len(same)):
        if labels[first] >= 0:
            continue
        labels[first] = count
        for other in range(first + 1, len(same)):
            if same[first, other]:
                labels[other] = count
        count += 1
    return labels


def clustered(implication: Array, method: str) -> tuple[list[int], list[int]]:
    """The cluster of each of m rollouts, and the others of it that each was not judged alike with.

    Parameters
    ----------
    implication : (m, m), as of `alike`
    method : components, strict or loose; the last two are `greedy`
    """
    same = alike(implication, method)
    labels = components(same) if method == "components" else greedy(same)
    together = np.equal.outer(labels, labels)
    return labels, [int(n) for n in (together & ~same).sum(1)]


def implications(places: dict[int, int], judged: Iterable[tuple[int, int, str | None]]) -> Array:
    """(m, m) verdicts as numbers, where ``places`` says the place of each sample judged.

    A pair that was not asked in one direction, or whose call failed, is none that are alike.
    """
    found = np.full((len(places), len(places)), CONTRADICTION)
    np.fill_diagonal(found, ENTAILMENT)
    for sample, other, verdict in judged:
        if verdict is not None:
            found[places[sample], places[other]] = _IMPLIES[verdict]
    return found


# ---------------------------------------------------------------- the job


def ingest_clusters(root: str | Path, judge: str, method: str = "components", **options: Any) -> str:
    """The name, JUDGE.METHOD, under which the clusters of all judged runs are now stored.

    Parameters
    ----------
    root : path of the store
    judge : a stored judge
    method : components, of pairs that are alike in both directions; or against the first member of
        each cluster, strict (each follows from the other) or loose (no contradiction, not both neutral)
    runs : run ids; by default every run that the judge has done
    shard, executor, workers, progress : as of `canopy_store.ingest.jobs.run_job`

    Raises
    ------
    DataError
        The judge has done no run, or not one of those named.
    UsageError
        A method that is none.
    """
    return run_job(root, open_clusters, {"judge": judge, "method": method, **options})


def open_clusters(
    root: str | Path,
    judge: str,
    method: str = "components",
    *,
    runs: tuple[str, ...] = (),
    progress: Progress,
) -> Job:
    """The job of `ingest_clusters`."""
    if method not in METHODS:
        raise UsageError(f"--method {method}: one of {', '.join(METHODS)}")
    root = store.writable(root)
    records = {record.run: record for record in store.records(root, "judgments", judge=judge)}
    if not records:
        names = sorted({record.keys["judge"] for record in store.records(root, "judgments")})
        hint = f"it has {', '.join(names)}" if names else "judge first: canopy ingest judge"
        raise DataError(f"--judge {judge}: no run is judged by it; {hint}")
    lacking = [run for run in runs if run not in records]
    if lacking:
        raise DataError(
            f"--run {lacking[0]}: not judged by {judge}; judge it first: canopy ingest judge"
        )
    name = f"{judge}.{method}"

    @functools.lru_cache(maxsize=1)
    def of_run(run_id: str) -> tuple[dict[str, list[int]], dict[str, list[tuple[int, int, str | None]]]]:
        record = records[run_id]
        verdicts: dict[str, list[tuple[int, int, str | None]]] = {}
        for file in record.of("judgments"):
            part = store.read_rows(root / file, ["prompt_id", "sample", "other_sample", "verdict"])
            for prompt_id, *judged in zip(*part.to_pydict().values(), strict=True):
                verdicts.setdefault(prompt_id, []).append((judged[0], judged[1], judged[2]))
        chosen = judged_samples(root, run_id, record.settings)
        return chosen, verdicts

    def rows(unit: Unit, progress: Progress) -> tuple[Columns, int]:
        chosen, verdicts = of_run(unit.group.run_id)
        mine = dict.fromkeys(store.read_rows(unit.source, ["prompt_id"])["prompt_id"].to_pylist())
        made: dict[str, list[Any]] = {key: [] for key in ("prompt_id", "sample", "cluster", "n_unlike")}
        for prompt_id in mine:
            samples = chosen[prompt_id]
            places = {sample: at for at, sample in enumerate(samples)}
            judged = implications(places, verdicts.get(prompt_id, ()))
            labels, unlike = clustered(judged, method)
            made["prompt_id"] += [prompt_id] * len(samples)
            made["sample"] += samples
            made["cluster"] += labels
            made["n_unlike"] += unlike
        return {"run_id": [unit.group.run_id] * len(made["sample"]), **made}, 0

    settings = {"clustering": name, "judge": judge, "method": method}
    groups = rollout_groups(root, "clusters", name, runs or [str(run) for run in records])
    return Job(root, "clusters", name, settings, groups, rows)


def judged_samples(root: Path, run_id: str, settings: Any) -> dict[str, list[int]]:
    """The sample numbers of each prompt of a run that a judge of these settings is asked about.

    The seed of a prompt is that of the judge plus its place among the run's prompts, the first 0.
    Prompts numbered by an importer keep the order of their numbers.
    """
    record = store.record(root, "rollouts", run=run_id)
    samples: dict[str, list[int]] = {}
    for name in record.of("rollouts") if record is not None else ():
        part = store.read_rows(root / name, ["prompt_id", "sample"]).to_pydict()
        for prompt_id, sample in zip(part["prompt_id"], part["sample"], strict=True):
            samples.setdefault(prompt_id, []).append(sample)
    chosen = {}
    for index, prompt_id in enumerate(sorted(samples, key=lambda each: (len(each), each))):
        every = sorted(samples[prompt_id])
        kept: Sequence[int] = subsample(len(every), settings["subsample"], settings["seed"] + index)
        chosen[prompt_id] = [every[place] for place in kept]
    return chosen
