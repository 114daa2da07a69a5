"""Prompts from a JSONL file: {"text": …}, {"prompt": …} or {"messages": [{"role", "content"}, …]}."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from canopy_store import store
from canopy_store.errors import DataError, StoreError, UsageError


def read_prompts(path: str | Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The prompts of a JSONL file, in order: prompt_id, text or messages (JSON), source, license,
    reference, line.

    A line's own ``prompt_id`` is kept, as text; otherwise the id is a hash of the content. Blank lines
    at the end are allowed, elsewhere not: a blank line among prompts is a sign of a damaged file.

    Raises
    ------
    StoreError
        No such file.
    DataError
        A line that is no prompt, or one prompt twice; names file and line.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    prompts: list[dict[str, Any]] = []
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        prompt = _read_prompt(line, f"{path}: line {number}")
        prompt["line"] = number
        earlier = seen.setdefault(prompt["prompt_id"], number)
        if earlier != number:
            raise DataError(
                f"{path}: line {number}: the same prompt as line {earlier}; remove one "
                "(more rollouts of a prompt: --samples)"
            )
        prompts.append(prompt)
    if not prompts:
        raise DataError(f'{path}: holds no prompts; one JSON object a line: {{"text": "…"}}')
    return prompts[:limit]


def _read_prompt(line: bytes, where: str) -> dict[str, Any]:
    if not line.strip():
        raise DataError(f"{where}: empty line; remove it")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "not UTF-8 JSON"
        raise DataError(f"{where}: not JSON ({reason})") from None
    if not isinstance(record, dict):
        raise DataError(f'{where}: needs an object such as {{"text": "…"}}')
    messages = record.get("messages")
    text = record.get("text", record.get("prompt"))
    if messages is not None:
        good = (
            isinstance(messages, list)
            and messages
            and all(
                isinstance(m, dict)
                and isinstance(m.get("role"), str)
                and isinstance(m.get("content"), str)
                for m in messages
            )
        )
        if not good:
            raise DataError(f"{where}: messages needs a list of {{role, content}} with text in both")
        content: Any = {"messages": messages}
    elif isinstance(text, str) and text:
        content = {"text": text}
    else:
        raise DataError(f"{where}: needs text (or prompt, or messages) with something in it")
    try:
        json.dumps(content, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds half a surrogate pair, which is no text") from None
    given = record.get("prompt_id")
    if given is not None and (not isinstance(given, (str, int)) or given == ""):
        raise DataError(f"{where}: prompt_id needs text or a whole number")
    return {
        "prompt_id": store.content_id(content) if given is None else str(given),
        "text": content.get("text"),
        "messages": store.canonical(messages) if messages is not None else None,
        "source": _optional_text(record, "source", where),
        "license": _optional_text(record, "license", where),
        "reference": _reference(record, where),
    }


def _reference(record: dict[str, Any], where: str) -> str | None:
    """The right answer, as text: a number counts as it is written."""
    value = record.get("reference")
    if value is not None and (isinstance(value, bool) or not isinstance(value, (str, int, float))):
        raise DataError(f"{where}: reference needs text or a number")
    return None if value is None else str(value)


def _optional_text(record: dict[str, Any], key: str, where: str) -> str | None:
    value = record.get(key)
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: {key} needs text")
    return value


def render(prompt: dict[str, Any], tokenizer: Any, rendering: str, where: str) -> list[int]:
    """A prompt's token ids, through the tokenizer's chat template or as plain text.

    Raises
    ------
    UsageError
        Chat asked of a tokenizer without a template.
    DataError
        Several messages where plain text is asked for, or a prompt of no tokens.
    """
    messages = json.loads(prompt["messages"]) if prompt["messages"] else None
    if rendering == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise UsageError("--template chat: the tokenizer has no chat template; use plain")
        messages = messages or [{"role": "user", "content": prompt["text"]}]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise anything on roles it does not know
            raise DataError(f"{where}: the chat template refuses it: {error}") from None
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        if messages and len(messages) > 1:
            raise DataError(f"{where}: several messages need --template chat, or a text")
        ids = tokenizer(messages[0]["content"] if messages else prompt["text"])["input_ids"]
    if not ids:
        raise DataError(f"{where}: the tokenizer makes no token of it")
    return [int(i) for i in ids]
