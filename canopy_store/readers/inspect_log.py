"""Reads Inspect's logs: ``.eval``, a zip of JSON with a member a sample of an epoch, or ``.json``."""

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
from canopy_store.readers import LONGEST, TOP_K_50, Row, Told, get, parse
from canopy_store.readers.openai_batch import chat_prompt
from canopy_store.readers.openai_logprobs import Table, listed_tokens, log_columns, token_table

_ZSTD = 93  # the zip method of newer logs, which zipfile knows from Python 3.14 on
_REASONS = {"stop": "stop", "tool_calls": "stop", "max_tokens": "length", "model_length": "length"}
# Its hf engine takes each step's likeliest token for the sampled one, before temperature and top-k, and
# counts the padding of its batch.
_OF_THE_LIKELIEST = (
    "Inspect's hf engine logs those of each step's likeliest token under the plain model, not those of "
    "the token that was sampled; canopy ingest score --own gives them"
)
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
    """Whether a file is a log, as a zip with its header or journal or as JSON, or a folder has one."""
    if path.is_dir():
        return bool(files(path))
    if path.suffix == ".json" and path.is_file():
        with open(path, "rb") as file:
            start = file.read(4096)
        return start.lstrip().startswith(b"{") and b'"eval":' in start and b'"version":' in start
    try:
        with zipfile.ZipFile(path) as log:
            return bool({"header.json", "_journal/start.json"} & set(log.namelist()))
    except _BROKEN:
        return False


def files(path: Path) -> list[Path]:
    """The logs of a folder and the folders in it, by name, which begins with the time; or the log."""
    if not path.is_dir():
        return [path]
    inside = path.resolve()
    named = (p for p in sorted(path.rglob("*")) if p.suffix in (".eval", ".json") and p.is_file())
    return [p for p in named if p.resolve().is_relative_to(inside) and sniff(p)]


def read(path: Path, told: Told) -> Iterator[Row]:
    """The generations of every sample that has one; the others are counted and left out.

    Only samples of one generation are rollouts of their prompt: one that called tools or took turns
    is refused. Of a folder's logs, a sample that a retried log has taken over is read once.

    Raises
    ------
    DataError
        No log, a sample in chunks or of several generations, a member that decodes to too much.
    """
    table = token_table(told.tokenizer)
    numbers: Counter[tuple[str | None, str]] = Counter()
    seen: set[str] = set()
    failed: list[str] = []
    again = 0
    for file in files(path):
        log = _json_log(file) if file.suffix == ".json" else _zip_log(file)
        told_there = _header(*next(log))
        for sample, where in log:
            uuid = get(sample, "uuid", str, where, None)
            if uuid in seen:
                again += 1
                continue
            rows = _sample(sample, where, table)
            if rows and uuid:
                seen.add(uuid)
            failed += [] if rows else [where.removeprefix(f"{path}: ")]
            for row in rows:
                if told_there["top_k_unsure"]:
                    _leave_out_the_likeliest(row)
                key = told_there["task"], row["prompt_id"]
                row["sample"] = numbers[key]
                numbers[key] += 1
                yield told_there | row
    if failed:
        told.say(f"{path}: {len(failed)} samples have no generation and are left out, first {failed[0]}")
    if again:
        told.say(f"{path}: {again} samples are in more than one log and are read once")


def _zip_log(path: Path) -> Iterator[tuple[Any, str]]:
    """Header and samples of an .eval log, each with what errors call it."""
    try:
        log = zipfile.ZipFile(path)
    except _BROKEN:
        raise DataError(f"{path}: truncated or not an .eval log") from None
    with log:
        names = list(dict.fromkeys(log.namelist()))
        header = next((n for n in ("header.json", "_journal/start.json") if n in names), None)
        if header is None:
            raise DataError(f"{path}: holds neither header.json nor _journal/start.json: no .eval log")
        yield _member(log, path, header), f"{path}: {header}"
        if any(re.fullmatch(r"samples/.*/sample\.json", name) for name in names):
            raise DataError(
                f"{path}: its samples are stored in chunks, which are not read; "
                "give the log as it was first written"
            )
        for name in sorted(n for n in names if re.fullmatch(r"samples/[^/]*\.json", n)):
            yield _member(log, path, name), f"{path}: {name}"


def _json_log(path: Path) -> Iterator[tuple[Any, str]]:
    """Header and samples of a .json log, each with what errors call it."""
    try:
        with open(path, "rb") as file:
            log = parse(file.read(LONGEST + 1), str(path))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    yield log, str(path)
    for number, sample in enumerate(get(log, "samples", list, str(path), []), 1):
        yield sample, f"{path}: sample {number}"


def _leave_out_the_likeliest(row: dict[str, Any]) -> None:
    """Takes from a rollout of the hf engine what is not of its own tokens."""
    had = row.get("logprob") is not None
    for name in ("logprob", "raw_logprobs", "token_ids", "top_token_ids", "top_logprobs", "n_tokens"):
        row.pop(name, None)
    row["left_out"] = {"logprob": _OF_THE_LIKELIEST} if had else {}


def _header(header: Any, where: str) -> dict[str, Any]:
    config = get(header, "eval.model_generate_config", dict, where, {})
    model = get(header, "eval.model", str, where, None)
    hf = (model or "").startswith("hf/")
    greedy = hf and get(header, "eval.model_args.do_sample", bool, where, None) is False
    return {
        "task": get(header, "eval.task", str, where, None),
        "model": model,
        "top_k_unsure": TOP_K_50 if hf else None,
        "temperature": 0.0 if greedy else get(config, "temperature", (int, float), where, None),
        "top_p": get(config, "top_p", (int, float), where, None),
        "top_k": get(config, "top_k", int, where, None),
        "max_new_tokens": get(config, "max_tokens", int, where, None),
    }


def _sample(sample: Any, where: str, table: Table | None) -> list[dict[str, Any]]:
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
            row |= log_columns(listed_tokens(entries, row["where"]), row["where"], table)
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
