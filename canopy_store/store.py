"""The store's folder: layout, atomic writes, runs that resume.

    STORE/canopy.json                                       format version
    STORE/models/<model>.parquet                            one row a file
    STORE/prompts/task=…/<content hash>.parquet
    STORE/rollouts/family=…/variant=…/task=…/run=…/part-00000.parquet
    STORE/embeddings/embedder=…/run=…/part-00000.parquet    likewise rewards, scores
    STORE/embedding_spectra/embedder=…/selection=…/run=…/part-00000.parquet
    STORE/runs/<run>.parquet                                written last: the run is complete
    STORE/selections/selection=…/run=…/part-00000.parquet   one file a run
    STORE/plans/<name>.json                                 settings that a resumed job must repeat
    STORE/canopy.duckdb                                     views only, rebuilt at will

A shard's name follows from what it holds, so writing it again replaces it. A file is written under a
temporary name in its own folder, flushed to disk, then renamed: readers never see half a file.
"""

from __future__ import annotations

import datetime
import errno
import hashlib
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq

from canopy_store.errors import ConflictError, DataError, StoreError, UsageError, differences
from canopy_store.schema import FORMAT_VERSION, METADATA_KEY, TABLES, arrow_schema

# Float lists are smaller byte-stream-split, then zstd (figures: docs/performance.md).
_SPLIT = ("logprob", "entropy", "eos_logprob", "embedding", "top_logprobs")
_ROWS_PER_GROUP = 4096


def init(root: str | Path) -> Path:
    """The path of the store at ``root``, made if it is missing."""
    root = Path(root)
    if (root / "canopy.json").is_file():
        return require(root)
    if root.is_file() or (root.is_dir() and any(p.suffix != ".tmp" for p in root.iterdir())):
        raise StoreError(f"{root}: not a store and not an empty folder; choose another --store")
    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
    write_json(root / "canopy.json", {"format": "canopy_store", "version": FORMAT_VERSION})
    return root


def require(root: str | Path) -> Path:
    """The path of an existing store, after a check of its format version.

    Raises
    ------
    StoreError
        Not a store, or one written by a newer version of this package.
    """
    root = Path(root)
    if not (root / "canopy.json").is_file():
        raise StoreError(f"{root}: no store here; make one with: canopy init --store {root}")
    try:
        version = json.loads((root / "canopy.json").read_text())["version"]
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{root / 'canopy.json'}: not readable as JSON with a version") from None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise StoreError(
            f"{root}: format version {version}, this package reads up to {FORMAT_VERSION}; "
            "upgrade it: pip install -U canopy-store"
        )
    return root


def quoted(value: str) -> str:
    """``value`` as one path component that cannot leave its folder (percent-encoded)."""
    name = quote(value, safe=" ")
    return name.replace(".", "%2E") if set(name) <= {"."} else name


def unquoted(name: str) -> str:
    """The value that `quoted` made a path component of."""
    return unquote(name)


def canonical(value: Any) -> str:
    """A JSON value as text that follows from it alone."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def folder(root: Path, table: str, **keys: str) -> Path:
    """The folder of a table's partition: every hive key must be given, in the table's order."""
    parts = [f"{key}={quoted(keys[key])}" for key in TABLES[table].partitions]
    return root.joinpath(table, *parts)


def shard_path(folder: Path, shard: int) -> Path:
    """The path of a partition's shard of this number."""
    return folder / f"part-{shard:05d}.parquet"


def files(root: Path, table: str) -> list[Path]:
    """A table's Parquet files, in name order; temporary files end in .tmp and are never among them."""
    return sorted((root / table).rglob("*.parquet"))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failing disk into one line; what was stored before is untouched."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else (error.strerror or str(error))
        todo = "free some space" if full else "mend that"
        raise StoreError(
            f"{path}: cannot write: {reason}; nothing stored is lost: {todo} and run it again"
        ) from None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes ``path`` whole when the block ends, or not at all."""
    temporary = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the rename itself must survive a power cut
        finally:
            os.close(directory)


def remove_leftovers(folder: Path) -> None:
    """Removes temporary files in ``folder`` whose writer, on this machine, is no longer alive."""
    for path in folder.glob(f".*.{platform.node()}.*.tmp"):
        pid = path.name.split(".")[-2]
        if pid.isdigit() and not alive(int(pid)):
            path.unlink(missing_ok=True)


def alive(pid: int) -> bool:
    """Whether a process of this id runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes ``value`` as JSON, atomically."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def write_rows(path: Path, table: str, columns: Mapping[str, Any], **schema: Any) -> None:
    """Writes a table's columns as one Parquet file, atomically; columns not given are NULL."""
    target = arrow_schema(table, **schema)
    rows = len(next(iter(columns.values())))
    arrays = []
    for field in target:
        values = columns.get(field.name)
        if values is None:
            arrays.append(pa.nulls(rows, field.type))
        elif isinstance(values, (pa.Array, pa.ChunkedArray)):
            arrays.append(values.cast(field.type))
        else:
            arrays.append(pa.array(values, field.type))
    with replacing(path) as file:
        write_parquet(pa.Table.from_arrays(arrays, schema=target), file)


def write_parquet(rows: pa.Table, file: BinaryIO) -> None:
    """Writes rows in the store's encoding: zstd, float lists byte-stream-split."""
    leaves = []
    for name in rows.schema.names:
        kind = rows.schema.field(name).type
        depth = 0
        while pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
            kind, depth = kind.value_type, depth + 1
        leaves.append((name, name + ".list.element" * depth, kind))
    split = [leaf for name, leaf, _ in leaves if name in _SPLIT]
    pq.write_table(
        rows,
        file,
        compression="zstd",
        row_group_size=_ROWS_PER_GROUP,
        use_dictionary=[leaf for _, leaf, kind in leaves if not pa.types.is_floating(kind)],
        use_byte_stream_split=split,
        store_schema=True,
        write_page_checksum=True,  # a flipped bit in a page is found, whatever it decodes to
    )


def read_rows(path: Path) -> pa.Table:
    """The rows of one of the store's Parquet files.

    Raises
    ------
    DataError
        The file is truncated, not ours, or of a newer version.
    """
    check_file(path)
    return pq.ParquetFile(path).read()


def check_file(path: Path, expected: str | None = None) -> pq.FileMetaData:
    """A Parquet file's metadata, once its footer proves readable and ours.

    Raises
    ------
    DataError
        The file is truncated, not Parquet, not written by this package, or of a newer version.
    """
    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowInvalid, OSError):
        raise DataError(
            f"{path}: truncated or not a Parquet file; remove it and run its ingest again"
        ) from None
    label = (metadata.metadata or {}).get(METADATA_KEY, b"").decode(errors="replace")
    table, _, version = label.partition(":")
    if table not in TABLES or not version.isdigit() or (expected and table != expected):
        raise DataError(
            f"{path}: not a canopy_store file of {expected or 'a table'}; move it out of the store"
        )
    if int(version) > FORMAT_VERSION:
        raise DataError(
            f"{path}: schema version {version}, this package reads up to {FORMAT_VERSION}; "
            "upgrade it: pip install -U canopy-store"
        )
    return metadata


def sha256(path: Path) -> str:
    """The hash of a file's bytes, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_id(value: Any) -> str:
    """Sixteen hex digits that follow from a JSON value alone."""
    return hashlib.sha256(canonical(value).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def now() -> datetime.datetime:
    """The present time in UTC, without a zone, as the tables keep it."""
    return datetime.datetime.now(datetime.UTC).replace(tzinfo=None)


# ---------------------------------------------------------------- models, prompts


def add_model(root: Path, row: Mapping[str, Any]) -> str:
    """The id of the checkpoint ``row`` describes, stored if it is new.

    Raises
    ------
    ConflictError
        The same family and variant are stored with other weights, parent or treatment.
    """
    model_id = f"{row['family']}/{row['variant']}"
    path = root / "models" / f"{quoted(row['family'])}--{quoted(row['variant'])}.parquet"
    said = {k: v for k, v in row.items() if v is not None}
    if path.exists():
        stored = read_rows(path).to_pylist()[0]
        # what is not said again is not in conflict: an ingest need not repeat the parent
        known = {k: v for k, v in said.items() if k != "source"}
        if any(stored[k] != v for k, v in known.items()):
            raise ConflictError(
                f"model {model_id} is stored with other settings: "
                f"{differences({k: stored[k] for k in known}, known)}; give another --variant"
            )
        return model_id
    new = {"treatment": row["variant"], "generation": 0, "parent_id": None, **said, "model_id": model_id}
    if new["parent_id"]:
        new["generation"] = said.get("generation") or 1 + _generation(root, new["parent_id"])
    write_rows(path, "models", {key: [value] for key, value in new.items()})
    return model_id


def _generation(root: Path, model_id: str) -> int:
    for path in files(root, "models"):
        row = read_rows(path).to_pylist()[0]
        if row["model_id"] == model_id:
            return row["generation"]
    return 0


def add_prompts(root: Path, task: str, prompts: Iterable[Mapping[str, Any]]) -> None:
    """Stores a task's prompts; the file is named after its content, so again is once."""
    rows = sorted(prompts, key=lambda row: row["prompt_id"])
    names = [c.name for c in TABLES["prompts"].columns]
    columns = {name: [row.get(name) for row in rows] for name in names}
    path = folder(root, "prompts", task=task) / f"{content_id(columns)}.parquet"
    if rows and not path.exists():
        write_rows(path, "prompts", columns)


# ---------------------------------------------------------------- runs


def plan_path(root: Path, kind: str, name: str) -> Path:
    """Where the settings of a job stand; ``kind`` is run or embedder."""
    return root / "plans" / f"{kind}={quoted(name)}.json"


def plan(root: Path, kind: str, name: str, settings: Mapping[str, Any]) -> bool:
    """Whether a job of this name was begun before; records its settings when it was not.

    Raises
    ------
    ConflictError
        It was begun with other settings; the message names each difference.
    """
    path = plan_path(root, kind, name)
    asked = json.loads(json.dumps(settings))
    if not path.exists():
        write_json(path, {"settings": asked, "started_at": now().isoformat()})
        return False
    stored = read_plan(path)["settings"]
    if stored != asked:
        option = "--run" if kind == "run" else "--name"
        raise ConflictError(
            f"{kind} {name} is stored with other settings: {differences(stored, asked)}; "
            f"repeat the stored ones to resume, or give it another name with {option}"
        )
    return True


def forget_unfinished(root: Path, run_id: str, engine: str) -> None:
    """Removes a run that this engine began and never completed, files first and its plan last.

    For imports, which cost nothing to repeat: a refused file must not stand in a mended one's way.
    """
    path = plan_path(root, "run", run_id)
    if not path.exists() or is_complete(root, run_id):
        return
    if read_plan(path)["settings"]["engine"] != engine:
        return
    for table in ("rollouts", "embeddings", "embedding_spectra", "rewards"):
        for file in files(root, table):
            if file.parent.name == f"run={quoted(run_id)}":
                file.unlink()
    path.unlink()


def read_plan(path: Path) -> dict[str, Any]:
    """A job's recorded settings and start."""
    try:
        recorded = json.loads(path.read_text())
        return {
            "settings": dict(recorded["settings"]),
            "started_at": datetime.datetime.fromisoformat(recorded["started_at"]),
        }
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not a readable plan; remove it and run the job again") from None


def is_complete(root: Path, run_id: str) -> bool:
    """Whether the run's row is written."""
    return (root / "runs" / f"{quoted(run_id)}.parquet").exists()


def complete_run(root: Path, where: Path, row: Mapping[str, Any]) -> None:
    """Writes a run's row, the last act of its ingest; counts come from its shards in ``where``."""
    rollouts = tokens = 0
    logged = True
    shards = sorted(where.glob("part-*.parquet"))
    prompts: dict[str, int] = {}
    for shard in shards:
        part = pq.ParquetFile(shard).read(["prompt_id", "n_tokens", "entropy_sum", "surprisal_sum"])
        rollouts += part.num_rows
        logged &= not (part["entropy_sum"].null_count or part["surprisal_sum"].null_count)
        tokens += sum(part["n_tokens"].to_pylist())
        for prompt in part["prompt_id"].to_pylist():
            prompts[prompt] = prompts.get(prompt, 0) + 1
    most = max(prompts.values(), default=0)
    counted = {
        "n_rollouts": rollouts, "n_tokens": tokens, "n_prompts": len(prompts), "n_samples": most,
        "n_shards": len(shards), "logged": logged, "finished_at": now(),
        "started_at": read_plan(plan_path(root, "run", row["run_id"]))["started_at"],
    }  # fmt: skip
    columns = {key: [value] for key, value in {**row, **counted}.items()}
    write_rows(root / "runs" / f"{quoted(row['run_id'])}.parquet", "runs", columns)


def complete_runs(root: Path, wanted: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The complete runs, as `runs` gives them; only those wanted, where any is named.

    Raises
    ------
    StoreError
        One that is wanted is not there or not complete.
    """
    known = {run["run_id"]: run for run in runs(root) if run["complete"]}
    wanted = list(wanted)
    for run_id in wanted:
        if run_id not in known:
            raise StoreError(f"--run {run_id}: no complete run of this name; see: canopy status")
    return [known[run_id] for run_id in wanted] if wanted else list(known.values())


def selections(root: Path, run_id: str) -> list[tuple[str, Path]]:
    """Name and file of each selection that the run has."""
    found = [(unquoted(path.name.partition("=")[2]), path) for path in (root / "selections").glob("*=*")]
    files = [(name, shard_path(path / f"run={quoted(run_id)}", 0)) for name, path in sorted(found)]
    return [(name, file) for name, file in files if file.exists()]


def check_name(option: str, value: str) -> str:
    """``value`` if it can name a partition.

    Raises
    ------
    UsageError
        It is empty, too long for a file system, or holds a control character.
    """
    if not value or len(quoted(value)) > 200 or any(ord(c) < 32 for c in value):
        raise UsageError(f"{option} {value[:40]!r}: needs 1 to 200 printable characters")
    return value


def runs(root: Path) -> list[dict[str, Any]]:
    """Every run begun: run_id, complete, shards present, the plan's settings; in name order."""
    found = []
    for path in sorted((root / "plans").glob("run=*.json")):
        recorded = read_plan(path)
        settings = recorded["settings"]
        where = folder(root, "rollouts", run=settings["run_id"], **{
            key: settings[key] for key in ("family", "variant", "task")
        })  # fmt: skip
        found.append({
            **settings,
            "complete": is_complete(root, settings["run_id"]),
            "where": where,
            "shards": sorted(where.glob("part-*.parquet")),
        })  # fmt: skip
    return found
