"""Where a model is: a local folder, a GGUF file, a hub id or a package. Told without torch."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from pathlib import Path

from canopy_store.errors import StoreError, UsageError


def short_name(source: str) -> str:
    """What a model goes by in the store: the last part of its path, hub id or package."""
    return source.rstrip("/").rpartition("/")[2].rpartition(":")[2]


def resolve_model(source: str, revision: str | None = None) -> Path:
    """The local folder or GGUF file behind ``source``.

    ``package:NAME`` is the one GGUF file that an installed package carries, which is not imported for
    it, or else the folder it names MODEL_DIR; anything that is not a path is a hub id, fetched or found
    in the hub's cache.

    Raises
    ------
    StoreError
        It is neither here nor on the hub.
    """
    if not source.strip():
        raise StoreError("no model is named: give a folder, a .gguf file, a hub id or package:NAME")
    if source.startswith("package:"):
        return _packaged(source.removeprefix("package:"))
    path = Path(source).expanduser()
    if path.exists():
        return path.resolve()
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise StoreError(f"{source}: no such folder or file")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"],
            )
        )
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise StoreError(f"{source}: no local folder, and not found on the hub ({reason})") from None


def _packaged(name: str) -> Path:
    """The model in an installed package."""
    source = f"package:{name}"
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):  # a part of a dotted name is none, or no name at all
        spec = None
    if spec is None:
        raise StoreError(f"{source}: no package of this name is installed; install it, or name a folder")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(file for folder in folders for file in folder.rglob("*.gguf"))
    if len(files) == 1:
        return files[0].resolve()
    try:
        return Path(importlib.import_module(name).MODEL_DIR)
    except (ImportError, AttributeError):
        if files:
            several = ", ".join(file.name for file in files[:5])
            raise StoreError(
                f"{source}: carries several models ({several}); name the file of one: "
                f"{files[0].parent}/…"
            ) from None
        raise StoreError(f"{source}: the package holds no model: no .gguf file, no MODEL_DIR") from None


def check_model(path: Path, weights: bool = True) -> None:
    """Raises StoreError for what cannot be a causal model: neither a GGUF file nor safetensors.

    Parameters
    ----------
    path : as `resolve_model` gives it
    weights : False where its tokenizer and configuration are enough
    """
    if path.is_file():
        if path.suffix != ".gguf":
            raise StoreError(f"{path}: a model is a folder or a .gguf file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise StoreError(f"{path}: not a GGUF file, or a damaged one")
    elif weights and not list(path.glob("*.safetensors")):
        pickled = [file for kind in ("bin", "pt", "pth") for file in path.glob(f"*.{kind}")]
        what = f"only pickled weights ({pickled[0].name})" if pickled else "no *.safetensors"
        raise StoreError(f"{path}: {what}; save it with save_pretrained first")


def check_trainable(path: Path) -> None:
    """Raises UsageError for a GGUF file, StoreError for what else cannot be trained."""
    check_model(path)
    if path.is_file():
        raise UsageError(f"{path}: a GGUF file cannot be trained; save it as safetensors first")


def check_embedder(path: Path) -> None:
    """Raises StoreError for what is no folder of an embedder."""
    if not path.is_dir():
        raise StoreError(f"{path}: an embedder is a folder of sentence-transformers")
