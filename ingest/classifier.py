"""Sequence classifiers from a folder: what rewards and entailment come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from canopy_store.errors import StoreError
from canopy_store.ingest import models


def load_classifier(path: Path, device: str | None, dtype: str | None, what: str) -> tuple[Any, Any]:
    """The model and its tokenizer, ready to be asked.

    Parameters
    ----------
    path : its folder: weights as safetensors only, and no code of its own
    what : it is taken for, in errors: a reward model, an entailment model

    Raises
    ------
    StoreError
        It cannot be loaded, or weights are missing.
    """
    device = device or models.default_device()
    dtype = dtype or models.default_dtype(device)
    if not list(path.glob("*.safetensors")):
        raise StoreError(f"{path}: no *.safetensors; pickled weights are not loaded")
    kwargs: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    models.quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
        model, found = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=models.DTYPES[dtype], use_safetensors=True, output_loading_info=True, **kwargs
        )
    except Exception as error:  # its files are anyone's: what reads them may raise anything
        raise StoreError(f"{path}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    if found["missing_keys"]:
        # transformers would make the head up: what it says would be noise
        raise StoreError(f"{path}: not {what}: no weights for {sorted(found['missing_keys'])[0]}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer
