"""The example store that ships with the package; demo/example.py makes it."""

from __future__ import annotations

import os
import secrets
import shutil
import zipfile
from importlib.resources import as_file, files
from pathlib import Path

from canopy_store import sql, store
from canopy_store.errors import StoreError


def unpack_example(root: str | Path) -> Path:
    """The path of a store that holds the example, made if it is missing, whole or not at all.

    Rollouts of SmolLM2-135M-Instruct and a fine-tuned child of it on two tasks, with embeddings. Its
    README.md says what is in it and under which licence.

    Raises
    ------
    StoreError
        A folder of something else, or a disk that fails.
    """
    root = Path(root)
    if store.place(root).exists() and store.exists(root / "canopy.json"):
        return root
    scratch = root.with_name(f".{root.name}.{secrets.token_hex(4)}.tmp")
    try:
        with store.writing(root):
            scratch.mkdir(parents=True)
            with as_file(files("canopy_store") / "example.zip") as archive:
                _unpack(archive, scratch)
            os.replace(scratch, root)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    sql.write_database(root)
    return root


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
    except zipfile.BadZipFile:
        raise StoreError(f"{archive}: damaged; install the package again") from None
