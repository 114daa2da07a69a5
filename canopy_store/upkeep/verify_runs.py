"""One run after another: its row, keys, counts, coverage, spectra and work, from the files it names."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from canopy_store import sql, store
from canopy_store.schema import TABLES
from canopy_store.store.embeddings import spectrum
from canopy_store.upkeep.verify_files import File, checked_rows
from canopy_store.upkeep.verify_report import AGAIN, COPY, Report
from canopy_store.upkeep.verify_rows import SPECTRUM

_PAIR = ["prompt_id", "sample"]
_EMBED = f"remove it and embed again: canopy ingest embed; or {COPY}"
_SELECT = f"{COPY}, or remove its record and make the selection again"


@dataclass(frozen=True)
class Others:
    """What runs and scores refer to: models, scorers and prompts, and the settings of runs planned."""

    models: frozenset[str]
    scorers: frozenset[str]
    prompts: pl.DataFrame  # task, prompt_id
    plans: Mapping[str, Mapping[str, Any]]


@dataclass
class Run:
    """A complete run: its files by table, and what they hold, less the token arrays, a frame a table."""

    run_id: str
    record: str  # where its record stands
    settings: Mapping[str, Any] = field(default_factory=dict)
    files: dict[str, list[File]] = field(default_factory=lambda: defaultdict(list))
    frames: dict[str, pl.DataFrame] = field(default_factory=lambda: defaultdict(pl.DataFrame))
    row: dict[str, Any] | None = None

    def home(self, table: str) -> str:
        """The folder of its first file of a table, or its record where there is none."""
        files = self.files[table]
        return files[0].name.rpartition("/")[0] if files else self.record


def check_run(report: Report, run: Run, others: Others) -> None:
    """Reads every file of a run; reports what is wrong in each of them, and between them."""
    run.frames["runs"] = read_frame(report, run.files["runs"], None)
    _check_row(report, run, others)
    check_tables(report, run, others)
    if run.row is not None:
        _check_counts(report, run, others)
    _check_spectra_cover(report, run)
    if report.deep:
        _check_deep(report, run)


def check_tables(report: Report, run: Run, others: Others) -> None:
    """Reads the files of each table; reports what is wrong in them, in their keys and in their work.

    All that there is to check of what is no run: a task of items, a corpus.
    """
    for table, files in list(run.files.items()):
        if table != "runs":
            run.frames[table] = read_frame(report, files, run.row)
    for table, frame in list(run.frames.items()):
        if len(frame):
            _check_keys(report, run, table)
        if len(frame) and "scorers" in TABLES[table].refers:
            lost = frame.filter(~pl.col("scorer_id").is_in(list(others.scorers)))
            for scorer_id in sorted(set(lost["scorer_id"])):
                where = lost.filter(scorer_id=scorer_id)["file"][0]
                report.add(where, table, f"scorer {scorer_id} is not in scorers", AGAIN)
    _check_items(report, run)
    _check_meanings(report, run)
    _check_work(report, run)


# ---------------------------------------------------------------- reading


def read_frame(report: Report, files: Iterable[File], run: Mapping[str, Any] | None) -> pl.DataFrame:
    """All rows of a table's files with the values of their paths and ``file``; reports what is wrong.

    Of a rollout's or document's lists the lengths are kept at most, and of its texts nothing: memory
    is bounded.
    """
    frames = []
    for file in files:
        for rows in checked_rows(report, file, run):
            frame = pl.DataFrame(rows.select(_kept(file.table, rows))).with_columns(
                *(pl.lit(value).alias(key) for key, value in file.keys.items()),
                *_lengths(file.table, rows),
                pl.lit(file.name).alias("file"),
            )
            frames.append(frame)
    return pl.concat(frames, how="diagonal_relaxed") if frames else pl.DataFrame()


def _kept(table: str, rows: pa.Table) -> list[str]:
    if "spectra" in TABLES[table].checks or not TABLES[table].commit:
        return rows.column_names  # few rows, or lists that other tables are checked against
    lists = {
        f.name for f in rows.schema if pa.types.is_list(f.type) or pa.types.is_fixed_size_list(f.type)
    }
    return [name for name in rows.column_names if name not in lists and name not in TABLES[table].texts]


def _lengths(table: str, rows: pa.Table) -> list[pl.Series | pl.Expr]:
    checks = TABLES[table].checks
    if "embeddings" in checks:
        return [pl.lit(rows["embedding"].type.list_size).alias("dimension")]
    if "scored_steps" in checks:
        lengths = rows["entropy"].combine_chunks().value_lengths()
        return [pl.Series("scored", lengths.to_numpy(zero_copy_only=False), pl.Int32)]
    return []


# ---------------------------------------------------------------- row, counts, keys, work


def _check_row(report: Report, run: Run, others: Others) -> None:
    """The run's row in ``runs``: one, of a model that is stored, with its plan's settings."""
    frame, files = run.frames["runs"], run.files["runs"]
    if len(files) != 1 or len(frame) > 1:
        what = f"has {max(len(files), len(frame))} rows in runs, needs one"
        report.add(run.record, "runs", what, AGAIN)
    if frame.is_empty():
        return
    row = run.row = frame.row(0, named=True)
    path = row["file"]
    if row["model_id"] not in others.models:
        report.add(path, "runs", f"model {row['model_id']} is not in models", AGAIN)
    if row["model_id"] != f"{row['family']}/{row['variant']}":
        report.add(path, "runs", f"model_id {row['model_id']} is not family/variant", AGAIN)
    plan = others.plans.get(run.run_id)
    if plan is None:
        report.add(path, "runs", f"no readable plan of {run.run_id}", COPY)
    elif store.canonical(plan) != row["settings"]:
        report.add(path, "runs", "its settings are not its plan's", "take both from a copy")
    if report.version > 1 and store.canonical(run.settings) != row["settings"]:
        report.add(path, "runs", "its settings are not its record's", "take both from a copy")


def _check_counts(report: Report, run: Run, others: Others) -> None:
    """What a run's row counts, against its files; and its prompts."""
    row, rollouts, home = run.row or {}, run.frames["rollouts"], run.home("rollouts")
    folders = sorted({file.name.rpartition("/")[0] for file in run.files["rollouts"]})
    if len(folders) > 1:
        report.add(folders[1], "rollouts", f"run {run.run_id} stands in {folders[0]} too", AGAIN)
    counted: dict[str, Any] = {"n_rollouts": len(rollouts)}
    if not half_compacted(report, run.run_id):
        counted["n_shards"] = len(run.files["rollouts"])
    if len(rollouts):
        sums = rollouts["entropy_sum"], rollouts["surprisal_sum"]
        sizes = rollouts["prompt_id"].value_counts()["count"]
        counted |= {
            "n_tokens": rollouts["n_tokens"].sum(),
            "n_prompts": len(sizes),
            "n_samples": sizes.max(),
            "logged": not any(column.null_count() for column in sums),
        }
        counted |= {key: rollouts[key][0] for key in ("family", "variant", "task")}
        _check_logging(report, home, rollouts)
        asked = rollouts.select("task", "prompt_id").unique()
        missing = asked.join(others.prompts, on=["task", "prompt_id"], how="anti")
        if len(missing):
            first = missing["prompt_id"].sort()[0]
            what = f"{len(missing)} of its prompts are not in prompts, first {first}"
            report.add(home, "rollouts", what, AGAIN)
    for key, value in counted.items():
        if row[key] != value:
            what = f"{key} is {row[key]} here and {value} in its files"
            report.add(row["file"], "runs", what, AGAIN)


def half_compacted(report: Report, run_id: str) -> bool:
    """Whether a compaction of a run of format 1 was stopped while it exchanged folders."""
    journal = report.root / ".work" / f"run={store.quoted(run_id)}" / "journal.json"
    return report.version == 1 and store.exists(journal)


def _check_logging(report: Report, home: str, rollouts: pl.DataFrame) -> None:
    """The view logging_check over this run alone, so that no other file can stand in its way."""
    named = ("family", "variant", "task", "run_id", "surprisal_sum", "entropy_sum")
    sums = rollouts.select(*named, pl.lit("all").alias("selection"))
    report.con.register("selected_rollouts", sums.to_arrow())
    checked = report.con.sql(sql.source("logging_check")).pl()
    # of a single rollout nothing can be said
    for row in checked.filter(~pl.col("ok") & (pl.col("n_rollouts") > 1)).to_dicts():
        what = f"logging_check: z is {row['z']}: not logged from the distribution that was sampled"
        report.add(home, "rollouts", what, "log logprob and entropy from one policy")
    report.con.unregister("selected_rollouts")


def _check_keys(report: Report, run: Run, table: str) -> None:
    """Keys of one table of a run: each once, and each with its row of the parent, its rollout."""
    frame, parent, keys = run.frames[table], TABLES[table].parent, list(TABLES[table].keys)
    twice = frame.filter(pl.struct(keys).is_duplicated())
    if len(twice):
        first = twice.row(0, named=True)
        said = ", ".join(f"{key} {first[key]}" for key in keys if key != "run_id")
        report.add(first["file"], table, f"{len(twice)} rows share a key, first {said}", AGAIN)
    if parent is None:
        return
    rollouts = run.frames[parent]
    if "dimension" in frame.columns:
        named = [key for key in keys if key not in ("run_id", *_PAIR)]
        sizes = frame.group_by(named).agg(pl.col("dimension").n_unique())
        if sizes["dimension"].max() != 1:
            report.add(run.home(table), table, "embeddings of different sizes", AGAIN)
    if "scored" in frame.columns and len(rollouts):
        both = frame.join(rollouts.select(*_PAIR, "n_tokens"), on=_PAIR)
        odd = both.filter(pl.col("scored") != pl.col("n_tokens"))
        if len(odd):
            what = f"entropy is not as long as n_tokens in {len(odd)} rows"
            report.add(odd["file"][0], table, what, AGAIN)
    if "samples" in frame.columns:
        frame = frame.explode("samples").rename({"samples": "sample"})
    shared = [key for key in TABLES[parent].keys if key != "run_id"]
    lost = frame.join(rollouts, on=shared, how="anti") if len(rollouts) else frame
    if len(lost):
        first = lost.row(0, named=True)
        which = " ".join(f"{key.removesuffix('_id')} {first[key]}" for key in shared)
        one = TABLES[parent].grain.removeprefix("one row per ").split()[0]
        what = f"{len(lost)} rows have no {one}, first {which}"
        report.add(first["file"], table, what, AGAIN)


def _check_items(report: Report, run: Run) -> None:
    """Items of a task: their options numbered from 0, one of each right, and all of them scored."""
    items, scores = run.frames["items"], run.frames["option_scores"]
    if items.is_empty():
        return
    of_item = items.group_by("item_id", maintain_order=True).agg(
        pl.len(), pl.col("option").max(), pl.col("correct").sum(), pl.col("file").first()
    )
    for row in of_item.filter(pl.col("correct") != 1).head(1).iter_rows(named=True):
        what = f"item {row['item_id']} has {row['correct']} right options, needs one"
        report.add(row["file"], "items", what, COPY)
    for row in of_item.filter(pl.col("option") != pl.col("len") - 1).head(1).iter_rows(named=True):
        report.add(row["file"], "items", f"item {row['item_id']} lacks an option", COPY)
    for scorer_id in sorted(set(scores["scorer_id"])) if len(scores) else ():
        mine = scores.filter(scorer_id=scorer_id)
        lacking = items.join(mine, on=["item_id", "option"], how="anti")
        if len(lacking):
            what = f"lacks {len(lacking)} options, first of item {lacking['item_id'][0]}"
            report.add(mine["file"][0].rpartition("/")[0], "option_scores", what, AGAIN)


def _check_meanings(report: Report, run: Run) -> None:
    """Judgments: both rollouts of a pair are there. Clusters: numbered from 0, none left out."""
    judged, clusters, rollouts = (run.frames[t] for t in ("judgments", "clusters", "rollouts"))
    if len(judged) and len(rollouts):
        others = rollouts.select("prompt_id", pl.col("sample").alias("other_sample"))
        lost = judged.join(others, on=["prompt_id", "other_sample"], how="anti")
        if len(lost):
            first = lost.row(0, named=True)
            what = f"{len(lost)} rows name an other_sample that is no rollout"
            what += f", first prompt {first['prompt_id']} sample {first['other_sample']}"
            report.add(first["file"], "judgments", what, AGAIN)
    if clusters.is_empty():
        return
    of_prompt = clusters.group_by("clustering", "prompt_id", maintain_order=True).agg(
        pl.col("cluster").n_unique().alias("n"), pl.col("cluster").max(), pl.col("file").first()
    )
    for row in of_prompt.filter(pl.col("cluster") != pl.col("n") - 1).head(1).iter_rows(named=True):
        what = f"{row['clustering']}: the clusters of prompt {row['prompt_id']} are not numbered from 0"
        report.add(row["file"], "clusters", what, AGAIN)


def _check_work(report: Report, run: Run) -> None:
    """What the shards of jobs took: nothing below 0, and in all what the run's row says."""
    work, row = run.frames["work"], run.row or {}
    if work.is_empty():
        return
    for name, total in (("seconds", "wall_s"), ("energy_j", "energy_j")):
        below = work.filter(pl.col(name) < 0)
        if len(below):
            report.add(below["file"][0], "work", f"{name} below 0 in {len(below)} rows", COPY)
        sampling = work.filter(kind="rollouts")
        if sampling.is_empty() or sampling[name].null_count() or row.get(total) is None:
            continue
        if not math.isclose(sampling[name].sum(), row[total], rel_tol=1e-9, abs_tol=1e-9):
            what = f"{total} is {row[total]} here and {sampling[name].sum()} in its work"
            report.add(row["file"], "runs", what, COPY)


# ---------------------------------------------------------------- embeddings and spectra


def _check_spectra_cover(report: Report, run: Run) -> None:
    """Whether embeddings, selections and spectra of a run speak of the same rollouts."""
    spectra, embeddings = run.frames["embedding_spectra"], run.frames["embeddings"]
    if len(embeddings):
        done = set(spectra.filter(selection="all")["embedder"]) if len(spectra) else set()
        for embedder in sorted(set(embeddings["embedder"]) - done):
            where = embeddings.filter(embedder=embedder)["file"][0].rpartition("/")[0]
            report.add(where, "embeddings", f"{embedder} has no spectra", _EMBED)
    if spectra.is_empty() or run.frames["rollouts"].is_empty():
        return
    for embedder, selection in spectra.select("embedder", "selection").unique().sort(pl.all()).rows():
        _check_cover(report, run, embedder, selection)


def _check_cover(report: Report, run: Run, embedder: str, selection: str) -> None:
    """Whether spectra are of each rollout of their selection, and have their embeddings."""
    frame = run.frames["embedding_spectra"].filter(embedder=embedder, selection=selection)
    selections, embeddings = run.frames["selections"], run.frames["embeddings"]
    where = frame["file"][0].rpartition("/")[0]
    covered = frame.explode("samples").select("prompt_id", pl.col("samples").alias("sample"))
    if selection == "all":
        wanted = run.frames["rollouts"].select(_PAIR)
    elif len(selections):
        wanted = selections.filter(selection=selection).select(_PAIR)
    else:
        wanted = covered[:0]
    missing = len(wanted.join(covered, on=_PAIR, how="anti"))
    extra = len(covered.join(wanted, on=_PAIR, how="anti"))
    if missing or extra:
        what = f"lacks {missing} rollouts of selection {selection}, has {extra} that are not of it"
        report.add(where, "embedding_spectra", what, _EMBED if selection == "all" else _SELECT)
    if selection != "all":
        return
    mine = embeddings.filter(embedder=embedder) if len(embeddings) else embeddings
    if mine.is_empty():
        what = "stands without its embeddings: length_terciles has no semantic_diversity"
        report.add(where, "embedding_spectra", what, "embed again to have it", harmless=True)
        return
    absent = len(covered.join(mine, on=_PAIR, how="anti"))
    if absent:
        folder = mine["file"][0].rpartition("/")[0]
        report.add(folder, "embeddings", f"lacks {absent} that spectra were made of", AGAIN)


def _check_deep(report: Report, run: Run) -> None:
    """Recomputes every spectrum of the run from its embeddings."""
    spectra = run.frames["embedding_spectra"]
    if spectra.is_empty() or run.frames["embeddings"].is_empty():
        return
    for embedder in sorted(spectra["embedder"].unique()):
        try:
            place, matrix = _matrix(report, run, embedder)
        except Exception:  # a file of it is damaged, which is reported where it was read
            continue
        wrong: dict[str, list[str]] = defaultdict(list)
        for row in spectra.filter(embedder=embedder).iter_rows(named=True):
            at = [place.get((row["prompt_id"], sample), -1) for sample in row["samples"]]
            if min(at, default=-1) < 0:
                continue  # reported as missing
            if np.isfinite(matrix[at]).all() and not _same_spectrum(matrix[at], row):
                wrong[row["file"]].append(row["prompt_id"])
        for file, prompts in sorted(wrong.items()):
            what = f"{len(prompts)} spectra are not those of the embeddings, first prompt {prompts[0]}"
            report.add(file, "embedding_spectra", what, AGAIN)


def _same_spectrum(embeddings: np.ndarray, row: Mapping[str, Any]) -> bool:
    """Whether a stored row is the spectrum of these embeddings (n, d)."""
    total, eigenvalues, distances = spectrum(embeddings)
    single = len(embeddings) == 1  # which has no distance to others
    made = total, eigenvalues, np.array(distances, float)[single:]
    said = row["embedding_sum"], row["eigenvalues"], np.array(row["semantic_distances"], float)[single:]
    return all(
        len(one) == len(other) and np.allclose(one, other, rtol=0, atol=SPECTRUM)
        for one, other in zip(made, said, strict=True)
    )


def _matrix(report: Report, run: Run, embedder: str) -> tuple[dict[tuple[str, int], int], np.ndarray]:
    """Where each (prompt, sample) stands in all embeddings (rows, d) of a run."""
    mine = run.frames["embeddings"].filter(embedder=embedder)
    files = mine["file"].unique(maintain_order=True)
    tables = (store.read_rows(report.root / file, ["embedding"]) for file in files)
    lists = [table["embedding"].combine_chunks() for table in tables]
    matrix = np.concatenate([a.flatten().to_numpy().reshape(len(a), -1) for a in lists])
    keys = mine.select(_PAIR).iter_rows()
    return {key: at for at, key in enumerate(keys)}, matrix
