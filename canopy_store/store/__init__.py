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
    STORE/.work/                                            locks, and what replaces a run's files

A shard's name follows from what it holds, so writing it again replaces it. A file is written under a
temporary name in its own folder, flushed to disk, then renamed: readers never see half a file. On
object storage (STORE is s3://BUCKET/PREFIX) it is put in one piece instead, and there is no
canopy.duckdb.
"""

from __future__ import annotations

import datetime
import errno
import glob
import hashlib
import importlib
import io
import json
import logging
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq

from canopy_store.errors import (
    CanopyError,
    ConflictError,
    DataError,
    StoreError,
    UsageError,
    differences,
)
from canopy_store.schema import FORMAT_VERSION, METADATA_KEY, TABLES, arrow_schema

# Float lists are smaller byte-stream-split, then zstd (figures: docs/performance.md).
_SPLIT = ("logprob", "entropy", "eos_logprob", "embedding", "top_logprobs")
_ROWS_PER_GROUP = 4096

# Object stores whose put is atomic, and the package that reaches each. Tested: s3.
_OBJECT_STORES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
_TAIL = 1 << 15  # bytes: holds the footer of most files
_BLOCK = 1 << 18  # bytes a request reads ahead


def locate(root: str | Path) -> Path:
    """``root`` as a path: of this machine, or for ``s3://BUCKET/PREFIX`` a UPath, which acts like one.

    Credentials and endpoint come from where the object store's own client looks for them
    (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ~/.aws).

    Raises
    ------
    UsageError
        Not an object store known, no bucket, or its package is not installed.
    """
    scheme, url, key = str(root).partition("://")
    if not url:
        return Path(root)
    if scheme not in _OBJECT_STORES:
        known = ", ".join(f"{name}://" for name in _OBJECT_STORES)
        raise UsageError(f"{root}: a store is a folder, or on object storage: {known}")
    if not key.strip("/") or {"", ".", ".."} & set(key.rstrip("/").split("/")) or set(key) & set("?#"):
        raise UsageError(f"{root}: needs {scheme}://BUCKET/PREFIX, without .., ?, # or empty parts")
    client = _OBJECT_STORES[scheme]
    try:
        from upath import UPath

        importlib.import_module(client)
    except ImportError:
        more = "" if scheme == "s3" else f" {client}"
        raise UsageError(f"{root}: needs {client}: pip install 'canopy-store[s3]'{more}") from None
    # what its tasks log of a lost connection would stand beside the one line that says so
    logging.getLogger("asyncio").addHandler(logging.NullHandler())
    # listings are never kept: another writer's shards must show
    options = {**getattr(root, "storage_options", {}), "use_listings_cache": False}
    return UPath(f"{scheme}://{key.rstrip('/')}", **options)


def snapshot(root: Path) -> Path:
    """The same root; on object storage one listing then answers what is there, how large and how new."""
    if not remote(root):
        return root
    kept = type(root)(root, use_listings_cache=True)  # type: ignore[call-arg]
    with reaching(root):
        client = kept.fs  # type: ignore[attr-defined]
        client.invalidate_cache()
        client.default_block_size = _BLOCK
        client.find(kept.path)  # type: ignore[attr-defined]
    return kept


def remote(path: Path) -> bool:
    """Whether a path is on object storage."""
    return not isinstance(path, Path)


@contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Turns what an object store's client raises into one line; a path of this machine is left alone."""
    try:
        yield
    except CanopyError:
        raise
    except Exception as error:
        if not remote(path):
            raise
        kind = type(error).__name__
        if isinstance(error, FileNotFoundError):
            reason = "no such object or bucket; make the bucket, or look at the address"
        elif isinstance(error, PermissionError):
            reason = "access refused; look at the credentials and the bucket's policy"
        elif "Credentials" in kind:
            reason = "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
        else:
            reason = f"{kind}: {' '.join(str(error).split())[:200]}; mend that and run it again"
        raise StoreError(f"{path}: {reason}; nothing stored is lost") from None


def read_bytes(path: Path) -> bytes:
    """A small file, whole."""
    if not remote(path):
        return path.read_bytes()
    with reaching(path):
        return path.fs.cat_file(path.path, start=0)  # type: ignore[attr-defined]  # one request


def exists(path: Path) -> bool:
    """Whether a file is there; never False because an object store cannot be reached."""
    with reaching(path):
        return path.exists()


def opened(path: Path) -> Any:
    """What Parquet readers take: the path itself, or a file on object storage that fetches on demand."""
    if not remote(path):
        return path
    with reaching(path):
        return path.open("rb", block_size=_BLOCK)  # type: ignore[call-overload]


def init(root: str | Path) -> Path:
    """The path of the store at ``root``, made if it is missing; a bucket is never made."""
    root = locate(root)
    if exists(root / "canopy.json"):
        return require(root)
    with reaching(root):
        foreign = root.is_file() or (root.is_dir() and any(p.suffix != ".tmp" for p in root.iterdir()))
        if foreign and not exists(root / "canopy.json"):  # or another job has made it meanwhile
            raise StoreError(f"{root}: not a store and not an empty folder; choose another --store")
    if not remote(root):
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
    root = locate(root)
    if not exists(root / "canopy.json"):
        raise StoreError(f"{root}: no store here; make one with: canopy init --store {root}")
    try:
        version = json.loads(read_bytes(root / "canopy.json"))["version"]
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


def shards(folder: Path) -> list[Path]:
    """A partition's shards, in name order."""
    return matching(folder, "part-*.parquet")


def matching(folder: Path, pattern: str) -> list[Path]:
    """What in ``folder`` matches, in name order."""
    with reaching(folder):
        return sorted(folder.glob(pattern))


def shard_number(path: Path) -> int:
    """The number in a shard's name, which no other rows of its run and table ever have."""
    return int(path.name.removeprefix("part-").partition(".")[0])


def files(root: Path, table: str) -> list[Path]:
    """A table's Parquet files, in name order; temporary files end in .tmp and are never among them."""
    with reaching(root):
        return sorted((root / table).rglob("*.parquet"))


def tables(root: Path) -> dict[str, list[Path]]:
    """Every table's Parquet files, as `files` gives them; by one listing on object storage."""
    if not remote(root):
        return {table: files(root, table) for table in TABLES}
    found: dict[str, list[Path]] = {table: [] for table in TABLES}
    with reaching(root):
        for path in sorted(root.rglob("*.parquet")):
            found.get(path.relative_to(root).parts[0], []).append(path)
    return found


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
    if remote(path):
        buffer = io.BytesIO()
        yield buffer
        with reaching(path):
            # no rename there, but a put (or the end of one in parts) is whole or not at all
            path.fs.pipe_file(path.path, buffer.getvalue())  # type: ignore[attr-defined]
        return
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
        remove_leftovers(path.parent, glob.escape(path.name))
        flush(path.parent)


def flush(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def remove_leftovers(folder: Path, names: str = "*") -> None:
    """Removes temporary files of these files (a pattern) whose writer, on this machine, is dead."""
    if remote(folder):
        return  # there are none
    for path in folder.glob(f".{names}.{platform.node()}.*.tmp"):
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


def _create_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes ``value`` as JSON, whole, unless another process was first."""
    if remote(path):
        text = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
        with reaching(path):
            try:
                path.fs.pipe_file(path.path, text, mode="create")  # type: ignore[attr-defined]
            except FileExistsError:
                pass
            except (TypeError, ValueError, NotImplementedError):  # a client that cannot promise that
                write_json(path, value)
        return
    mine = path.with_name(f".{path.name}.new.{platform.node()}.{os.getpid()}.tmp")
    write_json(mine, value)
    with writing(path):
        try:
            os.link(mine, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(mine, path)
        mine.unlink(missing_ok=True)
        flush(path.parent)


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


def read_rows(path: Path, columns: list[str] | None = None) -> pa.Table:
    """The rows of one of the store's Parquet files; of these columns alone, where any is named.

    Raises
    ------
    DataError
        The file is truncated, not ours, or of a newer version.
    """
    if remote(path) and columns is None:
        whole = io.BytesIO(read_bytes(path))
        _check_label(path, _metadata(path, whole), None)
        return pq.ParquetFile(whole).read()
    check_file(path)
    with reaching(path):
        return pq.ParquetFile(opened(path)).read(columns)


def check_file(path: Path, expected: str | None = None) -> pq.FileMetaData:
    """A Parquet file's metadata, once its footer proves readable and ours.

    Raises
    ------
    DataError
        The file is truncated, not Parquet, not written by this package, or of a newer version.
    """
    return _check_label(path, _metadata(path, _footer(path)), expected)


def _footer(path: Path) -> Any:
    """What a file's metadata is read from: the path itself, or the file's end."""
    if not remote(path):
        return path
    with reaching(path):
        tail = path.fs.cat_file(path.path, start=-_TAIL)  # type: ignore[attr-defined]
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if tail[-4:] == b"PAR1" and length > len(tail):
            tail = path.fs.cat_file(path.path, start=-length)  # type: ignore[attr-defined]
    return io.BytesIO(tail)


def _metadata(path: Path, file: Any) -> pq.FileMetaData:
    try:
        return pq.read_metadata(file)
    except FileNotFoundError:
        raise DataError(
            f"{path}: gone since it was listed, as by a compaction or a removal; run it again"
        ) from None
    except (pa.ArrowInvalid, OSError):
        raise DataError(
            f"{path}: truncated or not a Parquet file; remove it and run its ingest again"
        ) from None


def _check_label(path: Path, metadata: pq.FileMetaData, expected: str | None) -> pq.FileMetaData:
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


def table_rows(root: Path, table: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Each row of a small table, with its file."""
    for path in files(root, table):
        for row in read_rows(path).to_pylist():
            yield path, row


def copy_file(source: Path, target: Path, sha256: str | None = None) -> None:
    """Copies a file whole; one that is not of the hash given never appears.

    Raises
    ------
    DataError
        It is not of that hash.
    """
    digest = hashlib.sha256()
    with replacing(target) as file, source.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            file.write(block)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise DataError(f"{source}: changed while it was read; run it again")


def ends_labelled(path: Path, table: str) -> bool:
    """Whether a local file ends in a Parquet footer with this table's label, as nearly all do.

    Looks for the bytes, so that opening a store of thousands of files stays quick; where it says no,
    `check_file` tells why.
    """
    if remote(path):
        return False
    label = f"{table}:{FORMAT_VERSION}".encode()
    # how Parquet's footer (Thrift, compact) spells the pair: field, length, bytes, twice
    pair = b"\x18" + bytes([len(METADATA_KEY)]) + METADATA_KEY + b"\x18" + bytes([len(label)]) + label
    with open(path, "rb", buffering=0) as file:
        # behind the pair stands only the schema, once more
        file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
        tail = file.read()
    return tail[-4:] == b"PAR1" and pair in tail


def sha256(path: Path) -> str:
    """The hash of a file's bytes, as hex."""
    with reaching(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


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
    if exists(path):
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
    if rows and not exists(path):
        write_rows(path, "prompts", columns)


# ---------------------------------------------------------------- runs


def plan_path(root: Path, kind: str, name: str) -> Path:
    """Where the settings of a job stand; ``kind`` is run or embedder."""
    return root / "plans" / f"{kind}={quoted(name)}.json"


def plan(
    root: Path, kind: str, name: str, settings: Mapping[str, Any], yielding: Iterable[str] = ()
) -> dict[str, Any]:
    """The settings recorded for the job of this name: these, where it was not begun before.

    Of several jobs that begin at once one records its settings. Those named in ``yielding`` give way
    to the recorded ones; the others must be the same.

    Raises
    ------
    ConflictError
        It was begun with other settings; the message names each difference.
    """
    path = plan_path(root, kind, name)
    asked = json.loads(json.dumps(settings))
    if not exists(path):
        _create_json(path, {"settings": asked, "started_at": now().isoformat()})
    stored = read_plan(path)["settings"]
    asked.update({key: stored[key] for key in yielding if key in stored})
    if stored != asked:
        option = "--run" if kind == "run" else "--name"
        raise ConflictError(
            f"{kind} {name} is stored with other settings: {differences(stored, asked)}; "
            f"repeat the stored ones to resume, or give it another name with {option}"
        )
    return stored


def forget_unfinished(root: Path, run_id: str, engine: str) -> None:
    """Removes a run that this engine began and never completed, files first and its plan last.

    For imports, which cost nothing to repeat: a refused file must not stand in a mended one's way.
    """
    path = plan_path(root, "run", run_id)
    if not exists(path) or is_complete(root, run_id):
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
        recorded = json.loads(read_bytes(path))
        return {
            "settings": dict(recorded["settings"]),
            "started_at": datetime.datetime.fromisoformat(recorded["started_at"]),
        }
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not a readable plan; remove it and run the job again") from None


def is_complete(root: Path, run_id: str) -> bool:
    """Whether the run's row is written."""
    return exists(root / "runs" / f"{quoted(run_id)}.parquet")


def complete_run(root: Path, where: Path, row: Mapping[str, Any]) -> None:
    """Writes a run's row, the last act of its ingest; counts come from its shards in ``where``."""
    rollouts = tokens = 0
    logged = True
    written = shards(where)
    prompts: dict[str, int] = {}
    for shard in written:
        part = read_rows(shard, ["prompt_id", "n_tokens", "entropy_sum", "surprisal_sum"])
        rollouts += part.num_rows
        logged &= not (part["entropy_sum"].null_count or part["surprisal_sum"].null_count)
        tokens += sum(part["n_tokens"].to_pylist())
        for prompt in part["prompt_id"].to_pylist():
            prompts[prompt] = prompts.get(prompt, 0) + 1
    most = max(prompts.values(), default=0)
    counted = {
        "n_rollouts": rollouts,
        "n_tokens": tokens,
        "n_prompts": len(prompts),
        "n_samples": most,
        "n_shards": len(written),
        "logged": logged,
        "finished_at": now(),
        "started_at": read_plan(plan_path(root, "run", row["run_id"]))["started_at"],
    }
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
    chosen = [path for path in files(root, "selections") if path.parent.name == f"run={quoted(run_id)}"]
    return sorted((unquoted(path.parent.parent.name.partition("=")[2]), path) for path in chosen)


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
    for path in matching(root / "plans", "run=*.json"):
        recorded = read_plan(path)
        settings = recorded["settings"]
        where = folder(
            root,
            "rollouts",
            run=settings["run_id"],
            **{key: settings[key] for key in ("family", "variant", "task")},
        )
        found.append(
            {
                **settings,
                "complete": is_complete(root, settings["run_id"]),
                "where": where,
                "shards": shards(where),
            }
        )
    return found


@dataclass(frozen=True)
class Shard:
    """One shard of a run's rollouts, and the file that a job makes of it."""

    run: Mapping[str, Any]
    number: int
    source: Path
    target: Path
    rows: int


def shards_to_do(
    runs: Iterable[Mapping[str, Any]], target: Callable[[Mapping[str, Any], int], Path]
) -> tuple[list[Shard], list[Shard]]:
    """The shards of these runs (as `runs` gives them) that a job has still to do, and those done.

    ``target`` names the file that the job makes of a run's shard of a number: where it stands, the
    shard is done. Removes what killed writers left there.
    """
    todo: list[Shard] = []
    done: list[Shard] = []
    stored: dict[Path, set[str]] = {}
    for run in runs:
        for source in run["shards"]:
            number = shard_number(source)
            path = target(run, number)
            if path.parent not in stored:
                remove_leftovers(path.parent)
                stored[path.parent] = {file.name for file in shards(path.parent)}
            listed = done if path.name in stored[path.parent] else todo
            listed.append(Shard(run, number, source, path, check_file(source, "rollouts").num_rows))
    return todo, done


# ---------------------------------------------------------------- runs in use


def workspace(root: Path, run_id: str) -> Path:
    """Where files that replace or leave a run stand meanwhile: where no view's pattern looks."""
    return root / ".work" / f"run={quoted(run_id)}"


def half_compacted(root: Path, run_id: str) -> bool:
    """Whether a compaction of the run was stopped among its tables: their shards are not the same."""
    return not remote(root) and (workspace(root, run_id) / "journal.json").exists()


@contextmanager
def holding(root: Path, *run_ids: str, exclusive: bool = False, mending: bool = False) -> Iterator[None]:
    """Holds runs for one job: their writers share them; a job that replaces their files is alone.

    Never waits. The kernel lets go when the process ends, however it ends. Nothing is held on object
    storage, on a file system without locks, or, shared, where the store cannot be written.

    Parameters
    ----------
    root : path of the store
    run_ids : one open file each: thousands need a higher ``ulimit -n``
    exclusive : for compaction, removal and merging
    mending : also a run whose compaction was stopped half way

    Raises
    ------
    ConflictError
        Another process uses a run, or its compaction was stopped half way.
    """
    with ExitStack() as held:
        for run_id in run_ids:
            place = workspace(root, run_id)
            file = None
            if not remote(root):
                file = _locked(place.with_name(f"{place.name}.lock"), run_id, exclusive)
            if file is not None:
                held.callback(os.close, file)
            if not mending and half_compacted(root, run_id):
                raise ConflictError(
                    f"run {run_id}: its compaction was stopped half way; finish it: "
                    f"canopy compact --store {root} --run {run_id}"
                )
        yield


@contextmanager
def using_runs(root: Path, wanted: Iterable[str] = ()) -> Iterator[list[dict[str, Any]]]:
    """The complete runs, as `complete_runs` gives them, held until the block ends."""
    ids = [run["run_id"] for run in complete_runs(root, wanted)]
    with holding(root, *ids):
        yield complete_runs(root, ids)  # as they stand now


def _locked(path: Path, run_id: str, exclusive: bool) -> int | None:
    """The descriptor of the lock file, locked; None where there can be no lock."""
    try:
        import fcntl
    except ImportError:
        return None
    while True:
        try:
            if path.parent.is_symlink():
                raise StoreError(f"{path.parent}: a link, not a folder; remove it")
            path.parent.mkdir(exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if not exclusive and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                return None
            raise StoreError(f"{path}: cannot be locked: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_NB | (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH))
            if os.path.exists(path) and os.path.samestat(os.fstat(file), os.stat(path)):
                return file  # not one that a removal of the run took away meanwhile
        except BlockingIOError:
            os.close(file)
            raise ConflictError(
                f"run {run_id}: in use by another process; wait for that job to end, or stop it"
            ) from None
        except FileNotFoundError:
            pass
        except OSError:
            os.close(file)
            return None
        os.close(file)
