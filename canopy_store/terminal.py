"""Text as a terminal may show it: generated text and servers' words can hold codes that steer one."""

from __future__ import annotations

import re

# Control characters but tab and newline, what turns the direction of writing, other line ends, and
# halves of characters, as in file names that are not UTF-8.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""The text with every character that steers a terminal written as JSON would write it: \u001b."""
    return _STEERING.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
