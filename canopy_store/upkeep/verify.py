"""Whether a store is whole: every file, key, length, bound and sum, from the files alone.

`verify` reads each file once, a row group at a time, and never stops at a damaged one: what it finds
comes back as rows. Formulas are not written again here: sums and spectra are recomputed by the code
that stores them, and the check of logged data is the view logging_check.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from canopy_store import sql, store
from canopy_store.errors import CanopyError, DataError
from canopy_store.schema import TABLES, arrow_schema
from canopy_store.store.embeddings import spectrum
from canopy_store.upkeep.verify_rows import SPECTRUM, problems

MANIFEST = "MANIFEST"
SCHEMA = {
    "file": pl.String,
    "table": pl.String,
    "what": pl.String,
    "todo": pl.String,
    "harmless": pl.Boolean,
}
_AGAIN = "remove it and run its ingest again, or take it from a copy"
_SHARD = re.compile(r"part-\d{5,}(\.[\w-]+)?\.parquet")


@dataclass
class _Report:
    """What has been found so far; ``file`` is kept relative to the store."""

    root: Path
    deep: bool
    con: duckdb.DuckDBPyConnection
    rows: list[dict[str, Any]] = field(default_factory=list)

    def at(self, file: str) -> Path:
        """The path of a file named as frames name it: relative to the store."""
        return self.root / file

    def add(self, path: Path, table: str, what: str, todo: str, harmless: bool = False) -> None:
        file, what = _printable(str(path.relative_to(self.root))), _printable(" ".join(what.split()))
        self.rows.append(dict(zip(SCHEMA, (file, table, what, todo, harmless), strict=True)))


def _printable(text: str) -> str:
    """The text without what a terminal would act on: names in a foreign file may hold anything."""
    return "".join(c if c.isprintable() else "?" for c in text)


@dataclass
class _Run:
    """What a run's files hold, less the token arrays: one frame a table, with the path's columns."""

    files: dict[str, list[tuple[Path, dict[str, str]]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    frames: dict[str, list[pl.DataFrame]] = field(default_factory=lambda: defaultdict(list))

    def frame(self, table: str) -> pl.DataFrame:
        found = self.frames[table]
        return pl.concat(found, how="vertical_relaxed") if found else pl.DataFrame()


def verify(root: str | Path, deep: bool = False, *, database: bool = True) -> pl.DataFrame:
    """One row per problem: file, table, what, todo, harmless; no row when all is well.

    Files against their schema, checksums and MANIFEST; keys unique and leading to a row; lengths equal
    to n_tokens; bounds of log-probabilities and entropies; sums equal to their arrays; unit
    embeddings; spectra; run counts; the check of logged data. Rows marked harmless change no view:
    temporary files, runs not complete.

    Parameters
    ----------
    root : path of the store
    deep : also recomputes every spectrum from its embeddings
    database : also opens canopy.duckdb; for a folder that is not trusted, leave it shut

    Raises
    ------
    StoreError
        There is no store at ``root``. A damaged file is reported, never raised.
    """
    root = store.snapshot(store.locate(root))
    if not (root / "canopy.json").is_file() and not (root / "runs").is_dir():
        store.require(root)
    with duckdb.connect() as con:
        if store.remote(root):
            con.register_filesystem(root.fs)  # type: ignore[attr-defined]
        report = _Report(root, deep, con)
        _verify(report, database)
    return pl.DataFrame(report.rows, schema=SCHEMA)


def _verify(report: _Report, database: bool) -> None:
    root = report.root
    try:
        store.require(root)
    except CanopyError as error:
        report.add(
            root / "canopy.json", "", _short(error, root / "canopy.json"), "write it anew: canopy init"
        )
    _check_manifest(report)
    places = {table: list(_places(report, table)) for table in TABLES}
    if database:
        _check_database(report)
    _check_work(report)
    # three small tables whole, then one run after another: memory is bounded by the largest run
    small = {table: _small(report, table, places[table]) for table in ("models", "prompts", "runs")}
    plans = _plans(report)
    _check_small(report, small, plans)
    runs: dict[str, _Run] = defaultdict(_Run)
    for table in TABLES:
        if "run" in TABLES[table].partitions:
            for path, keys in places[table]:
                runs[keys["run"]].files[table].append((path, keys))
    rows = {row["run_id"]: row for row in small["runs"].to_dicts()} if len(small["runs"]) else {}
    known = small["prompts"].select("task", "prompt_id").unique() if len(small["prompts"]) else None
    for run_id in sorted({*runs, *rows}):
        run = runs.pop(run_id, _Run())
        for table, found in run.files.items():
            for path, keys in found:
                run.frames[table] += _read_shard(report, path, table, keys, rows.get(run_id))
        _check_run(report, run_id, run, rows.get(run_id), run_id in plans, known)
        _check_spectra_cover(report, run)
        if report.deep:
            _check_deep(report, run)


def _short(error: BaseException, path: Path) -> str:
    """An error as one line, without the path that the row names already."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.removeprefix(f"{path}: ").removeprefix(f"{path.parent}: ")


# ---------------------------------------------------------------- files


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The MANIFEST's entries, each {sha256, bytes, rows} under a path inside the folder.

    Raises
    ------
    DataError
        It is not JSON of that form, or names a path that leaves the folder.
    """
    path = folder / MANIFEST
    try:
        recorded = json.loads(store.read_bytes(path))
        files = dict(recorded["files"])
        version = int(recorded["version"])
        for entry in files.values():
            if not (
                re.fullmatch(r"[0-9a-f]{64}", entry["sha256"])
                and type(entry["bytes"]) is int
                and (entry["rows"] is None or type(entry["rows"]) is int)
            ):
                raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        raise DataError(f"{path}: not a readable MANIFEST; export the folder again") from None
    if version > store.FORMAT_VERSION:
        raise DataError(f"{path}: format version {version}; upgrade: pip install -U canopy-store")
    inside = "" if store.remote(folder) else os.path.realpath(folder)  # object storage has no links
    for name in files:
        parts = PurePosixPath(name).parts
        plain = name == "/".join(parts) != "" and ".." not in parts and not name.startswith("/")
        if not plain or "\\" in name or any(ord(c) < 32 for c in name):
            raise DataError(f"{path}: names {name!r}, a path out of the folder; do not trust it")
        if inside and not os.path.realpath(folder / name).startswith(inside + os.sep):
            raise DataError(f"{folder / name}: a link out of the folder; do not trust it")
    return files


def manifest_problem(path: Path, entry: dict[str, Any]) -> str | None:
    """How a file differs from its MANIFEST entry, if it does."""
    try:
        if not path.is_file():
            return "named in MANIFEST, not there"
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{size} bytes, {entry['bytes']} in MANIFEST"
        if store.sha256(path) != entry["sha256"]:
            return "its sha256 is not the one in MANIFEST"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _check_manifest(report: _Report) -> None:
    if not (report.root / MANIFEST).exists():
        return
    try:
        entries = read_manifest(report.root)
    except DataError as error:
        report.add(
            report.root / MANIFEST, "", _short(error, report.root / MANIFEST), "get the folder again"
        )
        return
    for name, entry in entries.items():
        what = manifest_problem(report.root / name, entry)
        if what:
            table = name.partition("/")[0]
            report.add(
                report.root / name,
                table if table in TABLES else "",
                what,
                "get it again; if you changed it yourself, export anew",
            )
    for table in TABLES:
        for path in store.files(report.root, table):
            if path.relative_to(report.root).as_posix() not in entries:
                report.add(
                    path, table, "not in MANIFEST", "move it out; if you added it yourself, export anew"
                )


def _places(report: _Report, table: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """Each of a table's files that stands where views look, with the values its path gives."""
    for path in sorted((report.root / table).rglob("*")):
        if path.is_dir() and not path.is_symlink():
            continue
        if path.name.startswith(".") and path.suffix == ".tmp":
            report.add(
                path,
                table,
                "a temporary file of a writer that was stopped",
                "remove it when no job runs",
                harmless=True,
            )
            continue
        keys = path_keys(table, path.relative_to(report.root).as_posix())
        if path.is_symlink() or not path.is_file():
            report.add(path, table, "a link, not a file", "put the file itself there")
        elif keys is None:
            report.add(path, table, "not where or how this table's files are named", "move it out")
        else:
            yield path, keys


def path_keys(table: str, name: str) -> dict[str, str] | None:
    """The hive values of a file's path in the store, None where no file of the table can stand."""
    top, *middle, last = name.split("/")
    keys = TABLES[table].partitions
    if top != table or len(middle) != len(keys) or "\0" in name:
        return None
    stem = last.removesuffix(".parquet")
    whole = last != stem != "" and store.quoted(store.unquoted(stem)) == stem
    if not (_SHARD.fullmatch(last) if "run" in keys else whole):
        return None
    found = {}
    for key, part in zip(keys, middle, strict=True):
        given, _, value = part.partition("=")
        if given != key or store.quoted(store.unquoted(value)) != value or not value:
            return None
        found[key] = store.unquoted(value)
    return found


def _check_work(report: _Report) -> None:
    """Compactions and removals that were stopped; what they left changes no view."""
    for path in sorted((report.root / ".work").glob("run=*")):
        run_id = store.unquoted(path.name.removeprefix("run="))
        if store.half_compacted(report.root, run_id):
            todo = f"finish it: canopy compact --store {report.root} --run {run_id}"
            report.add(path, "", "a compaction that was stopped half way", todo, harmless=True)
        elif path.is_dir():
            report.add(
                path,
                "",
                "files of a compaction or removal that was stopped",
                "compact or remove the run again",
                harmless=True,
            )


def _check_database(report: _Report) -> None:
    """canopy.duckdb opens, and has the views this package would write."""
    path = report.root / "canopy.duckdb"
    if not path.exists():
        return
    todo = "rebuild it: canopy init --store DIR"
    try:
        with duckdb.connect(str(path), read_only=True, config={"enable_external_access": False}) as con:
            found = {
                row[0]
                for row in con.execute(
                    "select view_name from duckdb_views() where not internal"
                ).fetchall()
            }
    except (duckdb.Error, RuntimeError, UnicodeDecodeError) as error:
        report.add(path, "", f"cannot be opened: {' '.join(str(error).split())[:100]}", todo)
        return
    missing = sorted({*TABLES, *sql.VIEWS} - found)
    if missing:  # of another version: this package's own queries never read it
        report.add(path, "", f"lacks the views {', '.join(missing)}", todo, harmless=True)


def _open(
    report: _Report, path: Path, table: str, keys: dict[str, str]
) -> Iterator[tuple[pq.FileMetaData, int, pa.Table]]:
    """The row groups of a file whose schema, checksums, statistics and path all agree."""
    try:
        metadata = store.check_file(path, table)
        file = pq.ParquetFile(store.opened(path), page_checksum_verification=True)
        found = file.schema_arrow
        dimension = None
        if table == "embeddings" and "embedding" in found.names:
            kind = found.field("embedding").type
            dimension = kind.list_size if pa.types.is_fixed_size_list(kind) else None
        wanted = arrow_schema(table, dimension)
        if not found.equals(wanted, check_metadata=True):
            report.add(path, table, f"schema differs: {_differing(found, wanted)}", _AGAIN)
            return
        for group in range(metadata.num_row_groups):
            rows = file.read_row_group(group)
            rows.validate(full=True)
            for name in (f.name for f in wanted if not f.nullable):
                if rows[name].null_count:
                    report.add(path, table, f"{name} is missing in {rows[name].null_count} rows", _AGAIN)
                    return
            what = _statistics(metadata.row_group(group), rows) or _path_differs(rows, table, keys)
            if what:
                report.add(path, table, what, _AGAIN)
                return
            yield metadata, group, rows
        # the views read with another reader, which may stumble where the first did not
        scan = (
            "select sum(hash(t)) from read_parquet(?) t" if report.deep else "from parquet_metadata(?)"
        )
        report.con.execute(scan, [glob.escape(str(path))]).fetchall()
    except CanopyError as error:
        what, _, todo = _short(error, path).partition("; ")
        report.add(path, table, what, todo or _AGAIN)
    except Exception as error:  # whatever a damaged file makes the reader say, it is one row here
        report.add(path, table, f"cannot be read: {_short(error, path)[:150]}", _AGAIN)


def _differing(found: pa.Schema, wanted: pa.Schema) -> str:
    if found.names != wanted.names:
        odd = sorted({*found.names} ^ {*wanted.names}) or ["their order"]
        return f"columns {', '.join(odd)[:100]}"
    odd = [f.name for f in wanted if not found.field(f.name).equals(f)]
    return ", ".join(odd) or "its label"


def _statistics(group: pq.RowGroupMetaData, rows: pa.Table) -> str | None:
    """What a row group's statistics say wrongly: a reader that prunes by them would lose rows."""
    if group.num_rows != rows.num_rows:
        return f"{rows.num_rows} rows, its footer says {group.num_rows}"
    for at in range(group.num_columns):
        column = group.column(at)
        said = column.statistics
        if said is None or "." in column.path_in_schema:
            continue  # lists: no view prunes by what is in them
        values = rows[column.path_in_schema]
        if said.has_null_count and said.null_count != values.null_count:
            return f"statistics of {column.path_in_schema} are wrong"
        if said.has_min_max:
            ends = pc.min_max(values).as_py()
            # long texts may be cut: then a bound is looser, never tighter; NaN has no order
            if (
                ends["min"] is not None
                and ends["min"] == ends["min"]
                and not (said.min <= ends["min"] and said.max >= ends["max"])
            ):
                return f"statistics of {column.path_in_schema} are wrong"
    return None


def _path_differs(rows: pa.Table, table: str, keys: dict[str, str]) -> str | None:
    if "run" in keys and (pc.unique(rows["run_id"]).to_pylist() or [keys["run"]]) != [keys["run"]]:
        return f"run_id is not {keys['run']!r}, as its path says"
    return None


def _small(report: _Report, table: str, places: list[tuple[Path, dict[str, str]]]) -> pl.DataFrame:
    """All rows of a small table, with its path columns and ``file``."""
    found = []
    for path, keys in places:
        for _, _, rows in _open(report, path, table, keys):
            frame = pl.DataFrame(rows).with_columns(
                pl.lit(str(path.relative_to(report.root))).alias("file"),
                *(pl.lit(v).alias(k) for k, v in keys.items()),
            )
            found.append(frame)
    return pl.concat(found, how="vertical_relaxed") if found else pl.DataFrame()


def _plans(report: _Report) -> dict[str, dict[str, Any]]:
    """The settings of each run planned, by run id; reports plans that cannot be read."""
    found = {}
    for path in sorted((report.root / "plans").glob("*")):
        if path.name.startswith("."):
            report.add(
                path,
                "",
                "a temporary file of a writer that was stopped",
                "remove it when no job runs",
                harmless=True,
            )
            continue
        try:
            settings = store.read_plan(path)["settings"]
            if path.name.startswith("run="):
                if store.plan_path(report.root, "run", settings["run_id"]) != path:
                    raise DataError(f"{path}: names another run, {settings['run_id']!r}")
                found[settings["run_id"]] = settings
        except (CanopyError, OSError, KeyError, TypeError, AttributeError) as error:
            report.add(path, "", _short(error, path), "take it from a copy")
    return found


def _check_small(
    report: _Report, small: dict[str, pl.DataFrame], plans: dict[str, dict[str, Any]]
) -> None:
    models, prompts, runs = (small[name] for name in ("models", "prompts", "runs"))
    for table, frame, key, named in (
        ("models", models, "model_id", ("family", "variant")),
        ("runs", runs, "run_id", ("run_id",)),
    ):
        if frame.is_empty():
            continue
        for row in frame.filter(pl.col(key).is_duplicated()).iter_rows(named=True):
            report.add(
                report.at(row["file"]), table, f"{key} {row[key]} is there twice", "keep one of them"
            )
        for row in frame.iter_rows(named=True):
            stem = "--".join(store.quoted(row[name]) for name in named)
            whole = f"{row['family']}/{row['variant']}" == row["model_id"]
            path = report.at(row["file"])
            if path.name != f"{stem}.parquet" or not whole:
                report.add(path, table, f"holds {row[key]}, which its name does not say", _AGAIN)
    if not runs.is_empty():
        known = set(models["model_id"]) if len(models) else set()
        for row in runs.iter_rows(named=True):
            path = report.at(row["file"])
            if row["model_id"] not in known:
                report.add(path, "runs", f"model {row['model_id']} is not in models", _AGAIN)
            if row["run_id"] not in plans:
                report.add(path, "runs", f"no readable plan of {row['run_id']}", "take it from a copy")
            elif store.canonical(plans[row["run_id"]]) != row["settings"]:
                report.add(path, "runs", "its settings are not its plan's", "take both from a copy")
    if not prompts.is_empty():
        said = prompts.group_by("task", "prompt_id").agg(
            pl.col("text", "messages").drop_nulls().n_unique(), pl.col("file").first()
        )
        for row in said.filter((pl.col("text") > 1) | (pl.col("messages") > 1)).iter_rows(named=True):
            what = f"prompt {row['prompt_id']} stands with two texts"
            report.add(report.at(row["file"]), "prompts", what, "keep one of them")


# ---------------------------------------------------------------- shards


def _read_shard(
    report: _Report, path: Path, table: str, keys: dict[str, str], run: dict[str, Any] | None
) -> list[pl.DataFrame]:
    """The shard's rows without its token arrays; reports what is wrong inside a row."""
    dropped = {
        "text",
        "token_ids",
        "logprob",
        "entropy",
        "eos_logprob",
        "top_token_ids",
        "top_logprobs",
        "embedding",
    }
    found = []
    for _, group, rows in _open(report, path, table, keys):
        where = f" (row group {group})" if group else ""
        for what in problems(table, rows, run):
            report.add(path, table, what + where, _AGAIN)
        kept = rows.select([name for name in rows.column_names if name not in dropped])
        frame = pl.DataFrame(kept).with_columns(pl.lit(v).alias(k) for k, v in keys.items())
        if table == "embeddings":
            frame = frame.with_columns(pl.lit(rows["embedding"].type.list_size).alias("dimension"))
        if table == "scores":
            lengths = rows["entropy"].combine_chunks().value_lengths()
            frame = frame.with_columns(pl.Series("scored", lengths.to_numpy(), pl.Int32))
        found.append(frame.with_columns(pl.lit(str(path.relative_to(report.root))).alias("file")))
    return found


# ---------------------------------------------------------------- runs


def _check_run(
    report: _Report,
    run_id: str,
    run: _Run,
    row: dict[str, Any] | None,
    planned: bool,
    prompts: pl.DataFrame | None,
) -> None:
    """Keys, references and counts of one run, whose row in ``runs`` is ``row``."""
    folders = sorted({path.parent for path, _ in run.files["rollouts"]})
    home = folders[0] if folders else report.root / "runs" / f"{store.quoted(run_id)}.parquet"
    if len(folders) > 1:
        report.add(folders[1], "rollouts", f"run {run_id} stands in {folders[0].name} too", _AGAIN)
    if row is None:
        what = f"run {run_id} is not complete; views leave it out"
        todo = "run its ingest again to finish it" if planned else "it has no plan: move it out"
        report.add(home, "rollouts", what, todo, harmless=True)
    rollouts = run.frame("rollouts")
    for table, frames in run.frames.items():
        if frames:
            _check_keys(report, run, table, rollouts, row is not None)
    if row is None:
        return
    path = report.root / "runs" / f"{store.quoted(run_id)}.parquet"
    counted: dict[str, Any] = {"n_rollouts": len(rollouts)}
    if not store.half_compacted(report.root, run_id):
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
        missing = asked if prompts is None else asked.join(prompts, on=["task", "prompt_id"], how="anti")
        if len(missing):
            first = missing["prompt_id"].sort()[0]
            what = f"{len(missing)} of its prompts are not in prompts, first {first}"
            report.add(home, "rollouts", what, _AGAIN)
    for key, value in counted.items():
        if row[key] != value:
            report.add(path, "runs", f"{key} is {row[key]} here and {value} in its files", _AGAIN)


def _check_keys(report: _Report, run: _Run, table: str, rollouts: pl.DataFrame, whole: bool) -> None:
    """Keys of one table of a run: each once, and each with its rollout."""
    frame = run.frame(table)
    keys = list(TABLES[table].keys)
    twice = frame.filter(pl.struct(keys).is_duplicated())
    if len(twice):
        first = twice.row(0, named=True)
        said = ", ".join(f"{key} {first[key]}" for key in keys if key != "run_id")
        report.add(
            report.at(first["file"]), table, f"{len(twice)} rows share a key, first {said}", _AGAIN
        )
    if table == "rollouts":
        return
    if (
        table == "embeddings"
        and frame.group_by("embedder").agg(pl.col("dimension").n_unique())["dimension"].max() != 1
    ):
        report.add(run.files[table][0][0].parent, table, "embeddings of different sizes", _AGAIN)
    if table == "embedding_spectra":
        frame = frame.explode("samples").rename({"samples": "sample"})
    pair = ["prompt_id", "sample"]
    if table == "scores" and len(rollouts):
        both = frame.join(rollouts.select(*pair, "n_tokens"), on=pair)
        odd = both.filter(pl.col("scored") != pl.col("n_tokens"))
        if len(odd):
            what = f"entropy is not as long as n_tokens in {len(odd)} rows"
            report.add(report.at(odd["file"][0]), table, what, _AGAIN)
    lost = frame.join(rollouts, on=pair, how="anti") if len(rollouts) else frame
    if len(lost) and (whole or len(rollouts)):
        first = lost.row(0, named=True)
        report.add(
            report.at(first["file"]),
            table,
            f"{len(lost)} rows have no rollout, first prompt "
            f"{first['prompt_id']} sample {first['sample']}",
            _AGAIN,
        )


def _check_logging(report: _Report, home: Path, rollouts: pl.DataFrame) -> None:
    """The view logging_check over this run alone, so that no other file can stand in its way."""
    sums = rollouts.select(
        "family",
        "variant",
        "task",
        "run_id",
        "surprisal_sum",
        "entropy_sum",
        pl.lit("all").alias("selection"),
    )
    con = report.con
    con.register("selected_rollouts", sums.to_arrow())
    for row in con.sql(sql.source("logging_check")).pl().filter(~pl.col("ok")).to_dicts():
        what = f"logging_check: z is {row['z']}: not logged from the distribution that was sampled"
        report.add(home, "rollouts", what, "log logprob and entropy from one policy")
    con.unregister("selected_rollouts")


def _check_spectra_cover(report: _Report, run: _Run) -> None:
    """Whether embeddings, selections and spectra of a run speak of the same rollouts."""
    rollouts, spectra = run.frame("rollouts"), run.frame("embedding_spectra")
    embeddings, selections = run.frame("embeddings"), run.frame("selections")
    pair = ["prompt_id", "sample"]
    if len(embeddings):
        done = set(spectra.filter(selection="all")["embedder"]) if len(spectra) else set()
        for embedder in sorted(set(embeddings["embedder"]) - done):
            where = report.at(embeddings.filter(embedder=embedder)["file"][0]).parent
            report.add(where, "embeddings", f"{embedder} has no spectra", "canopy ingest embed again")
    if spectra.is_empty() or rollouts.is_empty():
        return
    for name in spectra.select("embedder", "selection").unique().sort("embedder", "selection").rows():
        embedder, selection = name
        frame = spectra.filter(embedder=embedder, selection=selection)
        where = report.at(frame["file"][0]).parent
        covered = frame.explode("samples").select("prompt_id", pl.col("samples").alias("sample"))
        if selection == "all":
            wanted = rollouts.select(pair)
            todo = "canopy ingest embed again"
        else:
            wanted = covered[:0]
            if len(selections):
                wanted = selections.filter(selection=selection).select(pair)
            todo = "remove this folder and make the selection again"
        missing = len(wanted.join(covered, on=pair, how="anti"))
        extra = len(covered.join(wanted, on=pair, how="anti"))
        if missing or extra:
            report.add(
                where,
                "embedding_spectra",
                f"lacks {missing} rollouts of selection {selection}, has {extra} that are not of it",
                todo,
            )
        if selection != "all":
            continue
        mine = embeddings.filter(embedder=embedder) if len(embeddings) else embeddings
        if mine.is_empty():
            report.add(
                where,
                "embedding_spectra",
                "stands without its embeddings: length_terciles has no semantic_diversity",
                "embed again to have it",
                harmless=True,
            )
            continue
        absent = len(covered.join(mine, on=pair, how="anti"))
        if absent:
            folder = report.at(mine["file"][0]).parent
            report.add(folder, "embeddings", f"lacks {absent} that spectra were made of", _AGAIN)


def _check_deep(report: _Report, run: _Run) -> None:
    """Recomputes every spectrum of the run from its embeddings."""
    spectra = run.frame("embedding_spectra")
    if spectra.is_empty() or not run.files["embeddings"]:
        return
    for embedder in sorted(spectra["embedder"].unique()):
        frame = spectra.filter(embedder=embedder)
        try:
            place, matrix = _matrix(report, run, embedder)
        except Exception:  # a file of it is damaged, which is reported where it was read
            continue
        wrong: dict[str, list[str]] = defaultdict(list)
        for row in frame.iter_rows(named=True):
            rows = [place.get((row["prompt_id"], sample), -1) for sample in row["samples"]]
            if min(rows, default=-1) < 0:
                continue  # reported as missing
            if not np.isfinite(matrix[rows]).all():
                continue  # reported as not of unit length
            total, eigenvalues, distances = spectrum(matrix[rows])
            near = [
                len(found) == len(stored) and np.allclose(found, stored, rtol=0, atol=SPECTRUM)
                for found, stored in (
                    (total, row["embedding_sum"]),
                    (eigenvalues, row["eigenvalues"]),
                    (
                        np.array(distances, float)[len(rows) == 1 :],
                        np.array(row["semantic_distances"], float)[len(rows) == 1 :],
                    ),
                )
            ]
            if not all(near):
                wrong[row["file"]].append(row["prompt_id"])
        for file, prompts in sorted(wrong.items()):
            what = f"{len(prompts)} spectra are not those of the embeddings, first prompt {prompts[0]}"
            report.add(report.at(file), "embedding_spectra", what, _AGAIN)


def _matrix(report: _Report, run: _Run, embedder: str) -> tuple[dict[tuple[str, int], int], np.ndarray]:
    """Where each (prompt, sample) stands in all embeddings (rows, d) of a run."""
    mine = run.frame("embeddings").filter(embedder=embedder)
    files = [report.at(file) for file in mine["file"].unique(maintain_order=True)]
    lists = [store.read_rows(file, ["embedding"])["embedding"].combine_chunks() for file in files]
    matrix = np.concatenate([a.flatten().to_numpy().reshape(len(a), -1) for a in lists])
    keys = mine.select("prompt_id", "sample").iter_rows()
    return {key: at for at, key in enumerate(keys)}, matrix
