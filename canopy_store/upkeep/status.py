"""What a store holds, and what in it is not finished."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import duckdb
import polars as pl

from canopy_store import sql, store
from canopy_store.schema import TABLES

_COLUMNS = {
    "run_id": pl.String,
    "family": pl.String,
    "variant": pl.String,
    "task": pl.String,
    "complete": pl.Boolean,
    "shards": pl.Int64,
    "shards_planned": pl.Int64,
    "rollouts": pl.Int64,
    "tokens": pl.Int64,
    "bytes": pl.Int64,
    "entropies": pl.Boolean,
    "embedders": pl.String,
}


def status(root: str | Path) -> pl.DataFrame:
    """One row per run begun: whether complete, shards, rollouts, tokens, bytes, embedders.

    Read from records, plans and the table ``runs``: ``rollouts`` and ``tokens`` are NULL of a run that
    is not complete. ``entropies`` is false where the engine gave none and no scores complete them yet.
    ``embedders`` names each embedder, with the share of the run's shards where it has not done all.

    Raises
    ------
    DataError
        A record, a plan or a file of the table ``runs`` cannot be read.
    """
    root = store.snapshot(store.require(root))
    counts, lacking = sql.again(lambda: _counts(root))
    embedded = {(r.run, r.keys["embedder"]): r for r in store.records(root, "embeddings")}
    planned = [name for name, _ in store.plans(root, "embedder")]
    rows = []
    for run in store.runs(root):
        run_id, shards = run["run_id"], run["shards"]
        rollouts, tokens = counts.get(run_id, (None, None))
        names = sorted({*planned, *(name for of, name in embedded if of == run_id)})
        embedders = (_embedder(root, run, name, embedded.get((run_id, name))) for name in names)
        rows.append(
            {
                **{key: run[key] for key in ("run_id", "family", "variant", "task", "complete")},
                "shards": len(shards),
                "shards_planned": len(shards) if run["complete"] else run.get("n_shards"),
                "rollouts": rollouts,
                "tokens": tokens,
                "bytes": _bytes(run["record"], shards),
                "entropies": run_id not in lacking,
                "embedders": ", ".join(name for name in embedders if name),
            }
        )
    return pl.DataFrame(rows, schema=_COLUMNS)


def made_of_runs(root: str | Path) -> pl.DataFrame:
    """One row per embedder, scorer, reward model, grader, judge, …: kind, name, runs, complete.

    ``runs`` counts the complete runs that it has done, whole; ``complete`` all of them. One that was
    begun and has done none is there with 0.
    """
    return _made_of(root, "rollouts")


def made_of_documents(root: str | Path) -> pl.DataFrame:
    """As `made_of_runs`, one row per scorer of documents: ``runs`` and ``complete`` count corpora."""
    return _made_of(root, "documents")


def made_of_items(root: str | Path) -> pl.DataFrame:
    """As `made_of_runs`, one row per scorer of options: ``runs`` and ``complete`` count tasks."""
    return _made_of(root, "items")


def _made_of(root: str | Path, parent: str) -> pl.DataFrame:
    root = store.snapshot(store.require(root))
    runs = {record.subject[1] for record in store.records(root, parent)}
    done: dict[tuple[str, str], set[str]] = {}
    of_kind: dict[str, str] = {}
    for table in TABLES.values():
        if table.plan is not None and table.parent == parent:
            of_kind.setdefault(table.plan, table.name)  # spectra are their embedder's
    for kind, table_name in of_kind.items():
        for name, _ in store.plans(root, kind):
            done[kind, name] = set()
        for record in store.records(root, table_name):
            name = record.keys[TABLES[table_name].partitions[0]]
            done.setdefault((kind, name), set()).add(record.subject[1])
    rows = [(kind, name, len(of & runs), len(runs)) for (kind, name), of in sorted(done.items())]
    columns = {"kind": pl.String, "name": pl.String, "runs": pl.Int64, "complete": pl.Int64}
    return pl.DataFrame(rows, schema=columns, orient="row")


def corpora(root: str | Path) -> pl.DataFrame:
    """One row per corpus: its name, documents, bytes on disk, those of scores of it included."""
    root = store.snapshot(store.require(root))
    rows = []
    for record in store.records(root, "documents"):
        (corpus,) = record.keys.values()
        of_it = store.records(root, corpus=corpus)
        size = sum(said["bytes"] for each in of_it for said in each.files.values())
        documents = sum(record.files[name]["rows"] for name in record.of("documents"))
        rows.append((corpus, documents, size))
    columns = {"corpus": pl.String, "documents": pl.Int64, "bytes": pl.Int64}
    return pl.DataFrame(rows, schema=columns, orient="row")


def tasks(root: str | Path) -> pl.DataFrame:
    """One row per task of items: its name, items, bytes on disk, those of scores of them included."""
    root = store.snapshot(store.require(root))
    rows = []
    for record in store.records(root, "items"):
        of_it = [record, *(each for each in store.records(root, "option_scores", **record.keys))]
        size = sum(said["bytes"] for each in of_it for said in each.files.values())
        rows.append((record.keys["task"], record.settings.get("n_items"), size))
    columns = {"task": pl.String, "items": pl.Int64, "bytes": pl.Int64}
    return pl.DataFrame(rows, schema=columns, orient="row")


def _counts(root: Path) -> tuple[dict[str, tuple[int, int]], set[str]]:
    """Rollouts and tokens of each complete run, and the runs of which entropies lack."""
    names = store.names(store.records(root, "rollouts"), "runs")
    if not names:
        return {}, set()
    lacking: list[tuple[str]] = []
    try:
        with duckdb.connect() as con:  # no view: these files alone are opened
            if store.remote(root):
                con.register_filesystem(root.fs)  # type: ignore[attr-defined]
            else:
                store.check_folders(root)
            paths = [f"{glob.escape(str(root))}/{name}" for name in names]
            rows = con.execute(
                "select run_id, n_rollouts, n_tokens, logged"
                " from read_parquet(?, hive_partitioning = false)",
                [paths],
            ).fetchall()
        if not all(logged for *_, logged in rows):
            with sql.connect(root, relations=("selected_rollouts",)) as con:
                lacking = con.sql(
                    "select distinct run_id from selected_rollouts where entropy_sum is null"
                    " and run_id in (select run_id from runs where not logged)"
                ).fetchall()
    except duckdb.Error as error:
        raise sql.explain(error) from None
    return {run_id: (n, tokens) for run_id, n, tokens, _ in rows}, {run_id for (run_id,) in lacking}


def _bytes(record: store.Record | None, shards: Iterable[Path]) -> int:
    """Size of a run's rollouts: as recorded, or as found where no record says it."""
    said = [record.files[name]["bytes"] for name in record.of("rollouts")] if record else [None]
    known = [size for size in said if size is not None]
    return sum(known) if len(known) == len(said) else sum(path.stat().st_size for path in shards)


def _embedder(root: Path, run: dict[str, Any], name: str, record: store.Record | None) -> str | None:
    """An embedder, with the share of the run's shards where it has not done all; None where none."""
    whole = len(run["shards"])
    if record is not None:
        done = len(record.of("embedding_spectra"))
        half = done < whole and None in (said["bytes"] for said in record.files.values())
        return f"{name} ({done}/{whole})" if half else name  # format 1 lists what is there
    where = store.folder(root, "embeddings", embedder=name, run=run["run_id"])
    done = len(store.matching(where, "part-*.parquet"))
    return f"{name} ({done}/{whole})" if done else None
