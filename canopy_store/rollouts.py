"""A shard of rollouts: checks of the per-step record, its sums, and the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from canopy_store import store
from canopy_store.errors import DataError

_ROUNDING = 1e-5  # nats: what float32 arithmetic may leave above 0 or below it


def write_shard(path: Path, columns: Mapping[str, Any], rows: Sequence[str] | None = None) -> None:
    """Writes one shard of rollouts with n_tokens and every sum computed from its arrays.

    Parameters
    ----------
    path : the shard's file
    columns : columns of the table ``rollouts``; ``entropy`` and, where known, ``logprob`` and
        ``eos_logprob`` are lists of nats, one value a step
    rows : what errors call each row; by default its prompt and sample

    Raises
    ------
    DataError
        A rollout of no tokens, lists of different lengths, a value no policy can give.
    """
    names = rows or [
        f"prompt {p} sample {s}" for p, s in zip(columns["prompt_id"], columns["sample"], strict=True)
    ]
    entropy, offsets = _steps(columns["entropy"], "entropy", names)
    lengths = np.diff(offsets)
    if (lengths == 0).any():
        row = names[int(np.argmin(lengths))]
        raise DataError(f"{row}: a rollout of no tokens has no entropy rate; leave it out")
    _require(np.isfinite(entropy) & (entropy >= -_ROUNDING), entropy, "entropy", offsets, names,
             "an entropy is finite and at least 0 nats")  # fmt: skip
    entropy = np.maximum(entropy, np.float32(0))
    filled: dict[str, Any] = {
        **columns,
        "n_tokens": lengths.astype(np.int32),
        "entropy": _lists(entropy, offsets),
        "entropy_sum": _sums(entropy, offsets),
    }
    if columns.get("logprob") is not None:
        logprob, _ = _steps(columns["logprob"], "logprob", names, offsets)
        _require(np.isfinite(logprob) & (logprob <= _ROUNDING), logprob, "logprob", offsets, names,
                 "a sampled token has a finite log-probability of at most 0 nats")  # fmt: skip
        logprob = np.minimum(logprob, np.float32(0))
        filled["logprob"] = _lists(logprob, offsets)
        filled["surprisal_sum"] = _sums(-logprob, offsets)
    if columns.get("eos_logprob") is not None:
        eos, _ = _steps(columns["eos_logprob"], "eos_logprob", names, offsets)
        _require(~np.isnan(eos) & (eos <= _ROUNDING), eos, "eos_logprob", offsets, names,
                 "the log-probability of ending is at most 0 nats, or -inf")  # fmt: skip
        eos = np.minimum(eos, np.float32(0))
        filled["eos_logprob"] = _lists(eos, offsets)
        filled["stop_entropy_sum"] = _sums(stop_entropy(eos), offsets)
    for name in ("token_ids", "top_token_ids", "top_logprobs"):
        if columns.get(name) is not None:
            values = _array(columns[name], None)
            wrong = np.flatnonzero(values.value_lengths().to_numpy(False) != lengths)
            if len(wrong):
                raise DataError(f"{names[wrong[0]]}: {name} and entropy differ in length")
            filled[name] = values
    store.write_rows(path, "rollouts", filled)


def stop_entropy(eos_logprob: np.ndarray) -> np.ndarray:
    """Binary entropy (nats) of ending against going on; shape of ``eos_logprob`` (nats)."""
    e = np.asarray(eos_logprob, np.float64)
    q = np.exp(e)
    inside = (q > 0) & (q < 1)
    result = np.zeros_like(q)
    result[inside] = -(q[inside] * e[inside] + (1 - q[inside]) * np.log1p(-q[inside]))
    return result


def _array(values: Any, kind: pa.DataType | None) -> Any:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if not isinstance(values, pa.Array):
        values = pa.array(values, kind)
    return values if kind is None else values.cast(kind)


def _steps(
    values: Any, name: str, rows: Sequence[str], offsets: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """All steps of all rollouts end to end, float32, and where each rollout begins (rows + 1)."""
    lists = _array(values, pa.list_(pa.float32()))
    lengths = lists.value_lengths().fill_null(-1).to_numpy()
    if (lengths < 0).any():
        raise DataError(f"{rows[int(np.argmin(lengths))]}: {name} is missing")
    steps = lists.flatten()
    found = np.concatenate([[0], np.cumsum(lengths)])
    if offsets is not None and not np.array_equal(found, offsets):
        row = int(np.flatnonzero(np.diff(found) != np.diff(offsets))[0])
        raise DataError(f"{rows[row]}: {name} and entropy differ in length")
    return steps.fill_null(float("nan")).to_numpy(zero_copy_only=False), found


def _require(
    good: np.ndarray, steps: np.ndarray, name: str, offsets: np.ndarray, rows: Sequence[str],
    rule: str,
) -> None:  # fmt: skip
    if not good.all():
        at = int(np.argmin(good))
        row = int(np.searchsorted(offsets, at, side="right")) - 1
        raise DataError(f"{rows[row]}: {name} at step {at - offsets[row] + 1} is {steps[at]}: {rule}")


def _lists(steps: np.ndarray, offsets: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), pa.array(steps.astype(np.float32, copy=False))
    )


def _sums(steps: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    return np.add.reduceat(steps.astype(np.float64), offsets[:-1])
