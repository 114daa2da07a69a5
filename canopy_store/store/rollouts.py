"""A shard of rollouts: checks of the per-step record, its sums, and the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from canopy_store.errors import DataError
from canopy_store.store.parquet import write_rows

_ROUNDING = 1e-5  # nats: what float32 arithmetic may leave above 0 or below it


def write_shard(path: Path, columns: Mapping[str, Any], rows: Sequence[str] | None = None) -> None:
    """Writes one shard of rollouts with n_tokens and every sum computed from its arrays.

    Parameters
    ----------
    path : the shard's file
    columns : columns of the table ``rollouts``; ``entropy``, ``logprob``, ``eos_logprob`` and
        ``log_mass``, where known, are lists of nats, one value a step. The first of entropy, logprob
        and token_ids that is there gives the lengths; where none is, ``n_tokens`` must
    rows : what errors call each row; by default its prompt and sample

    Raises
    ------
    DataError
        A rollout of no tokens, lists of different lengths, a value no policy can give.
    """
    names = rows or [
        f"prompt {p} sample {s}" for p, s in zip(columns["prompt_id"], columns["sample"], strict=True)
    ]
    longest, offsets = _offsets(columns, names)
    lengths = np.diff(offsets)
    if (lengths == 0).any():
        row = names[int(np.argmin(lengths))]
        raise DataError(f"{row}: a rollout of no tokens has no entropy rate; leave it out")
    filled: dict[str, Any] = {**columns, "n_tokens": lengths.astype(np.int32)}

    def record(name: str, rule: str, good: Callable[[np.ndarray], np.ndarray]) -> np.ndarray | None:
        """The steps of a list column, checked; None where the column is not there."""
        if columns.get(name) is None:
            return None
        steps = _steps(columns[name], name, names, offsets, longest)
        _require(good(steps), steps, name, offsets, names, rule)
        return steps

    entropy = record(
        "entropy",
        "an entropy is finite and at least 0 nats",
        lambda h: np.isfinite(h) & (h >= -_ROUNDING),
    )
    if entropy is not None:
        entropy = np.maximum(entropy, np.float32(0))
        filled["entropy"] = _lists(entropy, offsets)
        filled["entropy_sum"] = _sums(entropy, offsets)
    logprob = record(
        "logprob",
        "a sampled token has a finite log-probability of at most 0 nats",
        lambda s: np.isfinite(s) & (s <= _ROUNDING),
    )
    if logprob is not None:
        logprob = np.minimum(logprob, np.float32(0))
        filled["logprob"] = _lists(logprob, offsets)
        filled["surprisal_sum"] = _sums(-logprob, offsets)
    eos = record(
        "eos_logprob",
        "the log-probability of ending is at most 0 nats, or -inf",
        lambda e: ~np.isnan(e) & (e <= _ROUNDING),
    )
    if eos is not None:
        eos = np.minimum(eos, np.float32(0))
        filled["eos_logprob"] = _lists(eos, offsets)
        filled["stop_entropy_sum"] = _sums(stop_entropy(eos), offsets)
    log_mass = record(
        "log_mass",
        "the log of a kept mass is finite and at most 0 nats",
        lambda m: np.isfinite(m) & (m <= _ROUNDING),
    )
    if log_mass is not None:
        log_mass = np.minimum(log_mass, np.float32(0))
        filled["log_mass"] = _lists(log_mass, offsets)
        filled["log_mass_sum"] = _sums(log_mass, offsets)
    record("n_kept", "a policy keeps one token at least", lambda n: n >= 1)
    for name in ("token_ids", "top_token_ids", "top_logprobs", "n_kept"):
        if columns.get(name) is not None:
            values = _array(columns[name], None)
            wrong = np.flatnonzero(values.value_lengths().to_numpy(False) != lengths)
            if len(wrong):
                raise DataError(f"{names[wrong[0]]}: {name} and {longest} differ in length")
            filled[name] = values
    if columns.get("token_chars") is not None:
        filled["token_chars"] = _array(columns["token_chars"], pa.list_(pa.int32()))
        texts = _array(columns.get("text") or [None] * len(names), pa.string())
        wrong = misplaced_tokens(filled["token_chars"], texts, lengths)
        if len(wrong):
            raise DataError(
                f"{names[wrong[0]]}: token_chars needs the characters of each token, all of them those "
                "of text"
            )
    write_rows(path, "rollouts", filled)


def misplaced_tokens(chars: pa.ListArray, texts: pa.StringArray, lengths: np.ndarray) -> np.ndarray:
    """The rows whose characters a token are not a number from 0 on each, or not the text's in all.

    Parameters
    ----------
    chars, texts : ``token_chars`` and ``text``; rows without the first are right
    lengths : tokens of each row (rows,)
    """
    known = chars.is_valid().to_numpy(False)
    counts = chars.value_lengths().fill_null(0).to_numpy(False)
    steps = chars.flatten().fill_null(-1).to_numpy(False)
    starts = np.concatenate([[0], np.cumsum(counts)])
    total = np.diff(np.concatenate([[0], np.cumsum(steps, dtype=np.int64)])[starts])
    below = np.diff(np.concatenate([[0], np.cumsum(steps < 0)])[starts])
    wanted = pc.utf8_length(texts).fill_null(-1).to_numpy(False)
    return np.flatnonzero(known & ((counts != lengths) | (total != wanted) | (below > 0)))


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


def _offsets(columns: Mapping[str, Any], rows: Sequence[str]) -> tuple[str, np.ndarray]:
    """The column that gives the rollouts' lengths, and where each rollout begins (rows + 1)."""
    for name in ("entropy", "logprob", "token_ids"):
        if columns.get(name) is not None:
            lengths = _array(columns[name], None).value_lengths().fill_null(-1).to_numpy()
            if (lengths < 0).any():
                raise DataError(f"{rows[int(np.argmin(lengths))]}: {name} is missing")
            return name, np.concatenate([[0], np.cumsum(lengths)])
    lengths = np.asarray(columns["n_tokens"], np.int64)
    return "n_tokens", np.concatenate([[0], np.cumsum(lengths)])


def _steps(values: Any, name: str, rows: Sequence[str], offsets: np.ndarray, longest: str) -> np.ndarray:
    """All steps of all rollouts end to end, float32."""
    lists = _array(values, pa.list_(pa.float32()))
    lengths = lists.value_lengths().fill_null(-1).to_numpy()
    if (lengths < 0).any():
        raise DataError(f"{rows[int(np.argmin(lengths))]}: {name} is missing")
    steps = lists.flatten()
    found = np.concatenate([[0], np.cumsum(lengths)])
    if not np.array_equal(found, offsets):
        row = int(np.flatnonzero(np.diff(found) != np.diff(offsets))[0])
        raise DataError(f"{rows[row]}: {name} and {longest} differ in length")
    return steps.fill_null(float("nan")).to_numpy(zero_copy_only=False)


def _require(
    good: np.ndarray,
    steps: np.ndarray,
    name: str,
    offsets: np.ndarray,
    rows: Sequence[str],
    rule: str,
) -> None:
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
