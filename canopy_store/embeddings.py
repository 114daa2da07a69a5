"""Embeddings of a shard of rollouts and the spectra from which SQL has every diversity measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from canopy_store import store
from canopy_store.errors import DataError


def spectrum(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum (d,) of the unit embeddings and eigenvalues of the cosine kernel / n, largest first.

    ``embeddings`` is (n, d) of any positive length. The smaller of the n x n kernel and the d x d
    second moment is diagonalised: both have the same eigenvalues but for zeros. Float64 throughout.
    Source: Friedman and Dieng, "The Vendi Score" (2023), definition 3.1.
    """
    unit = np.asarray(embeddings, np.float64)
    unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
    rows, dimension = unit.shape
    kernel = unit @ unit.T if rows <= dimension else unit.T @ unit
    eigenvalues = np.linalg.eigvalsh(kernel / rows)[::-1]
    return unit.sum(axis=0), np.clip(eigenvalues, 0, 1)


def write_embeddings(
    root: Path, embedder: str, run_id: str, shard: int,
    prompt_ids: Sequence[str], samples: Sequence[int], embeddings: np.ndarray,
) -> None:  # fmt: skip
    """Writes one shard of embeddings (rows, d) at unit length, then its prompts' spectra.

    The spectra come last: a shard that has them is done.

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
    store.write_rows(
        store.shard_path(where, shard),
        "embeddings",
        {**keys, "embedding": flat},
        embedding_dim=dimension,
    )
    spectra: dict[str, list] = {name: [] for name in ("prompt_id", "n", "embedding_sum", "eigenvalues")}
    ids = np.asarray(prompt_ids, dtype=object)
    for prompt in dict.fromkeys(prompt_ids):
        mine = unit[ids == prompt]
        total, eigenvalues = spectrum(mine)
        for name, value in zip(spectra, (prompt, len(mine), total, eigenvalues), strict=True):
            spectra[name].append(value)
    count = len(spectra["n"])
    where = store.folder(root, "embedding_spectra", embedder=embedder, run=run_id)
    store.write_rows(
        store.shard_path(where, shard),
        "embedding_spectra",
        {"run_id": [run_id] * count, "selection": ["all"] * count, **spectra},
    )
