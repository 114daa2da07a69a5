"""A tokenizer alone, for imports of what is known as text."""

from __future__ import annotations

from typing import Any

from transformers import AutoTokenizer

from canopy_store.errors import StoreError
from canopy_store.ingest.models import quiet
from canopy_store.ingest.sources import resolve_model


def load_tokenizer(source: str) -> Any:
    """The tokenizer of a folder, a GGUF file, a hub id or ``package:NAME``; runs no code of it.

    Raises
    ------
    StoreError
        Nothing to load there.
    """
    path = resolve_model(source)
    quiet()
    gguf = {"gguf_file": path.name} if path.is_file() else {}
    try:
        return AutoTokenizer.from_pretrained(
            path.parent if gguf else path, trust_remote_code=False, local_files_only=True, **gguf
        )
    except Exception as error:  # its files are anyone's: what reads them may raise anything
        raise StoreError(f"{path}: no tokenizer: {' '.join(str(error).split())[:300]}") from None
