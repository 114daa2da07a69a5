"""Bring your own rollouts: one source in, one run per (family, variant, task) stored.

The form that is stored from is a Parquet file. What a reader reads goes into a temporary one first,
so that memory stays bounded and every check is made before anything is stored.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from canopy_store import readers, sql, store
from canopy_store.errors import DataError, UsageError
from canopy_store.readers.staging import (
    LENGTHS,
    LISTS,
    NAMES,
    PLAIN,
    as_parquet,
    decoding,
    parquet_schema,
)
from canopy_store.schema import TABLES
from canopy_store.store.embeddings import write_embeddings
from canopy_store.store.rollouts import write_shard

_KEYS = (*NAMES, "prompt_id", "sample")
_ROLLOUT = ("text", "n_tokens", "finish_reason", *LISTS)
_GRADE = ("answer", "correct", "score")
_STORED = {*_ROLLOUT, *_GRADE, "reward", "where", "embedding"}
# kind of record and its key besides the run: the files of it
_Files = defaultdict[tuple[str, str], list[Path]]
_OF_THE_RUN = ("model", "temperature", "top_k", "top_p", "max_new_tokens")
_ROLLOUTS_PER_SHARD = 8192


def import_rollouts(
    root: str | Path,
    source: str | Path,
    *,
    format: str | None = None,
    family: str | None = None,
    variant: str | None = None,
    task: str | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    processed_logprobs: bool = False,
    requests: str | Path | None = None,
    tokenizer: Any = None,
    max_new_tokens: int | None = None,
    run: str | None = None,
    embedder: str = "imported",
    reward_model: str = "imported",
    grader: str = "imported",
    on_shard: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[str]:
    """The ids of the runs stored from a source of rollouts; the store is made if missing.

    The same source again changes nothing. All of it is checked before the first run is made visible.

    Parameters
    ----------
    root : path of the store
    source : Parquet with family, variant, task, prompt_id, sample and one of entropy (list of nats,
        one a token), logprob, token_ids and n_tokens; optional the other columns of
        `canopy_store.readers.FIELDS`. Or a file or folder that a reader knows
    format : name of the reader [default: the one that knows the source]
    family, variant, task : names that the source does not tell, or instead of those it tells
    temperature, top_k, top_p : the sampling policy, likewise; where only temperature is known, top_k
        is 0 and top_p is 1
    processed_logprobs : the engine logged log-probabilities after temperature, top-k and top-p, where
        they are otherwise those of the model itself
    requests : the requests that a batch answers, for their prompts and policy
    tokenizer : a transformers tokenizer of the model: gives ids to tokens known as text, and tokens to
        rollouts known as text alone (the sampled ones may have been others)
    max_new_tokens : marks rollouts of this length as cut, where finish_reason is absent
    run : name of the run; needs a source of one family, variant and task
    embedder, reward_model, grader : names under which embeddings, rewards and grades (columns correct,
        score and answer) are kept
    on_shard : called with (rollouts done, rollouts in all)
    say : called with a line on what was left out

    Raises
    ------
    DataError
        A missing column, a wrong type or an impossible value; names file, row or line, and column.
    UsageError
        A name or policy that neither the source nor the caller tells.
    ConflictError
        A run of this name is stored from another source.
    """
    path = Path(source)
    policy = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
    }
    _check_policy(policy, "--{}", UsageError)
    store.check_name("--embedder", embedder)
    store.check_name("--reward-model", reward_model)
    store.check_name("--grader", grader)
    names = {"family": family, "variant": variant, "task": task}
    told = {k: v for k, v in {**names, **policy}.items() if v is not None}
    notes: list[str] = []  # said once all is stored: a refusal is one line
    options = readers.Told(tokenizer, Path(requests) if requests else None, notes.append)
    with as_parquet(path, format, told, processed_logprobs, options) as (file, files, found):
        settings = {
            "engine": "import",
            "source_sha256": _hash(path, files),
            "embedder": embedder,
            "reward_model": reward_model,
            **({"grader": grader} if grader != "imported" else {}),
            **{
                k: v
                for k, v in {
                    "format": found,
                    **policy,
                    "processed_logprobs": processed_logprobs or None,
                    "requests_sha256": store.sha256(Path(requests)) if requests else None,
                    "tokenizer_sha256": _tokenizer_hash(tokenizer),
                }.items()
                if v is not None
            },
        }
        stored = _store(root, path, file, run, settings, told, on_shard)
    if say:
        for note in notes:
            say(note)
    return stored


def _store(
    root: str | Path,
    path: Path,
    file: Path,
    run: str | None,
    common: dict[str, Any],
    told: dict[str, Any],
    on_shard: Callable[[int, int], None] | None,
) -> list[str]:
    """Stores what ``file``, the Parquet form of the source at ``path``, holds."""
    schema = _check_schema(file, path)
    keys = _read_keys(file, path, schema)
    groups = keys.partition_by(list(NAMES), maintain_order=True)
    if run is not None and len(groups) > 1:
        raise UsageError(f"--run: {path} holds {len(groups)} runs, one a family, variant and task")
    for name in NAMES:
        for value in keys[name].unique(maintain_order=True):
            store.check_name(f"{path}: column {name}", value)
    jobs = []
    for group in groups:
        of_run = _of_the_run(group, path, told)
        run_id = store.check_name("--run", run or ".".join(of_run[name] for name in NAMES))
        jobs.append(({"run_id": run_id, **common, **of_run}, group))
    return _store_jobs(store.init(root), path, file, schema, jobs, len(keys), on_shard)


def _store_jobs(
    root: Path,
    path: Path,
    file: Path,
    schema: pa.Schema,
    jobs: list[tuple[dict[str, Any], pl.DataFrame]],
    rollouts: int,
    on_shard: Callable[[int, int], None] | None,
) -> list[str]:
    """Stores the run of each job; none is shown before all of the source proves good."""
    done = 0
    written: list[_Files] = []
    columns = [name for name in schema.names if name.partition(".")[0] in _STORED]
    for settings, group in jobs:
        run_id, files = settings["run_id"], _Files(list)
        with store.holding(root, run_id):
            store.forget_unfinished(root, run_id, engine="import")
            store.plan(root, "run", run_id, settings)
            for number, rows in enumerate(_shards(group)):
                if not store.is_complete(root, run_id):
                    _write(root, file, path, columns, settings, number, rows, files)
                done += len(rows)
                if on_shard:
                    on_shard(done, rollouts)
        written.append(files)
    for (settings, group), files in zip(jobs, written, strict=True):
        with store.holding(root, settings["run_id"]):
            _complete(root, file, path, schema, settings, group, files)
    sql.write_database(root)
    return [settings["run_id"] for settings, _ in jobs]


def _hash(path: Path, files: list[Path]) -> str:
    if files == [path]:
        return store.sha256(path)
    return store.content_id({str(f.relative_to(path)): store.sha256(f) for f in files})


def _tokenizer_hash(tokenizer: Any) -> str | None:
    return None if tokenizer is None else store.content_id(tokenizer.get_vocab())


# ---------------------------------------------------------------- from Parquet


def _is_list(kind: pa.DataType, of: Callable[[pa.DataType], bool]) -> bool:
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return listed and of(kind.value_type)


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)


def _is_whole(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_null(kind)


def _check_schema(file: Path, path: Path) -> pa.Schema:
    schema = parquet_schema(file)
    missing = [name for name in _KEYS if name not in schema.names]
    if not set(LENGTHS) & set(schema.names):
        missing.append("entropy (or logprob, token_ids or n_tokens)")
    if missing:
        raise DataError(
            f"{path}: missing column {', '.join(missing)}; there are {', '.join(schema.names)}"
        )
    floats = pa.types.is_floating
    wanted: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
        **dict.fromkeys(
            ("entropy", "logprob", "eos_logprob"), (lambda k: _is_list(k, floats), "a list of floats")
        ),
        "token_ids": (lambda k: _is_list(k, pa.types.is_integer), "a list of integers"),
        "top_token_ids": (
            lambda k: _is_list(k, lambda i: _is_list(i, pa.types.is_integer)),
            "a list of lists of integers",
        ),
        "top_logprobs": (
            lambda k: _is_list(k, lambda i: _is_list(i, floats)),
            "a list of lists of floats",
        ),
        "sample": (pa.types.is_integer, "integers"),
        "prompt_id": (lambda k: _is_text(k) or _is_whole(k), "text or integers"),
        **dict.fromkeys(NAMES, (_is_text, "text")),
        **dict.fromkeys(("n_tokens", "top_k", "max_new_tokens"), (_is_whole, "integers")),
        **dict.fromkeys(("temperature", "top_p", "reward", "score"), (_is_number, "numbers")),
        "correct": (lambda k: _is_number(k) or pa.types.is_boolean(k), "true or false"),
        **dict.fromkeys(
            (
                "text",
                "finish_reason",
                "prompt",
                "messages",
                "model",
                "answer",
                "reference",
            ),
            (_is_text, "text"),
        ),
    }
    for name, kind in zip(schema.names, schema.types, strict=True):
        rule = wanted["entropy"] if name.partition(".")[0] == "embedding" else wanted.get(name)
        if rule and not rule[0](kind):
            raise DataError(f"{path}: column {name} is {kind}, needs {rule[1]}")
        if schema.names.count(name) > 1:
            raise DataError(f"{path}: column {name} is there twice")
    return schema


def _read_keys(file: Path, path: Path, schema: pa.Schema) -> pl.DataFrame:
    """Keys as text and what is said of the run, with the row number and the prompt id as it stands."""
    others = [name for name in _OF_THE_RUN if name in schema.names]
    with decoding(path):
        table = pq.read_table(file, columns=[*_KEYS, *others])
        table.validate(full=True)
    if table.num_rows == 0:
        raise DataError(f"{path}: holds no rows")
    frame = pl.DataFrame(table)
    for name in _KEYS:
        if frame[name].null_count():
            row = int(np.argmax(frame[name].is_null().to_numpy()))
            raise DataError(f"{path}: row {row}: {name} is missing")
    text = [pl.col(name).cast(pl.String) for name in NAMES]
    frame = frame.select(
        *text,
        pl.col("prompt_id").alias("key"),
        pl.col("prompt_id").cast(pl.String),
        pl.col("sample").cast(pl.Int64, strict=False).fill_null(-1),
        *others,
    ).with_row_index("row")
    twice = frame.filter(pl.struct("family", "variant", "task", "prompt_id", "sample").is_duplicated())
    if len(twice):
        first = twice.row(0, named=True)
        raise DataError(
            f"{path}: row {first['row']}: prompt {first['prompt_id']} sample {first['sample']} of "
            f"{first['family']} {first['variant']} {first['task']} is there twice"
        )
    if frame["sample"].min() < 0 or frame["sample"].max() > 2**31 - 1:  # type: ignore[operator]
        raise DataError(f"{path}: column sample needs numbers from 0 to 2147483647")
    return frame


def _of_the_run(group: pl.DataFrame, path: Path, told: dict[str, Any]) -> dict[str, Any]:
    """Names, checkpoint and policy of a group's run, None left out; each has one value in it."""
    found: dict[str, Any] = {name: group[name][0] for name in NAMES}
    what = f"{path}: {' '.join(found.values())}"
    for name in _OF_THE_RUN:
        values = group[name].unique(maintain_order=True).to_list() if name in group.columns else [None]
        if name in told:
            values = [told[name]]
        if len(values) > 1:
            raise DataError(
                f"{what}: {name} is {values[0]} and {values[1]}; a run has one: import them "
                "apart, each with a --variant or --run of its own"
            )
        found[name] = values[0]
    if found["temperature"] is not None:
        found["temperature"] = float(found["temperature"])
        found |= {k: v for k, v in PLAIN.items() if found[k] is None}
    _check_policy(found, f"{what}: {{}}", DataError)
    return {k: v for k, v in found.items() if v is not None or k == "max_new_tokens"}


def _check_policy(policy: dict[str, Any], name: str, error: type[Exception]) -> None:
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "temperature": (lambda v: 0 <= v < math.inf, "0 (greedy) or more"),
        "top_k": (lambda v: 0 <= v < 2**31, "0 (off) or more, and below 2147483648"),
        "top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
        "max_new_tokens": (lambda v: 1 <= v < 2**31, "at least 1, and below 2147483648"),
    }
    for key, (good, rule) in rules.items():
        if policy[key] is not None and not good(policy[key]):
            raise error(f"{name.format(key.replace('_', '-'))} {policy[key]}: needs {rule}")


# ---------------------------------------------------------------- into the store


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


def _of(settings: dict[str, Any]) -> Any:
    """The filter of a run's rows."""
    family, variant, task = (ds.field(name) == settings[name] for name in NAMES)
    return family & variant & task


def _write(
    root: Path,
    file: Path,
    path: Path,
    columns: list[str],
    settings: dict[str, Any],
    shard: int,
    rows: pl.DataFrame,
    files: _Files,
) -> None:
    run_id = settings["run_id"]
    where = store.folder(root, "rollouts", run=run_id, **{k: settings[k] for k in NAMES})
    store.remove_leftovers(where)
    wanted = ds.field("prompt_id").isin(rows["key"].unique().to_list()) & _of(settings)
    with decoding(path):
        data = ds.dataset(file).to_table(columns=columns, filter=wanted)
        data.validate(full=True)
    # the filter keeps the file's order, and so do the keys: row i here is row i there
    first = {p: i for i, p in enumerate(rows["prompt_id"].unique(maintain_order=True))}
    order = rows.with_row_index("at").with_columns(
        pl.col("prompt_id").replace_strict(first, return_dtype=pl.Int64).alias("rank")
    )
    at = order.sort("rank", "sample")["at"].to_numpy()
    data, rows = data.take(pa.array(at)), rows[at]
    names = [f"{path}: row {row}" for row in rows["row"]]
    if "where" in columns:
        names = [said or name for said, name in zip(data["where"].to_pylist(), names, strict=True)]
    record = {name: data[name] for name in _ROLLOUT if name in columns}
    for name in LISTS:
        # a list of candidates stands for every rollout of a shard or for none
        some = name.startswith("top_") and name in record and record[name].null_count
        if name in record and (some or record[name].null_count == len(rows)):
            del record[name]
    _check_tokens(record, names)
    record |= {
        "run_id": [run_id] * len(rows),
        "prompt_id": rows["prompt_id"].to_list(),
        "sample": rows["sample"].to_list(),
        "finish_reason": _finish_reasons(record, settings["max_new_tokens"], names),
    }
    write_shard(store.shard_path(where, shard), record, names)
    files["rollouts", run_id].append(store.shard_path(where, shard))
    for column in columns:
        kind, _, embedder = column.partition(".")
        if kind == "embedding" and data[column].null_count < len(rows):
            embedder = embedder or settings["embedder"]
            matrix = _matrix(data[column], names)
            files["embeddings", embedder] += write_embeddings(
                root, embedder, run_id, shard, record["prompt_id"], record["sample"], matrix
            )
    of_rollout = {key: record[key] for key in ("run_id", "prompt_id", "sample")}
    if "reward" in columns:
        reward = {"reward": data["reward"].cast(pa.float64(), safe=False)}
        _write_known(root, "rewards", settings["reward_model"], shard, {**of_rollout, **reward}, files)
    if {"correct", "score"} & set(columns):
        grade = {name: _grade(data[name], name, names) for name in _GRADE if name in columns}
        _write_known(
            root, "grades", settings.get("grader", "imported"), shard, {**of_rollout, **grade}, files
        )


def _write_known(
    root: Path, table: str, name: str, shard: int, columns: dict[str, Any], files: _Files
) -> None:
    """Writes those rows of a shard that have a value in one of the columns after the keys."""
    rows = pl.DataFrame({key: pl.Series(values) for key, values in columns.items()})
    values = [key for key in columns if key not in ("run_id", "prompt_id", "sample", "answer")]
    rows = rows.filter(pl.any_horizontal(pl.col(key).is_not_null() for key in values))
    if len(rows):
        key = TABLES[table].partitions[0]
        run_id = columns["run_id"][0]
        path = store.shard_path(store.folder(root, table, **{key: name, "run": run_id}), shard)
        store.write_rows(path, table, {key: rows[key].to_arrow() for key in columns})
        files[table, name].append(path)


def _grade(values: pa.ChunkedArray, name: str, names: list[str]) -> pa.Array:
    """A column of grades: answers as text, scores as numbers, correct as booleans, also of 0 and 1."""
    listed = values.to_pylist()
    if name == "correct":
        for where, value in zip(names, listed, strict=True):
            if value not in (None, 0, 1):
                raise DataError(f"{where}: correct is {value}, needs true or false")
        return pa.array([None if value is None else bool(value) for value in listed], pa.bool_())
    if name == "answer":
        return pa.array([None if value is None else str(value) for value in listed], pa.string())
    for where, value in zip(names, listed, strict=True):
        if value is not None and not math.isfinite(value):
            raise DataError(f"{where}: score is {value}, needs a finite number")
    return pa.array([None if value is None else float(value) for value in listed], pa.float64())


def _check_tokens(record: dict[str, Any], names: list[str]) -> None:
    """Refuses a number or an id of tokens that none can be."""
    if not any(name in record for name in LENGTHS[:3]):
        if "n_tokens" not in record:
            raise DataError(f"{names[0]}: {', '.join(LENGTHS)} are missing")
        counts = record["n_tokens"].to_pylist()
        for name, count in zip(names, counts, strict=True):
            if count is None or not 0 <= count < 2**31:
                raise DataError(f"{name}: n_tokens is {count}, needs the number of tokens")
    if "token_ids" in record:
        for name, ids in zip(names, record["token_ids"], strict=True):
            if ids.values and (ids.values.null_count or not _are_ids(ids.values)):
                raise DataError(f"{name}: token_ids needs ids from 0 on, one a token")
    if "top_token_ids" in record:
        for name, steps in zip(names, record["top_token_ids"], strict=True):
            if not _are_ids(pc.list_flatten(steps.values)):
                raise DataError(f"{name}: top_token_ids needs ids from 0 on")


def _are_ids(values: pa.Array) -> bool:
    """Whether token ids can be these numbers, NULL left out."""
    low, high = pc.min_max(values).as_py().values()
    return low is None or (low >= 0 and high < 2**31)


def _finish_reasons(
    record: dict[str, Any], max_new_tokens: int | None, names: list[str]
) -> list[str | None]:
    known = next(name for name in LENGTHS if name in record)
    values = record[known].combine_chunks()
    lengths = (values if known == "n_tokens" else values.value_lengths()).to_pylist()
    given = record["finish_reason"].to_pylist() if "finish_reason" in record else [None] * len(names)
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


def _complete(
    root: Path,
    file: Path,
    path: Path,
    schema: pa.Schema,
    settings: dict[str, Any],
    group: pl.DataFrame,
    files: _Files,
) -> None:
    """Commits a run and what came with it; its rollouts last, so that all of it appears at once."""
    run_id = settings["run_id"]
    if store.is_complete(root, run_id):
        return
    names = {name: settings[name] for name in NAMES}
    model = {"family": names["family"], "variant": names["variant"], "source": settings.get("model")}
    model_id = store.add_model(root, model)
    prompts = store.add_prompts(
        root, settings["task"], _prompts(root, file, path, schema, settings, group)
    )
    for (table, name), made in files.items():
        if table != "rollouts":
            key = TABLES[table].partitions[0]
            store.commit(root, table, {key: name, "run": run_id}, made, {key: name, "engine": "import"})
    row = {
        **{k: settings.get(k) for k in ("run_id", *NAMES, *PLAIN, "max_new_tokens")},
        "model_id": model_id,
        "rendering": "import",
        "engine": "import",
        "settings": store.canonical(settings),
        "versions": "{}",
    }
    store.complete_run(root, files["rollouts", run_id], row, settings, prompts)


_PROMPT = {"prompt": "text", "messages": "messages", "reference": "reference"}


def _prompts(
    root: Path,
    file: Path,
    path: Path,
    schema: pa.Schema,
    settings: dict[str, Any],
    group: pl.DataFrame,
) -> list[dict[str, Any]]:
    """The prompts of a run, with what the source says of them."""
    said: dict[str, dict[str, Any]] = {}
    given = [name for name in _PROMPT if name in schema.names]
    if given:
        with decoding(path):
            for batch in ds.dataset(file).to_batches(["prompt_id", *given], filter=_of(settings)):
                ids = batch["prompt_id"].cast(pa.string()).to_pylist()
                values = [batch[name].to_pylist() for name in given]
                for prompt_id, *row in zip(ids, *values, strict=True):
                    said.setdefault(prompt_id, {_PROMPT[n]: v for n, v in zip(given, row, strict=True)})
    # what is stored with another text keeps it
    stored = sql.prompts(root)
    asked = [p for p in group["prompt_id"].unique(maintain_order=True)]
    known = {p for p in asked if _has_text(stored.get((settings["task"], p), {}))}
    for prompt_id in known & said.keys():
        said[prompt_id] = {k: v for k, v in said[prompt_id].items() if k == "reference"}
    return [{"prompt_id": p, "source": path.name, **said.get(p, {})} for p in asked]


def _has_text(prompt: Mapping[str, Any]) -> bool:
    return bool(prompt.get("text") or prompt.get("messages"))
