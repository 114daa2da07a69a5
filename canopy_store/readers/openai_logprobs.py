"""The log-probabilities that answers of OpenAI's API carry: its two forms, and what its servers add.

A chat completion, and llama.cpp, has a list of objects, a token each; a text completion has lists side
by side. A token is named by its text, by its text's bytes too, or by its number: as ``token_id:N``
(vLLM) or as ``id`` (llama.cpp).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from canopy_store.errors import DataError
from canopy_store.readers import get

UNKNOWN = -9999.0  # at or below it a number is the API's word for 'no log-probability'
_ROUNDING = 1e-3  # nats by which a log-probability may be above 0
_LOST = "\ufffd".encode()  # part of a character, which the engine's text has lost
_NO_IDS = "the ids of its tokens are not known, or not of all; --tokenizer may tell them"


Table = dict[bytes | str, int]  # ids by the bytes of a token's text, and by its piece of the vocabulary


@dataclass(frozen=True)
class LoggedToken:
    """A token as an answer logs it.

    Parameters
    ----------
    number : its id, where the log has it
    raw : the bytes of its text
    value : its log-probability as it is logged, nats; None where it is null
    tops : the likeliest tokens of its step
    piece : its text, where that is how the vocabulary spells it
    """

    number: int | None
    raw: bytes
    value: float | None
    tops: tuple[LoggedToken, ...] = ()
    piece: str | None = None

    @property
    def logprob(self) -> float | None:
        """Log-probability, nats; None where the log does not know it."""
        return None if self.value is None or self.value <= UNKNOWN else min(self.value, 0.0)

    def token_id(self, table: Table | None) -> int | None:
        """Its id, from the log or by its text from a `token_table`; None where neither tells it."""
        if self.number is not None or table is None or _LOST in self.raw:
            return self.number
        by_piece = table.get(self.piece) if self.piece is not None else None
        return table.get(self.raw) if by_piece is None else by_piece


def logged_tokens(choice: dict[str, Any], where: str) -> list[LoggedToken]:
    """The tokens that a choice of an answer logs, of either form; none where it logs nothing.

    Raises
    ------
    DataError
        Lists of unlike length, or an entry that is none.
    """
    entries = get(choice, "logprobs.content", list, where, None)
    if entries is not None:
        return listed_tokens(entries, where)
    tokens = get(choice, "logprobs.tokens", list, where, None)
    values = get(choice, "logprobs.token_logprobs", list, where, None)
    if tokens is None or values is None:
        return []
    tops = get(choice, "logprobs.top_logprobs", list, where, None) or [None] * len(tokens)
    if not len(tokens) == len(values) == len(tops):
        raise DataError(f"{where}: logprobs.tokens, token_logprobs and top_logprobs differ in length")
    entries = [
        {
            "token": token,
            "logprob": value,
            "top_logprobs": [{"token": t, "logprob": v} for t, v in top.items()]
            if isinstance(top, dict)
            else None,
        }
        for token, value, top in zip(tokens, values, tops, strict=True)
    ]
    return listed_tokens(entries, where)


def listed_tokens(entries: Sequence[Any], where: str) -> list[LoggedToken]:
    """The tokens of a list of objects: each with token and logprob, some with bytes and top_logprobs.

    ``bytes`` above 255 are code points of pieces of the vocabulary, 'Ġ' for a space: then all are.
    """
    steps = []
    for step, entry in enumerate(entries, 1):
        at = f"{where}: token {step}"
        steps.append((at, entry, get(entry, "top_logprobs", list, at, [])))
    pieces = any(_beyond_bytes(each) for _, entry, tops in steps for each in (entry, *tops))
    return [
        _token(entry, at, pieces, tuple(_token(top, at, pieces) for top in tops))
        for at, entry, tops in steps
    ]


def _beyond_bytes(entry: Any) -> bool:
    given = entry.get("bytes") if isinstance(entry, dict) else None
    return isinstance(given, list) and any(type(b) is int and b > 255 for b in given)


def _token(entry: Any, where: str, pieces: bool, tops: tuple[LoggedToken, ...] = ()) -> LoggedToken:
    text = get(entry, "token", str, where)
    number = get(entry, "id", int, where, None)
    digits = text.removeprefix("token_id:")
    if number is None and digits != text and digits.isdecimal() and len(digits) < 10:
        number = int(digits)
    value = get(entry, "logprob", (int, float), where, None)
    try:
        value = None if value is None else float(value)
    except OverflowError:
        value = float("inf")
    if value is not None and not value <= _ROUNDING:
        raise DataError(f"{where}: logprob {value:.4g} is no log-probability")
    piece = text if pieces else None
    return LoggedToken(number, _raw(text, entry.get("bytes")), value, tops, piece)


def _raw(text: str, given: Any) -> bytes:
    """The bytes of a token's text: those given with it, where they are bytes and not its characters."""
    of_bytes = isinstance(given, list) and all(type(b) is int and 0 <= b < 256 for b in given)
    if of_bytes and given != [ord(character) for character in text]:
        return bytes(given)
    return text.encode(errors="replace")


def log_columns(tokens: Sequence[LoggedToken], where: str, table: Table | None) -> dict[str, Any]:
    """logprob, token_ids, top_logprobs and top_token_ids of logged tokens, as a reader's row has them.

    Ids are None where neither the source nor ``table`` has them. The tops go with them: a
    log-probability of an unknown token says nothing.

    Raises
    ------
    DataError
        A token whose log-probability is not known, or that the table does not have.
    """
    values, ids, top_ids, top_values = [], [], [], []
    for step, token in enumerate(tokens, 1):
        at = f"{where}: token {step}"
        if token.value is None:
            raise DataError(f"{at}: logprob needs a number")
        if token.logprob is None:
            raise DataError(
                f"{at}: logprob {token.value:.0f} says that it is not known; remove the answer"
            )
        values.append(token.logprob)
        ids.append(token.token_id(table))
        if table is not None and ids[-1] is None:
            text = token.raw.decode(errors="replace")[:80]
            raise DataError(
                f"{at}: {text!r} is not one token of the tokenizer alone; log "
                "ids (vLLM: return_token_ids), or import without --tokenizer"
            )
        tops = sorted(
            ((top.logprob, top.token_id(table)) for top in token.tops if top.logprob is not None),
            key=lambda top: -top[0],
        )
        top_ids.append([number for _, number in tops])
        top_values.append([value for value, _ in tops])
    check_ids([i for i in ids if i is not None], where)
    check_ids([i for row in top_ids for i in row if i is not None], f"{where}: top_logprobs")
    whole = any(top_ids) and all(None not in row for row in top_ids)
    lost = any(top_ids) and not whole
    return {
        "logprob": values,
        "left_out": {"top_logprobs": _NO_IDS} if lost else {},
        "raw_logprobs": True,
        "token_ids": None if None in ids else ids,
        "top_token_ids": top_ids if whole else None,
        "top_logprobs": top_values if whole else None,
    }


def check_ids(ids: Sequence[Any], where: str, vocabulary: int = 2**31) -> None:
    """Refuses what is no token id of a vocabulary of this many tokens.

    Raises
    ------
    DataError
        Names the first.
    """
    for step, number in enumerate(ids, 1):
        if type(number) is not int or not 0 <= number < vocabulary:
            what = f"id {number}"[:24] if type(number) is int else "an id that is no whole number"
            raise DataError(
                f"{where}: token {step} has {what}, and token ids go from 0 to {vocabulary - 1}"
            )


def token_table(tokenizer: Any) -> Table | None:
    """Each token's id by its piece, and by its text's bytes where no other token shares them."""
    if tokenizer is None:
        return None
    pieces: dict[str, int] = tokenizer.get_vocab()
    table: dict[bytes, int] = {}
    shared: set[bytes] = set()
    for token, number in pieces.items():
        raw = tokenizer.convert_tokens_to_string([token]).encode(errors="replace")
        shared.update({raw} & table.keys())
        table[raw] = number
    return {**pieces, **{raw: number for raw, number in table.items() if raw not in shared}}
