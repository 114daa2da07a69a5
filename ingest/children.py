"""The folder of a checkpoint that is made here: whole or not there, what made it beside the weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from canopy_store import store
from canopy_store.errors import ConflictError, StoreError, UsageError, differences
from canopy_store.ingest import models

# In a child's folder: what made it. A call that was killed before the store named the child finds it.
RECORD = "finetune.json"


def is_free(out: Path) -> bool:
    """Whether a child can be saved there: no file, and no folder that holds something."""
    return not (out.is_file() or (out.is_dir() and any(out.iterdir())))


def made_by(asked: dict[str, Any], out: Path) -> dict[str, Any]:
    """What the same call did when it made ``out``; refused if another one made it.

    Raises
    ------
    ConflictError, UsageError
        Other settings did, each of which is named; or something else.
    """
    try:
        found = json.loads((out / RECORD).read_text())
        if found["asked"] == asked:
            return dict(found["done"])
        other = differences(dict(found["asked"]), asked)
    except (OSError, ValueError, TypeError, KeyError):
        raise in_use(out) from None
    raise ConflictError(f"--out {out}: was made with other settings: {other}; choose a new folder")


def in_use(out: Path) -> UsageError:
    """What is raised where something else is in a child's folder."""
    return UsageError(f"--out {out}: exists and is not empty; choose a new folder")


def save_child(model: Any, tokenizer: Any, out: Path, record: dict[str, Any]) -> None:
    """Writes the child beside ``out``, then renames: ``out`` is a whole model or is not there."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        store.write_json(temporary / RECORD, record)
        os.replace(temporary, out)
    except OSError as error:
        raise StoreError(f"{out}: cannot write: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_new(root: Path, out: str | Path, family: str, variant: str) -> str:
    """The model_id of a child that may be made: its name is free, or its weights are in ``out``.

    Raises
    ------
    ConflictError
        A checkpoint of this name is stored already, and not in ``out``.
    """
    for option, name in (("--family", family), ("--variant", variant)):
        store.check_name(option, name)
    model_id = f"{family}/{variant}"
    stored = store.models(root) if store.exists(root / "canopy.json") else {}
    if model_id in stored and not (Path(out) / RECORD).is_file():
        raise ConflictError(
            f"model {model_id} is stored already, and its weights are not in {out}; give another "
            "--variant, or the folder that it was saved in"
        )
    return model_id


def name_child(root: Path, out: str | Path, row: dict[str, Any]) -> str:
    """The model_id of a child in ``out``, whose row in ``models`` is now stored; it has to load."""
    _, tokenizer, folder = models.load_model(str(out), "cpu")
    whole = {
        **row,
        "weights_sha256": models.weights_sha256(folder),
        "tokenizer_sha256": models.tokenizer_sha256(tokenizer),
        "source": folder.name,
    }
    return store.add_model(store.init(root), whole)
