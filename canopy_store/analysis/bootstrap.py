"""Pooling over prompts and its paired bootstrap, as matrix products.

Every pooled measure but one is ``out(sum w f(x) / sum w)`` over prompts, with x a column of
prompt_metrics; or over clusters of items or documents, with x of `unit_rows`. A replicate that draws
prompt p c_p times is the same with w c_p: all replicates are one product of the counts (B, P) with the
weighted values (P, K). ``rho_pooled`` is a ratio of three sums, and needs a fourth to know whether any
prompt varies: so there are SUMS sums of every measure. The view model_metrics pools the same way in SQL;
a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

Array = np.ndarray
SUMS = 5  # w f(x); w; of rho_pooled alone the variances of length and rate, and the prompts that vary


@dataclass(frozen=True)
class Measure:
    """How a column of prompt_metrics pools over prompts; ``positive`` ones have a percent delta."""

    column: str
    into: Callable[[Array], Array] = np.asarray
    out: Callable[[Array], Array] = np.asarray
    # one, length, fisher (n - 3), pairs (n (n - 1) / 2) or freedom (n - 1); units, tokens or bytes
    weight: str = "one"
    positive: bool = True
    unit: str = "prompt"  # whose rows it is of: a prompt's rollouts, an item, a document


def _reciprocal(x: Array) -> Array:
    """1 / x, the macro `number_of`: nothing where no two resemble each other."""
    with np.errstate(divide="ignore"):
        return np.where(x > 1e-12, 1 / x, np.nan)


def _share_cut(log_mass: Array) -> Array:
    return -np.expm1(log_mass)


def _fisher_z(r: Array) -> Array:
    return np.arctanh(np.clip(r, -0.999999, 0.999999))


# of a prompt's graded rollouts: what k of them would give, k a power of two
AT_K = tuple(f"{kind}_{2**power}" for kind in ("pass_at", "pass_hat", "maj_at") for power in range(11))

MEASURES: dict[str, Measure] = {
    "ce_star": Measure("ce_star"),
    "surprisal_mean": Measure("surprisal_mean"),
    "mean_length": Measure("mean_length"),
    "entropy_rate": Measure("entropy_rate"),
    # exp(mean CE* / mean length) is exp of the mean of CE* / length weighted by length
    "gen_ppl": Measure("nats_per_token", out=np.exp, weight="length"),
    "branching_factor": Measure("entropy_rate", out=np.exp),
    "canopy_size_log10": Measure("canopy_size_log10"),
    "rho_pearson": Measure("rho_pearson", _fisher_z, np.tanh, "fisher", False),
    "rho_spearman": Measure("rho_spearman", _fisher_z, np.tanh, "fisher", False),
    "rho_kendall": Measure("rho_kendall", weight="pairs", positive=False),
    "rho_pooled": Measure("cov_length_rate", positive=False),
    "cov_length_rate": Measure("cov_length_rate", weight="freedom", positive=False),
    "truncation_rate": Measure("truncation_rate"),
    "semantic_diversity": Measure("semantic_diversity"),
    "rho_length_diversity_pearson": Measure(
        "rho_length_diversity_pearson", _fisher_z, np.tanh, "fisher", False
    ),
    "rho_length_diversity_spearman": Measure(
        "rho_length_diversity_spearman", _fisher_z, np.tanh, "fisher", False
    ),
    "rho_length_diversity_kendall": Measure(
        "rho_length_diversity_kendall", weight="pairs", positive=False
    ),
    "cov_length_diversity": Measure("cov_length_diversity", weight="freedom", positive=False),
    "vendi_score": Measure("vendi_score", np.log, np.exp),
    "diversity_number": Measure("squared_similarity", out=_reciprocal),
    "log_mass_mean": Measure("log_mass_mean", positive=False),
    "mass_cut": Measure("log_mass_mean", out=_share_cut),
    "ce_star_cv": Measure("ce_star_cv"),
    "accuracy": Measure("accuracy"),
    **{name: Measure(name) for name in AT_K},
    **{
        name: Measure(name, weight="units", positive=name.startswith("accuracy"), unit="item")
        for name in (
            *("accuracy_sum", "accuracy_token", "accuracy_char", "accuracy_pmi"),
            *("margin", "margin_token", "margin_pmi"),
        )
    },
    "nll": Measure("nll", weight="tokens", unit="document"),
    "expected_nll": Measure("expected_nll", weight="tokens", unit="document"),
    "bits_per_byte": Measure("bits_per_byte", weight="bytes", unit="document"),
    "perplexity": Measure("nll", out=np.exp, weight="tokens", unit="document"),
    "rse": Measure("rse"),
    "rse_norm": Measure("rse_norm"),
    "semantic_entropy": Measure("semantic_entropy"),
    "discrete_semantic_entropy": Measure("rse"),
    "n_meanings": Measure("n_meanings"),
    "distinct_10": Measure("distinct_10"),
    "utility_10": Measure("utility_10"),
    "n_intransitive": Measure("n_intransitive"),
}
# not in prompt_metrics: `control_variate.with_estimates` adds them
ESTIMATED = ("ce_star_cv",)
# of meaning_metrics: `meanings.with_meanings` adds them
MEANINGS = (
    *("rse", "rse_norm", "semantic_entropy", "discrete_semantic_entropy", "n_meanings"),
    *("distinct_10", "utility_10", "n_intransitive"),
)


def weighted_values(values: Mapping[str, Array], names: Sequence[str]) -> Array:
    """The summands (SUMS, ..., K) of prompts' columns (...); an undefined x weighs nothing.

    ``values`` has n_rollouts, mean_length and ce_star beside the columns of the measures named.
    """
    n, length = values["n_rollouts"], values["mean_length"]
    weights = {
        "one": np.ones_like(length),
        "length": length,
        "fisher": np.maximum(n - 3, 0),
        "pairs": n * (n - 1) / 2,
        "freedom": n - 1,
        "units": n,
        **{name: values[f"n_{name}"] for name in ("tokens", "bytes") if f"n_{name}" in values},
    }
    sums = np.zeros((SUMS, *length.shape, len(names)))
    for k, name in enumerate(names):
        measure = MEASURES[name]
        x = values["ce_star"] / length if name == "gen_ppl" else values[measure.column]
        with np.errstate(invalid="ignore", divide="ignore"):
            z = measure.into(x)
        known = np.isfinite(z)
        w = np.where(known, weights[measure.weight], 0.0)
        sums[0, ..., k] = np.where(known, z, 0.0) * w
        sums[1, ..., k] = w
        if name == "rho_pooled":
            sums[2, ..., k] = np.where(known, values["var_length"], 0.0)
            sums[3, ..., k] = np.where(known, values["var_rate"], 0.0)
            sums[4, ..., k] = known & np.isfinite(values["rho_pearson"])
    return sums


def pooled(sums: Array, names: Sequence[str]) -> Array:
    """The measures (..., K) of sums (SUMS, ..., K) over prompts; NaN where no prompt has the value."""
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = sums[0] / sums[1]
        for k, name in enumerate(names):
            if name == "rho_pooled":
                rho = sums[0, ..., k] / np.sqrt(sums[2, ..., k] * sums[3, ..., k])
                mean[..., k] = np.where(sums[4, ..., k] > 0, rho, np.nan)
    # each metric by itself in memory: the last bits of exp and tanh may depend on the layout
    one_by_one = [mean[..., k].copy() for k in range(len(names))]
    return np.stack([MEASURES[name].out(x) for name, x in zip(names, one_by_one, strict=True)], -1)


def varies(low: Any, high: Any) -> Any:
    """Whether values between low and high vary by more than rounding: the rule of the macro `varies`."""
    return high - low > 1e-12 * np.maximum(1, np.maximum(np.abs(low), np.abs(high)))


def diversity_of_sum(squared_norm: Any, n: Any, copies: Any = None) -> Any:
    """1 - the mean cosine similarity over pairs of n unit vectors, from the squared norm of their sum.

    NaN where there is no pair. The macro `diversity_of_sum`, for draws that repeat a vector as well.

    Parameters
    ----------
    squared_norm, n : numbers, or arrays of one shape
    copies : the sum of squares of how often each vector was drawn, for a pair of copies is no pair;
        n where each was drawn once
    """
    same = n if copies is None else copies
    pairs = np.where(n * n > same, n * n - same, np.nan)
    return 1 - (squared_norm - same) / pairs


def columns_of(rows: pl.DataFrame) -> dict[str, Array]:
    """prompt_metrics as float64 arrays (P,), NULL as NaN."""
    return {
        name: rows[name].cast(pl.Float64).fill_null(np.nan).to_numpy()
        for name, kind in rows.schema.items()
        if kind.is_numeric()
    }


def draw_prompts(prompts: int, replicates: int, seed: int | Sequence[int]) -> Array:
    """(B, P) indices of the prompts drawn, with replacement."""
    return np.random.default_rng(seed).integers(0, prompts, (replicates, prompts))


def counts_of(drawn: Array) -> Array:
    """(B, P) how often each prompt was drawn."""
    replicates, prompts = drawn.shape
    flat = drawn + prompts * np.arange(replicates)[:, None]
    return np.bincount(flat.ravel(), minlength=drawn.size).reshape(drawn.shape).astype(float)


@dataclass(frozen=True)
class Rollouts:
    """One prompt's rollouts: lengths, sums and rates (M,), and the cosine kernel (M, M) if embedded.

    ``correct`` is 1 or 0, NaN where a rollout has no grade.
    Of those judged, where any are, ``labels`` are the clusters, ``logprobs`` the sums of logprob (m,).
    """

    n_tokens: Array
    entropy_sum: Array
    surprisal_sum: Array
    entropy_rate: Array
    cut: Array
    kernel: Array | None = None
    correct: Array | None = None
    labels: Array | None = None
    logprobs: Array | None = None


# What the second level draws anew. Vendi scores and length-diversity correlations would need an
# eigendecomposition or distances anew for each draw.
ROLLOUT_LEVEL = (
    "ce_star",
    "surprisal_mean",
    "mean_length",
    "entropy_rate",
    "gen_ppl",
    "branching_factor",
    "canopy_size_log10",
    "rho_pearson",
    "rho_spearman",
    "rho_kendall",
    "rho_pooled",
    "cov_length_rate",
    "truncation_rate",
    "semantic_diversity",
    "diversity_number",
    "accuracy",
    *MEANINGS[:5],
)


def redraw(rollouts: Rollouts, draws: int, rng: np.random.Generator) -> dict[str, Array]:
    """The prompt's columns (S,), each of ``draws`` S times from M rollouts drawn with replacement.

    Two copies of one rollout are no pair: diversity is over pairs of distinct rollouts.
    """
    m = len(rollouts.n_tokens)
    flat = rng.integers(0, m, (draws, m)) + m * np.arange(draws)[:, None]
    c = np.bincount(flat.ravel(), minlength=draws * m).reshape(draws, m).astype(float)  # (S, M)
    n, r = rollouts.n_tokens.astype(float), rollouts.entropy_rate
    values = {
        "n_rollouts": np.full(draws, float(m)),
        "mean_length": c @ n / m,
        "ce_star": c @ rollouts.entropy_sum / m,
        "surprisal_mean": c @ rollouts.surprisal_sum / m,
        "entropy_rate": c @ r / m,
        "truncation_rate": c @ rollouts.cut / m,
    }
    values["canopy_size_log10"] = values["ce_star"] / np.log(10)
    # rounded as in the view, so that the last bits of a sum make no rank
    signs_n, signs_r = (np.sign(v[:, None] - v[None, :]) for v in (n, np.round(r, 12)))
    both_vary = _drawn_vary(c, n) & _drawn_vary(c, r)
    rho, *moments = _correlation(c, np.broadcast_to(n, c.shape), np.broadcast_to(r, c.shape))
    values["rho_pearson"] = np.where(both_vary, rho, np.nan)
    for name, moment in zip(("cov_length_rate", "var_length", "var_rate"), moments, strict=True):
        values[name] = moment * (m / (m - 1) if m > 1 else np.nan)
    rho, *_ = _correlation(c, c @ signs_n.T, c @ signs_r.T)
    values["rho_spearman"] = np.where(both_vary, rho, np.nan)
    agree, in_n, in_r = (
        ((c @ s) * c).sum(1) for s in (signs_n * signs_r, np.abs(signs_n), np.abs(signs_r))
    )
    with np.errstate(invalid="ignore", divide="ignore"):
        values["rho_kendall"] = np.where(both_vary, agree / np.sqrt(in_n * in_r), np.nan)
    values["semantic_diversity"] = values["squared_similarity"] = np.full(draws, np.nan)
    if rollouts.kernel is not None:
        over_pairs = [
            diversity_of_sum(((c @ kernel) * c).sum(1), m, (c**2).sum(1))
            for kernel in (rollouts.kernel, rollouts.kernel**2)
        ]
        values["semantic_diversity"], values["squared_similarity"] = over_pairs[0], 1 - over_pairs[1]
    values["accuracy"] = np.full(draws, np.nan)
    if rollouts.correct is not None:
        graded = np.isfinite(rollouts.correct)
        with np.errstate(invalid="ignore"):  # of a draw without a graded rollout
            values["accuracy"] = c @ np.where(graded, rollouts.correct, 0) / (c @ graded)
    return values | _meanings(rollouts, draws, rng)


def _meanings(rollouts: Rollouts, draws: int, rng: np.random.Generator) -> dict[str, Array]:
    """Measures of meaning (S,), each of as many judged rollouts, drawn with replacement."""
    names = ("rse", "rse_norm", "semantic_entropy", "n_meanings")
    if rollouts.labels is None or rollouts.logprobs is None:
        return {name: np.full(draws, np.nan) for name in names}
    m = len(rollouts.labels)
    c = counts_of(rng.integers(0, m, (draws, m)))
    of_class = (rollouts.labels[:, None] == np.unique(rollouts.labels)).astype(float)  # (m, classes)
    shares = c @ of_class / m
    weights = c * np.exp(rollouts.logprobs - np.max(rollouts.logprobs))
    rse, semantic = (_entropy(p) for p in (shares, weights @ of_class))
    norm = rse / np.log(m) if m > 1 else np.full(draws, np.nan)
    return dict(zip(names, (rse, norm, semantic, (shares > 0).sum(1).astype(float)), strict=True))


def _entropy(weights: Array) -> Array:
    """Entropy (S,), nats, of weights (S, classes) made to sum to 1."""
    with np.errstate(invalid="ignore", divide="ignore"):
        p = weights / weights.sum(1, keepdims=True)
        return -np.where(p == 0, 0.0, p * np.log(p)).sum(1)


def _drawn_vary(c: Array, x: Array) -> Array:
    """Whether the values of x (M,) that each draw (S, M) has vary (S,)."""
    return varies(np.where(c > 0, x, np.inf).min(1), np.where(c > 0, x, -np.inf).max(1))


def _correlation(c: Array, x: Array, y: Array) -> tuple[Array, Array, Array, Array]:
    """Pearson's correlation, population covariance and variances (S,) of x and y (S, M), weights c."""
    m = c.sum(1)
    dx = x - (c * x).sum(1, keepdims=True) / m[:, None]
    dy = y - (c * y).sum(1, keepdims=True) / m[:, None]
    covariance, vx, vy = ((c * a * b).sum(1) / m for a, b in ((dx, dy), (dx, dx), (dy, dy)))
    with np.errstate(invalid="ignore", divide="ignore"):
        return covariance / np.sqrt(vx * vy), covariance, vx, vy


def redraw_slots(
    prompts: Sequence[Rollouts], drawn: Array, rng: np.random.Generator
) -> dict[str, Array]:
    """The columns (B, P) of every drawn slot, its rollouts drawn anew: the second level."""
    columns: dict[str, Array] = {}
    for p, rollouts in enumerate(prompts):
        at = drawn == p
        for name, values in redraw(rollouts, int(at.sum()), rng).items():
            columns.setdefault(name, np.full(drawn.shape, np.nan))[at] = values
    return columns
