"""Reads and writes the tree that the paper's own code leaves behind (arXiv 2605.30844).

    {family}/{task}/{variant}/{run}/metadata.json                       sampling settings
    …/{run}/rollout_shards/NNNNNN.safetensors                           one file a prompt
    …/{run}/embedding_shards/{embedder}/NNNNNN.safetensors              embeddings (rollouts, d)

A shard has prompt_token_ids, sequence_lengths (rollouts), generated_token_ids_flat and
step_conditional_entropy_flat (tokens); in its header, prompt and generated_texts (JSON). Optional
sequence_step_logprobs.NNNNN are the paper's (steps, candidates), log-probabilities of candidates whose
ids are not kept: they tell nothing about the sampled token and are left out. In one dimension, as
`write_tree` has them, they are the sampled tokens' own. `write_tree` also keeps prompt_id, samples,
finish_reasons and messages in the header and eos_logprob_flat beside the tensors; the paper's code
passes over them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from canopy_store import store
from canopy_store.errors import DataError, StoreError, UsageError
from canopy_store.readers import LONGEST, Row, Told, get, parse

_SHARDS = ("rollout_shards", "prompt_shards")  # the second is what other versions call it
_SAMPLING = ("temperature", "top_k", "top_p", "max_new_tokens")


def sniff(path: Path) -> bool:
    """Whether a folder is such a tree, or any part of one that holds a run."""
    return path.is_dir() and bool(_runs(path))


def files(path: Path) -> list[Path]:
    """Every file that is read."""
    found = []
    for run in _runs(path):
        found += [run / "metadata.json", *_shards(run)]
        for folder in _embedders(run):
            found += sorted(folder.glob("*.safetensors"))
    return [_inside(file, path) for file in found]


def read(path: Path, told: Told) -> Iterator[Row]:
    """Every rollout of every run, by shard.

    Family, variant and task are those of metadata.json, else of the path. A prompt's id, unless the
    header has one, follows from its text.

    Raises
    ------
    DataError
        A shard that is not one, lengths that do not add up, two runs of one name.
    """
    seen: dict[tuple[str, ...], Path] = {}
    for run in _runs(path):
        names, settings = _metadata(run, path, told)
        key = tuple(str(names[n]) for n in ("family", "variant", "task"))
        earlier = seen.setdefault(key, run)
        if earlier != run:
            raise DataError(
                f"{path}: {earlier.name} and {run.name} are both runs of {' '.join(key)}; "
                "import one at a time, with --run"
            )
        samples: Counter[str] = Counter()
        for shard in _shards(run):
            embeddings = {
                f"embedding.{store.unquoted(folder.name)}": _inside(folder / shard.name, path)
                for folder in _embedders(run)
            }
            for row in _rollouts(_inside(shard, path), embeddings, samples):
                yield {**names, **settings, **row}


def _runs(path: Path) -> list[Path]:
    found = (p.parent for p in sorted(path.rglob("metadata.json")))
    return [run for run in found if any((run / name).is_dir() for name in _SHARDS)]


def _shards(run: Path) -> list[Path]:
    return sorted(
        p for name in _SHARDS for p in (run / name).glob("*.safetensors") if p.stem.isdecimal()
    )


def _embedders(run: Path) -> list[Path]:
    return sorted(p for p in run.glob("embedding_shards/*") if p.is_dir())


def _inside(file: Path, root: Path) -> Path:
    if not file.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{file}: leads out of {root}; put the file itself there")
    return file


def _metadata(run: Path, root: Path, told: Told) -> tuple[dict[str, Any], dict[str, Any]]:
    file = _inside(run / "metadata.json", root)
    where = str(file)
    try:
        with open(file, "rb") as stream:
            said = parse(stream.read(LONGEST + 1), where)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    parts = (run.resolve() if run == root else run).parts
    above = (
        dict(zip(("family", "task", "variant"), parts[-4:-1], strict=False)) if len(parts) > 3 else {}
    )
    prompts = get(said, "prompt_file", str, where, None)
    names = {
        "family": get(said, "model_name", str, where, None) or above.get("family"),
        "variant": get(said, "model_variant", str, where, None) or above.get("variant"),
        "task": get(said, "task", str, where, None)
        or (prompts and Path(prompts).stem)
        or above.get("task"),
    }
    settings = {
        name: get(said, name, (int, float) if name in ("temperature", "top_p") else int, where, None)
        for name in _SAMPLING
    }
    if settings["top_k"] is not None:
        settings["top_k"] = max(settings["top_k"], 0)  # vLLM's -1 is off, too
    kept = get(said, "logprobs", int, where, None)
    if kept and not 0 < (settings["top_k"] or 0) <= kept:
        told.say(
            f"{run}: its entropies were taken over the {kept} likeliest tokens of each step, which "
            "top-k did not bound: they are too small where more could be sampled"
        )
    asked, found = get(said, "num_prompts_processed", int, where, None), len(_shards(run))
    if asked is not None and asked != found:
        told.say(f"{run}: holds {found} shards of {asked} prompts")
    return names, settings


def _rollouts(
    file: Path, embeddings: dict[str, Path], samples: Counter[str]
) -> Iterator[dict[str, Any]]:
    header, tensors = _load(file)
    lengths = _vector(tensors, "sequence_lengths", "iu", file)
    ids = _vector(tensors, "generated_token_ids_flat", "iu", file)
    flat = {"token_ids": ids, "entropy": _vector(tensors, "step_conditional_entropy_flat", "f", file)}
    if "eos_logprob_flat" in tensors:
        flat["eos_logprob"] = _vector(tensors, "eos_logprob_flat", "f", file)
    if (lengths > len(ids)).any() or (lengths < 0).any() or int(lengths.sum()) != len(ids):
        raise DataError(f"{file}: sequence_lengths do not add up to the {len(ids)} tokens there are")
    for name, values in flat.items():
        if len(values) != len(ids):
            raise DataError(f"{file}: {name} has {len(values)} steps and there are {len(ids)} tokens")
    count = len(lengths)
    texts = _listed(header, "generated_texts", str, count, file)
    if texts is None:
        raise DataError(f"{file}: its header has no generated_texts")
    numbers = _listed(header, "samples", int, count, file)
    reasons = _listed(header, "finish_reasons", (str, type(None)), count, file) or [None] * count
    logprobs = [tensors.get(f"sequence_step_logprobs.{i:05d}") for i in range(count)]
    own = all(step is not None and step.ndim == 1 for step in logprobs)
    matrices = {name: _matrix(path, count) for name, path in embeddings.items()}
    prompt = header.get("prompt") or None
    prompt_id = header.get("prompt_id") or (store.content_id({"text": prompt}) if prompt else file.stem)
    ends = np.cumsum(lengths)
    for i, end in enumerate(ends):
        steps = slice(int(end - lengths[i]), int(end))
        yield {
            "where": f"{file}: rollout {i}",
            "prompt_id": prompt_id,
            "prompt": prompt,
            "messages": header.get("messages"),
            "text": texts[i],
            "finish_reason": reasons[i],
            "sample": numbers[i] if numbers else samples[prompt_id],
            "logprob": logprobs[i] if own else None,
            **{name: values[steps] for name, values in flat.items()},
            **{name: matrix[i] for name, matrix in matrices.items()},
        }
        samples[prompt_id] += 1


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError:
        raise UsageError(
            "the paper's tree needs safetensors: pip install 'canopy-store[ingest]'"
        ) from None
    return safetensors


def _load(file: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Header and tensors of a file; the library bounds every offset by the file's size."""
    library = _safetensors()
    try:
        with library.safe_open(file, framework="numpy") as tensors:
            return tensors.metadata() or {}, {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise DataError(f"{file}: is missing") from None
    except (library.SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{file}: truncated or no safetensors of numbers ({reason})") from None


def _vector(tensors: dict[str, np.ndarray], name: str, kinds: str, file: Path) -> np.ndarray:
    found = tensors.get(name)
    if found is None:
        raise DataError(f"{file}: has no {name}; there are {', '.join(sorted(tensors)[:6])}")
    if found.ndim != 1 or found.dtype.kind not in kinds:
        raise DataError(
            f"{file}: {name} is {found.dtype} of shape {found.shape}, needs one row of "
            f"{'floats' if 'f' in kinds else 'whole numbers'}"
        )
    return found if found.dtype.kind != "u" else found.astype(np.int64)


def _listed(header: dict[str, str], key: str, kind: Any, count: int, file: Path) -> list[Any] | None:
    if key not in header:
        return None
    values = parse(header[key], f"{file}: {key}")
    if (
        not isinstance(values, list)
        or len(values) != count
        or not all(isinstance(v, kind) for v in values)
    ):
        raise DataError(f"{file}: {key} needs a list of {count}, one a rollout")
    return values


def _matrix(file: Path, count: int) -> np.ndarray:
    found = _load(file)[1].get("embeddings")
    if found is None or found.ndim != 2 or len(found) != count or found.dtype.kind != "f":
        raise DataError(f"{file}: embeddings needs floats, one row for each of {count} rollouts")
    return found


# ---------------------------------------------------------------- writing


def write_tree(root: str | Path, out: str | Path, *, runs: tuple[str, ...] = ()) -> Path:
    """The folder ``out`` with every complete run of a store as the paper's code would leave it.

    What the tree has no place for stays behind: rewards, scores, selections, top log-probabilities.
    prompt_token_ids are empty, as a store keeps the prompt's text. A file that is there is replaced.

    Parameters
    ----------
    root : path of the store
    out : folder to write into; made where it is missing
    runs : only these

    Raises
    ------
    DataError
        A run without entropies or token ids, which the format demands.
    StoreError
        No such store, or no such run.
    """
    root, out = store.require(root), Path(out)
    if (out / "canopy.json").exists():
        raise StoreError(f"{out}: is a store; choose another folder")
    for run in store.complete_runs(root, runs):
        keys = [store.quoted(run[key]) for key in ("family", "task", "variant", "run_id")]
        folder = out.joinpath(*keys)
        row = store.run_row(root, run["record"])
        prompts = _prompts(root, run["task"])
        number = 0
        for shard in run["shards"]:
            number = _write_shard(root, run, shard, folder, number, prompts)
        store.write_json(
            folder / "metadata.json",
            {
                "task": run["task"],
                "prompt_file": f"{store.quoted(run['task'])}.jsonl",
                "num_prompts_processed": number,
                "model_name": run["family"],
                "model_variant": run["variant"],
                "n_samples": row["n_samples"],
                "logprobs": 0,
                "enable_thinking": False,
                **{key: row[key] for key in (*_SAMPLING, "seed")},
            },
        )
    return out


def _prompts(root: Path, task: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for file in store.files(root, "prompts"):
        if file.parent != store.folder(root, "prompts", task=task):
            continue
        for row in store.read_rows(file).to_pylist():
            if row["text"] or row["messages"]:
                found[row["prompt_id"]] = row
    return found


def _write_shard(
    root: Path,
    run: dict[str, Any],
    shard: Path,
    folder: Path,
    number: int,
    prompts: dict[str, dict[str, Any]],
) -> int:
    """Writes the prompts of one of the store's shards; the number of the next one."""
    table = store.read_rows(shard)
    for name in ("entropy", "token_ids"):
        if table[name].null_count:
            raise DataError(
                f"run {run['run_id']}: has no {name}, which the paper's tree demands; leave "
                "it out with runs"
            )
    embedded = _embedded(root, run["run_id"], shard.name)
    ids = table["prompt_id"].to_pylist()
    for prompt_id in dict.fromkeys(ids):
        rows = [i for i, p in enumerate(ids) if p == prompt_id]
        mine = table.take(pa.array(rows))
        prompt = prompts.get(prompt_id, {})
        header = {
            "prompt": prompt.get("text") or "",
            "prompt_id": prompt_id,
            "generated_texts": json.dumps([text or "" for text in mine["text"].to_pylist()]),
            "samples": json.dumps(mine["sample"].to_pylist()),
            "finish_reasons": json.dumps(mine["finish_reason"].to_pylist()),
            **({"messages": prompt["messages"]} if prompt.get("messages") else {}),
        }
        lists = {name: mine[name].combine_chunks() for name in mine.column_names}
        tensors = {
            "prompt_token_ids": np.zeros(0, np.int64),
            "sequence_lengths": mine["n_tokens"].to_numpy().astype(np.int64),
            "generated_token_ids_flat": lists["token_ids"].flatten().to_numpy().astype(np.int64),
            "step_conditional_entropy_flat": lists["entropy"].flatten().to_numpy(),
        }
        if not lists["eos_logprob"].null_count:
            tensors["eos_logprob_flat"] = lists["eos_logprob"].flatten().to_numpy()
        if not lists["logprob"].null_count:
            for i, steps in enumerate(lists["logprob"]):
                tensors[f"sequence_step_logprobs.{i:05d}"] = np.array(steps.values, np.float32)
        name = f"{number:06d}.safetensors"
        _write(folder / "rollout_shards" / name, tensors, header)
        for embedder, vectors in embedded.items():
            matrix = np.stack([vectors[prompt_id, s] for s in mine["sample"].to_pylist()])
            _write(
                folder / "embedding_shards" / store.quoted(embedder) / name, {"embeddings": matrix}, {}
            )
        number += 1
    return number


def _embedded(root: Path, run_id: str, shard: str) -> dict[str, dict[tuple[str, int], np.ndarray]]:
    """By embedder, the embedding of each rollout of a shard."""
    found = {}
    for file in store.files(root, "embeddings"):
        if (file.parent.name, file.name) != (f"run={store.quoted(run_id)}", shard):
            continue
        rows = store.read_rows(file)
        matrix = rows["embedding"].combine_chunks().flatten().to_numpy().reshape(rows.num_rows, -1)
        keys = zip(rows["prompt_id"].to_pylist(), rows["sample"].to_pylist(), strict=True)
        found[store.unquoted(file.parent.parent.name.partition("=")[2])] = dict(
            zip(keys, matrix, strict=True)
        )
    return found


def _write(file: Path, tensors: dict[str, np.ndarray], header: dict[str, str]) -> None:
    save: Callable[..., bytes] = _safetensors().numpy.save
    with store.replacing(file) as stream:
        stream.write(save({n: np.ascontiguousarray(t) for n, t in tensors.items()}, metadata=header))
