"""Every error this package raises on purpose.

    CanopyError            exit code 1; its message is one line that says what to do
    ├── UsageError         exit code 2: a wrong call
    ├── StoreError         the store's folder or a file in it cannot be read or written
    ├── DataError          data that fails: names the file, row or column
    ├── ConflictError      settings that must be alike and are not: names each that differs
    └── FitError           a model that cannot be fitted to this panel: names the term or the level

Only the command line catches them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class CanopyError(Exception):
    """The root of this package's errors."""

    exit_code = 1


class UsageError(CanopyError):
    """A wrong call: an option, an argument or a missing extra."""

    exit_code = 2


class StoreError(CanopyError):
    """The store's folder, or a file in it, cannot be read or written."""


class DataError(CanopyError):
    """Data that fails a check."""


class ConflictError(CanopyError):
    """Settings that must be alike and are not: of one name, or of runs that are compared."""


class FitError(CanopyError):
    """A model that cannot be fitted to this panel."""


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """One clause per setting that differs: ``temperature (stored 1.0, asked 0.7)``."""
    keys = [k for k in {**stored, **asked} if stored.get(k) != asked.get(k)]
    return ", ".join(f"{k} (stored {stored.get(k)!r}, asked {asked.get(k)!r})" for k in keys)
