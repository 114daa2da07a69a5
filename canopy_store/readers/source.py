"""The Parquet form of a source of rollouts: what its columns must be, and what they say of a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from canopy_store.errors import DataError
from canopy_store.readers.staging import LENGTHS, NAMES, PLAIN, decoding, parquet_schema

_KEYS = (*NAMES, "prompt_id", "sample")
_OF_THE_RUN = ("model", "temperature", "top_k", "top_p", "max_new_tokens")


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


def check_schema(file: Path, path: Path) -> pa.Schema:
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


def read_keys(file: Path, path: Path, schema: pa.Schema) -> pl.DataFrame:
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


def of_the_run(group: pl.DataFrame, path: Path, told: dict[str, Any]) -> dict[str, Any]:
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
    check_policy(found, f"{what}: {{}}", DataError)
    return {k: v for k, v in found.items() if v is not None or k == "max_new_tokens"}


def check_policy(policy: dict[str, Any], name: str, error: type[Exception]) -> None:
    rules: dict[str, tuple[Callable[[Any], bool], str]] = {
        "temperature": (lambda v: 0 <= v < math.inf, "0 (greedy) or more"),
        "top_k": (lambda v: 0 <= v < 2**31, "0 (off) or more, and below 2147483648"),
        "top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
        "max_new_tokens": (lambda v: 1 <= v < 2**31, "at least 1, and below 2147483648"),
    }
    for key, (good, rule) in rules.items():
        if policy[key] is not None and not good(policy[key]):
            raise error(f"{name.format(key.replace('_', '-'))} {policy[key]}: needs {rule}")


def grade_column(values: pa.ChunkedArray, name: str, names: list[str]) -> pa.Array:
    """A column of grades: answers as text, scores as numbers, correct as booleans, also of 0 and 1."""
    listed = values.to_pylist()
    if name == "correct":
        for where, value in zip(names, listed, strict=True):
            if value not in (None, 0, 1):
                raise DataError(f"{where}: correct is {value}, needs true or false")
        return pa.array([None if value is None else bool(value) for value in listed], pa.bool_())
    if name == "answer":
        return pa.array([None if value is None else str(value) for value in listed], pa.string())
    return number_column(values, name, names)


def number_column(values: pa.ChunkedArray, name: str, names: list[str]) -> pa.Array:
    """A column of finite numbers, or none."""
    listed = values.to_pylist()
    for where, value in zip(names, listed, strict=True):
        if value is not None and not math.isfinite(value):
            raise DataError(f"{where}: {name} is {value}, needs a finite number")
    return pa.array([None if value is None else float(value) for value in listed], pa.float64())


def check_tokens(record: dict[str, Any], names: list[str]) -> None:
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


def finish_reasons(
    record: dict[str, Any], max_new_tokens: int | None, names: list[str], guessed: list[bool | None]
) -> list[str | None]:
    """What ended each rollout: as told, else by its length, unless its tokens are ``guessed``."""
    known = next(name for name in LENGTHS if name in record)
    values = record[known].combine_chunks()
    lengths = (values if known == "n_tokens" else values.value_lengths()).to_pylist()
    given = record["finish_reason"].to_pylist() if "finish_reason" in record else [None] * len(names)
    reasons: list[str | None] = []
    for name, reason, length, guess in zip(names, given, lengths, guessed, strict=True):
        if reason not in (None, "stop", "length"):
            raise DataError(f"{name}: finish_reason {reason!r}: needs stop or length")
        if reason is None and max_new_tokens is not None and length is not None and not guess:
            reason = "length" if length >= max_new_tokens else "stop"
        reasons.append(reason)
    return reasons


def embedding_matrix(lists: pa.ChunkedArray, names: list[str]) -> np.ndarray:
    values = lists.to_pylist()
    for name, value in zip(names, values, strict=True):
        if value is None or len(value) != len(values[0] or []) or not value:
            raise DataError(f"{name}: embedding is missing or of another length than the first")
    return np.array(values, np.float64)
