"""The report: one HTML page that asks nothing of the network, and its charts as PDF and SVG files.

Every change and interval on it is what `canopy_store.compare` gives.

>>> from canopy_store.report import write_figures, write_report
>>> write_report("my-store", "report.html")
>>> write_figures("my-store", "figures")
"""

from canopy_store.report.page import EXPLORER_ROLLOUTS, write_figures, write_report

__all__ = ["EXPLORER_ROLLOUTS", "write_figures", "write_report"]
