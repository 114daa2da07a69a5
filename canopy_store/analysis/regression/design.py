"""Designs: columns by the name of their term, as a matrix and as a formula."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.interpolate import CubicSpline

from canopy_store.analysis.regression.beta import Array
from canopy_store.analysis.regression.panel import Columns, PanelData
from canopy_store.errors import FitError


def cross(a: Columns, b: Columns) -> Columns:
    return {f"{x}:{y}": a[x] * b[y] for x in a for y in b}


def intercept(n: int) -> Columns:
    return {"(Intercept)": np.ones(n)}


def matrix_of(design: Columns, model: str) -> Array:
    """Return the design as (rows, terms); a term that the earlier ones determine is a FitError."""
    matrix = np.column_stack(list(design.values()))
    if matrix.shape[0] <= matrix.shape[1]:
        raise FitError(f"{model}: {matrix.shape[0]} rows for {matrix.shape[1]} terms")
    norms = np.linalg.norm(matrix, axis=0)
    own = np.abs(np.diag(np.linalg.qr(matrix / np.where(norms > 0, norms, 1.0), mode="r")))
    for name, share, norm in zip(design, own, norms, strict=True):
        if share < 1e-7 or norm == 0:
            raise FitError(f"{model}: the term {name} is a combination of the others (singular design)")
    return matrix


def formula_of(data: PanelData, text: str, factors: Sequence[str]) -> tuple[str, list[str]]:
    """Return a formula without the terms of one-level factors, and the list of those."""
    single = [f for f in factors if len(data.levels[f]) == 1]
    kept, dropped = [], []
    for term in text.split(" + "):
        parts = [p for p in term.split("*") if p not in single]
        if parts:
            kept.append("*".join(parts))
        if "*".join(parts) != term:
            dropped.append(term)
    return " + ".join(kept), dropped


def natural_spline(x: Array, df: int, name: str) -> Columns:
    """Return a basis of the natural cubic splines of ``df`` columns, to stand beside an intercept.

    Knots are the ends of the range and df − 1 quantiles between. The columns are cardinal splines: 1 at
    one knot and 0 at the others. They span what R's ``splines::ns`` spans, in another basis.
    """
    knots = np.quantile(x, np.linspace(0, 1, df + 1))
    if np.any(np.diff(knots) <= 1e-9 * (knots[-1] - knots[0])):
        raise FitError(
            "N_bar takes too few distinct values for the spline of 1/N_bar (two knots coincide)"
        )
    basis = CubicSpline(knots, np.eye(df + 1), bc_type="natural")(x)
    return {f"{name}[{j}]": basis[:, j] for j in range(1, df + 1)}  # all df + 1 sum to the intercept
