"""Corpora: documents from a file or a folder of texts, stored once under a name.

A file is JSONL of {"document_id", "text", "split", "cluster", "source", "license"}, of which text alone
is needed, or Parquet with columns of these names; in a folder every .txt file is a document.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from canopy_store import store
from canopy_store.errors import ConflictError, DataError, StoreError
from canopy_store.ingest.prompts import jsonl_records
from canopy_store.schema import TABLES

# What a shard of documents holds at most, and a job that is stopped can lose at most.
_DOCUMENTS = 1024
_BYTES = 1 << 18

_GIVEN = ("document_id", "text", "split", "cluster", "source", "license")
_FORM = 'write {"document_id": "…", "text": "…"}, or give a .parquet file or a folder of .txt files'


def read_documents(path: str | Path) -> list[dict[str, Any]]:
    """The documents of a file or folder, in order: the columns of ``documents`` by their names.

    A document's ``document_id`` is kept, as text; of a text file it is the path in the folder; otherwise
    it is a hash of the text. ``split`` is all where none is given, ``cluster`` the document's own id.

    Raises
    ------
    StoreError
        No such file or folder.
    DataError
        A document without text, one id twice, or what is not UTF-8; names file and line.
    """
    path = Path(path)
    if path.is_dir():
        records = _folder_records(path)
    elif path.suffix.lower() == ".parquet":
        records = _parquet_records(path)
    else:
        records = ((where, record) for _, where, record in jsonl_records(path, store.read_input(path)))
    documents: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    for where, record in records:
        document = _document(record, where)
        earlier = seen.setdefault(document["document_id"], where)
        if earlier is not where:
            raise DataError(
                f"{where}: document_id {document['document_id']} is that of "
                f"{earlier.removeprefix(f'{path}: ')} too; remove one, or give it another id"
            )
        documents.append(document)
    if not documents:
        raise DataError(f"{path}: holds no documents; {_FORM}")
    return documents


def _folder_records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and document of each text file, in the order of their paths."""
    for path in sorted(folder.rglob("*.txt")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        content = store.read_input(path)
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content[: error.start].count(b"\n") + 1
            raise DataError(f"{path}: line {line}: not UTF-8; save the file as UTF-8") from None
        yield str(path), {"document_id": path.relative_to(folder).as_posix(), "text": text}


def _parquet_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and document of each row."""
    import polars as pl

    try:
        frame = pl.read_parquet(io.BytesIO(store.read_input(path)))
    except pl.exceptions.PolarsError as error:
        reason = " ".join(str(error).split())[:150]
        raise DataError(f"{path}: not a readable Parquet file ({reason})") from None
    if "text" not in frame.columns:
        shown = ", ".join(name[:30] for name in frame.columns[:8]) or "none"
        raise DataError(
            f"{path}: needs a column text, and its columns are {shown}; rename the one that holds the "
            "documents"
        )
    for number, row in enumerate(
        frame.select([name for name in _GIVEN if name in frame.columns]).iter_rows(named=True), 1
    ):
        yield f"{path}: row {number}", row


def _document(record: Any, where: str) -> dict[str, Any]:
    """A document's row, once it is one."""
    if not isinstance(record, dict):
        raise DataError(f"{where}: not an object; {_FORM}")
    text = record.get("text")
    if text is None:
        raise DataError(f"{where}: needs text; {_FORM}")
    if not isinstance(text, str):
        raise DataError(f"{where}: text needs to be text, not {json.dumps(text, default=str)[:40]}")
    if not text:
        raise DataError(f"{where}: an empty document; remove it")
    given = {key: _text(record.get(key), key, where) for key in _GIVEN if key != "text"}
    try:
        size = len(text.encode())
        "".join(value for value in given.values() if value).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: holds half a surrogate pair, which is no text") from None
    document_id = given["document_id"] or store.content_id({"text": text})
    return {
        **given,
        "document_id": document_id,
        "text": text,
        "split": given["split"] or "all",
        "cluster": given["cluster"] or document_id,
        "n_bytes": size,
    }


def _text(value: Any, key: str, where: str) -> str | None:
    """A value as text: a whole number counts as it is written."""
    if isinstance(value, bool) or not isinstance(value, (str, int, type(None))):
        raise DataError(f"{where}: {key} needs text or a whole number")
    return None if value is None else str(value)


# ---------------------------------------------------------------- stored


def stored_documents(root: Path, corpus: str) -> list[dict[str, Any]]:
    """Id, text and split of each document of a corpus that is stored; the text None where left out.

    Raises
    ------
    StoreError
        No corpus of this name is stored.
    """
    there = store.exists(root / "canopy.json")
    record = store.record(root, "documents", corpus=corpus) if there else None
    if record is None:
        raise StoreError(f"--corpus {corpus}: no corpus of this name is stored; give its --documents")
    return _rows(root, record, ["document_id", "text", "split"])


def _rows(root: Path, record: store.Record, columns: list[str]) -> list[dict[str, Any]]:
    names = record.of("documents")
    return [row for name in names for row in store.read_rows(root / name, columns).to_pylist()]


def store_corpus(root: Path, corpus: str, documents: list[dict[str, Any]] | None) -> store.Record:
    """The record of a corpus, which is now stored: committed once, and never changed after.

    Parameters
    ----------
    root : path of the store
    corpus : its name
    documents : as of `read_documents`; None: those that are stored

    Raises
    ------
    ConflictError
        The name is stored with other documents, or differs by case alone from one that is; or none are
        given, and none are stored.
    """
    with store.waiting(root, "commit"):  # of two that begin at once, one writes
        stored = store.record(root, "documents", corpus=corpus)
        if stored is not None and not all(store.exists(root / name) for name in stored.files):
            raise DataError(f"corpus {corpus}: a file of it is gone; see: canopy verify --store {root}")
        if documents is None:
            if stored is None:
                raise ConflictError(f"corpus {corpus}: removed since the job began; run it again")
            return stored
        digest = corpus_sha256(documents)
        if stored is not None:
            if stored.settings.get("documents_sha256") != digest:
                raise ConflictError(_differs(root, corpus, stored, documents))
            return stored
        taken = (record.keys["corpus"] for record in store.records(root, "documents"))
        store.require_own_name("corpus", corpus, taken)
        where = store.folder(root, "documents", corpus=corpus)
        paths = []
        for number, part in enumerate(_shards(documents)):
            paths.append(store.shard_path(where, number))
            columns = [column.name for column in TABLES["documents"].columns]
            store.write_rows(
                paths[-1], "documents", {name: [each[name] for each in part] for name in columns}
            )
        settings = {"documents_sha256": digest, "n_documents": len(documents)}
        return store.commit(root, "documents", {"corpus": corpus}, paths, settings)


def corpus_sha256(documents: list[dict[str, Any]], keys: Sequence[str] = _GIVEN) -> str:
    """A hash that two corpora share where all of their documents are the same in this, in one order."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(store.canonical([document[key] for key in keys]).encode() + b"\n")
    return digest.hexdigest()


def _shards(documents: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The documents, in order, in shards bounded in documents and in bytes."""
    part: list[dict[str, Any]] = []
    size = 0
    for document in documents:
        if part and (len(part) == _DOCUMENTS or size + document["n_bytes"] > _BYTES):
            yield part
            part, size = [], 0
        part.append(document)
        size += document["n_bytes"]
    yield part


def _differs(root: Path, corpus: str, stored: store.Record, documents: list[dict[str, Any]]) -> str:
    """One line: what is other in these documents than in those that are stored."""
    columns = list(_GIVEN)
    here = {row["document_id"]: row for row in _rows(root, stored, columns)}
    given = {document["document_id"]: document for document in documents}
    new, lost = given.keys() - here.keys(), here.keys() - given.keys()
    other = [
        (name, key)
        for name in given.keys() & here.keys()
        for key in columns
        if here[name][key] != given[name][key] and (key != "text" or here[name][key] is not None)
    ]
    if new or lost:
        what = f"{len(new)} of these documents are not in it, {len(lost)} of its own are not here"
        what += f", first {min(new or lost)}"
    elif other:
        what = f"document {min(other)[0]} has another {min(other)[1]}"
    else:
        what = "they stand in another order, or its texts were left out"
    return f"corpus {corpus} is stored with other documents: {what}; give another --corpus"
