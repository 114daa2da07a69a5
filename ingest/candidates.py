"""What an augmenter answered, in candidate lines; and why one of them is not kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

CHECKS = ("names", "answer")
# Why a candidate is rejected, the first that holds.
REASONS = ("unlisted", "cut", "empty", "unrelated", "duplicate", *CHECKS)

_BULLET = re.compile(r"(?:[-*•–]|\d{1,3}[.)])\s+")
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_POSSESSIVE = re.compile(r"['’]s$")
_BEFORE = " \t\"'“”‘’«»([*_-–—"  # between the end of a sentence and the first word of the next
_ENDS = ".!?:;…。"


@dataclass(frozen=True)
class Entry:
    """A line of the data: its number, its text, the answers that must follow from it, and its record."""

    line: int
    text: str
    answers: tuple[str, ...] = ()
    record: dict[str, object] = field(default_factory=dict)


def split(reply: str, labels: Sequence[str], cut: bool) -> list[tuple[str, str | None]]:
    """Each candidate of a reply, and ``unlisted`` or ``cut`` where it is none that can be kept.

    A candidate is a line, without the bullet or number before it. Where any line has one, what has none
    is talk around the list. At a line that begins with a label begins a next example, which is not read.

    Parameters
    ----------
    labels : what a line of the next example begins with
    cut : whether the reply stopped at the length limit, so that its last line may be half of one
    """
    lines = [line.strip() for line in reply.split("\n")]
    ends = next((at for at, line in enumerate(lines) if labels and line.startswith(tuple(labels))), None)
    half = len(lines) - 1 if cut and ends is None and lines[-1] else None
    listing = any(_BULLET.match(line) for line in lines[:ends])
    found: list[tuple[str, str | None]] = []
    for at, line in enumerate(lines[:ends]):
        bullet = _BULLET.match(line)
        if line:
            unlisted = "unlisted" if listing and not bullet else None
            found.append((line[bullet.end() if bullet else 0 :], "cut" if at == half else unlisted))
    return found or [("", None)]


def words(text: str) -> list[str]:
    """The words of a text, in lower case and without 's; of a script without cases, its characters."""
    found: list[str] = []
    for match in _WORD.findall(text):
        word = _POSSESSIVE.sub("", match)
        # Chinese or Thai put no space between words
        found += word if word.isalpha() and word.lower() == word.upper() else [word.casefold()]
    return found


def _cased(text: str) -> Iterable[tuple[str, bool]]:
    """Each word as it stands, without 's, and whether a sentence begins with it."""
    for match in _WORD.finditer(text):
        before = text[: match.start()].rstrip(_BEFORE)
        yield _POSSESSIVE.sub("", match[0]), not before or before[-1] in _ENDS


class Judge:
    """Keeps or rejects candidates, one after another: each is compared with those kept before it.

    Parameters
    ----------
    entries : the lines of the data
    whole : whether names and words may come from any of them, or from the candidate's own line alone
    checks : of CHECKS, those asked for
    replies : all of them: a word in lower case anywhere is no name where a sentence begins with it
    function_words : tells which of these words are function words
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        whole: bool,
        checks: Sequence[str],
        replies: Sequence[str],
        function_words: Callable[[Iterable[str]], set[str]],
    ) -> None:
        self.whole, self.checks = whole, checks
        self.taken = {_key(each.text): f"line {each.line} of the data" for each in reversed(entries)}
        texts = [*replies, *(each.text for each in entries)]
        self.function_words = function_words({word for text in texts for word in words(text)})
        plain = {word for text in texts for word, _ in _cased(text) if word[0].islower()}
        self.ordinary = self.function_words | {word.casefold() for word in plain}
        self.of_set = {word for each in entries for word in words(each.text)}

    def problem(self, text: str, entry: Entry, place: str) -> tuple[str, str] | None:
        """The reason and its detail where a candidate is rejected; else it is kept, at ``place``."""
        content = set(words(text)) - self.function_words
        own = set(words(entry.text))
        source = own | self.of_set if self.whole else own
        if not words(text):
            return "empty", "holds no word"
        if not content & source:
            return "unrelated", f"shares no word with {'the set' if self.whole else 'its line'}"
        if _key(text) in self.taken:
            return "duplicate", f"says the same as {self.taken[_key(text)]}"
        for check, detail_of in (("names", self._names), ("answer", self._answer)):
            detail = detail_of(text, entry, source) if check in self.checks else None
            if detail:
                return check, detail
        self.taken[_key(text)] = place
        return None

    def _names(self, text: str, entry: Entry, source: set[str]) -> str | None:
        mentioned = self.names(text)
        foreign = [name for name in mentioned if name.casefold() not in source]
        if foreign:
            where = "the set" if self.whole else "its line"
            return f"{foreign[0]} is no name of {where}"
        named = {name.casefold() for name in self.names(entry.text)}
        if named and not named & set(words(text)):
            return "has none of the names of its line"
        return None

    def _answer(self, text: str, entry: Entry, source: set[str]) -> str | None:
        said = f" {_key(text)} "
        for answer in entry.answers:
            if f" {_key(answer)} " not in said:
                return f"{answer.strip()} does not follow from it"
        return None

    def names(self, text: str) -> list[str]:
        """The capitalised words of a text, but for ordinary ones that begin a sentence."""
        return [
            word
            for word, begins in _cased(text)
            if word[0].isupper() and not (begins and word.casefold() in self.ordinary)
        ]


def _key(text: str) -> str:
    """What is the same in two texts that differ by case, spaces or punctuation alone."""
    return " ".join(words(text)) or text.strip().casefold()
