"""The report: one HTML page that asks nothing of the network, and its charts as PDF and SVG files.

>>> from canopy_store.report import write_figures, write_report
>>> write_report("my-store", "report.html")
>>> write_figures("my-store", "figures")
"""

from canopy_store.report.intervals import rho_intervals
from canopy_store.report.page import EXPLORER_ROLLOUTS, write_figures, write_report

__all__ = ["EXPLORER_ROLLOUTS", "rho_intervals", "write_figures", "write_report"]
