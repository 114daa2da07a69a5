"""Training text and worked examples from a JSONL file, and the text of a record in pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from canopy_store import store
from canopy_store.errors import ConflictError, DataError

_FORMS = '{"messages": […]}, {"prompt": …, "completion": …} or {"text": …}'


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place and record, of one of the three forms.

    Raises
    ------
    StoreError
        The file cannot be read.
    DataError
        A line that is none of the forms; names file and line.
    """
    lines = store.read_input(path).rstrip().split(b"\n")
    for number, line in enumerate(lines, 1):
        where = f"{path}: line {number}"
        yield where, _read_record(line, where)


def check_records(path: Path) -> None:
    """Raises as `read_records` does for a file that cannot be trained on, as for one that is no file."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: not a file, and training reads it more than once; save it as one")
    for _ in read_records(path):
        pass


def _read_record(line: bytes, where: str) -> dict[str, Any]:
    """A line's record, of one of the three forms."""
    if not line.strip():
        raise DataError(f"{where}: empty line; remove it, or write one of {_FORMS}")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{where}: not JSON; mend it to one of {_FORMS}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: not an object; write one of {_FORMS}")
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and _is_text(m.get("content"))
            for m in messages
        ):
            raise DataError(f"{where}: messages needs a list of {{role, content}} with text in both")
        if "assistant" not in [m["role"] for m in messages]:
            raise DataError(f"{where}: messages holds no assistant message to learn; add one")
    elif not (
        all(_is_text(record.get(key)) for key in ("prompt", "completion"))
        or ("prompt" not in record and _is_text(record.get("text")))
    ):
        raise DataError(f"{where}: needs one of {_FORMS}, with something in each")
    return record


def _is_text(value: Any) -> bool:
    # half a surrogate pair passes for a str but has no UTF-8
    return isinstance(value, str) and value != "" and value == value.encode(errors="ignore").decode()


def text_of(record: dict[str, Any]) -> str:
    """The text of a record on one line: of a conversation, what was said."""
    if "messages" in record:
        said = " ".join(message["content"] for message in record["messages"])
    elif "prompt" in record:
        said = record["prompt"] + record["completion"]
    else:
        said = record["text"]
    return " ".join(said.split())


def write_once(out: Path, content: bytes) -> None:
    """Writes a new file, whole or not at all; where it is there with the same content, nothing.

    Raises
    ------
    ConflictError
        It is there with other content.
    """
    if is_written(out, content):
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with store.replacing(out) as file:
        file.write(content)


def is_written(out: Path, content: bytes) -> bool:
    """Whether a file is there with this content; with other content raises as `write_once` does."""
    if not out.exists():
        return False
    if not out.is_file() or out.read_bytes() != content:
        raise ConflictError(f"--out {out}: is there, and holds something else; choose a new file")
    return True


def segments(record: dict[str, Any], tokenizer: Any, where: str) -> list[tuple[str, bool, bool]]:
    """Pieces of a record's text: the text, whether it is learnt, whether special tokens are added."""
    messages = record.get("messages")
    if "prompt" in record and messages is None:
        if not tokenizer.chat_template:
            return [(record["prompt"], False, True), (record["completion"], True, False)]
        messages = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
    if messages is None:
        return [(record["text"], True, True)]
    if not tokenizer.chat_template:
        raise DataError(
            f"{where}: messages need a chat template, and this tokenizer has none; write "
            '{"prompt": …, "completion": …}'
        )
    try:
        return [(text, learnt, False) for text, learnt in _turns(messages, tokenizer)]
    except Exception as error:  # a template may raise anything on roles it does not know
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{where}: the chat template refuses it: {reason}") from None


def _turns(messages: list[dict[str, str]], tokenizer: Any) -> list[tuple[str, bool]]:
    """A conversation's text up to the last answer, in pieces; the assistant's are learnt."""

    def render(upto: int, opening: bool = False) -> str:
        return tokenizer.apply_chat_template(
            messages[:upto], tokenize=False, add_generation_prompt=opening
        )

    done = ""
    pieces: list[tuple[str, bool]] = []
    for i in [i for i, message in enumerate(messages) if message["role"] == "assistant"]:
        before, after = render(i, opening=True), render(i + 1)
        if not (before.startswith(done) and after.startswith(before)):
            # the template rewrites earlier turns, so answers cannot be told apart: learn all of it
            return [(render(len(messages)).rstrip(), True)]
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    # without the line break that many templates put after the end token
    return [*pieces[:-1], (pieces[-1][0].rstrip(), True)]
