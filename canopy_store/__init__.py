"""canopy_store: the record of what language models generate, kept, queried and compared.

>>> import canopy_store
>>> con = canopy_store.open("my-store")                    # DuckDB, with every view
>>> con.sql("select * from model_metrics").pl()            # a polars frame
>>> canopy_store.read("my-store", "model_metrics")         # the same in one call
>>> canopy_store.compare("my-store")                       # what a treatment changed, with intervals
>>> canopy_store.write_report("my-store", "report.html")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from canopy_store._version import __version__
from canopy_store.analysis.comparison import compare
from canopy_store.analysis.control_variate import ce_star_estimates
from canopy_store.analysis.power import power, power_of_regression
from canopy_store.analysis.selections import select_lengths, select_reward
from canopy_store.errors import (
    CanopyError,
    ConflictError,
    DataError,
    FitError,
    StoreError,
    UsageError,
)
from canopy_store.readers.importing import import_rollouts
from canopy_store.readers.importing_options import import_options
from canopy_store.sharing import export, pull, push
from canopy_store.sharing.merge import merge
from canopy_store.sql import connect as open
from canopy_store.sql import read
from canopy_store.store import init
from canopy_store.upkeep.compact import compact
from canopy_store.upkeep.remove import remove_corpus, remove_run, remove_task
from canopy_store.upkeep.status import status
from canopy_store.upkeep.upgrade import upgrade
from canopy_store.upkeep.verify import verify

if TYPE_CHECKING:
    from canopy_store.analysis.pass_at_k import pass_at_k_curve
    from canopy_store.analysis.regression import read_panel, regress
    from canopy_store.analysis.uncertainty import calibrate
    from canopy_store.report import write_figures, write_report

# Imported when they are first used: scipy and the report's pages take longer than the rest together.
_ON_FIRST_USE = {
    "calibrate": "canopy_store.analysis.uncertainty",
    "pass_at_k_curve": "canopy_store.analysis.pass_at_k",
    "read_panel": "canopy_store.analysis.regression",
    "regress": "canopy_store.analysis.regression",
    "write_figures": "canopy_store.report",
    "write_report": "canopy_store.report",
}

__all__ = [
    "CanopyError",
    "ConflictError",
    "DataError",
    "FitError",
    "StoreError",
    "UsageError",
    "__version__",
    "calibrate",
    "ce_star_estimates",
    "compact",
    "compare",
    "export",
    "import_options",
    "import_rollouts",
    "init",
    "merge",
    "open",
    "pass_at_k_curve",
    "power",
    "power_of_regression",
    "pull",
    "push",
    "read",
    "read_panel",
    "regress",
    "remove_corpus",
    "remove_run",
    "remove_task",
    "select_lengths",
    "select_reward",
    "status",
    "upgrade",
    "verify",
    "write_figures",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _ON_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ON_FIRST_USE[name]), name)
