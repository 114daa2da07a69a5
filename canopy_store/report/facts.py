"""What the report shows, gathered from a store: views, comparisons and samples, all from `analysis`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from canopy_store import sql, store
from canopy_store.analysis.comparable import NO_EMBEDDER, comparable, view_rows
from canopy_store.analysis.comparison import compare_prompts
from canopy_store.analysis.examples import example_rollouts
from canopy_store.analysis.lengths import length_shares
from canopy_store.analysis.pairing import unpaired, variant_order
from canopy_store.analysis.pass_at_k import curve_of_prompts
from canopy_store.analysis.prompt_rows import prompt_rows
from canopy_store.analysis.regression.reliability import ENOUGH, reliability, samples_for
from canopy_store.analysis.studies import alone, values_of
from canopy_store.analysis.trajectories import thin_trajectories
from canopy_store.analysis.words import marks
from canopy_store.errors import StoreError
from canopy_store.report.study_facts import Study, gather_study
from canopy_store.upkeep.status import status

MAX_PANELS = 24  # more small charts than this are no longer read
MAX_POSITIONS = 240  # positions of a trajectory
MIN_ACTIVE = 0.1  # share of a run's rollouts that must reach a position for it to be drawn
ROLLOUTS_PER_PROMPT = 6


_EMPTY: dict[str, Any] = {
    name: pl.String for name in ("family", "variant", "task", "run_id", "panel")
} | {"n_rollouts": pl.Int64, "n_tokens": pl.Int64}


@dataclass(frozen=True)
class Facts:
    """A store as the report sees it.

    Attributes
    ----------
    embedder : None where nothing is embedded
    runs : rows of `status`
    metrics : every row of ``model_metrics``
    shown : one row per family, variant and task: its run, with pooled metrics, ``max_new_tokens`` and
        its ``panel``, the name of its small chart
    prompts : one row per prompt of those runs
    changes : what `compare` gives; no rows where nothing can be compared
    alone : what `estimate` gives of the models that no row of ``changes`` has
    unpaired : why nothing can be compared; None where something can
    grader : whose grades are shown; None where there are none
    pass_at_k : pass@k of that grader, as `pass_at_k_curve` gives it; no rows where none is compared
    decomposition, trajectory, lengths : rows of the views, of the runs shown
    logging, stopping : every row of ``logging_check`` and ``stop_check``
    reliability : a row a variant, over the prompts of the runs shown, as `reliability` gives them
    variants : the baseline first, the others by generation, step of training and name
    examples : rollouts to read
    study : items, documents, training and generations
    """

    baseline: str
    selection: str
    embedder: str | None
    seed: int
    runs: pl.DataFrame
    metrics: pl.DataFrame
    shown: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=_EMPTY))
    prompts: pl.DataFrame = field(default_factory=pl.DataFrame)
    changes: pl.DataFrame = field(default_factory=pl.DataFrame)
    alone: pl.DataFrame = field(default_factory=pl.DataFrame)
    unpaired: str | None = None
    grader: str | None = None
    pass_at_k: pl.DataFrame = field(default_factory=pl.DataFrame)
    decomposition: pl.DataFrame = field(default_factory=pl.DataFrame)
    trajectory: pl.DataFrame = field(default_factory=pl.DataFrame)
    lengths: pl.DataFrame = field(default_factory=pl.DataFrame)
    logging: pl.DataFrame = field(default_factory=pl.DataFrame)
    stopping: pl.DataFrame = field(default_factory=pl.DataFrame)
    reliability: pl.DataFrame = field(default_factory=pl.DataFrame)
    variants: list[str] = field(default_factory=list)
    examples: pl.DataFrame = field(default_factory=pl.DataFrame)
    study: Study = field(default_factory=Study)

    @property
    def families(self) -> list[str]:
        """In alphabetical order."""
        return sorted(self.shown["family"].unique().to_list())

    @property
    def treated(self) -> list[str]:
        """The variants that are compared with the baseline."""
        compared = [] if self.changes.is_empty() else self.changes["variant"].to_list()
        return [name for name in self.variants if name in compared]

    @property
    def covers(self) -> str:
        """What a sum over rollouts covers, to stand behind its name: ' (first 96 tokens)'."""
        caps = self.shown["max_new_tokens"].to_list()
        if not caps or None in caps:  # rollouts may be imported without their cap
            return "" if self.selection == "all" else " (mean of a subset)"
        least, most = min(caps), max(caps)
        tokens = f"first {most} tokens" if least == most else f"first {least} to {most} tokens"
        return f" ({tokens}{'' if self.selection == 'all' else '; mean of a subset'})"

    @property
    def panels(self) -> list[str]:
        """One small chart each: a task, with its family in front where there are several."""
        return self.shown["panel"].unique().sort().to_list()[:MAX_PANELS]

    def placed(self, frame: pl.DataFrame, on: Sequence[str] = ("run_id",)) -> pl.DataFrame:
        """The rows of the panels that are drawn, with the panel and variant of their run or key."""
        drawn = self.shown.filter(pl.col("panel").is_in(self.panels))
        names = [name for name in ("panel", "variant") if name not in frame.columns]
        places = drawn.select(*on, *names).unique(maintain_order=True)
        return frame.join(places, on=list(on), how="inner", maintain_order="left")


_PANEL = (
    pl.when(pl.col("family").n_unique() > 1)
    .then(pl.format("{} · {}", "family", "task"))
    .otherwise(pl.col("task"))
    .alias("panel")
)


def gather(
    root: str | Path,
    *,
    baseline: str,
    selection: str,
    embedder: str | None,
    grader: str | None = None,
    runs: Sequence[str],
    allow: Sequence[str] = (),
    seeds: Mapping[str, str] | None = None,
    seed: int,
    rollouts: int,
) -> Facts:
    """The facts of a store, with at most about ``rollouts`` examples to read.

    ``seeds`` are checkpoints of a variant, as in `compare`, where items and documents are shown.

    Raises
    ------
    StoreError
        No store there, or nothing in it.
    DataError, ConflictError, UsageError
        As `compare`: no such selection, embedder or run, several runs of one model and task, runs that
        were not sampled alike, several embedders and none named.
    """
    root = store.require(root)
    every_run = status(root)
    chosen: dict[str, Any] = {"selection": selection, "embedder": embedder, "runs": runs}
    with sql.connect(root) as con:
        metrics = view_rows(con, "model_metrics")
        caps = view_rows(con, "runs").select("run_id", "max_new_tokens")
        metrics = metrics.join(caps, on="run_id", how="left", maintain_order="left")
        of_study: dict[str, Any] = {"baseline": baseline, "seeds": seeds, "allow": allow, "seed": seed}
        if metrics.is_empty():
            study = gather_study(con, root, rollouts=pl.DataFrame(), **of_study)
            if every_run.is_empty() and study.empty:
                raise StoreError(
                    f"{root}: the store is empty; fill it with canopy ingest rollouts or canopy import"
                )
            return Facts(
                baseline=baseline,
                selection=selection,
                embedder=None,
                seed=seed,
                runs=every_run,
                metrics=metrics,
                study=study,
            )
        order = ["family", "task", "variant"]
        shown, used = comparable(metrics, root, **chosen)
        shown = shown.with_columns(_PANEL).sort(order)
        prompts, _ = prompt_rows(con, root, baseline=baseline, allow=allow, grader=grader, **chosen)
        prompts = prompts.sort(*order, "prompt_id")
        names = shown["run_id"].to_list()
        of_runs = pl.col("run_id").is_in(names), pl.col("selection") == selection
        models = view_rows(con, "models")
        reason = unpaired(prompts, baseline)
        changes = curve = pl.DataFrame()
        if reason is None:
            changes = compare_prompts(prompts, models, baseline=baseline, seed=seed)
            curve = curve_of_prompts(con, prompts, models, baseline=baseline, seed=seed)
        lone = alone(prompts, changes, baseline, seed)
        open_ended = values_of(changes, lone, baseline, "ce_star")
        study = gather_study(con, root, rollouts=open_ended, **of_study)
        drawn: dict[str, Any] = {"selection": selection}
        per_prompt = max(1, min(ROLLOUTS_PER_PROMPT, rollouts // len(shown)))
        return Facts(
            baseline=baseline,
            selection=selection,
            embedder=None if used == NO_EMBEDDER else used,
            seed=seed,
            runs=every_run,
            metrics=metrics,
            shown=shown,
            prompts=prompts,
            changes=changes,
            alone=lone,
            study=study,
            unpaired=reason,
            grader=prompts["grader"][0] if "grader" in prompts.columns else None,
            pass_at_k=curve,
            variants=variant_order(models, shown, baseline),
            decomposition=view_rows(con, "ce_star_decomposition").filter(*of_runs),
            trajectory=thin_trajectories(con, names, positions=MAX_POSITIONS, share=MIN_ACTIVE, **drawn),
            lengths=length_shares(con, names, **drawn),
            logging=view_rows(con, "logging_check"),
            stopping=view_rows(con, "stop_check"),
            reliability=_reliability(comparable(view_rows(con, "panel"), root, **chosen)[0]),
            examples=example_rollouts(
                con,
                shown,
                prompts,
                embedder=used,
                per_prompt=per_prompt,
                # enough prompts for the rollouts that are wanted, and no more
                prompts_per_task=max(min(1, rollouts), rollouts // (per_prompt * len(shown))),
                seed=seed,
                **drawn,
            ),
        )


def _reliability(panel: pl.DataFrame) -> pl.DataFrame:
    """What `reliability` gives, of the variants that have one, and the rollouts that would be enough."""
    frame = reliability(panel).drop_nulls("reliability")
    needed = [
        samples_for(row["reliability"], row["n_samples"], ENOUGH) for row in frame.iter_rows(named=True)
    ]
    return frame.with_columns(rollouts_needed=pl.Series(needed, dtype=pl.Int64))


def notes(facts: Facts) -> list[str]:
    """What a reader must know before the charts: what is missing, what stands for what."""
    out = []
    unfinished = facts.runs.filter(~pl.col("complete"))["run_id"].to_list()
    if unfinished:
        out.append(f"Not complete, and left out until the same ingest is run again: {few(unfinished)}.")
    if facts.runs.is_empty():
        return []
    if facts.shown.is_empty():
        return ["No run is complete yet, so there is nothing to measure.", *out]
    if facts.unpaired is not None:
        out.append(f"Nothing is compared: {facts.unpaired}.")
    if facts.embedder is None:
        out.append("Nothing is embedded: run canopy ingest embed for semantic diversity.")
    else:
        without = facts.shown.filter(pl.col("embedder") != facts.embedder)["run_id"].to_list()
        if without:
            out.append(f"Without embeddings by {facts.embedder}: {few(without)}.")
    others = facts.runs.filter("complete", ~pl.col("run_id").is_in(facts.shown["run_id"].to_list()))
    if len(others):
        out.append(f"Not shown in the charts: {few(others['run_id'].to_list())}. The tables list all.")
    out += _cut(facts)
    panels = facts.shown["panel"].n_unique()
    if panels > MAX_PANELS:
        out.append(f"Charts with one panel a task show the first {MAX_PANELS} of {panels}.")
    return out


def _cut(facts: Facts) -> list[str]:
    """Which comparisons of CE* must be read with care, and what helps."""
    if facts.changes.is_empty():
        return []
    rows = facts.placed(facts.changes.filter(level="task", metric="ce_star"), on=("family", "task"))
    marked = [
        f"{row['variant']} on {row['panel']} ({'; '.join(marks(row))})"
        for row in rows.sort("panel", place(facts)).iter_rows(named=True)
        if marks(row)
    ]
    return [f"To be read with care: {few(marked)}."] if marked else []


def place(facts: Facts) -> pl.Expr:
    """The place of a row's variant among the variants."""
    names = facts.variants
    return pl.col("variant").replace_strict(names, range(len(names)), return_dtype=pl.Int64)


def few(names: Sequence[str]) -> str:
    """The names, or the first six of more."""
    return ", ".join(names[:6]) + (" and more" if len(names) > 6 else "")
