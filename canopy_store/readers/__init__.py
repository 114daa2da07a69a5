"""Readers: what turns other tools' output into rollouts.

A reader is a module, or any object, with two functions:

    sniff(path) -> bool           whether the file or folder looks like its format; never raises
    read(path, told) -> rows      an iterator of rollouts, each a dict of the keys of `FIELDS`

and, for a format of several files, ``files(path)``, the list of those that it reads. What a source
does not tell, its rows leave out: a missing value is never made up. A package adds a reader of its
own by an entry point of the group ``canopy_store.readers``, named after the format.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from canopy_store.errors import DataError, StoreError, UsageError

Row = Mapping[str, Any]

LONGEST = 1 << 29  # bytes of one JSON record, decoded: what a reader may hold at once

FIELDS = {
    "where": "what an error calls the rollout: file and line, member or row",
    "family": "model family",
    "variant": "variant of the family",
    "task": "task",
    "prompt_id": "the prompt, as text or a whole number",
    "sample": "number among its rollouts",
    "prompt": "the prompt's text",
    "messages": "the prompt as chat messages, JSON",
    "text": "generated text",
    "token_ids": "generated token ids",
    "n_tokens": "their number, where neither they nor any list of a value a token is known",
    "finish_reason": "stop or length",
    "logprob": "log-probability of each token, nats",
    "raw_logprobs": "true where logprob and top_logprobs are the model's own, taken before "
    "temperature, top-k and top-p",
    "entropy": "exact entropy of each step, nats; never one of a shortened list",
    "eos_logprob": "log-probability of ending at each step, nats",
    "top_token_ids": "ids of each step's likeliest tokens",
    "top_logprobs": "and their log-probability",
    "reward": "a reward",
    "correct": "whether the answer is right",
    "score": "a grade",
    "answer": "the answer that was graded",
    "reference": "the right answer to the prompt",
    "embedding": "an embedding; embedding.NAME where its embedder is known",
    "model": "the checkpoint's name in the source",
    "temperature": "sampling temperature",
    "top_k": "tokens kept by top-k; 0 is off",
    "top_k_unsure": "why top_k, where nobody tells it, cannot be taken to be off",
    "top_p": "mass kept by top-p",
    "max_new_tokens": "longest rollout allowed",
    "left_out": "what of the rollout the reader left out, and why: {field: reason}",
}

_MODULES = {
    "paper": "canopy_store.readers.paper",
    "lm-eval": "canopy_store.readers.lm_eval",
    "inspect": "canopy_store.readers.inspect_log",
    "openai-batch": "canopy_store.readers.openai_batch",
}


TOP_K_50 = (
    "sampled by transformers' generate, which keeps the 50 likeliest tokens unless it is told otherwise, "
    "and the log names no top-k"
)


@dataclass(frozen=True)
class Told:
    """What the caller tells a reader.

    Parameters
    ----------
    tokenizer : a transformers tokenizer of the model, for sources that give tokens as text
    requests : the requests that a batch answers, JSONL
    say : shows one line to whoever imports: what was left out, and why
    """

    tokenizer: Any = None
    requests: Path | None = None
    say: Callable[[str], None] = lambda line: None


def formats() -> list[str]:
    """The names of every format there is a reader for, those of other packages last."""
    return [*_MODULES, *sorted({e.name for e in _others()} - set(_MODULES))]


def find(path: Path, format: str | None = None) -> tuple[str, Any]:
    """Name and reader of a source's format: the one asked for, else the first that knows it.

    Raises
    ------
    StoreError
        Nothing is there.
    UsageError
        No reader of this name, or none that knows the source.
    """
    if not path.exists():
        raise StoreError(f"{path}: no such file or folder")
    known = ", ".join(("parquet", *formats()))
    if format is not None:
        if format not in formats():
            raise UsageError(f"--format {format}: no such reader; there are {known}")
        return format, _load(format)
    for name in formats():
        reader = _load(name)
        if reader.sniff(path):
            return name, reader
    raise DataError(f"{path}: no reader knows this format; name it with --format: {known}")


def _others() -> list[Any]:
    return list(entry_points(group="canopy_store.readers"))


def _load(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    found = next(e for e in _others() if e.name == name)
    try:
        reader = found.load()
        if callable(reader.sniff) and callable(reader.read):
            return reader
    except (ImportError, AttributeError):
        pass
    raise UsageError(f"--format {name}: {found.value} is no reader: it needs sniff and read")


# ---------------------------------------------------------------- for readers of JSON


def first_record(path: Path) -> dict[str, Any]:
    """The first line of a JSONL file; empty where it is none. For ``sniff``."""
    try:
        return next(records(path))[1]
    except (DataError, StopIteration):
        return {}


def records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What errors call each line of a JSONL file, and its object.

    Raises
    ------
    DataError
        A line that is empty, too long or no JSON object; names file and line.
    """
    blank = 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), 1):
                if not line.strip():
                    blank = blank or number  # allowed at the end
                    continue
                if blank:
                    raise DataError(f"{path}: line {blank}: empty line; remove it")
                where = f"{path}: line {number}"
                record = parse(line, where)
                if not isinstance(record, dict):
                    raise DataError(f"{where}: needs a JSON object")
                yield where, record
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def parse(data: bytes | str, where: str) -> Any:
    """A JSON value.

    Raises
    ------
    DataError
        It is too long or no JSON.
    """
    if len(data) > LONGEST:
        raise DataError(f"{where}: longer than {LONGEST >> 20} MiB")
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8 JSON"
        raise DataError(f"{where}: not JSON ({reason})") from None


def get(record: Any, path: str, kind: type | tuple[type, ...], where: str, missing: Any = ...) -> Any:
    """The value at ``path``, keys joined by dots, of a JSON object.

    ``missing``, where given, stands for a value that is not there or null.

    Raises
    ------
    DataError
        It is not there, or not of this kind; names the key.
    """
    value = record
    for key in path.split(".") if "." in path else (path,):
        value = value.get(key) if isinstance(value, dict) else None
    if type(value) is kind:
        return value
    if value is None and missing is not ...:
        return missing
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        wanted = " or ".join(_KINDS.get(k, k.__name__) for k in kinds)
        raise DataError(f"{where}: {path} needs {wanted}")
    return value


_KINDS = {str: "text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}
