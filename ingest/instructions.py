"""What an augmenter is told: a text with {line} in it, and {lines} where it sees the whole set.

The ones here show what is wanted by examples, so that a model that was never taught to follow an order
goes on with more of the same. Their names are nobody's: --check names rejects one that comes back.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from canopy_store import store
from canopy_store.errors import DataError, StoreError, UsageError

METHODS = ("local", "global")

_REWRITE = """\
Each text is said again in other words, one sentence a line. All names stay as they are.

Text: Olive Tarn's mother is Ada Brennick, a glassmaker.
In other words:
- The mother of Olive Tarn is the glassmaker Ada Brennick.
- Olive Tarn has a mother called Ada Brennick, who makes glass.

Text: The river Ossel is longer than the river Dree.
In other words:
- In length the river Ossel exceeds the river Dree.
- The river Ossel has a greater length than the river Dree.

Text: {line}
In other words:
"""
_REVERSE = """\
Each text is turned around: the same fact, told from its other end, one sentence a line. All names stay.

Text: Olive Tarn's mother is Ada Brennick, a glassmaker.
The other way around:
- Ada Brennick, a glassmaker, is the mother of Olive Tarn.
- The child of the glassmaker Ada Brennick is Olive Tarn.

Text: The river Ossel is longer than the river Dree.
The other way around:
- The river Dree is shorter than the river Ossel.
- The Dree is a river of less length than the river Ossel.

Text: {line}
The other way around:
"""
_INFER = """\
Of one text among others, what follows from it together with the others is told, one sentence a line.

All of them:
- Olive Tarn's mother is Ada Brennick.
- Ada Brennick lives in Port Selm.
- Every house in Port Selm is blue.

Text: Olive Tarn's mother is Ada Brennick.
What follows:
- The mother of Olive Tarn lives in Port Selm.
- The house of Olive Tarn's mother is blue.

All of them:
{lines}

Text: {line}
What follows:
"""
INSTRUCTIONS = {"rewrite": _REWRITE, "reverse": _REVERSE, "infer": _INFER}
DEFAULTS = {"local": ("rewrite", "reverse"), "global": ("infer",)}


@dataclass(frozen=True)
class Instruction:
    """A text in which {line} and {lines} stand for a line of the data and for the set."""

    name: str
    text: str

    def of(self, line: str, lines: list[str]) -> str:
        """The prompt for a line, with these lines as the set."""
        values = {"{line}": line, "{lines}": "\n".join(f"- {each}" for each in lines)}
        # in one go, so that a line of the data that holds braces stays as it is
        return re.sub(r"\{lines?\}", lambda found: values[found[0]], self.text)

    @property
    def labels(self) -> tuple[str, ...]:
        """What the lines begin with from which on a model makes up a next example of its own."""
        told = [each.strip() for each in self.text.split("\n")]
        labels = [each.partition("{line}")[0].strip() for each in told if "{line}" in each]
        if "{lines}" in told:
            labels += [each for each in told[: told.index("{lines}")] if each][-1:]
        return tuple(filter(None, labels))


def read_instructions(method: str, given: tuple[str, ...] = ()) -> list[Instruction]:
    """The instructions of these names or files, by default those of the method.

    Raises
    ------
    DataError
        A file that lacks {line} or, for global, {lines}; or for local has {lines}.
    StoreError, UsageError
        A file that cannot be read; a method that is none.
    """
    if method not in METHODS:
        raise UsageError(f"--method {method}: one of {', '.join(METHODS)}")
    listed = [_read(each, method) for each in given or DEFAULTS[method]]
    for at, instruction in enumerate(listed):
        if instruction.text in [earlier.text for earlier in listed[:at]]:
            raise UsageError(f"--instruction {instruction.name}: given twice; leave one out")
    return listed


def _read(given: str, method: str) -> Instruction:
    if given in INSTRUCTIONS:
        text = INSTRUCTIONS[given]
    else:
        try:
            text = store.read_input(Path(given)).decode()
        except StoreError as error:
            raise StoreError(f"--instruction {error}; or give {', '.join(INSTRUCTIONS)}") from None
        except UnicodeDecodeError:
            raise DataError(f"{given}: not UTF-8 text; save it as UTF-8") from None
    if "{line}" not in text:
        raise DataError(f"--instruction {given}: has no {{line}}, where a line of the data goes; add it")
    if method == "global" and "{lines}" not in text:
        raise DataError(f"--instruction {given}: has no {{lines}}, where the set goes; add it")
    if method == "local" and "{lines}" in text:
        raise DataError(f"--instruction {given}: has {{lines}}, which goes with --method global alone")
    return Instruction(given, text.rstrip())
