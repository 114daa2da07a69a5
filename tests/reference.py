"""The measures once more, from their definitions, in numpy float64 on plain lists.

Written from the definitions alone and shares no code with the views: tests compare the two. A value
that is not defined is None. What the store keeps as float32 is rounded to float32 first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from scipy import stats

TERCILES = ("short", "medium", "long")
_KINDS = ("pearson", "spearman", "kendall")


def stored(values: Iterable[float]) -> np.ndarray:
    """(N,) the values as the store keeps them, float32, widened for arithmetic."""
    return np.asarray(list(values), np.float32).astype(np.float64)


def unit_embeddings(vectors: Sequence[Sequence[float]]) -> np.ndarray:
    """(M, d) unit vectors; the store keeps float32, and a cosine does not depend on the norm left."""
    matrix = np.asarray(vectors, np.float64)
    matrix = matrix / np.sqrt((matrix**2).sum(axis=1, keepdims=True))
    kept = matrix.astype(np.float32).astype(np.float64)
    return kept / np.sqrt((kept**2).sum(axis=1, keepdims=True))


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of what is defined, None of nothing."""
    kept = [v for v in values if v is not None]
    return math.fsum(kept) / len(kept) if kept else None


def weighted_mean(pairs: Iterable[tuple[float | None, float]]) -> float | None:
    """Mean of (value, weight); an undefined value takes its weight along, no weight at all is None."""
    kept = [(v, w) for v, w in pairs if v is not None and w > 0]
    total = math.fsum(w for _, w in kept)
    return math.fsum(v * w for v, w in kept) / total if kept else None


def exp(value: float | None) -> float | None:
    """exp, of None None."""
    return None if value is None else math.exp(value)


def binary_entropy(log_q: np.ndarray) -> np.ndarray:
    """(N,) nats, of an event of log-probability log_q; 0 where it is certain or impossible."""
    entropies = []
    for e in log_q:
        p, rest = math.exp(e), -math.expm1(e)
        entropies.append(sum(-x * math.log(x) for x in (p, rest) if x > 0))
    return np.array(entropies)


def is_constant(values: Sequence[float]) -> bool:
    """Whether the values differ by no more than rounding."""
    lo, hi = min(values), max(values)
    return hi - lo <= 1e-12 * max(1, abs(lo), abs(hi))


def covariance(x: Sequence[float], y: Sequence[float], ddof: int) -> float | None:
    """Covariance with divisor M - ddof."""
    if len(x) <= ddof:
        return None
    a, b = np.asarray(x, float), np.asarray(y, float)
    return float(((a - a.mean()) * (b - b.mean())).sum() / (len(a) - ddof))


def correlation(x: Sequence[float], y: Sequence[float], kind: str) -> float | None:
    """Pearson, Spearman (mid-ranks) or Kendall (tau-b); None of fewer than 2 or of a constant."""
    if len(x) < 2 or is_constant(x) or is_constant(y):
        return None
    if kind == "kendall":
        a, b = np.round(x, 12), np.round(y, 12)
        signs_x, signs_y = (np.sign(v[:, None] - v[None, :]) for v in (a, b))
        return float((signs_x * signs_y).sum() / math.sqrt((signs_x**2).sum() * (signs_y**2).sum()))
    if kind == "spearman":
        x, y = stats.rankdata(np.round(x, 12)), stats.rankdata(np.round(y, 12))
    return float(stats.pearsonr(x, y).statistic)


def similarities(unit: np.ndarray) -> np.ndarray:
    """(M, M) cosines of unit vectors, one pair at a time: equal vectors give equal rows."""
    return np.array([[math.fsum(a * b) for b in unit] for a in unit])


def semantic_distances(unit: np.ndarray) -> list[float | None]:
    """Per rollout, 1 - mean cosine to the others; None of a single rollout."""
    m = len(unit)
    if m < 2:
        return [None] * m
    cosine = similarities(unit)
    return [1 - math.fsum(cosine[i, j] for j in range(m) if j != i) / (m - 1) for i in range(m)]


def semantic_diversity(unit: np.ndarray) -> float | None:
    """1 - mean cosine over pairs; None of a single rollout."""
    m = len(unit)
    if m < 2:
        return None
    cosine = similarities(unit)
    pairs = [cosine[i, j] for i in range(m) for j in range(i)]
    return 1 - math.fsum(pairs) / len(pairs)


def squared_similarity(unit: np.ndarray) -> float | None:
    """The mean squared cosine over pairs; None of a single rollout."""
    cosine = similarities(unit)
    return mean(cosine[i, j] ** 2 for i in range(len(unit)) for j in range(i))


def diversity_number(squared: float | None) -> float | None:
    """Its inverse; None where all pairs are orthogonal."""
    return None if squared is None or squared <= 1e-12 else 1 / squared


def eigenvalues(unit: np.ndarray) -> np.ndarray:
    """Eigenvalues above rounding of the cosine kernel / M, largest first."""
    values = np.linalg.eigvalsh(similarities(unit) / len(unit))[::-1]
    return values[values > 1e-12]


def vendi_score(unit: np.ndarray, q: float = 1) -> float:
    """Vendi score of order q."""
    values = eigenvalues(unit)
    if q == 1:
        return math.exp(-math.fsum(v * math.log(v) for v in values))
    if q == math.inf:
        return 1 / values.max()
    return math.fsum(v**q for v in values) ** (1 / (1 - q))


def tercile_samples(lengths: Sequence[int]) -> dict[str, list[int]]:
    """Indices of the rollouts in each length tercile that holds any; ties by sample order."""
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    buckets: dict[str, list[int]] = {}
    for rank, i in enumerate(order):
        buckets.setdefault(TERCILES[rank * 3 // len(lengths)], []).append(i)
    return buckets


def rollout_metrics(rollout: dict[str, Any]) -> dict[str, Any]:
    """A rollout's own measures. Takes entropy and, where known, logprob, eos_logprob, finish_reason."""
    h = stored(rollout["entropy"])
    total = math.fsum(h)
    surprisal = stop = None
    if rollout.get("logprob") is not None:
        surprisal = math.fsum(-stored(rollout["logprob"]))
    if rollout.get("eos_logprob") is not None:
        stop = math.fsum(binary_entropy(stored(rollout["eos_logprob"])))
    mass = None if rollout.get("log_mass") is None else math.fsum(stored(rollout["log_mass"]))
    return {
        "log_mass_sum": mass,
        "log_mass_mean": None if mass is None else mass / len(h),
        "n_tokens": len(h),
        "finish_reason": rollout.get("finish_reason"),
        "entropy_sum": total,
        "surprisal_sum": surprisal,
        "stop_entropy_sum": stop,
        "content_entropy_sum": None if stop is None else total - stop,
        "entropy_rate": total / len(h),
    }


def prompt_metrics(rollouts: Sequence[dict[str, Any]], unit: np.ndarray | None) -> dict[str, Any]:
    """A prompt's measures, of its rollouts in sample order and their (M, d) embeddings or None."""
    rows = [rollout_metrics(r) for r in rollouts]
    lengths = [r["n_tokens"] for r in rows]
    rates = [r["entropy_rate"] for r in rows]
    ce_star, rate = mean(r["entropy_sum"] for r in rows), mean(rates)
    masses = [r["log_mass_mean"] for r in rows]
    log_mass = None if None in masses else mean(masses)
    cut = [None if r["finish_reason"] is None else r["finish_reason"] == "length" for r in rows]
    result = {
        "n_rollouts": len(rows),
        "n_tokens": sum(lengths),
        "ce_star": ce_star,
        "surprisal_mean": mean(r["surprisal_sum"] for r in rows),
        "mean_length": mean(lengths),
        "entropy_rate": rate,
        "gen_ppl": math.exp(ce_star / mean(lengths)),
        "branching_factor": exp(rate),
        "canopy_size_log10": ce_star / math.log(10),
        "cov_length_rate": covariance(lengths, rates, ddof=1),
        "var_length": covariance(lengths, lengths, ddof=1),
        "var_rate": covariance(rates, rates, ddof=1),
        "squared_similarity": None,
        "diversity_number": None,
        "truncation_rate": None if None in cut else mean(cut),
        "semantic_diversity": None,
        "cov_length_diversity": None,
        "vendi_score": None,
        "log_mass_mean": log_mass,
        "mass_cut": None if log_mass is None else -math.expm1(log_mass),
    }
    for kind in _KINDS:
        result[f"rho_{kind}"] = correlation(lengths, rates, kind)
        result[f"rho_length_diversity_{kind}"] = None
    if unit is not None:
        result["vendi_score"] = vendi_score(unit)
        result["semantic_diversity"] = semantic_diversity(unit)
        result["squared_similarity"] = squared_similarity(unit)
        result["diversity_number"] = diversity_number(result["squared_similarity"])
        distances = semantic_distances(unit)
        if len(rows) > 1:
            result["cov_length_diversity"] = covariance(lengths, distances, ddof=1)
            for kind in _KINDS:
                result[f"rho_length_diversity_{kind}"] = correlation(lengths, distances, kind)
    return result


def error_covariances(rollouts: Sequence[dict[str, Any]], unit: np.ndarray | None) -> dict[str, Any]:
    """(Co)variances of the errors of a prompt's mean rate, mean length and diversity.

    Those with diversity by its pairs: of a statistic that averages a_i b_jk over all triples of distinct
    rollouts, which estimates the product of the two expectations without their covariance.
    """
    rows = [rollout_metrics(r) for r in rollouts]
    values = {"R": [r["entropy_rate"] for r in rows], "N": [r["n_tokens"] for r in rows]}
    m = len(rows)

    def over_m(a: Sequence[float], b: Sequence[float]) -> float | None:
        found = covariance(a, b, ddof=1)
        return None if found is None else found / m

    result = {
        "n_rollouts": m,
        "var_R": over_m(values["R"], values["R"]),
        "var_N": over_m(values["N"], values["N"]),
        "cov_RN": over_m(values["R"], values["N"]),
        "cov_RD": None,
        "cov_ND": None,
    }
    if unit is not None and m > 2:
        distance = 1 - similarities(unit)
        for name, x in values.items():
            apart = [
                x[i] * distance[j, k]
                for i in range(m)
                for j in range(m)
                for k in range(m)
                if len({i, j, k}) == 3
            ]
            result[f"cov_{name}D"] = mean(x) * semantic_diversity(unit) - mean(apart)
    return result


def reliabilities(rows: Iterable[dict[str, Any]]) -> dict[tuple[str, ...], float | None]:
    """Per variant, embedder and selection of a panel, the reliability of its R_bar."""
    groups: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for row in rows:
        group = groups.setdefault((row["variant"], row["embedder"], row["selection"]), [])
        if row["var_R"] is not None:
            group.append((row["R_bar"], row["var_R"]))
    result: dict[tuple[str, ...], float | None] = {}
    for key, pairs in groups.items():
        rates = [r for r, _ in pairs]
        result[key] = None
        if len(pairs) > 1 and not is_constant(rates):
            result[key] = 1 - mean(v for _, v in pairs) / covariance(rates, rates, ddof=1)
    return result


def fisher_mean(pairs: Iterable[tuple[float | None, int]]) -> float | None:
    """Mean of correlations (r, n) through Fisher's z, weighted by n - 3."""
    clipped = [
        (None if r is None else math.atanh(max(-0.999999, min(0.999999, r))), n - 3) for r, n in pairs
    ]
    z = weighted_mean(clipped)
    return None if z is None else math.tanh(z)


def pooled_metrics(prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The measures of one (model, task), of its prompts' ``prompt_metrics``."""

    def plain(name: str) -> float | None:
        return mean(p[name] for p in prompts)

    def weighted(name: str, weight: Callable[[int], float]) -> float | None:
        return weighted_mean((p[name], weight(p["n_rollouts"])) for p in prompts)

    result = {
        "n_prompts": len(prompts),
        "n_rollouts": sum(p["n_rollouts"] for p in prompts),
        "n_tokens": sum(p["n_tokens"] for p in prompts),
        "gen_ppl": math.exp(plain("ce_star") / plain("mean_length")),
        "branching_factor": exp(plain("entropy_rate")),
        "canopy_size_log10": plain("ce_star") / math.log(10),
        "vendi_score": exp(
            mean(None if p["vendi_score"] is None else math.log(p["vendi_score"]) for p in prompts)
        ),
    }
    for name in (
        "ce_star",
        "surprisal_mean",
        "mean_length",
        "entropy_rate",
        "truncation_rate",
        "semantic_diversity",
        "log_mass_mean",
    ):
        result[name] = plain(name)
    log_mass = plain("log_mass_mean")
    result["mass_cut"] = None if log_mass is None else -math.expm1(log_mass)
    result["squared_similarity"] = plain("squared_similarity")
    result["diversity_number"] = diversity_number(result["squared_similarity"])
    result["rho_pooled"] = None
    if any(p["rho_pearson"] is not None for p in prompts):
        with_spread = [p for p in prompts if p["cov_length_rate"] is not None]
        over, n, r = (
            math.fsum(p[name] for p in with_spread)
            for name in ("cov_length_rate", "var_length", "var_rate")
        )
        result["rho_pooled"] = over / math.sqrt(n * r)
    for stem, cov in (("rho", "cov_length_rate"), ("rho_length_diversity", "cov_length_diversity")):
        for kind in ("pearson", "spearman"):
            name = f"{stem}_{kind}"
            result[name] = fisher_mean((p[name], p["n_rollouts"]) for p in prompts)
        result[f"{stem}_kendall"] = weighted(f"{stem}_kendall", lambda n: n * (n - 1) / 2)
        result[cov] = weighted(cov, lambda n: n - 1)
    return result


def decomposition(prompts: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """The two decompositions of ce_star, of every prompt's rollouts."""
    rows = [[rollout_metrics(r) for r in rollouts] for rollouts in prompts]
    lengths = [[r["n_tokens"] for r in p] for p in rows]
    rates = [[r["entropy_rate"] for r in p] for p in rows]
    length_means, rate_means = [mean(p) for p in lengths], [mean(p) for p in rates]
    return {
        "ce_star": mean(mean(r["entropy_sum"] for r in p) for p in rows),
        "length_rate_product": mean(length_means) * mean(rate_means),
        "cov_within": mean(covariance(n, r, ddof=0) for n, r in zip(lengths, rates, strict=True)),
        "cov_between": covariance(length_means, rate_means, ddof=0),
        "stop_entropy": mean(mean(r["stop_entropy_sum"] for r in p) for p in rows),
        "content_entropy": mean(mean(r["content_entropy_sum"] for r in p) for p in rows),
    }


def entropy_trajectory(rollouts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a position: the step's entropy and the running rate, over rollouts that reach it."""
    steps = [stored(r["entropy"]) for r in rollouts]
    rows = []
    for t in range(1, max(map(len, steps)) + 1):
        active = [h for h in steps if len(h) >= t]
        rows.append(
            {
                "position": t,
                "active": len(active),
                "mean_entropy": mean(h[t - 1] for h in active),
                "mean_entropy_rate": mean(math.fsum(h[:t]) / t for h in active),
            }
        )
    return rows


def eos_trajectory(rollouts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a position: how likely, how uncertain and how often the end is there."""
    steps = [(stored(r["entropy"]), stored(r["eos_logprob"]), r.get("finish_reason")) for r in rollouts]
    rows = []
    for t in range(1, max(len(h) for h, _, _ in steps) + 1):
        active = [(h, e, reason) for h, e, reason in steps if len(h) >= t]
        stop = [binary_entropy(e[t - 1 : t])[0] for _, e, _ in active]
        rows.append(
            {
                "position": t,
                "active": len(active),
                "stop_probability": mean(math.exp(e[t - 1]) for _, e, _ in active),
                "stopped": sum(len(h) == t and reason == "stop" for h, _, reason in active),
                "stop_entropy": mean(stop),
                "content_entropy": mean(h[t - 1] - s for (h, _, _), s in zip(active, stop, strict=True)),
            }
        )
    return rows


def length_terciles(
    rollouts: Sequence[dict[str, Any]], unit: np.ndarray | None
) -> dict[str, dict[str, Any]]:
    """Per tercile that holds any rollout, its measures."""
    rows = [rollout_metrics(r) for r in rollouts]
    return {
        tercile: {
            "n_rollouts": len(chosen),
            "mean_length": mean(rows[i]["n_tokens"] for i in chosen),
            "entropy_rate": mean(rows[i]["entropy_rate"] for i in chosen),
            "semantic_diversity": None if unit is None else semantic_diversity(unit[chosen]),
        }
        for tercile, chosen in tercile_samples([r["n_tokens"] for r in rows]).items()
    }


def pooled_terciles(prompts: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Plain means over the prompts' ``length_terciles``."""
    result = {}
    for tercile in TERCILES:
        rows = [p[tercile] for p in prompts if tercile in p]
        if rows:
            result[tercile] = {
                "n_prompts": len(rows),
                "n_rollouts": sum(r["n_rollouts"] for r in rows),
                **{
                    name: mean(r[name] for r in rows)
                    for name in ("mean_length", "entropy_rate", "semantic_diversity")
                },
            }
    return result


def truncation(rollouts: Sequence[dict[str, Any]], cap: int | None) -> dict[str, Any]:
    """CE* as cut, and as the last half of the window would go on after the cap."""
    whole = prompt_metrics(rollouts, None)
    row = {name: whole[name] for name in ("n_rollouts", "truncation_rate", "ce_star")}
    row |= {"max_new_tokens": cap, "ce_star_extrapolated": None}
    if row["truncation_rate"] == 0:
        row["ce_star_extrapolated"] = row["ce_star"]
    elif row["truncation_rate"] is not None and cap is not None and "eos_logprob" in rollouts[0]:
        steps = [(stored(r["entropy"]), np.exp(stored(r["eos_logprob"]))) for r in rollouts]
        h, q = (
            math.fsum(s[k][t - 1] for s in steps for t in range(1, len(s[k]) + 1) if t > cap / 2)
            for k in (0, 1)
        )
        if q > 0:
            row["ce_star_extrapolated"] = row["ce_star"] + row["truncation_rate"] * h / q
    return row


def ce_star_cv(rollouts: Sequence[dict[str, Any]], cap: int | None) -> tuple[float, float] | None:
    """CE* with a control variate for stopping, and its jackknife se: the double loop, as defined."""
    steps = [
        (stored(r["entropy"]), np.exp(stored(r["eos_logprob"])), r["finish_reason"] == "stop")
        for r in rollouts
    ]

    def estimate(members: Sequence[int]) -> float:
        values = []
        for i in members:
            h, q, stopped = steps[i]
            others = [steps[j][0] for j in members if j != i]
            everywhere = mean(math.fsum(o[t:]) for o in others for t in range(1, len(o))) or 0.0
            value = math.fsum(h)
            for t in range(1, len(h) + 1):
                after = [math.fsum(o[t:]) for o in others if len(o) > t]
                forgone = 0.0 if t == cap else (math.fsum(after) + everywhere) / (len(after) + 1)
                value += forgone * ((stopped and t == len(h)) - q[t - 1])
            values.append(value)
        return mean(values)

    m = len(steps)
    if m < 2:
        return None
    without = np.array([estimate([i for i in range(m) if i != k]) for k in range(m)])
    return estimate(range(m)), math.sqrt((m - 1) / m * ((without - without.mean()) ** 2).sum())


def check_of(excess: Sequence[float]) -> dict[str, Any]:
    """Whether what must average 0 does, by Student's t."""
    n, middle = len(excess), mean(excess)
    sd = z = p = None
    if n > 1:
        sd = 0.0 if min(excess) == max(excess) else float(np.std(excess, ddof=1))
        z = middle / (sd / math.sqrt(n)) if sd else None
        p = None if z is None else float(2 * stats.t.sf(abs(z), n - 1))
    # what never varies must be nothing; so must a single one
    ok = abs(middle) < 1e-6 if p is None else p >= 5.7e-7
    return {"n_rollouts": n, "mean_excess": middle, "sd": sd, "z": z, "p": p, "ok": ok}


def logging_check(rollouts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether surprisal minus entropy averages 0, as it must for a faithful log."""
    rows = [rollout_metrics(r) for r in rollouts]
    return check_of([r["surprisal_sum"] - r["entropy_sum"] for r in rows])


def stop_check(rollouts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Whether rollouts end as often as their probabilities of ending say."""
    return check_of(
        [(r["finish_reason"] == "stop") - math.fsum(np.exp(stored(r["eos_logprob"]))) for r in rollouts]
    )
