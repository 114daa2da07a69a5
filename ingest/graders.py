"""Graders: what finds the answer in a rollout's text, and tells whether it is the reference.

Each is a function of text and reference. None runs what a model has written: answers are compared as
text, as numbers, or as the expressions that a grammar reads in them; a function of one's own does what
it does.
"""

from __future__ import annotations

import importlib
import inspect
import math
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

from canopy_store import store
from canopy_store.errors import DataError, UsageError

GRADERS = ("exact", "regex", "choice", "number", "math", "python")


class Grade(NamedTuple):
    """What a grader says of a rollout; ``answer`` None where none was found or the grader names none."""

    answer: str | None
    correct: bool
    score: float


Grader = Callable[[str, str], Grade]  # of a rollout's text and its prompt's reference


def grader_of(method: str, pattern: str | None = None, function: str | None = None) -> Grader:
    """The grader of a name in GRADERS.

    exact, the whole text is the answer; regex, the last match of ``pattern``; choice, the letter that is
    stated last; number, the last number; math, the expression that math-verify finds; python, what
    ``function``, named module:name, says.

    Raises
    ------
    UsageError
        An unknown name, a pattern or function that is missing, superfluous or none, math-verify that is
        not installed. The grader raises DataError of a reference that it cannot read.
    """
    for option, value, of in (("--pattern", pattern, "regex"), ("--function", function, "python")):
        if value is not None and method != of:
            raise UsageError(f"{option}: only with --grader {of}")
    if method == "exact":
        return lambda text, reference: _same_text(text.strip(), reference)
    if method == "regex":
        return _regex(pattern)
    if method == "choice":
        return _choice
    if method == "number":
        return _number
    if method == "math":
        return _math()
    if method == "python":
        return _python(function)
    raise UsageError(f"--grader {method}: one of {', '.join(GRADERS)}")


def _told(answer: str | None, correct: bool) -> Grade:
    return Grade(answer, correct, float(correct))


def _same_text(answer: str | None, reference: str) -> Grade:
    return _told(answer, answer is not None and answer.strip() == reference.strip())


def _regex(pattern: str | None) -> Grader:
    if pattern is None:
        raise UsageError(r"--grader regex needs --pattern, as in --pattern '#### (-?\d+)'")
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"--pattern {pattern}: not a regular expression: {error}") from None

    def grade(text: str, reference: str) -> Grade:
        matches = list(compiled.finditer(text))
        return _same_text(matches[-1][1 if compiled.groups else 0] if matches else None, reference)

    return grade


# ---------------------------------------------------------------- a choice letter

# Runs of spaces are bounded: a text of nothing else must not take for ever.
_SAID = r"[A-Z]|[a-z](?=\s?(?:[).,;:*}\]]|$))"
_STATED = re.compile(
    r"\\boxed\s?\{\s?(?:\\(?:text|mathrm|textbf)\s?\{)?\s?\(?(?P<boxed>[A-Za-z])\)?\s?\}"
    rf"|(?<!\w)(?i:answer|choice|option)(?=[\s:=*_])(?i:\s{{1,3}}is)?\s{{0,3}}[:=]?[\s*_(\[]{{0,8}}"
    rf"(?P<said>{_SAID})(?![\w'’])"
    r"|\*\*\s?\(?(?P<bold>[A-Z])\)?[.:]?\s?\*\*"
    r"|^[ \t*_(\[]*(?P<alone>[A-Z])[ \t*_)\].:]*$",
    re.MULTILINE,
)
_NAMED = re.compile(r"(?<!\w)\((?P<a>[A-Za-z])\)|^[ \t]*(?P<b>[A-Z])[).:](?=\s|$)", re.MULTILINE)


def choice_letter(text: str) -> str | None:
    """The choice that a text states last, as a capital letter; None where none is clearly stated.

    Stated is a letter in a box, after 'answer', 'choice' or 'option' (is, :), in bold, or alone in a
    line. Where none is, a letter in parentheses or before the text of an option counts, if the text has
    only one.
    """
    stated = [match[match.lastgroup or 0] for match in _STATED.finditer(text)]
    if stated:
        return stated[-1].upper()
    named = {match[match.lastgroup or 0].upper() for match in _NAMED.finditer(text)}
    return named.pop() if len(named) == 1 else None


def _choice(text: str, reference: str) -> Grade:
    wanted = re.fullmatch(r"\s*\(?([A-Za-z])\)?[.:]?\s*", reference)
    if wanted is None:
        raise DataError(f"its reference {reference[:40]!r} is no choice letter")
    answer = choice_letter(text)
    return _told(answer, answer == wanted[1].upper())


# ---------------------------------------------------------------- a number

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>(?<![\w)\]])[-+])?[$€£]?(?P<top>{_DIGITS})"
    rf"(?:[eE](?P<power>[-+]?\d{{1,3}})(?!\w)|/(?P<below>\d+(?:\.\d+)?)(?![\d/]))?(?P<percent>\s?%)?"
)
_LATEX = ((r"{,}", ","), (r"\,", ""), (r"\!", ""), (r"\%", "%"), (r"\$", "$"), ("−", "-"))


class Number(NamedTuple):
    """A number as it stands in a text: ``text`` without commas and closing zeros, and its value."""

    text: str
    value: Fraction
    percent: bool


def last_number(text: str) -> Number | None:
    """The last number of a text; None where there is none.

    Commas between thousands, a currency before it and a unit behind it do not count; 3/4 is one number,
    as 1.5e3 is. A hyphen after a word, a digit or a bracket is no sign.
    """
    for written, plain in _LATEX:
        text = text.replace(written, plain)
    matches = list(_NUMBER.finditer(text))
    if not matches:
        return None
    sign, top, power, below, percent = matches[-1].group("sign", "top", "power", "below", "percent")
    top = top.replace(",", "")
    if "." in top:
        top = top.rstrip("0").rstrip(".")
    top = ("0" + top if top[:1] in ("", ".") else top).lstrip("0") or "0"
    top = "0" + top if top.startswith(".") else top
    value = Fraction(Decimal(top))  # a decimal has no limit to its digits, as int() has
    behind = ""
    if power is not None:
        value, behind = value * Fraction(10) ** int(power), f"e{int(power)}"
    if below is not None and (divisor := Fraction(Decimal(below))):
        value, behind = value / divisor, f"/{below}"
    minus = "-" if sign == "-" and value else ""
    return Number(
        f"{minus}{top}{behind}{'%' * (percent is not None)}",
        -value if minus else value,
        percent is not None,
    )


def same_number(answer: Number, reference: Number) -> bool:
    """Whether two numbers are equal; where one has a percent sign, also as that many hundredths."""
    if answer.value == reference.value:
        return True
    if answer.percent == reference.percent:
        return False
    share, plain = (answer, reference) if answer.percent else (reference, answer)
    return share.value / 100 == plain.value


def _number(text: str, reference: str) -> Grade:
    wanted = last_number(reference)
    if wanted is None:
        raise DataError(f"its reference {reference[:40]!r} has no number")
    answer = last_number(text)
    return _told(answer and answer.text, answer is not None and same_number(answer, wanted))


# ---------------------------------------------------------------- mathematics


def _math() -> Grader:
    """By math-verify: LaTeX is read by a grammar, plain text as digits and operators alone."""
    try:
        from math_verify import parse, verify
    except ImportError:
        raise UsageError(
            "--grader math needs math-verify: install it with: pip install math-verify"
        ) from None

    def grade(text: str, reference: str) -> Grade:
        # a reference is often bare, as \frac{1}{2}, which is read where it stands between dollars
        wanted = parse(reference) if "$" in reference or "\\boxed" in reference else None
        wanted = wanted or parse(f"${reference}$") or parse(reference)
        if not wanted:
            raise DataError(f"its reference {reference[:40]!r} is no mathematics that math-verify reads")
        found = parse(text)
        if not found:
            return _told(None, False)
        # the text that was found stands last, after what it was read as
        return _told(str(found[-1]), bool(verify(wanted, found)))

    return grade


# ---------------------------------------------------------------- a function of one's own


def _python(named: str | None) -> Grader:
    if named is None:
        raise UsageError(
            "--grader python needs --function module:name, as in --function my_graders:close"
        )
    function = _function(named)

    def grade(text: str, reference: str) -> Grade:
        try:
            said = function(text, reference)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{named} raised {type(error).__name__}: {reason}") from error
        answer, score = said if isinstance(said, tuple) and len(said) == 2 else (None, said)
        value = _share(score)
        if value is None or not isinstance(answer, str | None):
            raise DataError(
                f"{named} returned {repr(said)[:80]}; it needs True or False, a score from 0 to 1, or "
                "(answer, score) with the answer as text or None"
            )
        return Grade(answer, value == 1, value)

    return grade


def _share(score: Any) -> float | None:
    """The score as a number from 0 to 1; None of what is none."""
    try:
        value = math.nan if isinstance(score, str | bytes) else float(score)
    except (TypeError, ValueError):
        return None
    return value if 0 <= value <= 1 else None


def _module(named: str) -> tuple[Any, str]:
    module, colon, name = named.partition(":")
    if not (colon and module and name):
        raise UsageError(f"--function {named}: needs module:name, as in my_graders:close")
    if "" not in sys.path and "." not in sys.path:
        sys.path.append("")  # the working folder, after all that is installed
    try:
        return importlib.import_module(module), name
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"--function {named}: {module} cannot be imported: {reason}") from error


def _function(named: str) -> Callable[[str, str], Any]:
    module, name = _module(named)
    function = getattr(module, name, None)
    if not callable(function):
        raise UsageError(f"--function {named}: {module.__name__} has no function {name}")
    return function


def source_hash(named: str) -> str | None:
    """A hash of the file that a function stands in: another text of it is another grader."""
    module, _ = _module(named)
    try:
        return store.content_id({"source": inspect.getsource(module)})
    except (OSError, TypeError):
        return None
