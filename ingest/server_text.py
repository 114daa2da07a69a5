"""A server's words and a connection's errors made fit to be shown: short, plain, nothing of the key."""

from __future__ import annotations

import base64
import functools
import html
import re
import urllib.parse

_PIECE = 4  # letters and digits in a row that are taken for a part of the key
# colours, titles and the like: an escape with what belongs to it
_ESCAPES = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b.")


def shown(text: str, key: str = "", longest: int = 300) -> str:
    """The text on one line of at most ``longest`` characters, free of control codes and of the key.

    Four letters and digits in a row that the key has too become '…', in either case, whatever stands
    between them, and in the key's other spellings: percent-encoded, base64, hexadecimal, HTML.
    """
    plain = (c for c in _ESCAPES.sub("", text) if c.isprintable() or c.isspace())
    line = " ".join("".join(plain).split())
    if key:
        line = _without_key(line.replace(key, "…"), key)
    return line if len(line) <= longest else line[: longest - 1] + "…"


def holds_key(text: str, key: str) -> bool:
    """Whether the whole key stands in the text, as it is or percent-encoded."""
    return bool(key) and any(part in text for part in (key, urllib.parse.quote(key, safe="")))


def _without_key(line: str, key: str) -> str:
    places = [i for i, character in enumerate(line) if character.isascii() and character.isalnum()]
    letters, pieces = _letters(line), _pieces(key)
    hidden = bytearray(len(line))
    for size in {len(piece) for piece in pieces}:
        for at in range(len(letters) - size + 1):
            if letters[at : at + size] in pieces:
                first, last = places[at], places[at + size - 1]
                hidden[first : last + 1] = b"\1" * (last + 1 - first)
    return re.sub("\0+", "…", "".join("\0" if h else c for h, c in zip(hidden, line, strict=True)))


@functools.lru_cache(maxsize=4)
def _pieces(key: str) -> frozenset[str]:
    """What a part of the key looks like in text, letters and digits alone."""
    raw = key.encode()
    spellings = [key, urllib.parse.quote(key, safe=""), html.escape(key), raw.hex()]
    for before in ("", ":", "Bearer ", "x", "xx"):  # base64 differs by what stands before, modulo 3
        spellings.append(base64.b64encode(before.encode() + raw).decode())
    if len(_letters(key)) < _PIECE:
        spellings = spellings[:1]  # too short to tell its other spellings from any text
    pieces = set()
    for letters in map(_letters, spellings):
        size = min(_PIECE, len(letters))
        pieces |= {letters[at : at + size] for at in range(len(letters) - size + 1)}
    return frozenset(pieces - {""})


def _letters(text: str) -> str:
    return "".join(c for c in text if c.isascii() and c.isalnum()).lower()
