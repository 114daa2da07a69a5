"""canopy_store: the record of what language models generate, kept, queried and compared.

>>> import canopy_store
>>> con = canopy_store.open("my-store")                    # DuckDB, with every view
>>> con.sql("select * from model_metrics").pl()            # a polars frame
>>> canopy_store.read("my-store", "model_metrics")         # the same in one call
"""

from canopy_store._version import __version__
from canopy_store.analysis.comparison import compare
from canopy_store.analysis.power import power
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
from canopy_store.sharing import export, pull, push
from canopy_store.sharing.merge import merge
from canopy_store.sql import connect as open
from canopy_store.sql import read
from canopy_store.store import init
from canopy_store.upkeep.maintenance import compact, remove_run
from canopy_store.upkeep.status import status
from canopy_store.upkeep.verify import verify

__all__ = [
    "CanopyError",
    "ConflictError",
    "DataError",
    "FitError",
    "StoreError",
    "UsageError",
    "__version__",
    "compact",
    "compare",
    "export",
    "import_rollouts",
    "init",
    "merge",
    "open",
    "power",
    "pull",
    "push",
    "read",
    "remove_run",
    "select_lengths",
    "select_reward",
    "status",
    "verify",
]
