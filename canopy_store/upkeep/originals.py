"""Files that upkeep replaces or removes: they must be the owner's to change, and read without damage."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from canopy_store import store
from canopy_store.errors import DataError, UsageError
from canopy_store.upkeep.manifest import MANIFEST


def require_own(root: Path, instead: str = "") -> Path:
    """``root``, a store whose files no MANIFEST names by their hash.

    Raises
    ------
    UsageError
        It is an exported folder; ``instead`` says what to do once that is merged into a store.
    """
    if store.exists(root / MANIFEST):
        raise UsageError(
            f"{root}: an exported folder, whose {MANIFEST} names its files: merge it into "
            f"a store{instead}"
        )
    return root


def read_intact(path: Path, table: str) -> pa.Table:
    """A file's rows; its pages' checksums agree, for damage must not be copied under fresh ones.

    Raises
    ------
    DataError
        It is damaged, gone, or no file of the table.
    """
    store.check_file(path, table)
    try:
        source = io.BytesIO(store.read_bytes(path)) if store.remote(path) else path
        return store.completed(pq.ParquetFile(source, page_checksum_verification=True).read())
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path}: cannot be read: {' '.join(str(error).split())[:150]}; see: canopy verify"
        ) from None
