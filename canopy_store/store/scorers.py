"""Scorers: who scored given text, a row each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from canopy_store.errors import ConflictError, differences
from canopy_store.schema import view_columns
from canopy_store.store.catalog import commit_rows, table_rows
from canopy_store.store.locks import waiting
from canopy_store.store.plans import require_own_name


def add_scorer(root: Path, row: Mapping[str, Any]) -> str:
    """The scorer_id, whose row in ``scorers`` is now stored; the same again is once.

    Raises
    ------
    ConflictError
        It is stored with other values; names each difference.
    """
    row = {column.name: row.get(column.name) for column in view_columns("scorers")}
    scorer_id = row["scorer_id"]
    with waiting(root, "commit"):  # of two that begin at once, one writes the row
        stored = {each["scorer_id"]: each for _, each in table_rows(root, "scorers")}
        known = stored.get(scorer_id)
        if known is not None and known != row:
            raise ConflictError(
                f"scorer {scorer_id} is stored with other settings: {differences(known, row)}; give it "
                "another name with --name"
            )
        if known is None:
            require_own_name("scorer", scorer_id, stored)
            commit_rows(root, "scorers", [row])
    return scorer_id
