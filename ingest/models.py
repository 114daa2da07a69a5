"""Models as transformers loads them: a local folder, a GGUF file, or a hub id. Safetensors only."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from canopy_store import store
from canopy_store.errors import StoreError, UsageError
from canopy_store.ingest.sources import check_model, resolve_model

# In one of these every tokenizer keeps itself; without them transformers may make an empty one up.
TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt", "tekken.json")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_device() -> str:
    """The best device present: cuda, then mps, then cpu."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_dtype(device: str) -> str:
    """bfloat16 on cuda, float32 elsewhere."""
    return "bfloat16" if device.startswith("cuda") else "float32"


def quiet() -> None:
    """Keeps transformers from writing over the progress bar."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def load_model(
    source: str, device: str | None = None, dtype: str | None = None
) -> tuple[Any, Any, Path]:
    """A causal model in eval mode, its tokenizer, and the folder or GGUF file they came from.

    Weights are read from safetensors (or GGUF) alone, and no code that comes with a model is run.

    Raises
    ------
    StoreError
        Nothing to load there, only pickled weights, not all of the weights, or no tokenizer.
    UsageError
        An unknown dtype.
    """
    path = resolve_model(source)
    device = device or default_device()
    dtype = dtype or default_dtype(device)
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: one of {', '.join(DTYPES)}")
    quiet()
    kwargs: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    check_model(path)
    folder = path
    if path.is_file():
        folder, kwargs["gguf_file"] = path.parent, path.name
    elif not any(any(path.glob(pattern)) for pattern in TOKENIZERS):
        raise StoreError(f"{path}: no tokenizer; save it there with its save_pretrained")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **kwargs)
        if "gguf_file" not in kwargs:
            kwargs["use_safetensors"] = True
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[dtype], output_loading_info=True, **kwargs
        )
    except Exception as error:  # its files are anyone's: what reads them may raise anything
        raise StoreError(f"{path}: cannot be loaded: {_reason(error)}") from None
    model, loading = loaded
    if loading["missing_keys"]:
        # transformers would make them up: what is sampled would be noise
        raise StoreError(f"{path}: no weights for {min(loading['missing_keys'])}; take it from a copy")
    model.to(device)
    return model.eval(), tokenizer, path


def _reason(error: BaseException) -> str:
    """An error's words in one line, or its kind where it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_config(path: Path) -> Any:
    """A model's ``config`` and ``generation_config`` without its weights, each None where it has none.

    For `end_token_ids` and `context_window`, where another engine has the weights.

    Raises
    ------
    StoreError
        A config that transformers cannot read.
    """
    quiet()
    found: dict[str, Any] = {"config": None, "generation_config": None}
    try:
        if path.is_file():
            found["config"] = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        elif (path / "config.json").exists():
            found["config"] = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if (path / "generation_config.json").exists():
            found["generation_config"] = GenerationConfig.from_pretrained(path)
    except Exception as error:
        raise StoreError(f"{path}: its config cannot be read: {_reason(error)}") from None
    return SimpleNamespace(**found)


def weights_sha256(path: Path) -> str:
    """One hash over a model's weight files, in name order."""
    weights = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return hashlib.sha256("".join(store.sha256(file) for file in weights).encode()).hexdigest()


def tokenizer_sha256(tokenizer: Any) -> str:
    """A hash that two tokenizers share when they map the same text to the same ids."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else store.canonical(tokenizer.get_vocab())
    return hashlib.sha256(text.encode()).hexdigest()


def checkpoint(source: str, path: Path, tokenizer: Any) -> dict[str, str | None]:
    """What the table ``models`` says of weights and tokenizer at ``path``, asked for as ``source``.

    weights_sha256 is None where the folder holds a tokenizer alone.
    """
    weighed = path.is_file() or any(path.glob("*.safetensors"))
    return {
        "weights_sha256": weights_sha256(path) if weighed else None,
        "tokenizer_sha256": tokenizer_sha256(tokenizer),
        "source": source if "/" in source and not Path(source).exists() else path.name,
    }


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """Every token id that ends a rollout: the generation config's, else config's, else tokenizer's."""
    for holder in (getattr(model, "generation_config", None), model.config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return sorted({int(i) for i in (ids if isinstance(ids, (list, tuple)) else [ids])})
    return []


def vocabulary_size(model: Any, tokenizer: Any) -> int:
    """How many token ids a model has: its config's, or its tokenizer's where these are more.

    A model's vocabulary is often padded: it can then sample ids that its tokenizer has no text for.
    """
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    named = max(tokenizer.get_vocab().values(), default=-1) + 1
    return max(getattr(config, "vocab_size", None) or 0, named)


def context_window(model: Any) -> int | None:
    """The most tokens a model can attend to, or None when its config does not say."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        value = getattr(config or model.config, name, None)
        if value:
            return int(value)
    return None
