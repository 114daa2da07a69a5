"""Bring your own rollouts: one source in, one run per (family, variant, task) stored.

The form that is stored from is a Parquet file. What a reader reads goes into a temporary one first,
so that memory stays bounded and every check is made before anything is stored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from canopy_store import readers, sql, store
from canopy_store.errors import DataError, UsageError
from canopy_store.readers.source import (
    check_policy,
    check_schema,
    check_tokens,
    embedding_matrix,
    finish_reasons,
    grade_column,
    number_column,
    of_the_run,
    read_keys,
)
from canopy_store.readers.staging import (
    LISTS,
    NAMES,
    PLAIN,
    as_parquet,
    decoding,
)
from canopy_store.schema import TABLES
from canopy_store.store.embeddings import write_embeddings
from canopy_store.store.rollouts import write_shard

_ROLLOUT = ("text", "n_tokens", "finish_reason", *LISTS)
_GRADE = ("answer", "correct", "score")
_STORED = {*_ROLLOUT, *_GRADE, "reward", "where", "embedding", "retokenised"}
# kind of record and its key besides the run: the files of it
_Files = defaultdict[tuple[str, str], list[Path]]
_ROLLOUTS_PER_SHARD = 8192


def import_rollouts(
    root: str | Path,
    source: str | Path,
    *,
    format: str | None = None,
    family: str | None = None,
    variant: str | None = None,
    task: str | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    processed_logprobs: bool = False,
    requests: str | Path | None = None,
    tokenizer: Any = None,
    max_new_tokens: int | None = None,
    run: str | None = None,
    embedder: str = "imported",
    reward_model: str = "imported",
    grader: str = "imported",
    on_shard: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] | None = None,
) -> list[str]:
    """The ids of the runs stored from a source of rollouts; the store is made if missing.

    The same source again changes nothing. All of it is checked before the first run is made visible.

    Parameters
    ----------
    root : path of the store
    source : Parquet with family, variant, task, prompt_id, sample and one of entropy (list of nats,
        one a token), logprob, token_ids and n_tokens; optional the other columns of
        `canopy_store.readers.FIELDS`. Or a file or folder that a reader knows
    format : name of the reader [default: the one that knows the source]
    family, variant, task : names that the source does not tell, or instead of those it tells
    temperature, top_k, top_p : the sampling policy, likewise; where only temperature is known, top_k
        is 0 and top_p is 1
    processed_logprobs : the engine logged log-probabilities after temperature, top-k and top-p, where
        they are otherwise those of the model itself
    requests : the requests that a batch answers, for their prompts and policy
    tokenizer : a transformers tokenizer of the model: gives ids to tokens known as text, and tokens to
        rollouts known as text alone (the sampled ones may have been others)
    max_new_tokens : marks rollouts of this length as cut, where finish_reason is absent
    run : name of the run; needs a source of one family, variant and task
    embedder, reward_model, grader : names under which embeddings, rewards and grades (columns correct,
        score and answer) are kept
    on_shard : called with (rollouts done, rollouts in all)
    say : called with a line on what was left out

    Raises
    ------
    DataError
        A missing column, a wrong type or an impossible value; names file, row or line, and column.
    UsageError
        A name or policy that neither the source nor the caller tells.
    ConflictError
        A run of this name is stored from another source.
    """
    path = Path(source)
    policy = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "max_new_tokens": max_new_tokens,
    }
    check_policy(policy, "--{}", UsageError)
    store.check_name("--embedder", embedder)
    store.check_name("--reward-model", reward_model)
    store.check_name("--grader", grader)
    names = {"family": family, "variant": variant, "task": task}
    told = {k: v for k, v in {**names, **policy}.items() if v is not None}
    notes: list[str] = []  # said once all is stored: a refusal is one line
    options = readers.Told(tokenizer, Path(requests) if requests else None, notes.append)
    with as_parquet(path, format, told, processed_logprobs, options) as (file, files, found):
        settings = {
            "engine": "import",
            "source_sha256": _hash(path, files),
            "embedder": embedder,
            "reward_model": reward_model,
            **({"grader": grader} if grader != "imported" else {}),
            **{
                k: v
                for k, v in {
                    "format": found,
                    **policy,
                    "processed_logprobs": processed_logprobs or None,
                    "requests_sha256": store.sha256(Path(requests)) if requests else None,
                    "tokenizer_sha256": _tokenizer_hash(tokenizer),
                }.items()
                if v is not None
            },
        }
        stored = _store(root, path, file, run, settings, told, on_shard)
    if say:
        for note in notes:
            say(note)
    return stored


def _store(
    root: str | Path,
    path: Path,
    file: Path,
    run: str | None,
    common: dict[str, Any],
    told: dict[str, Any],
    on_shard: Callable[[int, int], None] | None,
) -> list[str]:
    """Stores what ``file``, the Parquet form of the source at ``path``, holds."""
    schema = check_schema(file, path)
    keys = read_keys(file, path, schema)
    groups = keys.partition_by(list(NAMES), maintain_order=True)
    if run is not None and len(groups) > 1:
        raise UsageError(f"--run: {path} holds {len(groups)} runs, one a family, variant and task")
    for name in NAMES:
        for value in keys[name].unique(maintain_order=True):
            store.check_name(f"{path}: column {name}", value)
    jobs = []
    for group in groups:
        of_run = of_the_run(group, path, told)
        run_id = store.check_name("--run", run or ".".join(of_run[name] for name in NAMES))
        jobs.append(({"run_id": run_id, **common, **of_run}, group))
    return _store_jobs(store.init(root), path, file, schema, jobs, len(keys), on_shard)


def _store_jobs(
    root: Path,
    path: Path,
    file: Path,
    schema: pa.Schema,
    jobs: list[tuple[dict[str, Any], pl.DataFrame]],
    rollouts: int,
    on_shard: Callable[[int, int], None] | None,
) -> list[str]:
    """Stores the run of each job; none is shown before all of the source proves good."""
    with store.waiting(root, "import"):  # of two of the same run, one would clear the other's files
        return _store_in_turn(root, path, file, schema, jobs, rollouts, on_shard)


def _store_in_turn(
    root: Path,
    path: Path,
    file: Path,
    schema: pa.Schema,
    jobs: list[tuple[dict[str, Any], pl.DataFrame]],
    rollouts: int,
    on_shard: Callable[[int, int], None] | None,
) -> list[str]:
    taken = list(store.models(root))
    for settings, _ in jobs:  # before anything is written under the name
        model_id = f"{settings['family']}/{settings['variant']}"
        store.require_own_name("model", model_id, taken)
        taken.append(model_id)
    done = 0
    written: list[_Files] = []
    columns = [name for name in schema.names if name.partition(".")[0] in _STORED]
    for settings, group in jobs:
        run_id, files = settings["run_id"], _Files(list)
        with store.holding(root, run_id):
            _require_whole(root, run_id)
            store.forget_unfinished(root, run_id, engine="import")
            store.plan(root, "run", run_id, settings)
            for number, rows in enumerate(_shards(group)):
                if not store.is_complete(root, run_id):
                    _write(root, file, path, columns, settings, number, rows, files)
                done += len(rows)
                if on_shard:
                    on_shard(done, rollouts)
        written.append(files)
    for (settings, group), files in zip(jobs, written, strict=True):
        with store.holding(root, settings["run_id"]):
            _complete(root, file, path, schema, settings, group, files)
    sql.write_database(root)
    return [settings["run_id"] for settings, _ in jobs]


def _require_whole(root: Path, run_id: str) -> None:
    """Raises DataError where the run is stored and a file of it is lost."""
    done = store.record(root, "rollouts", run=run_id)
    for name in done.files if done is not None else ():
        if not store.exists(root / name):
            raise DataError(
                f"{root / name}: lost; take it from a copy, or remove the run and import it again: "
                f"canopy rm-run {run_id} --store {root}"
            )


def _hash(path: Path, files: list[Path]) -> str:
    if files == [path]:
        return store.sha256(path)
    return store.content_id({str(f.relative_to(path)): store.sha256(f) for f in files})


def _tokenizer_hash(tokenizer: Any) -> str | None:
    return None if tokenizer is None else store.content_id(tokenizer.get_vocab())


# ---------------------------------------------------------------- into the store


def _shards(group: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """A run's rows in shards of whole prompts, in the order the file first names them."""
    counts = group.group_by("prompt_id", maintain_order=True).len()
    chosen: list[str] = []
    size = 0
    for prompt, rows in counts.iter_rows():
        if chosen and size + rows > _ROLLOUTS_PER_SHARD:
            yield group.filter(pl.col("prompt_id").is_in(chosen))
            chosen, size = [], 0
        chosen.append(prompt)
        size += rows
    yield group.filter(pl.col("prompt_id").is_in(chosen))


def _of(settings: dict[str, Any]) -> Any:
    """The filter of a run's rows."""
    family, variant, task = (pc.field(name) == settings[name] for name in NAMES)
    return family & variant & task


def _write(
    root: Path,
    file: Path,
    path: Path,
    columns: list[str],
    settings: dict[str, Any],
    shard: int,
    rows: pl.DataFrame,
    files: _Files,
) -> None:
    import pyarrow.dataset as ds  # brings pandas along, which takes as long as all else

    run_id = settings["run_id"]
    where = store.folder(root, "rollouts", run=run_id, **{k: settings[k] for k in NAMES})
    store.remove_leftovers(where)
    wanted = pc.field("prompt_id").isin(rows["key"].unique().to_list()) & _of(settings)
    with decoding(path):
        data = ds.dataset(file).to_table(columns=columns, filter=wanted)
        data.validate(full=True)
    # the filter keeps the file's order, and so do the keys: row i here is row i there
    first = {p: i for i, p in enumerate(rows["prompt_id"].unique(maintain_order=True))}
    order = rows.with_row_index("at").with_columns(
        pl.col("prompt_id").replace_strict(first, return_dtype=pl.Int64).alias("rank")
    )
    at = order.sort("rank", "sample")["at"].to_numpy()
    data, rows = data.take(pa.array(at)), rows[at]
    names = [f"{path}: row {row}" for row in rows["row"]]
    if "where" in columns:
        names = [said or name for said, name in zip(data["where"].to_pylist(), names, strict=True)]
    record = {name: data[name] for name in _ROLLOUT if name in columns}
    for name in LISTS:
        # a list of candidates stands for every rollout of a shard or for none
        some = name.startswith("top_") and name in record and record[name].null_count
        if name in record and (some or record[name].null_count == len(rows)):
            del record[name]
    check_tokens(record, names)
    guessed = data["retokenised"].to_pylist() if "retokenised" in columns else [None] * len(names)
    record |= {
        "run_id": [run_id] * len(rows),
        "prompt_id": rows["prompt_id"].to_list(),
        "sample": rows["sample"].to_list(),
        "finish_reason": finish_reasons(record, settings["max_new_tokens"], names, guessed),
    }
    write_shard(store.shard_path(where, shard), record, names)
    files["rollouts", run_id].append(store.shard_path(where, shard))
    for column in columns:
        kind, _, embedder = column.partition(".")
        if kind == "embedding" and data[column].null_count < len(rows):
            embedder = embedder or settings["embedder"]
            matrix = embedding_matrix(data[column], names)
            files["embeddings", embedder] += write_embeddings(
                root, embedder, run_id, shard, record["prompt_id"], record["sample"], matrix
            )
    of_rollout = {key: record[key] for key in ("run_id", "prompt_id", "sample")}
    if "reward" in columns:
        reward = {"reward": number_column(data["reward"], "reward", names)}
        _write_known(root, "rewards", settings["reward_model"], shard, {**of_rollout, **reward}, files)
    if set(_GRADE) & set(columns):
        grade = {name: grade_column(data[name], name, names) for name in _GRADE if name in columns}
        _write_known(
            root, "grades", settings.get("grader", "imported"), shard, {**of_rollout, **grade}, files
        )


def _write_known(
    root: Path, table: str, name: str, shard: int, columns: dict[str, Any], files: _Files
) -> None:
    """Writes those rows of a shard that have a value in one of the columns after the keys."""
    rows = pl.DataFrame({key: pl.Series(values) for key, values in columns.items()})
    values = [key for key in columns if key not in ("run_id", "prompt_id", "sample")]
    rows = rows.filter(pl.any_horizontal(pl.col(key).is_not_null() for key in values))
    if len(rows):
        key = TABLES[table].partitions[0]
        run_id = columns["run_id"][0]
        path = store.shard_path(store.folder(root, table, **{key: name, "run": run_id}), shard)
        store.write_rows(path, table, {key: rows[key].to_arrow() for key in columns})
        files[table, name].append(path)


def _complete(
    root: Path,
    file: Path,
    path: Path,
    schema: pa.Schema,
    settings: dict[str, Any],
    group: pl.DataFrame,
    files: _Files,
) -> None:
    """Commits a run and what came with it; its rollouts last, so that all of it appears at once."""
    run_id = settings["run_id"]
    if store.is_complete(root, run_id):
        return
    names = {name: settings[name] for name in NAMES}
    model = {"family": names["family"], "variant": names["variant"], "source": settings.get("model")}
    model_id = store.add_model(root, model)
    asked = _prompts(root, file, path, schema, settings, group)
    for (table, name), made in files.items():
        if table != "rollouts":
            key = TABLES[table].partitions[0]
            store.commit(root, table, {key: name, "run": run_id}, made, {key: name, "engine": "import"})
    row = {
        **{k: settings.get(k) for k in ("run_id", *NAMES, *PLAIN, "max_new_tokens")},
        "model_id": model_id,
        "rendering": "import",
        "engine": "import",
        "settings": store.canonical(settings),
        "versions": "{}",
    }
    with store.waiting(root, "commit"):  # a removal must not find these prompts named by no run
        prompts = store.add_prompts(root, settings["task"], asked)
        store.complete_run(root, files["rollouts", run_id], row, settings, prompts)


_PROMPT = {"prompt": "text", "messages": "messages", "reference": "reference"}


def _prompts(
    root: Path,
    file: Path,
    path: Path,
    schema: pa.Schema,
    settings: dict[str, Any],
    group: pl.DataFrame,
) -> list[dict[str, Any]]:
    """The prompts of a run, with what the source says of them."""
    import pyarrow.dataset as ds

    said: dict[str, dict[str, Any]] = {}
    given = [name for name in _PROMPT if name in schema.names]
    if given:
        with decoding(path):
            for batch in ds.dataset(file).to_batches(["prompt_id", *given], filter=_of(settings)):
                ids = batch["prompt_id"].cast(pa.string()).to_pylist()
                values = [batch[name].to_pylist() for name in given]
                for prompt_id, *row in zip(ids, *values, strict=True):
                    said.setdefault(prompt_id, {_PROMPT[n]: v for n, v in zip(given, row, strict=True)})
    # what is stored with another text keeps it
    stored = sql.prompts(root)
    asked = [p for p in group["prompt_id"].unique(maintain_order=True)]
    known = {p for p in asked if _has_text(stored.get((settings["task"], p), {}))}
    for prompt_id in known & said.keys():
        said[prompt_id] = {k: v for k, v in said[prompt_id].items() if k == "reference"}
    return [{"prompt_id": p, "source": path.name, **said.get(p, {})} for p in asked]


def _has_text(prompt: Mapping[str, Any]) -> bool:
    return bool(prompt.get("text") or prompt.get("messages"))
