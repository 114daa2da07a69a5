"""The MANIFEST of an exported folder: each of its files with sha256, bytes and rows."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from canopy_store import store
from canopy_store.errors import DataError

MANIFEST = "MANIFEST"


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The MANIFEST's entries, each {sha256, bytes, rows} under a path inside the folder.

    Raises
    ------
    DataError
        It is no regular file, not JSON of that form, or names a path that leaves the folder.
    """
    path = folder / MANIFEST
    try:
        recorded = json.loads(store.read_bytes(path))
        files = dict(recorded["files"])
        version = recorded["version"]
        if type(version) is not int:  # True is one, by isinstance
            raise ValueError
        for entry in files.values():
            if not (
                re.fullmatch(r"[0-9a-f]{64}", entry["sha256"])
                and type(entry["bytes"]) is int
                and (entry["rows"] is None or type(entry["rows"]) is int)
            ):
                raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        raise DataError(f"{path}: not a readable MANIFEST; export the folder again") from None
    if version > store.FORMAT_VERSION:
        raise DataError(f"{path}: format version {version}; upgrade: pip install -U canopy-store")
    inside = "" if store.remote(folder) else os.path.realpath(folder)  # object storage has no links
    for name in files:
        parts = PurePosixPath(name).parts
        plain = name == "/".join(parts) != "" and ".." not in parts and not name.startswith("/")
        if any("\ud800" <= c <= "\udfff" for c in name):
            raise DataError(f"{path}: names {name!r}, which is no text; do not trust it")
        if not plain or "\\" in name or any(ord(c) < 32 for c in name):
            raise DataError(f"{path}: names {name!r}, a path out of the folder; do not trust it")
        if inside and not os.path.realpath(folder / name).startswith(inside + os.sep):
            raise DataError(f"{folder / name}: a link out of the folder; do not trust it")
    return files


def manifest_problem(path: Path, entry: dict[str, Any]) -> str | None:
    """How a file differs from its MANIFEST entry, if it does."""
    try:
        if not path.is_file():
            return "named in MANIFEST, not there"
        size = path.stat().st_size
        if size != entry["bytes"]:
            return f"{size} bytes, {entry['bytes']} in MANIFEST"
        if store.sha256(path) != entry["sha256"]:
            return "its sha256 is not the one in MANIFEST"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None
