"""What a store holds, and what in it is not finished."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from canopy_store import sql, store

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

    ``entropies`` is false where the engine gave none and no scores complete them yet. ``embedders``
    names each embedder with the share of the run's shards it has done. Reads the
    footer of every file in the store.

    Raises
    ------
    DataError
        A file in the store is truncated, foreign or of a newer version.
    """
    root = store.snapshot(store.require(root))
    with sql.connect(root, incomplete=True) as con:
        counts = {
            run_id: counted
            for run_id, *counted in con.sql(
                "select run_id, count(*), sum(n_tokens) from rollouts group by all"
            ).fetchall()
        }
        lacking = {
            run_id
            for (run_id,) in con.sql(
                "select distinct run_id from selected_rollouts where entropy_sum is null"
            ).fetchall()
        }
    rows = []
    for run in store.runs(root):
        shards = run["shards"]
        rollouts, tokens = counts.get(run["run_id"], (0, 0))
        rows.append(
            {
                **{key: run[key] for key in ("run_id", "family", "variant", "task", "complete")},
                "shards": len(shards),
                "shards_planned": len(shards) if run["complete"] else run.get("n_shards"),
                "rollouts": rollouts,
                "tokens": tokens,
                "bytes": sum(p.stat().st_size for p in shards),
                "entropies": run["run_id"] not in lacking,
                "embedders": ", ".join(_embedders(root, run["run_id"], len(shards))),
            }
        )
    return pl.DataFrame(rows, schema=_COLUMNS)


def _embedders(root: Path, run_id: str, shards: int) -> list[str]:
    found = []
    for where in store.matching(root / "embedding_spectra", "embedder=*"):
        done = len(store.shards(where / "selection=all" / f"run={store.quoted(run_id)}"))
        if done:
            name = store.unquoted(where.name.partition("=")[2])
            found.append(name if done == shards else f"{name} ({done}/{shards})")
    return found
