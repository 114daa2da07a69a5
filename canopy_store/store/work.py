"""What each shard of a job took: measured when it is written, kept until the job is committed.

A shard's note stands in STORE/.work until the commit makes a file of the table ``work`` of all of them,
so that a resumed run, or one that many jobs share, tells the truth.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from canopy_store.errors import DataError
from canopy_store.schema import TABLES
from canopy_store.store.files import exists, read_json, remote, write_json
from canopy_store.store.layout import folder, shard_number
from canopy_store.store.parquet import read_rows, write_rows


def note(root: Path, shard: Path, **measured: Any) -> None:
    """Keeps what a shard took (columns of ``work``); before the shard itself, which says it is done."""
    write_json(_note_path(root, shard), {"host": platform.node(), **measured})


def _note_path(root: Path, shard: Path) -> Path:
    return root / ".work" / "notes" / shard.relative_to(root).with_suffix(".json")


def gather(
    root: Path, kind: str, name: str, run_id: str, shards: list[Path]
) -> tuple[list[Path], dict[str, Any]]:
    """The file of ``work`` for these shards, none where nothing was noted; and what they took in all.

    The sums are {"seconds", "energy_j", "energy_method"}, None where a shard's is not known.
    """
    rows: list[Mapping[str, Any]] = []
    last = next((shard.name.partition(".")[2] for shard in shards), "")
    path = folder(root, "work", kind=kind, name=name, run=run_id) / f"part-00000.{last}"
    # of a run that is committed anew since a file of it was lost, what is known stays known
    known = {row["shard"]: row for row in read_rows(path).to_pylist()} if exists(path) else {}
    for shard in shards:
        noted = _note_path(root, shard)
        try:
            measured = read_json(noted) if exists(noted) else known.get(shard_number(shard), {})
        except DataError:
            measured = {}
        rows.append({"run_id": run_id, "shard": shard_number(shard), "rows": 0, **measured})
    total = {
        "seconds": _sum(row.get("seconds") for row in rows),
        "energy_j": _sum(row.get("energy_j") for row in rows),
        "energy_method": next((row["energy_method"] for row in rows if row.get("energy_method")), None),
    }
    if not any("host" in row for row in rows):
        return [], total
    columns = {c.name: [row.get(c.name) for row in rows] for c in TABLES["work"].columns}
    write_rows(path, "work", columns)
    return [path], total


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum; None where one is not known, or there is none."""
    listed = list(values)
    return None if not listed or None in listed else float(sum(v for v in listed if v is not None))


def forget(root: Path, shards: Iterable[Path]) -> None:
    """Removes the notes of shards that are committed."""
    for shard in shards:
        path = _note_path(root, shard)
        try:
            path.unlink()
        except FileNotFoundError:
            continue  # not noted, or another job has committed the same
        if not remote(root):
            _remove_empty(root / ".work" / "notes", path.parent)


def _remove_empty(top: Path, place: Path) -> None:
    while top in place.parents:
        try:
            place.rmdir()
        except OSError:
            return
        place = place.parent
