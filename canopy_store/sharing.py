"""Stores that travel: exported as a dataset that anyone can load, pulled with nothing taken on trust.

    OUT/README.md       the dataset card: a Hugging Face dataset as it stands, one config a table
    OUT/MANIFEST        JSON: sha256, bytes and rows of every file
    OUT/croissant.json  the same tables for Croissant readers
    OUT/views.sql       every view on relative paths; OUT/canopy.duckdb holds them ready
    OUT/canopy.json, plans, models, prompts, runs, rollouts, …    the store itself

A pull reads JSON and Parquet only, and nothing that the MANIFEST does not name.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from canopy_store import sql, store
from canopy_store.errors import (
    CanopyError,
    ConflictError,
    DataError,
    StoreError,
    UsageError,
    differences,
)
from canopy_store.schema import TABLES
from canopy_store.verify import MANIFEST, path_keys, read_manifest, table_files, verify

_ALWAYS = ("models", "prompts", "runs", "rollouts")  # without these a folder is no store
_TEXTS = {"rollouts": ("text", "token_ids", "top_token_ids"), "prompts": ("text", "messages")}
# Of a run, what may differ between two ingests that gave the same rollouts.
_VOLATILE = ("started_at", "finished_at", "wall_s", "energy_j", "energy_method", "versions", "n_shards")
_SMALL = 16 << 20  # bytes: the most a MANIFEST or plan may have
_DECODED = 1 << 30  # bytes a file may always decode to; above, no more than this many times its size:
_RATIO = 100


# ---------------------------------------------------------------- export


def export(
    root: str | Path, out: str | Path, *, tables: Iterable[str] | None = None,
    where: str | None = None, text: bool = True, embeddings: bool = True, license: str | None = None,
) -> Path:  # fmt: skip
    """The path of a new folder that is a store, a Hugging Face dataset and a Croissant dataset.

    Only complete runs travel, with their models and prompts. The folder appears whole, after
    `verify` found nothing wrong in it, or not at all.

    Parameters
    ----------
    root : path of the store
    out : the new folder; must not exist, or be empty
    tables : tables to take along besides models, prompts, runs and rollouts [default: all]
    where : an SQL condition on the table runs, as in ``family = 'llama' and task = 'math'``
    text : False leaves out prompts' and rollouts' texts, token_ids and top_token_ids; every measure
        stays computable
    embeddings : False leaves out the embeddings and keeps their spectra; of the measures only
        length_terciles' semantic_diversity goes
    license : identifier of the rollouts' licence, as in apache-2.0

    Raises
    ------
    UsageError
        An unknown table, a condition that is not SQL, a folder that is not empty.
    DataError
        No run fits, or verify finds a problem.
    """
    root, out = store.require(root).resolve(), Path(out).absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out}: is there and not empty; choose another folder")
    if root == out.resolve() or root in out.resolve().parents:
        raise UsageError(f"{out}: inside the store; choose a folder outside it")
    if license is not None and not (license.isascii() and license.isprintable() and license):
        raise UsageError(f"--license {license!r}: needs an identifier, as in apache-2.0")
    wanted = _tables(tables, embeddings)
    runs = _chosen(root, where)
    scratch = out.parent / f".{out.name}.{os.getpid()}.exporting"
    for old in out.parent.glob(f".{glob.escape(out.name)}.*.exporting"):
        if not store.alive(int("0" + re.sub(r"\D", "", old.suffixes[-2]))):
            shutil.rmtree(old, ignore_errors=True)  # of an export that was killed
    try:
        with store.writing(out):
            scratch.mkdir(parents=True)
        _fill(root, scratch, runs, wanted, text)
        sql.write_database(scratch)
        _describe(scratch, out.name, text, license)
        _require_sound(scratch)
        with store.writing(out):
            os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


def _tables(tables: Iterable[str] | None, embeddings: bool) -> set[str]:
    wanted = set(TABLES if tables is None else tables)
    unknown = sorted(wanted - set(TABLES))
    if unknown:
        raise UsageError(f"no table {unknown[0]!r}: there are {', '.join(TABLES)}")
    if "embeddings" in wanted:
        wanted.add("embedding_spectra")  # what makes the embeddings' measures
    if not embeddings:
        wanted.discard("embeddings")
    return wanted | set(_ALWAYS)


def _chosen(root: Path, where: str | None) -> list[dict[str, Any]]:
    with sql.connect(root) as con:
        try:
            found = con.sql(f"select * from runs where ({where or 'true'}) order by run_id").pl()
        except duckdb.Error as error:
            raise UsageError(f"--where {where}: {sql.explain(error)}") from None
    if found.is_empty():
        raise DataError(f"{root}: no complete run" + (f" where {where}" if where else " to export"))
    return found.to_dicts()


def _fill(
    root: Path, out: Path, runs: list[dict[str, Any]], tables: set[str], text: bool
) -> None:  # fmt: skip
    """Copies the runs' files, their plans, models and prompts."""
    names = {run["run_id"] for run in runs}
    values: dict[str, set[str]] = {}
    for table in (t for t in TABLES if t in tables and "run" in TABLES[t].partitions):
        for path in table_files(root, table):
            keys = path_keys(table, path.relative_to(root).as_posix())
            if keys is None or keys["run"] not in names:
                continue
            if keys.get("selection", "all") != "all" and "selections" not in tables:
                continue
            for key, value in keys.items():
                values.setdefault(key.removesuffix("_id"), set()).add(value)
            target = out / path.relative_to(root)
            if text or table not in _TEXTS:
                _copy(path, target)
            else:
                rows = store.read_rows(path)
                kept = {n: rows[n] for n in rows.column_names if n not in _TEXTS[table]}
                store.write_rows(target, table, kept)
    _fill_prompts(root, out, text)
    models = {row["model_id"]: (path, row["parent_id"]) for path, row in _rows(root, "models")}
    needed = {run["model_id"] for run in runs}
    while needed:
        known = models.pop(needed.pop(), None)
        if known is not None:
            _copy(known[0], out / known[0].relative_to(root))
            needed |= {known[1]} - {None}  # ancestors, as far as they are known
    for path in sorted((root / "plans").glob("[!.]*.json")):
        kind, _, name = path.stem.partition("=")
        if store.unquoted(name) in (names if kind == "run" else values.get(kind, ())):
            _copy(path, out / "plans" / path.name)
    for run in runs:
        path = root / "runs" / f"{store.quoted(run['run_id'])}.parquet"
        _copy(path, out / "runs" / path.name)
    _copy(root / "canopy.json", out / "canopy.json")


def _fill_prompts(root: Path, out: Path, text: bool) -> None:
    """The prompts of the exported rollouts, once each; a file that is needed whole is copied."""
    asked: dict[str, set[str]] = {}
    for path in table_files(out, "rollouts"):
        keys = path_keys("rollouts", path.relative_to(out).as_posix()) or {}
        ids = pq.ParquetFile(path).read(["prompt_id"])["prompt_id"].unique().to_pylist()
        asked.setdefault(keys["task"], set()).update(ids)
    for path in table_files(root, "prompts"):
        keys = path_keys("prompts", path.relative_to(root).as_posix()) or {}
        rows = store.read_rows(path).to_pylist()
        kept = [row for row in rows if row["prompt_id"] in asked.get(keys.get("task", ""), ())]
        if text and len(kept) == len(rows) > 0:
            _copy(path, out / path.relative_to(root))
            continue
        if not text:
            kept = [{**row, **dict.fromkeys(_TEXTS["prompts"])} for row in kept]
        store.add_prompts(out, keys.get("task", ""), kept)


def _rows(root: Path, table: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in table_files(root, table):
        for row in store.read_rows(path).to_pylist():
            yield path, row


def _copy(source: Path, target: Path, sha256: str | None = None) -> None:
    """Copies a file whole; one that is not of the hash given never appears."""
    digest = hashlib.sha256()
    with store.replacing(target) as file, open(source, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            file.write(block)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise DataError(f"{source}: changed while it was read; pull again")


def _require_sound(folder: Path, trusted: bool = True) -> None:
    problems = verify(folder, database=trusted).filter(~pl.col("harmless"))
    if len(problems):
        first = problems.row(0, named=True)
        more = f" (and {len(problems) - 1} more: canopy verify)" if len(problems) > 1 else ""
        raise DataError(f"{folder / first['file']}: {first['what']}{more}; {first['todo']}")


# ---------------------------------------------------------------- the card, Croissant, MANIFEST


def _describe(out: Path, name: str, text: bool, license: str | None) -> None:
    """Writes views.sql, croissant.json, README.md and, last, the MANIFEST."""
    found = {t: table_files(out, t) for t in TABLES}
    counts = {t: sum(pq.read_metadata(p).num_rows for p in files) for t, files in found.items() if files}
    name = store.quoted(name)  # as in paths: nothing that means something to YAML or Markdown
    _write_text(out / "views.sql", _views(out))
    card = _croissant(name, list(counts), license, _newest(out))
    _write_text(out / "croissant.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    _write_text(out / "README.md", _card(out, name, counts, text, license))
    entries = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        rows = pq.read_metadata(path).num_rows if path.suffix == ".parquet" else None
        entries[path.relative_to(out).as_posix()] = {
            "sha256": store.sha256(path), "bytes": path.stat().st_size, "rows": rows,
        }  # fmt: skip
    store.write_json(out / MANIFEST, {
        "format": "canopy_store", "version": store.FORMAT_VERSION, "files": entries,
    })  # fmt: skip


def _write_text(path: Path, text: str) -> None:
    with store.replacing(path) as file:
        file.write(text.encode())


def _newest(out: Path) -> str:
    return max(row["finished_at"] for _, row in _rows(out, "runs")).date().isoformat()


def _views(out: Path) -> str:
    statements = [sql.source("macros").rstrip().rstrip(";")]
    statements += [sql.table_view(out, table, "", False) for table in TABLES]
    statements += [f"create or replace view {v} as\n{sql.source(v).rstrip()}" for v in sql.VIEWS]
    return "-- Run inside this folder: duckdb -init views.sql\n" + ";\n\n".join(statements) + ";\n"


_YAML = {
    "VARCHAR": "string", "INTEGER": "int32", "BIGINT": "int64", "FLOAT": "float32",
    "DOUBLE": "float64", "TIMESTAMP": "timestamp[us]", "BOOLEAN": "bool",
}  # fmt: skip
_CROISSANT = {
    "VARCHAR": "sc:Text", "INTEGER": "sc:Integer", "BIGINT": "sc:Integer", "FLOAT": "sc:Float",
    "DOUBLE": "sc:Float", "TIMESTAMP": "sc:DateTime", "BOOLEAN": "sc:Boolean",
}  # fmt: skip


def _glob(table: str, *middle: str) -> str:
    return "/".join([table, *middle, *(["**"] if TABLES[table].partitions else []), "*.parquet"])


def _configs(out: Path, tables: Iterable[str]) -> Iterator[dict[str, Any]]:
    """One entry a table; then one a path value, where the key has several values and only paths say.

    `datasets` does not read hive keys from paths: rows of two embedders would look alike.
    """
    for table in tables:
        default = {"default": True} if table == "rollouts" else {}
        yield {"config_name": table, "data_files": _glob(table), **default}
        hidden = [key for key in TABLES[table].path_columns if key in TABLES[table].keys]
        if not hidden:
            continue
        folders = sorted({p.relative_to(out).parts[1:][: len(hidden)] for p in table_files(out, table)})
        for parts in folders if len(folders) > 1 else ():
            values = [part.partition("=")[2] for part in parts]
            yield {"config_name": "--".join([table, *values]), "data_files": _glob(table, *parts)}


def _features(table: str) -> list[dict[str, Any]]:
    found = []
    for column in TABLES[table].columns:
        depth = column.type.count("[]")
        kind: Any = _YAML[column.type.removesuffix("[]" * depth)]
        for level in range(depth):
            kind = {"list": kind} if level else kind
        found.append({"name": column.name, **({"list": kind} if depth else {"dtype": kind})})
    return found


def _card(out: Path, name: str, counts: Mapping[str, int], text: bool, license: str | None) -> str:
    """README.md: YAML whose values are JSON, which YAML reads, then what the folder is."""
    size = counts["rollouts"]
    bounds = (("n<1K", 10**3), ("1K<n<10K", 10**4), ("10K<n<100K", 10**5), ("100K<n<1M", 10**6),
              ("1M<n<10M", 10**7), ("10M<n<100M", 10**8), ("100M<n<1B", 10**9))  # fmt: skip
    known = license is not None and re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", license)
    head: dict[str, Any] = {"pretty_name": name}
    if license is not None:
        head |= {"license": license} if known else {"license": "other", "license_name": license}
    configs = list(_configs(out, counts))
    head |= {
        "task_categories": ["text-generation"],
        "tags": ["canopy_store", "rollouts", "entropy", "evaluation"],
        "size_categories": [next((label for label, top in bounds if size < top), "n>1B")],
        "configs": configs,
        "dataset_info": [
            {"config_name": config["config_name"],
             "features": _features(config["config_name"].partition("--")[0])}
            for config in configs
        ],
    }  # fmt: skip
    lines = ["---"]
    for key, value in head.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f"- {json.dumps(item)}" for item in value)]
        else:
            lines.append(f"{key}: {json.dumps(value)}")
    tables = [f"| {t} | {TABLES[t].grain} | {n:,} |" for t, n in counts.items()]
    runs = [
        f"| {store.quoted(r['family'])} | {store.quoted(r['variant'])} | {store.quoted(r['task'])} "
        f"| {r['n_prompts']:,} | {r['n_rollouts']:,} | {r['n_tokens']:,} |"
        for _, r in _rows(out, "runs")
    ]
    left = "" if text else "\nTexts and token ids are left out; every measure is computable without.\n"
    if "embedding_spectra" in counts and "embeddings" not in counts:
        left += "\nEmbeddings are left out; their spectra, which the measures are made of, are here.\n"
    return "\n".join(lines) + _BODY.format(
        name=name, left=left, tables="\n".join(tables), runs="\n".join(runs)
    )


_BODY = """
---

# {name}

Sampled rollouts of language models with the exact entropy, log-probability and ending probability of
every step, kept by canopy_store.
{left}
| table | one row | rows |
|---|---|---|
{tables}

| family | variant | task | prompts | rollouts | tokens |
|---|---|---|---|---|---|
{runs}

## Use

```python
import datasets, polars as pl

rollouts = datasets.load_dataset("PATH_OR_REPO", "rollouts", split="train")
rollouts = pl.scan_parquet("PATH/rollouts", hive_partitioning=True)  # with family, variant, task
```

Inside the folder, `duckdb canopy.duckdb "from model_metrics"` has every view; `views.sql` makes them in
any DuckDB. To merge the folder into a store of your own: `canopy pull PATH_OR_REPO --store S`.

Family, variant, task, embedder, selection, reward model and scorer stand in the paths as hive keys.
`datasets` leaves those keys out: runs says family, variant and task of each run_id, and a table with
several embedders has a config for each. Sizes, hashes and row counts of all files: `MANIFEST`.
"""

_CONTEXT = {
    "@language": "en", "@vocab": "https://schema.org/", "citeAs": "cr:citeAs", "column": "cr:column",
    "conformsTo": "dct:conformsTo", "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/", "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"}, "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"}, "extract": "cr:extract",
    "field": "cr:field", "fileProperty": "cr:fileProperty", "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet", "format": "cr:format", "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset", "jsonPath": "cr:jsonPath", "key": "cr:key",
    "md5": "cr:md5", "parentField": "cr:parentField", "path": "cr:path",
    "recordSet": "cr:recordSet", "references": "cr:references", "regex": "cr:regex",
    "repeated": "cr:repeated", "replace": "cr:replace", "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/", "separator": "cr:separator", "source": "cr:source",
    "subField": "cr:subField", "transform": "cr:transform",
}  # fmt: skip


def _croissant(name: str, tables: list[str], license: str | None, date: str) -> dict[str, Any]:
    """Croissant 1.0 (mlcommons.org/croissant/1.0): a file set and a record set for each table."""
    sets, records = [], []
    for table in tables:
        files = f"{table}-files"
        sets.append({
            "@type": "cr:FileSet", "@id": files, "name": files,
            "description": f"Parquet files of {table}.",
            "encodingFormat": "application/x-parquet", "includes": _glob(table),
        })  # fmt: skip
        fields = []
        for column in TABLES[table].columns:
            unit = f" [{column.unit}]" if column.unit else ""
            depth = column.type.count("[]")
            fields.append({
                "@type": "cr:Field", "@id": f"{table}/{column.name}", "name": column.name,
                "description": column.doc + unit,
                "dataType": _CROISSANT[column.type.removesuffix("[]" * depth)],
                **({"repeated": True} if depth else {}),
                "source": {"fileSet": {"@id": files}, "extract": {"column": column.name}},
            })  # fmt: skip
        for key in TABLES[table].path_columns:
            fields.append({
                "@type": "cr:Field", "@id": f"{table}/{key}", "name": key, "dataType": "sc:Text",
                "description": "From the path; bytes outside letters and digits percent-encoded.",
                "source": {"fileSet": {"@id": files}, "extract": {"fileProperty": "fullpath"},
                           "transform": {"regex": f".*?{key}=([^/]+)/.*"}},
            })  # fmt: skip
        records.append({
            "@type": "cr:RecordSet", "@id": table, "name": table, "description": TABLES[table].grain,
            "key": [{"@id": f"{table}/{key}"} for key in TABLES[table].keys], "field": fields,
        })  # fmt: skip
    return {
        "@context": _CONTEXT, "@type": "sc:Dataset", "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": name, "description": "Sampled rollouts of language models with the exact entropy of "
        "every step, kept by canopy_store.", "version": "1.0.0", "datePublished": date,
        "citeAs": "Measures: Fine-Tuning Improves Information Conveyance in Language Models, "
        "arXiv 2605.30844.", **({"license": license} if license else {}),
        "url": "https://arxiv.org/abs/2605.30844",
        "distribution": sets, "recordSet": records,
    }  # fmt: skip


# ---------------------------------------------------------------- pull


def pull(source: str | Path, root: str | Path) -> list[str]:
    """The ids of the runs of an exported folder, merged into the store; made if it is missing.

    Everything is checked before anything is written: hashes and sizes against the MANIFEST, paths,
    the size each file decodes to, all that `verify` checks, and conflicts with what is stored. Then
    run after run is copied, its row in runs last: an interrupted pull resumes, the same run twice is
    one run. Nothing of the source is executed; JSON and Parquet alone are read.

    Parameters
    ----------
    source : a folder that `export` wrote, or the id of a dataset on the Hugging Face hub
    root : path of the store

    Raises
    ------
    DataError
        The folder is damaged, or holds what no export writes.
    ConflictError
        Something of the same name is stored with other values; names what differs.
    """
    if Path(source).exists():
        return _pull_folder(Path(source), Path(root))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise StoreError(f"{source}: no such folder, and not a hub id as in user/name")
    hub = _hub()
    with tempfile.TemporaryDirectory(prefix="canopy-pull-") as folder:
        try:
            hub.snapshot_download(str(source), repo_type="dataset", local_dir=folder)
        except Exception as error:  # the client's own errors are many; none may show a token
            raise StoreError(f"{source}: cannot be downloaded: {_no_token(error)}") from None
        return _pull_folder(Path(folder), Path(root))


def _pull_folder(folder: Path, root: Path) -> list[str]:
    entries = _check_source(folder)
    _require_sound(folder, trusted=False)
    runs = [row for _, row in _rows(folder, "runs")]
    groups = _groups(entries)
    if (root / "canopy.json").is_file():
        _check_conflicts(folder, store.require(root), runs, groups, entries)
    for place in (root, root / "plans", root / "models", root / "runs"):
        store.remove_leftovers(place)  # of a pull that was killed
    root = store.init(root)
    for _, model in sorted(_rows(folder, "models"), key=lambda found: found[1]["generation"]):
        store.add_model(root, model)
    _add_prompts(folder, root)
    for path in sorted((folder / "plans").glob("*.json")):
        if not path.name.startswith("run=") and not (root / "plans" / path.name).exists():
            _copy(path, root / "plans" / path.name, entries[f"plans/{path.name}"]["sha256"])
    for run in runs:
        _merge_run(folder, root, run, groups, entries)
    sql.write_database(root)
    return sorted(run["run_id"] for run in runs)


def _check_source(folder: Path) -> dict[str, dict[str, Any]]:
    """The MANIFEST's entries, once every path and size in it is one that an export writes."""
    if not (folder / MANIFEST).is_file():
        raise DataError(f"{folder}: no {MANIFEST} here; make a folder to share with: canopy export")
    if (folder / MANIFEST).stat().st_size > _SMALL:
        raise DataError(f"{folder / MANIFEST}: over {_SMALL:,} bytes; do not trust it")
    entries = read_manifest(folder)
    beside = {"README.md", "croissant.json", "views.sql", "canopy.duckdb", "canopy.json"}
    for name, entry in entries.items():
        table = name.partition("/")[0]
        keys = path_keys(table, name) if table in TABLES else None
        if keys is None and name not in beside and not re.fullmatch(r"plans/[^/.][^/]*\.json", name):
            raise DataError(f"{folder / MANIFEST}: names {name!r}, which no export writes")
        try:
            for key, value in (keys or {}).items():
                store.check_name(key, value)
        except UsageError as error:
            raise DataError(f"{folder / MANIFEST}: {error}") from None
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}: named in {MANIFEST}, not there; get the folder again")
        if keys is not None:
            _check_size(folder / name, table, entry)
        elif name.endswith(".json") and (folder / name).stat().st_size > _SMALL:
            raise DataError(f"{folder / name}: over {_SMALL:,} bytes; do not trust it")
    for top in ("plans", *TABLES):
        for path in (folder / top).rglob("*"):
            listed = path.relative_to(folder).as_posix() in entries
            if not listed and (path.is_symlink() or not path.is_dir()):
                raise DataError(f"{path}: not in {MANIFEST}; remove it, or get the folder again")
    return entries


def _check_size(path: Path, table: str, entry: Mapping[str, Any]) -> None:
    """Refuses a file that would decode to far more than it is: 1 GiB, and 100 times its size."""
    size, claimed = path.stat().st_size, 0
    most = max(_DECODED, _RATIO * size)
    try:
        metadata = store.check_file(path, table)
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                # encoded values may repeat in no space at all, so they are counted as well
                claimed += max(column.total_uncompressed_size, 8 * column.num_values, 8 * group.num_rows)
        if claimed <= most and metadata.num_rows == entry["rows"]:
            claimed += _text_bytes(path, metadata)
    except CanopyError:
        raise
    except Exception as error:  # whatever a forged file makes the reader say, it is one line here
        raise DataError(f"{path}: cannot be read: {' '.join(str(error).split())[:150]}") from None
    if claimed > most or metadata.num_rows != entry["rows"]:
        raise DataError(
            f"{path}: {size:,} bytes that decode to {metadata.num_rows:,} rows, over {claimed:,} bytes "
            f"({MANIFEST} says {entry['rows']} rows); do not trust it"
        )


def _text_bytes(path: Path, metadata: pq.FileMetaData) -> int:
    """Bytes that the file's texts decode to: one long text may stand for every row.

    Read as a dictionary and places in it, so that they are counted without being written out.
    """
    texts = [f.name for f in metadata.schema.to_arrow_schema() if pa.types.is_string(f.type)]
    file = pq.ParquetFile(path, read_dictionary=texts)
    found = 0
    for at in range(metadata.num_row_groups if texts else 0):
        for column in file.read_row_group(at, columns=texts).columns:
            for chunk in column.chunks:
                lengths = pc.binary_length(chunk.dictionary).take(chunk.indices)
                found += pc.sum(lengths.cast(pa.int64())).as_py() or 0
    return found


# (run, folder in the store, end of the file names): each file's name in the source and its place
_Groups = dict[tuple[str, str, str], list[tuple[str, Path]]]


def _groups(names: Iterable[str]) -> _Groups:
    """The files of runs, those together that hold one thing: a table's shards of a run.

    Scores under several policies share a folder; the policy is in their names' ends.
    """
    found: _Groups = {}
    for name in sorted(names):
        table = name.partition("/")[0]
        keys = path_keys(table, name) if table in TABLES else None
        if keys and "run" in keys:
            # the target is built from the values, never from the path that was given
            where, last = store.folder(Path(), table, **keys), Path(name).name
            group = (keys["run"], str(where), last.partition(".")[2])
            found.setdefault(group, []).append((name, where / last))
    return found


def _check_conflicts(
    folder: Path, root: Path, runs: list[dict[str, Any]],
    groups: _Groups,
    entries: Mapping[str, Mapping[str, Any]],
) -> None:  # fmt: skip
    """Raises ConflictError, before anything is written, where a stored name means something else."""
    for path in sorted((folder / "plans").glob("*.json")):
        kind, _, name = path.stem.partition("=")
        target = root / "plans" / path.name
        if target.exists():
            _same(f"{kind} {store.unquoted(name)}", *(store.read_plan(p)["settings"]
                                                     for p in (target, path)))  # fmt: skip
    models = {row["model_id"]: row for _, row in _rows(root, "models")}
    for _, row in _rows(folder, "models"):
        said = {k: v for k, v in row.items() if v is not None and k != "source"}
        known = models.get(row["model_id"], said)
        _same(f"model {row['model_id']}", {k: known[k] for k in said}, said)
    texts = {(k["task"], r["prompt_id"]): r for k, r in _prompts(root)}
    for keys, row in _prompts(folder):
        known = texts.get((keys["task"], row["prompt_id"]), row)
        both = [c for c in _TEXTS["prompts"] if known[c] is not None and row[c] is not None]
        _same(f"prompt {row['prompt_id']}", *({c: r[c] for c in both} for r in (known, row)))
    for run in runs:
        complete = store.is_complete(root, run["run_id"])
        if complete:
            path = root / "runs" / f"{store.quoted(run['run_id'])}.parquet"
            stored = store.read_rows(path).to_pylist()[0]
            _same(f"run {run['run_id']}", *(
                {k: v for k, v in row.items() if k not in _VOLATILE} for row in (stored, run)
            ))  # fmt: skip
        for (run_id, where, end), files in groups.items():
            if run_id == run["run_id"]:
                _check_group(folder, root / where, end, files, entries, complete)


def _same(what: str, stored: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    if stored != asked:
        raise ConflictError(
            f"{what} is stored with other values: {differences(stored, asked)[:400]}; nothing was "
            "pulled: pull into another store, or remove what is here first"
        )


def _prompts(root: Path) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    for path, row in _rows(root, "prompts"):
        yield path_keys("prompts", path.relative_to(root).as_posix()) or {"task": ""}, row


def _unfinished(
    stored: list[Path], files: list[tuple[str, Path]], entries: Mapping[str, Mapping[str, Any]]
) -> bool:
    """Whether what is stored is some of these files and no other: a pull that was stopped, or done."""
    pulled = {target.name: entries[name]["sha256"] for name, target in files}
    return all(pulled.get(path.name) == store.sha256(path) for path in stored)


def _check_group(
    folder: Path, where: Path, end: str, files: list[tuple[str, Path]],
    entries: Mapping[str, Mapping[str, Any]], complete: bool,
) -> None:  # fmt: skip
    """Raises ConflictError where the store's folder ``where`` holds other rows than the source's."""
    stored = sorted(where.glob(f"*.{end}"))
    if _unfinished(stored, files, entries):
        return
    if not complete:
        raise ConflictError(f"{where}: its run is begun here and not complete; finish it, or remove "
                            "it: canopy remove-run")  # fmt: skip
    table = files[0][0].partition("/")[0]
    here, there = _comparable(stored, table), _comparable([folder / name for name, _ in files], table)
    # a column that one side leaves out says nothing: texts may have been dropped on the way
    said = [c for c in here.columns if here[c].null_count() < len(here)
            and there[c].null_count() < len(there)]  # fmt: skip
    if len(here) != len(there):
        what = f"{len(here)} rows here, {len(there)} in {folder}"
    elif here.select(said).equals(there.select(said)):
        return
    else:
        what = f"other values of {', '.join(c for c in said if not here[c].equals(there[c]))}"
    raise ConflictError(f"{where}: {what}; nothing was pulled: pull into another store, or remove "
                        "what is here first")  # fmt: skip


def _comparable(paths: list[Path], table: str) -> pl.DataFrame:
    """The rows in key order, of what says whether two are the same: sums stand for their arrays."""
    lists = {c.name for c in TABLES[table].columns if c.type.endswith("[]")} - {"embedding", "samples"}
    keys = [key for key in TABLES[table].keys if any(c.name == key for c in TABLES[table].columns)]
    names = [c.name for c in TABLES[table].columns if c.name not in lists]
    frames = [pl.DataFrame(pq.ParquetFile(path).read(names)) for path in paths]
    return pl.concat(frames).sort(keys)


def _add_prompts(folder: Path, root: Path) -> None:
    """Adds the prompts that the store lacks."""
    known = {(keys["task"], row["prompt_id"]) for keys, row in _prompts(root)}
    new: dict[str, list[dict[str, Any]]] = {}
    for keys, row in _prompts(folder):
        if (keys["task"], row["prompt_id"]) not in known:
            new.setdefault(keys["task"], []).append(row)
    for task, rows in new.items():
        store.add_prompts(root, task, rows)


def _merge_run(
    folder: Path, root: Path, run: Mapping[str, Any],
    groups: _Groups,
    entries: Mapping[str, Mapping[str, Any]],
) -> None:  # fmt: skip
    """Copies what the store lacks of a run: plan, rollouts, the rest, and last the row in runs."""
    plan = f"{store.plan_path(Path(), 'run', run['run_id'])}"
    if not (root / plan).exists():
        _copy(folder / plan, root / plan, entries[plan]["sha256"])
    order = [table for table in TABLES if table not in _ALWAYS]
    mine = [(group, files) for group, files in groups.items() if group[0] == run["run_id"]]
    # embeddings before spectra: a shard that has its spectra is done
    mine.sort(key=lambda found: ["rollouts", *order].index(found[1][0][0].partition("/")[0]))
    for (_, where, end), files in mine:
        if not _unfinished(sorted((root / where).glob(f"*.{end}")), files, entries):
            continue  # there already in other files, and compared
        store.remove_leftovers(root / where)
        for name, target in files:
            if not (root / target).exists():
                _copy(folder / name, root / target, entries[name]["sha256"])
    last = f"runs/{store.quoted(run['run_id'])}.parquet"
    if not (root / last).exists():
        _copy(folder / last, root / last, entries[last]["sha256"])


# ---------------------------------------------------------------- push, remove


def push(
    folder: str | Path, repo: str, *, dry_run: bool = False, private: bool = True
) -> list[tuple[str, int]]:
    """Name and bytes of each file of an exported folder that was sent to the Hugging Face hub.

    Parameters
    ----------
    folder : a folder that `export` wrote, unchanged since
    repo : id of the dataset, user/name; made if it is missing, closed to others unless ``private``
        is False
    dry_run : sends nothing and asks for no network
    """
    folder = Path(folder)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise UsageError(f"{repo}: not the id of a dataset, as in user/name")
    entries = _check_source(folder)
    _require_sound(folder)
    names = sorted([MANIFEST, *entries])
    sizes = [(name, (folder / name).stat().st_size) for name in names]
    if dry_run:
        return sizes
    hub = _hub()
    try:
        api = hub.HfApi()
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        # only what the MANIFEST names: notes and caches beside it stay at home
        api.upload_folder(
            repo_id=repo, folder_path=str(folder), repo_type="dataset",
            allow_patterns=[re.sub(r"([*?\[])", r"[\1]", name) for name in names],
        )  # fmt: skip
    except Exception as error:  # the client's own errors are many; none may show a token
        raise StoreError(f"{repo}: cannot be sent: {_no_token(error)}; push again to resume") from None
    return sizes


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UsageError(
            "the hub needs huggingface_hub: install it with: pip install 'canopy-store[hub]'"
        ) from None
    return huggingface_hub


def _no_token(error: Exception) -> str:
    return re.sub(r"hf_\w+|(?i:bearer)\s+\S+", "hf_…", " ".join(str(error).split()))[:300]


def remove_run(root: str | Path, run_id: str) -> int:
    """How many files of a run were removed: its row in runs first, its plan last.

    Readers see the run whole or not at all; a removal that was stopped is finished by calling it
    again. Models, prompts and the rules of selections stay: other runs may need them.

    Raises
    ------
    StoreError
        No run of this name, complete or begun.
    """
    root = store.require(root)
    files = [
        path for table in TABLES if "run" in TABLES[table].partitions
        for path in (root / table).rglob(f"run={_escaped(run_id)}/*") if path.is_file()
    ]  # fmt: skip
    row = root / "runs" / f"{store.quoted(run_id)}.parquet"
    plan = store.plan_path(root, "run", run_id)
    doomed = [path for path in (row, *files, plan) if path.exists()]
    if not doomed:
        raise StoreError(f"--run {run_id}: no run of this name; see: canopy status")
    with store.writing(root):
        for path in doomed:
            path.unlink()
            for folder in path.parents:
                if folder == root or folder.parent == root or any(folder.iterdir()):
                    break
                folder.rmdir()
    sql.write_database(root)
    return len(doomed)


def _escaped(value: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", store.quoted(value))
