"""Embeddings of a shard of rollouts and the spectra from which SQL has every diversity measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from canopy_store.errors import DataError
from canopy_store.schema import TABLES
from canopy_store.store.commits import Record, commit, fresh_number, record, records, remove_unnamed
from canopy_store.store.files import exists
from canopy_store.store.layout import content_id, folder, shard_path
from canopy_store.store.locks import selecting
from canopy_store.store.parquet import read_rows, write_rows


def spectrum(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[float | None]]:
    """Sum (d,) of the unit embeddings, eigenvalues of the cosine kernel / n, and distances (n,).

    ``embeddings`` is (n, d) of any positive length. The smaller of the n x n kernel and the d x d
    second moment is diagonalised: both have the same eigenvalues but for zeros. Largest first;
    float64 throughout. A rollout's distance is 1 - its mean cosine similarity to the others, which
    follows from the sum; that of a single rollout is None.
    Source: Friedman and Dieng, "The Vendi Score" (2023), definition 3.1.
    """
    unit = np.asarray(embeddings, np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    rows, dimension = unit.shape
    kernel = unit @ unit.T if rows <= dimension else unit.T @ unit
    eigenvalues = np.linalg.eigvalsh(kernel / rows)[::-1]
    total = unit.sum(axis=0)
    distances = (1 - (unit @ total - 1) / (rows - 1)).tolist() if rows > 1 else [None]
    return total, np.clip(eigenvalues, 0, 1), distances


def write_embeddings(
    root: Path,
    embedder: str,
    run_id: str,
    shard: int,
    prompt_ids: Sequence[str],
    samples: Sequence[int],
    embeddings: np.ndarray,
) -> list[Path]:
    """The files of one shard of embeddings (rows, d), at unit length, and of its prompts' spectra.

    The embeddings come last: a shard that has them is done.

    Raises
    ------
    DataError
        An embedding is zero or not finite.
    """
    matrix = np.asarray(embeddings, np.float64)
    norms = np.linalg.norm(matrix, axis=1)
    bad = np.flatnonzero(~(np.isfinite(norms) & (norms > 0)))
    if len(bad):
        raise DataError(
            f"prompt {prompt_ids[bad[0]]} sample {samples[bad[0]]}: its embedding is zero or not "
            "finite and has no direction"
        )
    unit = (matrix / norms[:, None]).astype(np.float32)
    dimension = unit.shape[1]
    flat = pa.FixedSizeListArray.from_arrays(pa.array(unit.reshape(-1)), dimension)
    keys = {"run_id": [run_id] * len(unit), "prompt_id": prompt_ids, "sample": samples}
    path, spectra = embedding_paths(root, embedder, run_id, shard)
    _write_spectra(spectra, run_id, prompt_ids, samples, unit)
    write_rows(path, "embeddings", {**keys, "embedding": flat}, embedding_dim=dimension)
    return [path, spectra]


def embedding_paths(root: Path, embedder: str, run_id: str, shard: int) -> tuple[Path, Path]:
    """Where a shard's embeddings stand, and the spectra of all its rollouts."""
    where = folder(root, "embeddings", embedder=embedder, run=run_id)
    spectra = folder(root, "embedding_spectra", embedder=embedder, selection="all", run=run_id)
    return shard_path(where, shard), shard_path(spectra, shard)


def add_spectra(root: Path, run_id: str) -> None:
    """Commits the spectra that a run's selections lack, one record for each embedder and selection."""
    if not records(root, "selections", run=run_id):
        return
    with selecting(root, run_id):  # as they are now, and until their spectra are committed
        selected = records(root, "selections", run=run_id)
        for embedded in records(root, "embeddings", run=run_id):
            for selection in selected:
                _select_spectra(root, embedded, selection)


def spectra_settings(selected: Record) -> dict[str, str]:
    """The settings of the record of a selection's spectra: they are made anew where it has changed."""
    return {"selection": content_id({name: said["sha256"] for name, said in selected.files.items()})}


def add_shard_spectra(root: Path, embedder: str, run_id: str, shard: int) -> Path:
    """The spectra of all rollouts of a shard whose embeddings are stored without them."""
    embeddings, spectra = embedding_paths(root, embedder, run_id, shard)
    data = read_rows(embeddings)
    prompt_ids, samples = data["prompt_id"].to_pylist(), data["sample"].to_pylist()
    _write_spectra(spectra, run_id, prompt_ids, samples, _matrix(data))
    return spectra


def _select_spectra(root: Path, embedded: Record, selected: Record) -> None:
    run_id, embedder = embedded.keys["run"], embedded.keys["embedder"]
    keys = {"embedder": embedder, "selection": selected.keys["selection"], "run": run_id}
    made_of = spectra_settings(selected)
    old = record(root, "embedding_spectra", **keys)
    whole = old is not None and all(exists(root / name) for name in old.files)
    if (whole and old is not None and old.settings == made_of) or not embedded.of("embeddings"):
        return
    where, number = folder(root, "embedding_spectra", **keys), fresh_number(old)
    chosen = {key for name in selected.of("selections") for key in _keys(read_rows(root / name))}
    written: list[Path] = []
    for shard in embedded.of("embeddings"):
        data = read_rows(root / shard)
        pairs = _keys(data)
        unit = _matrix(data)
        rows = [at for at, key in enumerate(pairs) if key in chosen]
        written.append(shard_path(where, number + len(written)))
        prompt_ids, samples = [pairs[at][0] for at in rows], [pairs[at][1] for at in rows]
        _write_spectra(written[-1], run_id, prompt_ids, samples, unit[rows])
    commit(root, "embedding_spectra", keys, written, made_of)
    if old is not None:
        remove_unnamed(root, old.files)


def _matrix(rows: pa.Table) -> np.ndarray:
    """The embeddings (rows, d)."""
    return rows["embedding"].combine_chunks().flatten().to_numpy().reshape(len(rows), -1)


def _keys(rows: pa.Table) -> list[tuple[str, int]]:
    return list(zip(rows["prompt_id"].to_pylist(), rows["sample"].to_pylist(), strict=True))


def _write_spectra(
    path: Path, run_id: str, prompt_ids: Sequence[str], samples: Sequence[int], unit: np.ndarray
) -> None:
    ids, numbers = np.asarray(prompt_ids, dtype=object), np.asarray(samples, np.int32)
    spectra = []
    for prompt in dict.fromkeys(prompt_ids):
        mine = np.flatnonzero(ids == prompt)
        total, eigenvalues, distances = spectrum(unit[mine])
        row = {"run_id": run_id, "prompt_id": prompt, "n": len(mine), "samples": numbers[mine]}
        row |= {"semantic_distances": distances, "embedding_sum": total, "eigenvalues": eigenvalues}
        spectra.append(row)
    columns = [column.name for column in TABLES["embedding_spectra"].columns]
    write_rows(path, "embedding_spectra", {name: [row[name] for row in spectra] for name in columns})
