"""Embedders as sentence-transformers loads them, of whose files none is run and none is unpickled."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module, Router
from sentence_transformers.util import import_from_string

from canopy_store import store
from canopy_store.errors import CanopyError, StoreError
from canopy_store.ingest import models
from canopy_store.ingest.sources import check_embedder, resolve_model

_READ = (".json", ".safetensors", ".gguf", ".txt", ".model", ".jinja")  # what an embedder is loaded from
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_LONGEST = 200  # characters of a module's path
# Settings that name code, or files other than those that are checked and hashed here.
_FOREIGN = {
    "auto_map",
    "trust_remote_code",
    "use_kernels",
    "kernel_config",
    "tokenizer_name_or_path",
    "processor_name",
    "subfolder",
    "cache_dir",
}


def open_embedder(source: str, device: str | None = None) -> tuple[SentenceTransformer, dict[str, str]]:
    """The encoder at ``source``, and what tells it from others: ``files_sha256``.

    All that is loaded is checked before: modules of sentence-transformers alone, weights in safetensors,
    no file outside the folder, no configuration that names code.

    Parameters
    ----------
    source : sentence-transformers folder, hub id, or package:NAME
    device : by default the best one present

    Raises
    ------
    StoreError
        Nothing to load there, or something that must not be loaded; names the file.
    """
    path = resolve_model(source)
    check_embedder(path)
    path = path.resolve()
    models.quiet()
    with _told_in_a_line(path):
        files = _files(path)
        _check(path, files)
        encoder = SentenceTransformer(
            str(path),
            device=device or models.default_device(),
            trust_remote_code=False,
            local_files_only=True,
            model_kwargs={"use_safetensors": True},
        )
        if encoder.tokenizer is not None and getattr(encoder.tokenizer, "pad_token", "") is None:
            # texts of several lengths share a batch: any token can fill, the mask hides it
            encoder.tokenizer.pad_token = encoder.tokenizer.eos_token or encoder.tokenizer.unk_token
        # some that load cannot embed: better told now than after the work began
        encoder.encode(["a"], show_progress_bar=False)
    hashes = {file.relative_to(path).as_posix(): store.sha256(file) for file in files}
    return encoder, {"files_sha256": hashlib.sha256(store.canonical(hashes).encode()).hexdigest()}


@contextmanager
def _told_in_a_line(path: Path) -> Iterator[None]:
    """Turns whatever an embedder's files make its loading raise into one StoreError."""
    try:
        yield
    except CanopyError:
        raise
    except Exception as error:  # which ones depends on the files: there is no list of them
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise StoreError(f"{path}: cannot be loaded: {reason}") from None


def weights_sha256(source: str) -> str:
    """One hash over the weight files alone, by which stores made before ``files_sha256`` know them."""
    weights = sorted(resolve_model(source).rglob("*.safetensors"))
    return store.content_id([store.sha256(file) for file in weights])


def _files(path: Path) -> list[Path]:
    """Every file that can change an embedding, sorted; the same in a clone and in the hub's cache.

    Raises
    ------
    StoreError
        A link out of the folder, or to a folder; a pipe or a device.
    """
    inside = [path]
    if path.parent.name == "snapshots":
        inside.append(
            path.parent.parent / "blobs"
        )  # where the hub's cache keeps what a snapshot links to
    files = []
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not hidden and file.is_symlink():
            out = not any(file.resolve().is_relative_to(folder) for folder in inside)
            if out or file.is_dir():
                raise StoreError(f"{file}: a link; copy what it links to into the embedder's folder")
        if not hidden and file.suffix in _READ and not file.is_dir():
            if not file.is_file():
                raise StoreError(f"{file}: not a regular file; move it out of the embedder's folder")
            files.append(file)
    return files


def _check(path: Path, files: list[Path]) -> None:
    """Refuses what would run code of the embedder's, or unpickle a file of it."""
    for file in files:
        if file.name == "adapter_config.json":
            raise StoreError(f"{file}: an adapter of another model; merge it into the model first")
        if "config" in file.name and file.suffix == ".json":
            for key, value in _settings(_json(file)):
                if _foreign(key, value):
                    raise StoreError(
                        f"{file}: {key} names code or files from elsewhere, which are never loaded; use "
                        "an embedder of sentence-transformers' own modules, whole in its folder"
                    )
    modules = path / "modules.json"
    if not modules.exists():  # a transformer alone, whose tokens' vectors are averaged
        _check_weights(path)
        return
    entries = _json(modules)
    if not isinstance(entries, list) or not entries:
        raise StoreError(f"{modules}: needs a list of modules")
    for entry in entries:
        kind, place = (entry.get(k) if isinstance(entry, dict) else None for k in ("type", "path"))
        _check_module(path, modules, kind, place)


def _check_module(path: Path, named_in: Path, kind: Any, place: Any) -> None:
    """Refuses a module that is not sentence-transformers' own, or not in the embedder's folder."""
    nameable = isinstance(place, str) and place.isprintable() and len(place) <= _LONGEST
    inside = nameable and (path / place).resolve().is_relative_to(path)
    if not inside or any(part.startswith((".", "/")) for part in Path(place).parts):
        raise StoreError(
            f"{named_in}: path {str(place)[:80]!r} needs to be a folder inside the embedder's"
        )
    module = _own_module(kind)
    if module is None:
        raise StoreError(
            f"{named_in}: type {str(kind)[:80]!r} is no module of sentence-transformers' own, and code "
            "that comes with an embedder is never run"
        )
    folder = path / place
    _check_weights(folder)
    if not issubclass(module, Router):
        return
    named = [file for name in ("router_config.json", "config.json") if (file := folder / name).is_file()]
    types = _json(named[0]).get("types") if named else None
    if not isinstance(types, dict):
        raise StoreError(f"{folder}: its router_config.json needs the types of its modules")
    for inner, inner_kind in types.items():
        _check_module(path, named[0], inner_kind, Path(place, inner).as_posix())


def _own_module(kind: Any) -> type[Module] | None:
    """The class of sentence-transformers that a module's type names; None where it names none."""
    if not isinstance(kind, str) or not re.fullmatch(r"sentence_transformers(\.[A-Za-z]\w*)+", kind):
        return None
    try:
        module = import_from_string(kind)
    except (ImportError, AttributeError):
        return None
    own = isinstance(module, type) and issubclass(module, Module)
    return module if own and module.__module__.startswith("sentence_transformers.") else None


def _check_weights(folder: Path) -> None:
    """Refuses a folder with pickled weights, or with an index of other weights than its safetensors."""
    pickled = sorted(file.name for file in folder.glob("*") if file.suffix.lower() in _PICKLED)
    if pickled:  # beside safetensors too: which of both is loaded is for each module to say
        raise StoreError(
            f"{folder}: {pickled[0]} is pickled, and pickled weights are not loaded; if you trust it, "
            "load it with SentenceTransformer and save it with save_pretrained, as safetensors; if they "
            "are there already, remove it"
        )
    for index in sorted(folder.glob("*.index.json")):
        content = _json(index)
        weights = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weights, dict) or not weights:
            raise StoreError(f"{index}: needs a weight_map that names safetensors; save the model again")
        beside = {file.name for file in folder.glob("*.safetensors") if file.is_file()}
        for name in weights.values():
            if not isinstance(name, str) or name not in beside:
                raise StoreError(
                    f"{index}: names {str(name)[:80]!r}, which is no safetensors file beside it; "
                    "save the model again"
                )


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise StoreError(f"{file}: not JSON") from None


def _settings(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key and value of a configuration, those inside others too."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key, inner
            yield from _settings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _settings(inner)


def _foreign(key: str, value: Any) -> bool:
    """Whether a setting names code, or files other than the embedder's own."""
    if key in _FOREIGN:
        return bool(value)
    if key.endswith("_implementation"):  # attention from a repository of kernels, as owner/name
        return "/" in str(value)
    if key.startswith("activation"):  # of a Dense layer
        return "." in str(value) and not str(value).startswith("torch.nn.")
    if key == "tokenizer_class":  # of word embeddings
        return "." in str(value) and not str(value).startswith("sentence_transformers.")
    return False
