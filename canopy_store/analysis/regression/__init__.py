"""Regressions of diversity on entropy rate: linear mixed models, and the beta mixed model (`beta`)."""

from canopy_store.analysis.regression.checkpoints import ALONE
from canopy_store.analysis.regression.design import natural_spline
from canopy_store.analysis.regression.fit import Fit, Model, as_object
from canopy_store.analysis.regression.models import regress
from canopy_store.analysis.regression.panel import FACTORS, panel_file, read_panel
from canopy_store.analysis.regression.reliability import reliability, samples_for
from canopy_store.analysis.regression.slopes import fieller
from canopy_store.analysis.regression.sweep import spread, sweep

__all__ = [
    "ALONE",
    "FACTORS",
    "Fit",
    "Model",
    "as_object",
    "fieller",
    "natural_spline",
    "panel_file",
    "read_panel",
    "regress",
    "reliability",
    "samples_for",
    "spread",
    "sweep",
]
