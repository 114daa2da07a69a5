"""Reads Inspect's ``.eval`` logs: a zip of JSON, one member a sample of an epoch."""

from __future__ import annotations

import copy
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from canopy_store.errors import DataError
from canopy_store.readers import LONGEST, Row, Told, get, parse
from canopy_store.readers.openai_batch import chat_prompt
from canopy_store.readers.openai_logprobs import listed_tokens, log_columns, token_table

_ZSTD = 93  # the zip method of newer logs, which zipfile knows from Python 3.14 on
_REASONS = {"stop": "stop", "tool_calls": "stop", "max_tokens": "length", "model_length": "length"}
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    pa.ArrowException,
    NotImplementedError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
)


def sniff(path: Path) -> bool:
    """Whether a file is a zip with a log's header or journal."""
    try:
        with zipfile.ZipFile(path) as log:
            return bool({"header.json", "_journal/start.json"} & set(log.namelist()))
    except _BROKEN:
        return False


def read(path: Path, told: Told) -> Iterator[Row]:
    """The generations of every sample that has one; the others are counted and left out.

    Only samples of one generation are rollouts of their prompt: one that called tools or took turns
    is refused.

    Raises
    ------
    DataError
        No log, a sample in chunks or of several generations, a member that decodes to too much.
    """
    table = token_table(told.tokenizer)
    try:
        log = zipfile.ZipFile(path)
    except _BROKEN:
        raise DataError(f"{path}: truncated or not an .eval log") from None
    with log:
        names = list(dict.fromkeys(log.namelist()))
        header = next((n for n in ("header.json", "_journal/start.json") if n in names), None)
        if header is None:
            raise DataError(f"{path}: holds neither header.json nor _journal/start.json: no .eval log")
        told_there = _header(_member(log, path, header), f"{path}: {header}")
        if any(re.fullmatch(r"samples/.*/sample\.json", name) for name in names):
            raise DataError(
                f"{path}: its samples are stored in chunks, which are not read; "
                "give the log as it was first written"
            )
        samples: Counter[str] = Counter()
        failed = []
        for name in sorted(n for n in names if re.fullmatch(r"samples/[^/]*\.json", n)):
            rows = _sample(_member(log, path, name), f"{path}: {name}", table)
            failed += [] if rows else [name]
            for row in rows:
                row["sample"] = samples[row["prompt_id"]]
                samples[row["prompt_id"]] += 1
                yield told_there | row
    if failed:
        told.say(f"{path}: {len(failed)} samples have no generation and are left out, first {failed[0]}")


def _header(header: Any, where: str) -> dict[str, Any]:
    config = get(header, "eval.model_generate_config", dict, where, {})
    return {
        "task": get(header, "eval.task", str, where, None),
        "model": get(header, "eval.model", str, where, None),
        "temperature": get(config, "temperature", (int, float), where, None),
        "top_p": get(config, "top_p", (int, float), where, None),
        "top_k": get(config, "top_k", int, where, None),
        "max_new_tokens": get(config, "max_tokens", int, where, None),
    }


def _sample(sample: Any, where: str, table: dict[bytes, int] | None) -> list[dict[str, Any]]:
    attachments = get(sample, "attachments", dict, where, {})
    messages = get(sample, "messages", list, where)
    choices = get(sample, "output.choices", list, where, [])
    answers = [
        i
        for i, m in enumerate(messages)
        if get(m, "role", str, where) == "assistant" and get(m, "source", str, where, None) == "generate"
    ]
    if sample.get("error") or not choices:
        return []
    if len(answers) != 1:
        raise DataError(f"{where}: {len(answers)} generations; a rollout is one, from its prompt")
    turns = [
        {**m, "content": _text(get(m, "content", (str, list), where, ""), attachments)}
        for m in messages[: answers[0]]
    ]
    shared = {**chat_prompt(turns, where), "prompt_id": str(get(sample, "id", (int, str), where))}
    rows = []
    for place, choice in enumerate(choices):
        ended = get(choice, "stop_reason", str, where, None)
        text = _text(get(choice, "message.content", (str, list), where, ""), attachments)
        row = {
            **shared,
            "where": f"{where}, choice {place}",
            "text": text,
            "finish_reason": _REASONS.get(ended or ""),
        }
        entries = get(choice, "logprobs.content", list, where, None)
        if entries:
            row |= log_columns(listed_tokens(entries, row["where"]), row["where"], table, text)
        elif len(choices) == 1:
            row["n_tokens"] = get(sample, "output.usage.output_tokens", int, where, None)
        rows.append(row)
    return rows


def _text(content: str | list[Any], attachments: dict[str, Any]) -> str | None:
    """A message's text, longer pieces taken from the attachments; None where a part is no text."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts: list[str] = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if isinstance(text, str) and text.startswith("attachment://"):
            text = attachments.get(text.removeprefix("attachment://"), text)
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)


def _member(log: zipfile.ZipFile, path: Path, name: str) -> Any:
    """A member's JSON, decoded in memory and no further than LONGEST: no path in it is ever used."""
    where = f"{path}: {name}"
    try:
        info = log.getinfo(name)
        if info.compress_type == _ZSTD:
            stored = copy.copy(info)  # its bytes as they lie there, for a library that decodes them
            stored.compress_type, stored.file_size = zipfile.ZIP_STORED, info.compress_size
            stored.CRC = None  # type: ignore[assignment]  # that of the decoded bytes
            with log.open(stored) as raw:
                data = pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd").read(LONGEST + 1)
            if zlib.crc32(data) != info.CRC and len(data) <= LONGEST:
                raise zipfile.BadZipFile
        else:
            with log.open(info) as raw:
                data = raw.read(LONGEST + 1)
    except _BROKEN:
        raise DataError(f"{where}: cannot be decoded: the log is damaged or truncated") from None
    return parse(data, where)
