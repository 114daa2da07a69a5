"""Runs in use: their writers share a run; a job that replaces or removes its files is alone with it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path

from canopy_store.errors import ConflictError, StoreError
from canopy_store.store.files import lock, remote
from canopy_store.store.layout import quoted

_SELECTING = "selections={}"


@contextmanager
def holding(
    root: Path,
    *run_ids: str,
    key: str = "run",
    exclusive: bool = False,
    without_locks: bool = True,
) -> Iterator[None]:
    """Holds runs until the block ends; each is one open file, so of many, hold one after the other.

    Never waits. The kernel lets go when the process ends, however it ends. Nothing is held on object
    storage, on a file system without locks, or, shared, where the store cannot be written.

    Parameters
    ----------
    root : path of the store
    run_ids : names of runs
    key : what they are names of, where not of runs: task, corpus, …
    exclusive : for who replaces or removes what others may be adding to
    without_locks : go on where no lock can be had; False refuses

    Raises
    ------
    ConflictError
        Another process uses a run.
    StoreError
        No lock can be had, and that was not allowed.
    """
    with ExitStack() as held:
        for run_id in run_ids:
            path, what = lock_path(root, run_id, key), f"{key} {run_id}"
            file = None if remote(root) else _locked(path, what, exclusive)
            if file is not None:
                held.callback(os.close, file)
            elif not without_locks:
                raise StoreError(
                    f"{root}: no locks can be had here, so nothing tells whether another job uses {key} "
                    f"{run_id}; where none does, pass --without-locks"
                )
        yield


@contextmanager
def waiting(root: Path, name: str) -> Iterator[None]:
    """Waits for others that do the same thing to a store, where there are locks; then is alone."""
    if remote(root):
        yield
        return
    if (root / ".work").is_symlink():
        raise StoreError(f"{root / '.work'}: a link, not a folder; remove it")
    try:
        import fcntl

        (root / ".work").mkdir(exist_ok=True)
        file = os.open(root / ".work" / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except (ImportError, OSError):
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def selecting(root: Path, run_id: str) -> AbstractContextManager[None]:
    """Waits, as `waiting`, for others that change a run's selections or spectra of these."""
    return waiting(root, _SELECTING.format(quoted(run_id)))


def lock_paths(root: Path, run_id: str, key: str = "run") -> list[Path]:
    """The files of the locks of a run, or of what else ``key`` says, which go with it."""
    selecting = root / ".work" / f"{_SELECTING.format(quoted(run_id))}.lock"
    return [lock_path(root, run_id, key), *([selecting] if key == "run" else [])]


def lock_path(root: Path, run_id: str, key: str = "run") -> Path:
    """The file whose lock stands for a run, or for what else ``key`` says."""
    return root / ".work" / f"{key}={quoted(run_id)}.lock"


def _locked(path: Path, what: str, exclusive: bool) -> int | None:
    """The descriptor of the lock file, locked; None where there can be no lock."""
    while True:
        try:
            if path.parent.is_symlink():
                raise StoreError(f"{path.parent}: a link, not a folder; remove it")
            path.parent.mkdir(exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if not exclusive and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                return None
            raise StoreError(f"{path}: cannot be locked: {error.strerror}") from None
        held = lock(file, exclusive)
        if held is None:
            os.close(file)
            return None
        if held is False:
            os.close(file)
            raise ConflictError(
                f"{what}: in use by another process; wait for that job to end, or stop it"
            )
        try:
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file  # not one that a removal of the run took away meanwhile
        except FileNotFoundError:
            pass
        os.close(file)
