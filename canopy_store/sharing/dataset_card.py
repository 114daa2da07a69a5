"""What an exported folder says of itself: dataset card, Croissant, views.sql, MANIFEST."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from canopy_store import sql, store
from canopy_store.schema import TABLES, file_columns
from canopy_store.upkeep.verify import MANIFEST


def describe(out: Path, name: str, text: bool, license: str | None) -> None:
    """Writes views.sql, croissant.json, README.md and, last, the MANIFEST.

    Parameters
    ----------
    out : folder that is a store already
    name : of the dataset
    text : whether texts are in it
    license : identifier of the rollouts' licence
    """
    records = store.records(out)
    rows = {name: said["rows"] for record in records for name, said in record.files.items()}
    counts = {t: sum(rows[n] for n in names) for t in TABLES if (names := store.names(records, t))}
    name = store.quoted(name)  # as in paths: nothing that means something to YAML or Markdown
    _write_text(out / "views.sql", _views(out))
    card = _croissant(name, list(counts), license, _newest(out))
    _write_text(out / "croissant.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    _write_text(out / "README.md", _card(out, name, counts, text, license))
    files = sorted(path for path in out.rglob("*") if path.is_file())
    store.write_json(
        out / MANIFEST,
        {
            "format": "canopy_store",
            "version": store.FORMAT_VERSION,
            "files": {path.relative_to(out).as_posix(): manifest_entry(path) for path in files},
        },
    )


def manifest_entry(path: Path) -> dict[str, Any]:
    """A file's line in a MANIFEST: sha256, bytes, and rows where it is Parquet."""
    rows = pq.read_metadata(path).num_rows if path.suffix == ".parquet" else None
    return {"sha256": store.sha256(path), "bytes": path.stat().st_size, "rows": rows}


def _write_text(path: Path, text: str) -> None:
    with store.replacing(path) as file:
        file.write(text.encode())


def _newest(out: Path) -> str:
    finished = [row["finished_at"].isoformat() for _, row in store.table_rows(out, "runs")]
    return max(finished or [str(record.committed_at) for record in store.records(out)])[:10]


def _views(out: Path) -> str:
    statements = ";\n\n".join(sql.statements(out))
    return f"-- Run inside this folder: duckdb -init views.sql\n{statements};\n"


_YAML = {
    "VARCHAR": "string",
    "INTEGER": "int32",
    "BIGINT": "int64",
    "FLOAT": "float32",
    "DOUBLE": "float64",
    "TIMESTAMP": "timestamp[us]",
    "BOOLEAN": "bool",
}
_CROISSANT = {
    "VARCHAR": "sc:Text",
    "INTEGER": "sc:Integer",
    "BIGINT": "sc:Integer",
    "FLOAT": "sc:Float",
    "DOUBLE": "sc:Float",
    "TIMESTAMP": "sc:DateTime",
    "BOOLEAN": "sc:Boolean",
}


def _glob(table: str) -> str:
    return "/".join([table, *(["**"] if TABLES[table].partitions else []), "*.parquet"])


def _features(table: str) -> list[dict[str, Any]]:
    features = []
    for column in file_columns(table):
        depth = column.type.count("[]")
        kind: Any = _YAML[column.type.removesuffix("[]" * depth)]
        for level in range(depth):
            kind = {"list": kind} if level else kind
        features.append({"name": column.name, **({"list": kind} if depth else {"dtype": kind})})
    return features


def _card(out: Path, name: str, counts: Mapping[str, int], text: bool, license: str | None) -> str:
    """README.md: YAML whose values are JSON, which YAML reads, then what the folder is."""
    main = "rollouts" if "rollouts" in counts else max(counts, key=lambda table: counts[table])
    size = counts[main]
    bounds = (
        ("n<1K", 10**3),
        ("1K<n<10K", 10**4),
        ("10K<n<100K", 10**5),
        ("100K<n<1M", 10**6),
        ("1M<n<10M", 10**7),
        ("10M<n<100M", 10**8),
        ("100M<n<1B", 10**9),
    )
    known = license is not None and re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", license)
    head: dict[str, Any] = {"pretty_name": name}
    if license is not None:
        head |= {"license": license} if known else {"license": "other", "license_name": license}
    head |= {
        "task_categories": ["text-generation"],
        "tags": ["canopy_store", "rollouts", "entropy", "evaluation"],
        "size_categories": [next((label for label, top in bounds if size < top), "n>1B")],
        "configs": [
            {
                "config_name": table,
                "data_files": _glob(table),
                **({"default": True} if table == main else {}),
            }
            for table in counts
        ],
        "dataset_info": [{"config_name": table, "features": _features(table)} for table in counts],
    }
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
        for _, r in store.table_rows(out, "runs")
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
import datasets, pandas, polars as pl

rollouts = datasets.load_dataset("PATH_OR_REPO", "rollouts", split="train")
rollouts = pl.scan_parquet("PATH/rollouts")
rollouts = pandas.read_parquet("PATH/rollouts", partitioning=None)  # what the paths say is in the files
```

Inside the folder, `duckdb canopy.duckdb "from model_metrics"` has every view; `views.sql` makes them in
any DuckDB. To merge the folder into a store of your own: `canopy pull PATH_OR_REPO --store S`.

Family, variant, task, embedder, selection, reward model and scorer are columns of the files, and hive
keys of their paths. Sizes, hashes and row counts of all files: `MANIFEST`.
"""

_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def _croissant(name: str, tables: list[str], license: str | None, date: str) -> dict[str, Any]:
    """Croissant 1.0 (mlcommons.org/croissant/1.0): a file set and a record set for each table."""
    sets, records = [], []
    for table in tables:
        files = f"{table}-files"
        sets.append(
            {
                "@type": "cr:FileSet",
                "@id": files,
                "name": files,
                "description": f"Parquet files of {table}.",
                "encodingFormat": "application/x-parquet",
                "includes": _glob(table),
            }
        )
        fields = []
        for column in file_columns(table):
            unit = f" [{column.unit}]" if column.unit else ""
            depth = column.type.count("[]")
            fields.append(
                {
                    "@type": "cr:Field",
                    "@id": f"{table}/{column.name}",
                    "name": column.name,
                    "description": column.doc + unit,
                    "dataType": _CROISSANT[column.type.removesuffix("[]" * depth)],
                    **({"repeated": True} if depth else {}),
                    "source": {"fileSet": {"@id": files}, "extract": {"column": column.name}},
                }
            )
        records.append(
            {
                "@type": "cr:RecordSet",
                "@id": table,
                "name": table,
                "description": TABLES[table].grain,
                "key": [{"@id": f"{table}/{key}"} for key in TABLES[table].keys],
                "field": fields,
            }
        )
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": name,
        "description": "Sampled rollouts of language models with the exact entropy of "
        "every step, kept by canopy_store.",
        "version": "1.0.0",
        "datePublished": date,
        "citeAs": "Measures: Fine-Tuning Improves Information Conveyance in Language Models, "
        "arXiv 2605.30844.",
        **({"license": license} if license else {}),
        "url": "https://arxiv.org/abs/2605.30844",
        "distribution": sets,
        "recordSet": records,
    }
