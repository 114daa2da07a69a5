"""Embeddings of a shard of rollouts and the spectra from which SQL has every diversity measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from canopy_store import store
from canopy_store.errors import DataError
from canopy_store.schema import TABLES


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
) -> None:
    """Writes one shard of embeddings (rows, d) at unit length, then its prompts' spectra.

    The spectra come last, those of every selection too: a shard that has them is done.

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
    where = store.folder(root, "embeddings", embedder=embedder, run=run_id)
    path = store.shard_path(where, shard)
    store.write_rows(path, "embeddings", {**keys, "embedding": flat}, embedding_dim=dimension)
    _write_spectra(root, embedder, run_id, shard, "all", prompt_ids, samples, unit)
    add_spectra(root, embedder, run_id, shard)


def add_spectra(root: Path, embedder: str, run_id: str, shard: int) -> None:
    """Writes the spectra that an embedded shard lacks: one file for each selection of its run."""
    subset = None
    for selection, chosen in store.selections(root, run_id):
        where = store.folder(
            root, "embedding_spectra", embedder=embedder, selection=selection, run=run_id
        )
        if store.exists(store.shard_path(where, shard)):
            continue
        if subset is None:
            folder = store.folder(root, "embeddings", embedder=embedder, run=run_id)
            data = store.read_rows(store.shard_path(folder, shard))
            prompt_ids, samples = data["prompt_id"].to_pylist(), data["sample"].to_pylist()
            lists = data["embedding"].combine_chunks()
            subset = lists.flatten().to_numpy().reshape(len(data), -1)
        members = set(
            zip(*(store.read_rows(chosen)[k].to_pylist() for k in ("prompt_id", "sample")), strict=True)
        )
        rows = [i for i, key in enumerate(zip(prompt_ids, samples, strict=True)) if key in members]
        _write_spectra(
            root,
            embedder,
            run_id,
            shard,
            selection,
            [prompt_ids[i] for i in rows],
            [samples[i] for i in rows],
            subset[rows],
        )


def _write_spectra(
    root: Path,
    embedder: str,
    run_id: str,
    shard: int,
    selection: str,
    prompt_ids: Sequence[str],
    samples: Sequence[int],
    unit: np.ndarray,
) -> None:
    ids, numbers = np.asarray(prompt_ids, dtype=object), np.asarray(samples, np.int32)
    spectra = []
    for prompt in dict.fromkeys(prompt_ids):
        mine = np.flatnonzero(ids == prompt)
        total, eigenvalues, distances = spectrum(unit[mine])
        spectra.append(
            {
                "run_id": run_id,
                "prompt_id": prompt,
                "n": len(mine),
                "samples": numbers[mine],
                "semantic_distances": distances,
                "embedding_sum": total,
                "eigenvalues": eigenvalues,
            }
        )
    where = store.folder(root, "embedding_spectra", embedder=embedder, selection=selection, run=run_id)
    names = [column.name for column in TABLES["embedding_spectra"].columns]
    store.write_rows(
        store.shard_path(where, shard),
        "embedding_spectra",
        {name: [row[name] for row in spectra] for name in names},
    )
