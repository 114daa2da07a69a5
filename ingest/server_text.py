"""A server's words and a connection's errors made fit to be shown: short, plain, nothing of the key."""

from __future__ import annotations

import base64
import functools
import html
import re
import unicodedata
import urllib.parse
from collections.abc import Iterator

_PIECE = 4  # letters and digits in a row that are taken for a part of the key
# colours, titles and the like: an escape with what belongs to it
_ESCAPES = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b.")

_HEX = "[0-9a-fA-F]"
# a character as JSON, Python, HTML or a URL may spell it; each group's base
_SPELT = re.compile(
    rf"\\u({_HEX}{{4}})|\\[ux]\{{({_HEX}{{1,6}})\}}|\\U({_HEX}{{8}})|\\x({_HEX}{{2}})|%({_HEX}{{2}})"
    rf"|&#[xX]({_HEX}{{1,8}});?|&#([0-9]{{1,9}});?|\\([0-7]{{3}})|."
)
_BASES = (16, 16, 16, 16, 16, 16, 10, 8)
_BYTE = re.compile(rf"\b(?:0x({_HEX}{{2}})|([0-9]{{2,3}}))\b")

Reading = list[tuple[str, int, int]]  # a character, and from where to where it is spelt


def shown(text: str, key: str = "", longest: int = 300) -> str:
    """The text on one line of at most ``longest`` characters, free of control codes and of the key.

    Four letters and digits in a row that the key has too become '…', in either case, whatever stands
    between them, and in the key's other spellings: backwards, percent-encoded, base64, base32,
    hexadecimal, HTML, escaped as in JSON or Python, as numbers of bytes, in wide letters.
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
    pieces = _pieces(key)
    hidden = bytearray(len(line))
    for reading in _readings(line):
        spelt = [each for each in reading if _letters(each[0])]
        letters = _letters("".join(character for character, _, _ in spelt))
        for size in {len(piece) for piece in pieces}:
            for at in range(len(letters) - size + 1):
                if letters[at : at + size] in pieces:
                    first, end = spelt[at][1], spelt[at + size - 1][2]
                    hidden[first:end] = b"\1" * (end - first)
    return re.sub("\0+", "…", "".join("\0" if h else c for h, c in zip(hidden, line, strict=True)))


def _readings(line: str) -> Iterator[Reading]:
    """The line as it stands, with what is escaped in it decoded, and as the bytes that it lists."""
    yield [(character, at, at + 1) for at, character in enumerate(line)]
    decoded: Reading = []
    for match in _SPELT.finditer(line):
        group = match.lastindex
        number = int(match[group], _BASES[group - 1]) if group else ord(match[0])
        if number < 0x110000:
            plain = unicodedata.normalize("NFKC", chr(number))  # letters that are merely wider
            decoded += [(character, *match.span()) for character in plain]
    yield decoded
    numbers = ((int(m[1], 16) if m[1] else int(m[2]), m) for m in _BYTE.finditer(line))
    yield [(chr(number), *match.span()) for number, match in numbers]


@functools.lru_cache(maxsize=4)
def _pieces(key: str) -> frozenset[str]:
    """What a part of the key looks like in text, letters and digits alone."""
    raw = key.encode()
    spellings = [key, key[::-1], urllib.parse.quote(key, safe=""), html.escape(key), raw.hex()]
    for before in ("", ":", "Bearer ", "x", "xx"):  # base64 differs by what stands before, modulo 3
        spellings.append(base64.b64encode(before.encode() + raw).decode())
    spellings += [base64.b32encode(b"x" * before + raw).decode() for before in range(5)]  # modulo 5
    if len(_letters(key)) < _PIECE:
        spellings = spellings[:1]  # too short to tell its other spellings from any text
    pieces = set()
    for letters in map(_letters, spellings):
        size = min(_PIECE, len(letters))
        pieces |= {letters[at : at + size] for at in range(len(letters) - size + 1)}
    return frozenset(pieces - {""})


def _letters(text: str) -> str:
    return "".join(c for c in text if c.isascii() and c.isalnum()).lower()
