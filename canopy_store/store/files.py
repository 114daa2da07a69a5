"""Files of a store, on this machine or on object storage: read with care, written whole or not at all.

A file is written under a temporary name in its own folder, flushed to disk, then renamed: readers never
see half a file. While it is written, its writer holds a lock on it that the kernel drops when the
process ends, however it ends; so whoever can take the lock knows that the writer is dead. On object
storage (s3://BUCKET/PREFIX) a file is put in one piece instead.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import importlib
import io
import json
import logging
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from canopy_store.errors import CanopyError, DataError, StoreError, UsageError

# Object stores whose put is atomic, and the package that reaches each. Tested: s3.
_OBJECT_STORES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}


TAIL = 1 << 15  # bytes: holds the footer of most files


BLOCK = 1 << 18  # bytes a request reads ahead


def locate(root: str | Path) -> Path:
    """``root`` as a path: of this machine, or for ``s3://BUCKET/PREFIX`` a UPath, which acts like one.

    Credentials and endpoint come from where the object store's own client looks for them
    (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ~/.aws).

    Raises
    ------
    UsageError
        Not an object store known, no bucket, or its package is not installed.
    """
    scheme, url, key = str(root).partition("://")
    if not url:
        return Path(root)
    if scheme not in _OBJECT_STORES:
        known = ", ".join(f"{name}://" for name in _OBJECT_STORES)
        raise UsageError(f"{root}: a store is a folder, or on object storage: {known}")
    if not key.strip("/") or {"", ".", ".."} & set(key.rstrip("/").split("/")) or set(key) & set("?#"):
        raise UsageError(f"{root}: needs {scheme}://BUCKET/PREFIX, without .., ?, # or empty parts")
    client = _OBJECT_STORES[scheme]
    try:
        from upath import UPath

        importlib.import_module(client)
    except ImportError:
        more = "" if scheme == "s3" else f" {client}"
        raise UsageError(f"{root}: needs {client}: pip install 'canopy-store[s3]'{more}") from None
    # what its tasks log of a lost connection would stand beside the one line that says so
    logging.getLogger("asyncio").addHandler(logging.NullHandler())
    # listings are never kept: another writer's shards must show
    options = {**getattr(root, "storage_options", {}), "use_listings_cache": False}
    return UPath(f"{scheme}://{key.rstrip('/')}", **options)


def snapshot(root: Path) -> Path:
    """The same root; on object storage one listing then answers what is there, how large and how new."""
    if not remote(root):
        return root
    kept = type(root)(root, use_listings_cache=True)  # type: ignore[call-arg]
    with reaching(root):
        client = kept.fs  # type: ignore[attr-defined]
        client.invalidate_cache()
        client.default_block_size = BLOCK
        client.find(kept.path)  # type: ignore[attr-defined]
    return kept


def remote(path: Path) -> bool:
    """Whether a path is on object storage."""
    return not isinstance(path, Path)


@contextmanager
def reaching(path: Path) -> Iterator[None]:
    """Turns what an object store's client raises into one line; a path of this machine is left alone."""
    try:
        yield
    except CanopyError:
        raise
    except Exception as error:
        if not remote(path):
            raise
        kind = type(error).__name__
        if isinstance(error, FileNotFoundError):
            reason = "no such object or bucket; make the bucket, or look at the address"
        elif isinstance(error, PermissionError):
            reason = "access refused; look at the credentials and the bucket's policy"
        elif "Credentials" in kind:
            reason = "no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
        else:
            reason = f"{kind}: {' '.join(str(error).split())[:200]}; mend that and run it again"
        raise StoreError(f"{path}: {reason}; nothing stored is lost") from None


def read_bytes(path: Path, most: int = 64 << 20) -> bytes:
    """A small file, whole.

    Raises
    ------
    DataError
        Not a regular file (a pipe, a device, a folder), or of more than ``most`` bytes.
    """
    if remote(path):
        with reaching(path):
            return path.fs.cat_file(path.path, start=0)  # type: ignore[attr-defined]  # one request
    require_regular(path)
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > most:
            raise DataError(f"{path}: over {most:,} bytes; take it from a copy")
        return file.read()


def read_input(path: Path) -> bytes:
    """A file that a caller names, whole: of a store or not, and a pipe too, as of ``<(command)``.

    A pipe that nobody writes to is empty: opening it does not wait for a writer.

    Raises
    ------
    StoreError
        It cannot be read.
    DataError
        A device or a socket, which may never end.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            kind = os.fstat(file.fileno()).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind) or stat.S_ISDIR(kind)):
                raise DataError(f"{path}: a device, not a file; save what it gives in a file")
            os.set_blocking(file.fileno(), True)
            return file.read()
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from None


def read_many(paths: list[Path]) -> list[Any]:
    """The values of many small JSON files on object storage, asked for at once.

    Raises
    ------
    DataError
        One that is not JSON.
    """
    if not paths:
        return []
    with reaching(paths[0]):
        client = paths[0].fs  # type: ignore[attr-defined]
        data = client.cat([path.path for path in paths])  # type: ignore[attr-defined]
    values = []
    for path in paths:
        try:
            values.append(json.loads(data[path.path]))  # type: ignore[attr-defined]
        except (ValueError, RecursionError):
            raise DataError(f"{path}: not readable as JSON; take it from a copy") from None
    return values


def require_regular(path: Path) -> None:
    """Raises DataError for what is there but is no regular file, before anything opens it."""
    if not remote(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise DataError(f"{path}: not a regular file; move it out of the store")


def read_json(path: Path) -> Any:
    """The value of a small JSON file.

    Raises
    ------
    DataError
        Not JSON, nested without end, or not a regular file of a bearable size.
    """
    try:
        return json.loads(read_bytes(path).decode())
    except (ValueError, RecursionError):
        raise DataError(f"{path}: not readable as JSON; take it from a copy") from None


def exists(path: Path) -> bool:
    """Whether a file is there; never False because an object store cannot be reached."""
    with reaching(path):
        return path.exists()


def opened(path: Path) -> Any:
    """What Parquet readers take: the path itself, or a file on object storage that fetches on demand."""
    if not remote(path):
        return path
    with reaching(path):
        return path.open("rb", block_size=BLOCK)  # type: ignore[call-overload]


def matching(folder: Path, pattern: str) -> list[Path]:
    """What in ``folder`` matches, in name order."""
    with reaching(folder):
        return sorted(folder.glob(pattern))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failing disk into one line; what was stored before is untouched."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else (error.strerror or str(error))
        todo = "free some space" if full else "mend that"
        raise StoreError(
            f"{path}: cannot write: {reason}; nothing stored is lost: {todo} and run it again"
        ) from None


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes ``path`` whole when the block ends, or not at all."""
    if remote(path):
        buffer = io.BytesIO()
        yield buffer
        with reaching(path):
            # no rename there, but a put (or the end of one in parts) is whole or not at all
            path.fs.pipe_file(path.path, buffer.getvalue())  # type: ignore[attr-defined]
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = _temporary(path)
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        remove_leftovers(path.parent, glob.escape(path.name))
        flush(path.parent)


def _temporary(path: Path) -> tuple[Path, int]:
    """A new file beside ``path`` and its descriptor, locked where files can be locked."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            # one who tidies up may have locked it, or removed it, between the two steps
            if lock(descriptor) is not False and os.path.samestat(
                os.fstat(descriptor), os.stat(temporary)
            ):
                return temporary, descriptor
        except FileNotFoundError:
            pass
        os.close(descriptor)


def lock(descriptor: int, exclusive: bool = True) -> bool | None:
    """Whether the open file is now locked; False where another holds it, None where none can be."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_NB | (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def flush(folder: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def remove_leftovers(folder: Path, names: str = "*") -> None:
    """Removes temporary files of these files (a pattern) whose lock nobody holds: the writer is dead."""
    if remote(folder):
        return  # nothing there is temporary
    for path in folder.glob(f".{names}.*.tmp"):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue  # gone meanwhile, or no file of ours
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode) and lock(descriptor):
                path.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes ``value`` as JSON, atomically."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def create_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes ``value`` as JSON, whole, unless another process was first."""
    text = (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
    if remote(path):
        with reaching(path):
            try:
                path.fs.pipe_file(path.path, text, mode="create")  # type: ignore[attr-defined]
            except FileExistsError:
                pass
            except (TypeError, ValueError, NotImplementedError):  # a client that cannot promise that
                write_json(path, value)
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, descriptor = _temporary(path)
        try:
            with open(descriptor, "wb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    pass
                except OSError:  # a file system without hard links
                    os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        remove_leftovers(path.parent, glob.escape(path.name))
        flush(path.parent)


def copy_file(source: Path, target: Path, sha256: str | None = None) -> None:
    """Copies a file whole; one that is not of the hash given never appears.

    Raises
    ------
    DataError
        It is not of that hash.
    """
    digest = hashlib.sha256()
    with replacing(target) as file, source.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            file.write(block)
        if sha256 is not None and digest.hexdigest() != sha256:
            raise DataError(f"{source}: changed while it was read; run it again")


def sha256(path: Path) -> str:
    """The hash of a file's bytes, as hex."""
    with reaching(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
