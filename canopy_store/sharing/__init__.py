"""Stores that travel: export, pull, push and merge."""

from canopy_store.sharing.export import export, pull, push

__all__ = ["export", "pull", "push"]
