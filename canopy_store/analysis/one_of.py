"""Of what a store has several of, an embedder, a grader, a clustering: the one that is meant."""

from __future__ import annotations

from collections.abc import Sequence

from canopy_store.errors import DataError, UsageError


def one_of(option: str, stored: Sequence[str], wanted: str | None) -> str:
    """The one wanted, or the only one stored, of which there is at least one.

    Raises
    ------
    DataError
        The one wanted is not stored.
    UsageError
        Several are stored and none is wanted.
    """
    if wanted is not None and wanted not in stored:
        raise DataError(f"{option} {wanted}: not in the store; it has {', '.join(stored)}")
    if wanted is None and len(stored) > 1:
        raise UsageError(f"{option}: the store has several: {', '.join(stored)}")
    return wanted or stored[0]
