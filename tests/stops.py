"""Calls that end in the middle, as if the power had gone, or wait there while another one runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

DRIVER = """
import importlib, json, os, sys
name, roots, more = json.loads(sys.argv[1])
module = importlib.import_module(name.rpartition(".")[0])
call = getattr(module, name.rpartition(".")[2])
if hasattr(module, "_GRACE"):
    module._GRACE = 0.0
changes = 0
def counted(real, last):
    def change(*args, **more):
        global changes
        changes += 1
        if changes == last:
            os._exit(9)
        return real(*args, **more)
    return change
def run(root, last):
    pid = os.fork()
    if pid == 0:
        for each in ("fsync", "replace", "unlink", "mkdir", "rmdir"):
            setattr(os, each, counted(getattr(os, each), last))
        try:
            call(root, **more)
            print(changes, flush=True)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
for line in sys.stdin:
    root, last = json.loads(line)
    print(run(root, last), flush=True)
"""


def stopped(function: str, spare: Path, roots: list[Path], **more: object) -> None:
    """Calls ``function(root, **more)`` and ends it before some change to the disk, later for each root.

    They are spread evenly over all that the same call makes on ``spare``, which it finishes. A change is
    a flush (so that half-written files are left), a rename, or a file or folder made or removed.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, json.dumps([function, [], more])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def ask(root: Path, last: int | None) -> list[str]:
        print(json.dumps([str(root), last]), file=process.stdin, flush=True)
        lines = [process.stdout.readline().strip()]
        return lines if lines[0] in ("9", "1") else [*lines, process.stdout.readline().strip()]

    changes, code = ask(spare, None)
    assert code == "0", code
    for at, root in enumerate(roots):
        # the first is ended before anything was done, the last before the last change
        last = 1 + round(at / max(len(roots) - 1, 1) * (int(changes) - 1))
        assert ask(root, last) == ["9"], (root, last)
    process.communicate()


def interleaved(
    fresh: Callable[[], Path], call: Callable[[Path], object], other: Callable[[Path], object]
) -> list[Path]:
    """Roots on each of which ``call`` waited before another of its renames or removals of a file.

    Meanwhile ``other`` runs to its end, or until it waits for a lock in turn: then both go on, side by
    side. The last root is one on which nothing waited. Neither may raise.
    """
    roots = [fresh()]
    while _waited(call, other, roots[-1], len(roots)):
        roots.append(fresh())
    return roots


def _waited(
    call: Callable[[Path], object], other: Callable[[Path], object], root: Path, before: int
) -> bool:
    """Whether the call came to its change of this number, and waited there for the other one."""
    caller, errors, changes = threading.current_thread(), [], 0

    def beside() -> None:
        try:
            other(root)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=beside)

    def waiting(real: Callable[..., object]) -> Callable[..., object]:
        def change(*args: object, **more: object) -> object:
            nonlocal changes
            changes += threading.current_thread() is caller
            if changes == before and not thread.ident:
                thread.start()
                thread.join(2)
            return real(*args, **more)

        return change

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "unlink"):
            patch.setattr(os, name, waiting(getattr(os, name)))
        call(root)
        if thread.ident:
            thread.join()
    assert not errors, (root, errors)
    return thread.ident is not None
