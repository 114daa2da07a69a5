"""Regressions of diversity on entropy rate: linear mixed models, and the beta mixed model (`beta`)."""

from canopy_store.analysis.regression.linear import (
    FACTORS,
    Fit,
    Model,
    fieller,
    natural_spline,
    read_panel,
    regress,
)

__all__ = ["FACTORS", "Fit", "Model", "fieller", "natural_spline", "read_panel", "regress"]
