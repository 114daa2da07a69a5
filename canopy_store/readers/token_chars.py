"""Where in its text each token of a rollout stands: the characters that are whole with it.

Tokens are bytes, and a text is what all of them decode to; so a character that several tokens spell is
the last one's. Nothing is guessed: where the bytes of the tokens do not decode to the text, no token
has a place in it.
"""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

_FREE = (n for n in range(256, 512))
# Byte-level vocabularies spell a byte as a character that can be seen (Radford et al. 2019).
_BYTES = {
    chr(byte if byte in chain(range(33, 127), range(161, 173), range(174, 256)) else next(_FREE)): byte
    for byte in range(256)
}


def chars_of_bytes(raw: Sequence[bytes], text: str) -> list[int] | None:
    """Per token, the characters of ``text`` that its bytes complete; None where these are not the text.

    Bytes that are no UTF-8 are the U+FFFD that stands for them, once nothing after can mend them.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    parts = [decoder.decode(token) for token in raw]
    cut = decoder.decode(b"", final=True)  # a character that was begun and never ended
    if cut:
        last = max(step for step, token in enumerate(raw) if token)
        parts[last] += cut
    return [len(part) for part in parts] if "".join(parts) == text else None


def token_chars(tokenizer: Any, token_ids: Sequence[int], text: str) -> list[int] | None:
    """Per token, the characters of ``text``, which the ids were decoded to, that it completes.

    Special tokens complete none. None where the tokenizer spells its tokens in a way that is not known.
    """
    for spell in (_byte_level, _sentence_piece):
        table = _spelled(tokenizer, spell)
        raw = [table.get(number) for number in token_ids]
        known = [token for token in raw if token is not None]
        if len(known) < len(raw):
            return None
        chars = chars_of_bytes(known, text)
        if chars is None and (chars := chars_of_bytes(known, f" {text}")) is not None:
            # the space that a sentence begins with is left out of its text
            chars[next(step for step, count in enumerate(chars) if count)] -= 1
        if chars is not None:
            return chars
    return None


@functools.lru_cache(maxsize=4)
def _spelled(tokenizer: Any, spell: Callable[[str], bytes]) -> dict[int, bytes]:
    """The bytes that each token puts into a text, by its id."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*getattr(tokenizer, "all_special_ids", ()), *(n for n in added if added[n].special)}
    table = {number: spell(token) for token, number in tokenizer.get_vocab().items()}
    table |= {number: token.content.encode() for number, token in added.items()}
    return table | dict.fromkeys(special, b"")


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token.encode(errors="replace")


def _sentence_piece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            pass
    return token.replace("\u2581", " ").encode(errors="replace")
