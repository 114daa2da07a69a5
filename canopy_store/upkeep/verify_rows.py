"""What is wrong inside a file's rows: lengths, bounds (nats) and sums.

Sums are recomputed by the formulas that store them, not written again here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from canopy_store.schema import TABLES, VERDICTS
from canopy_store.store.rollouts import misplaced_tokens, stop_entropy

SPECTRUM = 1e-9  # what summing in another order may change in a spectrum
_SUM = 1e-10  # relative: the same of a sum
_ABOVE = 1e-4  # nats: what float32 may leave above log |support|
_UNIT = 1e-5
_NAMING = ("prompt_id", "document_id", "item_id", "option", "sample")  # columns that say which row it is


def problems(table: str, rows: pa.Table, run: Mapping[str, Any] | None) -> Iterator[str]:
    """A line for each kind of fault in ``rows`` of ``table``, of the run with this row in ``runs``."""
    return chain.from_iterable(CHECKS[check](rows, run) for check in TABLES[table].checks)


def _support(run: Mapping[str, Any] | None) -> float:
    """log |support| of the run's policy in nats; infinite where the vocabulary is not recorded."""
    if run is None:
        return math.inf
    if run["temperature"] == 0:
        return 0.0
    return math.log(run["top_k"]) if run["top_k"] else math.inf


def _rows_at(rows: pa.Table, wrong: np.ndarray) -> str:
    """Says how many rows are wrong, and which is the first."""
    first = int(wrong[0])
    named = [name for name in _NAMING if name in rows.column_names]
    which = " ".join(f"{name.removesuffix('_id')} {rows[name][first]}" for name in named)
    return f"in {len(wrong)} rows, first {which}"


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All values end to end, each row's length (-1: NULL) and where each row begins (rows + 1)."""
    lists = column.combine_chunks()
    lengths = lists.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(np.maximum(lengths, 0))])
    return lists.flatten().to_numpy(zero_copy_only=False), lengths, starts


def _sums(values: np.ndarray, lengths: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Each row's sum in float64; NaN where the list is NULL."""
    result = np.where(lengths < 0, np.nan, 0.0)
    full = lengths > 0  # reduceat reads one value even of an empty stretch
    if full.any():
        result[full] = np.add.reduceat(values.astype(np.float64), starts[:-1][full])
    return result


def _rollout_problems(rows: pa.Table, run: Mapping[str, Any] | None) -> Iterator[str]:
    wrong = np.flatnonzero(rows["n_tokens"].to_numpy() < 1)
    if len(wrong):
        yield f"n_tokens below 1 {_rows_at(rows, wrong)}"
    known = pa.array(["stop", "length", None])
    wrong = np.flatnonzero(~pc.is_in(rows["finish_reason"], known).to_numpy())
    if len(wrong):
        yield f"finish_reason neither stop nor length {_rows_at(rows, wrong)}"
    if "token_chars" in rows.column_names:
        chars, texts = rows["token_chars"].combine_chunks(), rows["text"].combine_chunks()
        wrong = misplaced_tokens(chars, texts, rows["n_tokens"].to_numpy())
        if len(wrong):
            yield f"token_chars are not one a token, or not those of text {_rows_at(rows, wrong)}"


_SUMMED: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "entropy": ("entropy_sum", lambda h: h),
    "logprob": ("surprisal_sum", lambda s: -s),
    "eos_logprob": ("stop_entropy_sum", stop_entropy),
    "log_mass": ("log_mass_sum", lambda m: m),
}


def _sampled_problems(rows: pa.Table, run: Mapping[str, Any] | None) -> Iterator[str]:
    return _step_problems(rows, rows["n_tokens"].to_numpy(), run, own=True)


def _scored_problems(rows: pa.Table, run: Mapping[str, Any] | None) -> Iterator[str]:
    return _step_problems(rows, _flat(rows["entropy"])[1], None, own=False)


def _step_problems(
    rows: pa.Table, wanted: np.ndarray, run: Mapping[str, Any] | None, own: bool
) -> Iterator[str]:
    """What is wrong in lists of one value a step: lengths, bounds (nats), sums.

    Parameters
    ----------
    rows : a row group
    wanted : each row's number of steps (rows,)
    run : whose policy it is; None where it is not known, or another's
    own : false for scores, where another policy may give a sampled token no probability
    """
    support = _support(run)
    most = (run and run["top_k"]) or math.inf
    rules: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
        "entropy": (
            f"outside 0 to {support + _ABOVE:.4g} nats",
            lambda h: np.isfinite(h) & (h >= 0) & (h <= support + _ABOVE),
        ),
        "logprob": ("above 0, or not finite", lambda s: (s <= 0) & (np.isfinite(s) | (not own))),
        "eos_logprob": ("above 0", lambda e: e <= 0),
        "log_mass": ("above 0, or not finite", lambda m: (m <= 0) & np.isfinite(m)),
        "n_kept": (f"outside 1 to {most:.0f}", lambda n: (n >= 1) & (n <= most)),
    }
    for name in (*rules, "token_ids", "top_token_ids", "top_logprobs"):
        if name not in rows.column_names or rows[name].null_count == len(rows) > 0:
            total = _SUMMED.get(name, ("",))[0]
            if total in rows.column_names and rows[total].null_count < len(rows):
                yield f"{_SUMMED[name][0]} without {name}"
            continue
        lists = rows[name].combine_chunks()
        lengths = lists.value_lengths().fill_null(-1).to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero((lengths != wanted) & (lengths >= 0))
        if len(wrong):
            yield f"{name} is not as long as n_tokens {_rows_at(rows, wrong)}"
        if name == "top_logprobs":
            inner = pc.list_flatten(lists).flatten().to_numpy(zero_copy_only=False)
            if not (inner <= 0).all():
                yield "top_logprobs above 0, or missing"
        if name not in rules:
            continue
        values, lengths, starts = _flat(rows[name])
        rule, good = rules[name]
        at = np.flatnonzero(~good(values))
        if len(at):
            owners = np.unique(np.searchsorted(starts, at, side="right") - 1)
            yield f"{name} {rule} {_rows_at(rows, owners)}"
            continue  # its sum says nothing more
        if name not in _SUMMED:
            continue
        column, transform = _SUMMED[name]
        stored = rows[column].to_numpy(zero_copy_only=False).astype(np.float64)
        summed = _sums(transform(values), lengths, starts)
        same = np.isclose(stored, summed, rtol=_SUM, atol=_SUM, equal_nan=True)
        wrong = np.flatnonzero(~same)
        if len(wrong):
            yield f"{column} is not the sum over {name} {_rows_at(rows, wrong)}"


def _document_problems(rows: pa.Table, run: Mapping[str, Any] | None) -> Iterator[str]:
    """What is wrong in scores of documents: lengths, bounds (nats), sums, and token strings."""
    wanted = rows["n_tokens"].to_numpy()
    for name, total, good, rule in (
        ("logprob", "logprob_sum", lambda s: s <= 0, "above 0"),
        ("entropy", "entropy_sum", lambda h: np.isfinite(h) & (h >= 0), "below 0, or not finite"),
    ):
        values, lengths, starts = _flat(rows[name])
        wrong = np.flatnonzero(lengths != wanted)
        if len(wrong):
            yield f"{name} is not as long as n_tokens {_rows_at(rows, wrong)}"
        at = np.flatnonzero(~good(values))
        if len(at):
            owners = np.unique(np.searchsorted(starts, at, side="right") - 1)
            yield f"{name} {rule} {_rows_at(rows, owners)}"
            continue
        summed = _sums(values, lengths, starts)
        stored = rows[total].to_numpy().astype(np.float64)
        wrong = np.flatnonzero(~np.isclose(stored, summed, rtol=_SUM, atol=_SUM))
        if len(wrong):
            yield f"{total} is not the sum over {name} {_rows_at(rows, wrong)}"
    yield from _token_problems(rows, wanted)


def _item_problems(rows: pa.Table, run: Mapping[str, Any] | None) -> Iterator[str]:
    wrong = np.flatnonzero((rows["n_chars"].to_numpy() < 0) | (rows["option"].to_numpy() < 0))
    if len(wrong):
        yield f"n_chars or option below 0 {_rows_at(rows, wrong)}"


def _option_problems(rows: pa.Table, run: Mapping[str, Any] | None) -> Iterator[str]:
    """What is wrong in scores of options: lengths, bounds (nats), sums."""
    counts = rows["n_tokens"].combine_chunks().fill_null(-1).to_numpy(zero_copy_only=False)
    values, lengths, starts = _flat(rows["logprob"])
    wrong = np.flatnonzero((counts != lengths) & (lengths >= 0) | (counts == 0))
    if len(wrong):
        yield f"logprob is not as long as n_tokens, or of no token {_rows_at(rows, wrong)}"
    at = np.flatnonzero(~(values <= 0))
    if len(at):
        owners = np.unique(np.searchsorted(starts, at, side="right") - 1)
        yield f"logprob above 0, or missing {_rows_at(rows, owners)}"
    else:
        stored = rows["logprob_sum"].to_numpy().astype(np.float64)
        same = np.isclose(stored, _sums(values, lengths, starts), rtol=_SUM, atol=_SUM)
        wrong = np.flatnonzero(~same & (lengths >= 0))
        if len(wrong):
            yield f"logprob_sum is not the sum over logprob {_rows_at(rows, wrong)}"
    for name in ("logprob_sum", "neutral_sum"):
        sums = rows[name].to_numpy(zero_copy_only=False).astype(np.float64)
        wrong = np.flatnonzero(~(sums <= 0) & rows[name].is_valid().to_numpy())
        if len(wrong):
            yield f"{name} above 0 {_rows_at(rows, wrong)}"


def _token_problems(rows: pa.Table, wanted: np.ndarray) -> Iterator[str]:
    """What is wrong in the tokens of documents, where they were not left out."""
    for name in ("token_ids", "tokens"):
        lengths = rows[name].combine_chunks().value_lengths().fill_null(-1)
        lengths = lengths.to_numpy(zero_copy_only=False)
        wrong = np.flatnonzero((lengths >= 0) & ((lengths < wanted) | (lengths > wanted + 1)))
        if len(wrong):
            yield f"{name} are not n_tokens, or one more {_rows_at(rows, wrong)}"
            return
    texts, sizes = rows["tokens"].to_pylist(), rows["n_bytes"].to_pylist()
    wrong = np.array(
        [
            row
            for row, tokens in enumerate(texts)
            if tokens is not None
            and len("".join(tokens[len(tokens) - wanted[row] :]).encode()) != sizes[row]
        ]
    )
    if len(wrong):
        yield f"the scored tokens' text has not n_bytes bytes {_rows_at(rows, wrong)}"


def _embedding_problems(rows: pa.Table, run: Mapping[str, Any] | None) -> Iterator[str]:
    lists = rows["embedding"].combine_chunks()
    if not pa.types.is_fixed_size_list(lists.type):
        yield "embedding has no fixed size"
        return
    matrix = lists.flatten().to_numpy(zero_copy_only=False).reshape(len(rows), -1).astype(np.float64)
    wrong = np.flatnonzero(~(np.abs(np.linalg.norm(matrix, axis=1) - 1) <= _UNIT))
    if len(wrong):
        yield f"embedding is not of unit length {_rows_at(rows, wrong)}"


def _reward_problems(rows: pa.Table, run: Mapping[str, Any] | None) -> Iterator[str]:
    return _not_finite(rows, "reward")


def _grade_problems(rows: pa.Table, run: Mapping[str, Any] | None) -> Iterator[str]:
    return _not_finite(rows, "score")


def _judgment_problems(rows: pa.Table, run: Mapping[str, Any] | None) -> Iterator[str]:
    verdicts, status = rows["verdict"], rows["status"]
    known = pc.fill_null(pc.is_in(verdicts, pa.array(VERDICTS)), True).to_numpy()
    for wrong, what in (
        (~known, f"verdict is none of {', '.join(VERDICTS)}"),
        (~pc.is_in(status, pa.array(["ok", "failed"])).to_numpy(), "status neither ok nor failed"),
        (
            verdicts.is_null().to_numpy() == pc.equal(status, "ok").to_numpy(),
            "ok without a verdict, or failed with one",
        ),
        (pc.equal(rows["sample"], rows["other_sample"]).to_numpy(), "a rollout judged against itself"),
    ):
        if wrong.any():
            yield f"{what} {_rows_at(rows, np.flatnonzero(wrong))}"
    shares = rows["probability"].to_numpy(zero_copy_only=False).astype(np.float64)
    wrong = ~((shares >= 0) & (shares <= 1)) & rows["probability"].is_valid().to_numpy()
    if wrong.any():
        yield f"probability outside 0 to 1 {_rows_at(rows, np.flatnonzero(wrong))}"


def _cluster_problems(rows: pa.Table, run: Mapping[str, Any] | None) -> Iterator[str]:
    for name in ("cluster", "n_unlike"):
        wrong = np.flatnonzero(rows[name].to_numpy() < 0)
        if len(wrong):
            yield f"{name} below 0 {_rows_at(rows, wrong)}"


def _not_finite(rows: pa.Table, name: str) -> Iterator[str]:
    values = rows[name].to_numpy(zero_copy_only=False).astype(np.float64)
    wrong = np.flatnonzero(~np.isfinite(values) & rows[name].is_valid().to_numpy())
    if len(wrong):
        yield f"{name} is not finite {_rows_at(rows, wrong)}"


def _spectrum_problems(rows: pa.Table, run: Mapping[str, Any] | None) -> Iterator[str]:
    """What in a row of spectra contradicts itself: lengths, eigenvalues, sum against distances."""
    n = rows["n"].to_numpy().astype(np.float64)
    samples, distances = _flat(rows["samples"]), _flat(rows["semantic_distances"])
    wrong = np.flatnonzero((samples[1] != n) | (distances[1] != n) | (n < 1))
    if len(wrong):
        yield f"samples or semantic_distances are not n long {_rows_at(rows, wrong)}"
        return
    values, lengths, starts = _flat(rows["eigenvalues"])
    total = _sums(values, lengths, starts)
    fall = np.diff(values) > SPECTRUM
    first = starts[1:-1]
    fall[first[(first > 0) & (first < len(values))] - 1] = False  # a row's first may be above the last's
    good = np.isfinite(values) & (values >= 0) & (values <= 1 + SPECTRUM)
    at = np.concatenate([np.flatnonzero(~good), np.flatnonzero(fall)])
    if len(at):
        owners = np.unique(np.searchsorted(starts, at, side="right") - 1)
        yield f"eigenvalues outside 0 to 1, or not falling {_rows_at(rows, owners)}"
    wrong = np.flatnonzero(~(np.abs(total - 1) <= SPECTRUM))
    if len(wrong):
        yield f"eigenvalues do not sum to 1 {_rows_at(rows, wrong)}"
    sums, lengths, starts = _flat(rows["embedding_sum"])
    squared = _sums(sums**2, lengths, starts)
    many = n > 1
    # the mean distance is the diversity, which the sum gives too
    diversity = 1 - (squared[many] - n[many]) / (n[many] * (n[many] - 1))
    mean = _sums(distances[0], distances[1], distances[2])[many] / n[many]
    wrong = np.flatnonzero(many)[~(np.abs(mean - diversity) <= SPECTRUM)]
    if len(wrong):
        yield f"semantic_distances do not agree with embedding_sum {_rows_at(rows, wrong)}"


# What each name in a table's ``checks`` stands for.
CHECKS: dict[str, Callable[[pa.Table, Mapping[str, Any] | None], Iterator[str]]] = {
    "rollouts": _rollout_problems,
    "steps": _sampled_problems,
    "scored_steps": _scored_problems,
    "embeddings": _embedding_problems,
    "spectra": _spectrum_problems,
    "rewards": _reward_problems,
    "grades": _grade_problems,
    "document_scores": _document_problems,
    "items": _item_problems,
    "option_scores": _option_problems,
    "judgments": _judgment_problems,
    "clusters": _cluster_problems,
}
