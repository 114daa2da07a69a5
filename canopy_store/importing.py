"""Bring your own rollouts: one Parquet file in, one run per (family, variant, task) stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from canopy_store import sql, store
from canopy_store.embeddings import write_embeddings
from canopy_store.errors import DataError, StoreError, UsageError
from canopy_store.rollouts import write_shard

_KEYS = ("family", "variant", "task", "prompt_id", "sample")
_OPTIONAL = (
    "text", "token_ids", "logprob", "eos_logprob", "embedding", "reward", "finish_reason",
)  # fmt: skip
_ROLLOUTS_PER_SHARD = 8192


def import_rollouts(
    root: str | Path,
    file: str | Path,
    *,
    max_new_tokens: int | None = None,
    run: str | None = None,
    embedder: str = "imported",
    reward_model: str = "imported",
    on_shard: Callable[[int, int], None] | None = None,
) -> list[str]:
    """The ids of the runs stored from a Parquet file of rollouts; the store is made if missing.

    The same file again changes nothing. All of the file is checked before the first run is made
    visible.

    Parameters
    ----------
    root : path of the store
    file : Parquet with family, variant, task, prompt_id, sample and entropy (list of nats, one a
        token); optional text, token_ids, logprob, eos_logprob (lists), embedding, reward,
        finish_reason ('stop' or 'length')
    max_new_tokens : marks rollouts of this length as cut, where finish_reason is absent
    run : name of the run; needs a file of one family, variant and task
    embedder, reward_model : names under which embeddings and rewards are kept
    on_shard : called with (rollouts done, rollouts in all)

    Raises
    ------
    DataError
        A missing column, a wrong type or an impossible value; names the file, row and column.
    ConflictError
        A run of this name is stored from another file.
    """
    file = Path(file)
    if max_new_tokens is not None and max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens {max_new_tokens}: needs at least 1")
    store.check_name("--embedder", embedder)
    store.check_name("--reward-model", reward_model)
    schema = _check_schema(file)
    keys = _read_keys(file)
    groups = keys.partition_by(["family", "variant", "task"], maintain_order=True)
    if run is not None and len(groups) > 1:
        raise UsageError(f"--run: {file} holds {len(groups)} runs, one a family, variant and task")
    for name in ("family", "variant", "task"):
        for value in keys[name].unique():
            store.check_name(f"{file}: column {name}", value)
    source_hash = store.sha256(file)
    root = store.init(root)
    jobs = []
    for group in groups:
        family, variant, task = (group[name][0] for name in ("family", "variant", "task"))
        run_id = store.check_name("--run", run or f"{family}.{variant}.{task}")
        settings = {
            "run_id": run_id, "engine": "import", "source_sha256": source_hash,
            "max_new_tokens": max_new_tokens, "embedder": embedder, "reward_model": reward_model,
            "family": family, "variant": variant, "task": task,
        }  # fmt: skip
        store.forget_unfinished(root, run_id, engine="import")
        store.plan(root, "run", run_id, settings)
        jobs.append((settings, group))
    done = 0
    columns = [name for name in _OPTIONAL if name in schema.names]
    for settings, group in jobs:
        for number, rows in enumerate(_shards(group)):
            if not store.is_complete(root, settings["run_id"]):
                _write(root, file, columns, settings, number, rows)
            done += len(rows)
            if on_shard:
                on_shard(done, len(keys))
    for settings, group in jobs:
        _complete(root, file, settings, group)
    sql.write_database(root)
    return [settings["run_id"] for settings, _ in jobs]


def _check_schema(file: Path) -> pa.Schema:
    if not file.is_file():
        raise StoreError(f"{file}: no such file")
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowInvalid, OSError):
        raise DataError(f"{file}: truncated or not a Parquet file") from None
    missing = [name for name in (*_KEYS, "entropy") if name not in schema.names]
    if missing:
        raise DataError(
            f"{file}: missing column {', '.join(missing)}; there are {', '.join(schema.names)}"
        )

    def is_list(kind: pa.DataType, of: Callable[[pa.DataType], bool]) -> bool:
        listed = (
            pa.types.is_list(kind) or pa.types.is_large_list(kind)
            or pa.types.is_fixed_size_list(kind)
        )  # fmt: skip
        return listed and of(kind.value_type)

    for name in ("entropy", "logprob", "eos_logprob", "embedding"):
        if name in schema.names:
            kind = schema.field(name).type
            if not is_list(kind, pa.types.is_floating):
                raise DataError(f"{file}: column {name} is {kind}, needs a list of floats")
    if "token_ids" in schema.names and not is_list(schema.field("token_ids").type, pa.types.is_integer):
        raise DataError(f"{file}: column token_ids needs a list of integers")
    if not pa.types.is_integer(schema.field("sample").type):
        raise DataError(f"{file}: column sample is {schema.field('sample').type}, needs integers")
    return schema


def _read_keys(file: Path) -> pl.DataFrame:
    """The key columns as text, with the row number and the prompt id as the file has it."""
    try:
        table = pq.read_table(file, columns=list(_KEYS))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    if table.num_rows == 0:
        raise DataError(f"{file}: holds no rows")
    frame = pl.DataFrame(table)
    for name in _KEYS:
        if frame[name].null_count():
            row = int(np.argmax(frame[name].is_null().to_numpy()))
            raise DataError(f"{file}: row {row}: {name} is missing")
    text = [pl.col(name).cast(pl.String) for name in ("family", "variant", "task")]
    frame = frame.select(
        *text,
        pl.col("prompt_id").alias("key"),
        pl.col("prompt_id").cast(pl.String),
        pl.col("sample").cast(pl.Int64),
    ).with_row_index("row")
    twice = frame.filter(pl.struct("family", "variant", "task", "prompt_id", "sample").is_duplicated())
    if len(twice):
        first = twice.row(0, named=True)
        raise DataError(
            f"{file}: row {first['row']}: prompt {first['prompt_id']} sample {first['sample']} of "
            f"{first['family']} {first['variant']} {first['task']} is there twice"
        )
    if frame["sample"].min() < 0 or frame["sample"].max() > 2**31 - 1:  # type: ignore[operator]
        raise DataError(f"{file}: column sample needs numbers from 0 to 2147483647")
    return frame


def _shards(group: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """A run's rows in shards of whole prompts, in the order the file first names them."""
    counts = group.group_by("prompt_id", maintain_order=True).len()
    chosen: list[str] = []
    size = 0
    for prompt, rows in counts.iter_rows():
        if chosen and size + rows > _ROLLOUTS_PER_SHARD:
            yield group.filter(pl.col("prompt_id").is_in(chosen))
            chosen, size = [], 0
        chosen.append(prompt)
        size += rows
    yield group.filter(pl.col("prompt_id").is_in(chosen))


def _write(
    root: Path, file: Path, columns: list[str], settings: dict[str, Any], shard: int,
    rows: pl.DataFrame,
) -> None:  # fmt: skip
    run_id = settings["run_id"]
    where = store.folder(
        root, "rollouts", run=run_id, **{k: settings[k] for k in ("family", "variant", "task")}
    )
    store.remove_leftovers(where)
    wanted = (ds.field("prompt_id").isin(rows["key"].unique().to_list())) & (
        (ds.field("family") == settings["family"])
        & (ds.field("variant") == settings["variant"])
        & (ds.field("task") == settings["task"])
    )
    data = ds.dataset(file).to_table(columns=["entropy", *columns], filter=wanted)
    # the filter keeps the file's order, and so do the keys: row i here is row i there
    first = {p: i for i, p in enumerate(rows["prompt_id"].unique(maintain_order=True))}
    order = rows.with_row_index("at").with_columns(
        pl.col("prompt_id").replace_strict(first, return_dtype=pl.Int64).alias("rank")
    )
    at = order.sort("rank", "sample")["at"].to_numpy()
    data, rows = data.take(pa.array(at)), rows[at]
    names = [f"{file}: row {row}" for row in rows["row"]]
    record = {name: data[name] for name in data.column_names if name not in ("embedding", "reward")}
    record.update(
        run_id=[run_id] * len(rows), prompt_id=rows["prompt_id"].to_list(),
        sample=rows["sample"].to_list(),
        finish_reason=_finish_reasons(data, settings["max_new_tokens"], names),
    )  # fmt: skip
    for name in ("token_ids", "logprob", "eos_logprob"):
        if name in record and record[name].null_count == len(rows):
            del record[name]
    write_shard(store.shard_path(where, shard), record, names)
    if "embedding" in columns and data["embedding"].null_count < len(rows):
        matrix = _matrix(data["embedding"], names)
        write_embeddings(
            root, settings["embedder"], run_id, shard, record["prompt_id"], record["sample"], matrix
        )
    if "reward" in columns and data["reward"].null_count < len(rows):
        known = data["reward"].is_valid().to_numpy()
        where = store.folder(root, "rewards", reward_model=settings["reward_model"], run=run_id)
        store.write_rows(store.shard_path(where, shard), "rewards", {
            "run_id": [run_id] * int(known.sum()),
            "prompt_id": rows["prompt_id"].filter(known).to_list(),
            "sample": rows["sample"].filter(known).to_list(),
            "reward": data["reward"].filter(pa.array(known)),
        })  # fmt: skip


def _finish_reasons(data: pa.Table, max_new_tokens: int | None, names: list[str]) -> list[str | None]:
    lengths = data["entropy"].combine_chunks().value_lengths().to_pylist()
    given = (
        data["finish_reason"].to_pylist()
        if "finish_reason" in data.column_names
        else [None] * len(names)
    )
    reasons: list[str | None] = []
    for name, reason, length in zip(names, given, lengths, strict=True):
        if reason not in (None, "stop", "length"):
            raise DataError(f"{name}: finish_reason {reason!r}: needs stop or length")
        if reason is None and max_new_tokens is not None and length is not None:
            reason = "length" if length >= max_new_tokens else "stop"
        reasons.append(reason)
    return reasons


def _matrix(lists: pa.ChunkedArray, names: list[str]) -> np.ndarray:
    values = lists.to_pylist()
    for name, value in zip(names, values, strict=True):
        if value is None or len(value) != len(values[0] or []) or not value:
            raise DataError(f"{name}: embedding is missing or of another length than the first")
    return np.array(values, np.float64)


def _complete(root: Path, file: Path, settings: dict[str, Any], group: pl.DataFrame) -> None:
    run_id = settings["run_id"]
    if store.is_complete(root, run_id):
        return
    model_id = store.add_model(root, {"family": settings["family"], "variant": settings["variant"]})
    store.add_prompts(
        root,
        settings["task"],
        [{"prompt_id": p, "source": file.name} for p in group["prompt_id"].unique()],
    )
    where = store.folder(
        root, "rollouts", run=run_id, **{k: settings[k] for k in ("family", "variant", "task")}
    )
    store.complete_run(root, where, {
        **{k: settings[k] for k in ("run_id", "family", "variant", "task", "max_new_tokens")},
        "model_id": model_id, "rendering": "import", "engine": "import",
        "settings": store.canonical(settings), "versions": "{}",
    })  # fmt: skip
