"""What a reader reads, as one temporary Parquet file: memory stays bounded, every row is checked."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from canopy_store import readers, store
from canopy_store.errors import DataError, StoreError, UsageError

NAMES = ("family", "variant", "task")
LENGTHS = ("entropy", "logprob", "token_ids", "n_tokens")  # any of them gives a rollout's length
LISTS = ("entropy", "logprob", "eos_logprob", "token_ids", "top_token_ids", "top_logprobs")
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}  # the model's own distribution
_VALUES_AT_ONCE = 1_000_000  # values of the rows that wait to be written
_RAW = (
    "the engine gave the model's own, not that of the policy sampled from (where it is that, say "
    "--processed-logprobs); from token ids, canopy ingest score gives it"
)


@contextmanager
def as_parquet(
    path: Path, format: str | None, told: dict[str, Any], processed: bool, options: readers.Told
) -> Iterator[tuple[Path, list[Path], str | None]]:
    """The source as Parquet, the files it is made of, and its format where it is another."""
    parquet = format == "parquet" or (format is None and _is_parquet(path))
    named = {name: told[name] for name in NAMES if name in told}
    if parquet and not named:
        yield path, [path], None
        return
    found, reader = (None, None) if parquet else readers.find(path, format)
    with tempfile.TemporaryDirectory(prefix="canopy-import-") as folder:
        file = Path(folder) / "rollouts.parquet"
        if reader is None:
            _rename(path, file, named)
            yield file, [path], None
            return
        files = reader.files(path) if hasattr(reader, "files") else [path]
        rows = _finished(reader.read(path, options), path, {**named, **told}, processed, options)
        for (name, reason), count in _spool(rows, file, path).items():
            options.say(f"{path}: {name} of {count} rollouts is left out: {reason}")
        yield file, files, found


def _is_parquet(path: Path) -> bool:
    if path.suffix == ".parquet" or not path.is_file():
        return path.suffix == ".parquet"
    with open(path, "rb") as file:
        return file.read(4) == b"PAR1"


def _rename(path: Path, file: Path, named: dict[str, str]) -> None:
    """Copies a Parquet file with some of its columns replaced by one value."""
    parquet_schema(path)
    with decoding(path):
        source = pq.ParquetFile(path)
    writer = None
    batches = source.iter_batches(batch_size=4096)
    with store.writing(file):
        while True:
            with decoding(path):
                batch = next(batches, None)
            if batch is None:
                break
            table = pa.Table.from_batches([batch])
            for name, value in named.items():
                if name in table.column_names:
                    table = table.drop_columns([name])
                table = table.append_column(name, pa.array([value] * len(table), pa.string()))
            writer = writer or pq.ParquetWriter(file, table.schema)
            writer.write_table(table)
    if writer is None:
        raise DataError(f"{path}: holds no rows")
    writer.close()


_UNFIT = (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError)
_FLOAT_LIST, _INT_LIST = pa.list_(pa.float32()), pa.list_(pa.int32())
_SPOOL = {
    "where": pa.string(),
    **dict.fromkeys((*NAMES, "prompt_id"), pa.string()),
    "sample": pa.int64(),
    **dict.fromkeys(("prompt", "messages", "text", "finish_reason", "model"), pa.string()),
    "n_tokens": pa.int64(),
    "retokenised": pa.bool_(),
    "token_ids": _INT_LIST,
    **dict.fromkeys(("logprob", "entropy", "eos_logprob"), _FLOAT_LIST),
    "top_token_ids": pa.list_(_INT_LIST),
    "top_logprobs": pa.list_(_FLOAT_LIST),
    "reward": pa.float64(),
    "correct": pa.bool_(),
    "score": pa.float64(),
    **dict.fromkeys(("answer", "reference"), pa.string()),
    "temperature": pa.float64(),
    "top_p": pa.float64(),
    "top_k": pa.int64(),
    "max_new_tokens": pa.int64(),
}


def _finished(
    rows: Iterable[dict[str, Any]],
    path: Path,
    told: dict[str, Any],
    processed: bool,
    options: readers.Told,
) -> Iterator[dict[str, Any]]:
    """The rows as they can be stored, without those whose text has no token to count."""
    empty = []
    for row in rows:
        finished = _finish({**row, **told}, path, processed, options)
        if finished.get("retokenised") and not finished["token_ids"]:
            empty.append(finished["where"].removeprefix(f"{path}: "))
        else:
            yield finished
    if empty:
        options.say(
            f"{path}: {len(empty)} rollouts are left out, as their text holds no token and the tokens "
            f"themselves are not in the source, first {empty[0]}"
        )


def _finish(row: dict[str, Any], path: Path, processed: bool, options: readers.Told) -> dict[str, Any]:
    """A reader's row, with what the caller tells, as it can be stored."""
    where = row.setdefault("where", str(path))
    for name in NAMES:
        if not row.get(name):
            raise UsageError(f"{path}: does not tell the {name}; give --{name}")
    unsure = row.pop("top_k_unsure", None)
    if unsure and row.get("top_k") is None and row.get("temperature"):  # greedy and unknown need none
        raise UsageError(f"{where}: {unsure}; give --top-k, 0 where it was off")
    row["prompt_id"] = str(row["prompt_id"]) if row.get("prompt_id") is not None else None
    if row.pop("raw_logprobs", False) and not processed and row.get("logprob") is not None:
        if row.get("temperature") is None:
            raise UsageError(
                f"{where}: does not tell how it was sampled, which its log-probabilities depend on; "
                "give --temperature, and --top-k and --top-p where they were used"
            )
        if {**PLAIN, **{k: row[k] for k in PLAIN if row.get(k) is not None}} != PLAIN:
            row["n_tokens"] = len(row["logprob"])
            for name in ("logprob", "top_token_ids", "top_logprobs"):
                row.pop(name, None)
            row["left_out"] = {**row.get("left_out", {}), "logprob": _RAW}
    if all(row.get(name) is None for name in LENGTHS) or (
        options.tokenizer and all(row.get(name) is None for name in LENGTHS[:3])
    ):
        if options.tokenizer is None or row.get("text") is None:
            raise UsageError(
                f"{where}: tells no tokens and not how many there were; give the model's tokenizer with "
                "--tokenizer, for those of its text"
            )
        try:
            row["text"].encode()
        except (UnicodeEncodeError, AttributeError):  # half a pair of surrogates, which JSON can hold
            raise DataError(f"{where}: text cannot be kept: it is not valid Unicode") from None
        row["token_ids"] = options.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        row["retokenised"] = True
    return row


def _spool(rows: Iterable[dict[str, Any]], file: Path, path: Path) -> Counter[tuple[str, str]]:
    """Writes the rows to ``file``; the fields that were left out, why, and of how many."""
    schema, writer, size = dict(_SPOOL), None, 0
    left_out: Counter[tuple[str, str]] = Counter()
    waiting: list[dict[str, Any]] = []

    def flush() -> None:
        nonlocal writer, waiting, size
        writer = writer or pq.ParquetWriter(file, pa.schema(schema))
        writer.write_table(_table(waiting, schema))
        waiting, size = [], 0

    with store.writing(file):
        for row in rows:
            embedded = {name for name in row if name.partition(".")[0] == "embedding"}
            if writer is None and not waiting:
                schema |= dict.fromkeys(sorted(embedded), _FLOAT_LIST)
            elif embedded - set(schema):
                raise DataError(f"{row['where']}: has {min(embedded)}, which the first rollout lacks")
            left_out.update(row.pop("left_out", {}).items())
            waiting.append(row)
            steps = max((len(row[n]) for n in LISTS if row.get(n) is not None), default=0)
            tops = row.get("top_logprobs") or [[]]
            size += 1000 + steps * (1 + len(tops[0])) + sum(len(row[n]) for n in embedded)
            if size > _VALUES_AT_ONCE:
                flush()
        if waiting:
            flush()
    if writer is None:
        raise DataError(f"{path}: holds no rollouts")
    writer.close()
    return left_out


def _table(rows: list[dict[str, Any]], schema: dict[str, pa.DataType]) -> pa.Table:
    columns = {}
    for name, kind in schema.items():
        try:
            columns[name] = pa.array([row.get(name) for row in rows], kind)
        except _UNFIT:
            for row in rows:  # the row that it was
                try:
                    pa.array([row.get(name)], kind)
                except _UNFIT as error:
                    reason = " ".join(str(error).split())[:120]
                    raise DataError(f"{row['where']}: {name} cannot be kept: {reason}") from None
            raise
    return pa.table(columns, schema=pa.schema(schema))


def parquet_schema(path: Path) -> pa.Schema:
    if not path.is_file():
        raise StoreError(f"{path}: no such file")
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError):
        raise DataError(f"{path}: truncated or not a Parquet file") from None


@contextmanager
def decoding(path: Path) -> Iterator[None]:
    """Turns Parquet pages that cannot be read into one line."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be read: {reason}") from None
