"""Estimating equations that add up over prompts: their root, and intervals by a bootstrap of the scores.

The root b of the sum over prompts of (h_p − H_p b), with G the sum of H_p, is G⁻¹ h. Under a hypothesis
q'b = v the restricted root is b̃ = b − G⁻¹q δ / (q'G⁻¹q) with δ = q'b − v, and the scores

    s_p = q'G⁻¹ (h_p − H_p b̃) = a_p + δ c_p,   Σ a_p = 0,   Σ c_p = 1,
    c_p = q'G⁻¹ H_p G⁻¹q / (q'G⁻¹q)

add up to δ. Their studentised sum is compared with that of bootstrap samples of prompts (a score
bootstrap: Kline and Santos, "A score based approach to wild bootstrap inference", 2012). An interval
holds the values that are not rejected. Unlike a bootstrap of b it never divides by a drawn G, which may
be next to singular where R_bar is mostly error.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import optimize

from canopy_store.analysis.bootstrap import counts_of
from canopy_store.analysis.regression.beta import Array

LEVEL = 0.95
_CHUNK = 4_000_000  # counts drawn at a time


@dataclass(frozen=True)
class Equations:
    """One linear model's equations: ``left`` (P, p, p), symmetric, and ``right`` (P, p), by prompt.

    ``plain`` (p, p) is the sum of ``left`` as it would be were the regressors exact.
    """

    terms: list[str]
    left: Array
    right: Array
    plain: Array
    rows: int

    def without(self, term: str) -> Equations:
        """The same equations of a model that lacks the term."""
        keep = [i for i, name in enumerate(self.terms) if name != term]
        square = np.ix_(keep, keep)
        return Equations(
            [self.terms[i] for i in keep],
            self.left[:, square[0], square[1]],
            self.right[:, keep],
            self.plain[square],
            self.rows,
        )


@dataclass(frozen=True)
class Root:
    """The root b (p,), the inverse (p, p) of the summed left side, and each prompt's score (P, p)."""

    b: Array
    inverse: Array
    scores: Array


def solve(equations: Equations) -> Root | None:
    """The root; None where what the errors leave of the left side is not positive definite."""
    scale = np.sqrt(np.diag(equations.plain))
    left = equations.left.sum(axis=0) / np.outer(scale, scale)
    if np.linalg.eigvalsh(left)[0] <= 0:
        return None
    inverse = np.linalg.inv(left) / np.outer(scale, scale)
    b = inverse @ equations.right.sum(axis=0)
    return Root(b, inverse, equations.right - equations.left @ b)


def covariance(equations: Equations, root: Root) -> Array:
    """(p, p) the covariance of b by the spread of the prompts' scores (the sandwich)."""
    each = root.scores @ root.inverse
    centred = each - each.mean(axis=0)
    return np.asarray(_size(equations) * centred.T @ centred)


class Bootstrap:
    """Prompts drawn with replacement: how often each was, (B, P)."""

    def __init__(self, prompts: int, replicates: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.chunks = []
        for start in range(0, replicates, size := max(1, _CHUNK // prompts)):
            drawn = rng.integers(0, prompts, (min(size, replicates - start), prompts))
            self.chunks.append(counts_of(drawn).astype(np.uint8))

    def sums(self, columns: Array) -> Array:
        """(B, m) the sums of columns (P, m) over the prompts of each draw."""
        return np.concatenate([chunk.astype(float) @ columns for chunk in self.chunks])


class Scores:
    """Studentised sums of combinations of the columns (P, m), and what the bootstrap makes of them.

    ``size`` is the factor by which the columns' variance is too small, for b was fitted to them.
    """

    def __init__(self, columns: Array, bootstrap: Bootstrap, size: float) -> None:
        centred = columns - columns.mean(axis=0)
        self.prompts, m = columns.shape
        self.totals = columns.sum(axis=0)
        self.variance = size * centred.T @ centred
        drawn = bootstrap.sums(
            np.column_stack([centred, *(centred[:, i : i + 1] * centred for i in range(m))])
        )
        self.drawn, self.squares = drawn[:, :m], drawn[:, m:].reshape(-1, m, m)

    def t(self, weights: Array) -> Array:
        """(g,) studentised sums of the combinations (g, m)."""
        variance = np.einsum("gi,ij,gj->g", weights, self.variance, weights)
        return np.asarray(weights @ self.totals / np.sqrt(np.maximum(variance, 1e-300)))

    def t_drawn(self, weights: Array) -> Array:
        """(B, g) the same in each draw, about the sums of the sample."""
        sums = self.drawn @ weights.T
        outer = np.einsum("gi,gj->gij", weights, weights).reshape(len(weights), -1)
        squares = self.squares.reshape(len(self.squares), -1) @ outer.T
        return np.asarray(sums / np.sqrt(np.maximum(squares - sums**2 / self.prompts, 1e-300)))

    def excess(self, weights: Array) -> Array:
        """(g,) how far studentised sums are outside the middle 95% of the draws; below 0: inside."""
        t = self.t(weights)
        low, high = np.quantile(self.t_drawn(weights), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        return np.maximum(t - high, low - t)

    def p(self, weights: Array) -> float:
        """The bootstrap p value, two-sided, of one combination's sum being 0."""
        drawn, t = self.t_drawn(weights[None])[:, 0], self.t(weights[None])[0]
        tail = 1 + min((drawn >= t).sum(), (drawn <= t).sum())
        return float(min(1.0, 2 * tail / (1 + len(drawn))))


def information(equations: Equations, root: Root, q: Array) -> float:
    """What the data tell of q'b, 1 / q'G⁻¹q, in its standard errors over prompts."""
    x = root.inverse @ q
    shares = _quadratic(equations, x, x) / (q @ x)  # their sum is 1
    return float(1 / np.sqrt(_size(equations) * ((shares - shares.mean()) ** 2).sum()))


def contrast(
    equations: Equations, root: Root, q: Array, bootstrap: Bootstrap
) -> tuple[float, float, float, float, float]:
    """Estimate, se, p value of 0, and ends of q'b; infinite where its information may be none."""
    value, x = float(q @ root.b), root.inverse @ q
    columns = np.column_stack([root.scores @ x, _quadratic(equations, x, x) / (q @ x)])
    scores = Scores(columns, bootstrap, _size(equations))
    se = float(np.sqrt(scores.variance[0, 0]))
    p = scores.p(np.array([1.0, value]))
    if scores.excess(np.array([[0.0, 1.0]]))[0] <= 0:
        return value, se, p, -np.inf, np.inf

    def end(sign: float) -> float:
        inside, step = 0.0, se
        while scores.excess(np.array([[1.0, sign * step]]))[0] <= 0:
            inside, step = step, 1.5 * step
        return optimize.brentq(
            lambda d: scores.excess(np.array([[1.0, sign * d]]))[0], inside, step, xtol=1e-6 * se
        )

    return value, se, p, value - end(1.0), value + end(-1.0)


def ratio(
    equations: Equations, root: Root, top: Array, bottom: Array, bootstrap: Bootstrap
) -> tuple[float, float, float, float]:
    """Estimate, se and ends of (top'b)/(bottom'b): the values r for which (top − r bottom)'b = 0 holds.

    Infinite both ways where bottom'b = 0 holds.
    """
    x, z = root.inverse @ top, root.inverse @ bottom
    pairs = [_quadratic(equations, *each) for each in ((x, x), (x, z), (z, z))]
    columns = np.column_stack([root.scores @ x, root.scores @ z, *pairs])
    scores = Scores(columns, bootstrap, _size(equations))
    a, b = float(top @ root.b), float(bottom @ root.b)

    def weights(r: Array) -> Array:
        known = top @ x - 2 * r * (top @ z) + r**2 * (bottom @ z)
        slack = (a - r * b) / known
        return np.column_stack([np.ones_like(r), -r, slack, -2 * r * slack, r**2 * slack])

    def excess(r: float) -> float:
        return float(scores.excess(weights(np.array([r])))[0])

    at, gradient = a / b, np.array([1.0, -a / b]) / b
    se = float(np.sqrt(gradient @ scores.variance[:2, :2] @ gradient))
    at_infinity = np.array([[0.0, 1.0, 0.0, 0.0, b / (bottom @ z)]])
    if scores.excess(at_infinity)[0] <= 0:
        return at, se, -np.inf, np.inf
    grid = at + se * np.tan(np.linspace(-1.57, 1.57, 301))  # denser where the ends are to be expected
    held = np.flatnonzero(scores.excess(weights(grid)) <= 0)
    ends = []
    for sign, last in ((-1, held.min(initial=150)), (1, held.max(initial=150))):
        inside, step = float(grid[last]), se * 0.05 + abs(float(grid[last]) - at)
        while excess(outside := at + sign * step) <= 0:
            step *= 1.5
        ends.append(optimize.brentq(excess, inside, outside, xtol=1e-6 * se))
    return at, se, ends[0], ends[1]


def joint(equations: Equations, root: Root, q: Array, bootstrap: Bootstrap) -> tuple[float, float]:
    """Statistic and bootstrap p value of q (k, p) b = 0, all k at once; of one, the p of `contrast`."""
    x = root.inverse @ q.T  # (p, k)
    delta = q @ root.b
    restricted = root.b - x @ np.linalg.solve(q @ x, delta)
    columns = (equations.right - equations.left @ restricted) @ x  # (P, k)
    scores = Scores(columns, bootstrap, _size(equations))
    statistic = float(delta @ np.linalg.solve(scores.variance, delta))
    if len(q) == 1:
        return statistic, scores.p(np.ones(1))
    covariance = scores.squares - (scores.drawn[:, :, None] * scores.drawn[:, None, :] / scores.prompts)
    solved = np.linalg.solve(
        covariance + 1e-12 * np.trace(scores.variance) * np.eye(len(q)), scores.drawn[..., None]
    )
    drawn = (scores.drawn[..., None] * solved).sum(axis=(1, 2))
    return statistic, float((1 + (drawn >= statistic).sum()) / (1 + len(drawn)))


def _quadratic(equations: Equations, x: Array, y: Array) -> Array:
    return np.asarray(np.einsum("i,pij,j->p", x, equations.left, y))


def _size(equations: Equations) -> float:
    prompts, p = equations.right.shape
    return equations.rows / (equations.rows - p) * prompts / (prompts - 1)
