"""What a long job tells as it goes."""

from __future__ import annotations


class Progress:
    """This one says nothing. The command line shows a bar."""

    def start(self, rollouts: int, done: int) -> None:
        """``rollouts`` in all, of which ``done`` are stored already."""

    def tokens(self, count: int) -> None:
        """``count`` tokens more were sampled."""

    def rollouts(self, count: int) -> None:
        """``count`` rollouts more were stored."""

    def say(self, line: str) -> None:
        """A line the user should see."""
