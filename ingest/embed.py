"""The ingest of embeddings: every stored rollout's text under one embedder, and the spectra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from canopy_store import store
from canopy_store.ingest.embedder import open_embedder, weights_sha256
from canopy_store.ingest.jobs import (
    Columns,
    Job,
    Unit,
    rollout_groups,
    run_job,
    text_of,
)
from canopy_store.ingest.progress import Progress
from canopy_store.ingest.sources import short_name
from canopy_store.store.embeddings import add_spectra, embedding_paths, write_embeddings


def ingest_embeddings(root: str | Path, embedder: str, **options: Any) -> str:
    """The name under which the embeddings of all complete runs' rollouts are now stored.

    Shards already embedded are skipped, so it resumes, and picks up runs added since.

    Parameters
    ----------
    root : path of the store
    embedder : sentence-transformers folder, hub id, or package:NAME
    name : name in the store; by default the folder's or hub id's last part
    prompt_prefix : put before each text, for embedders trained with one
    runs : run ids; by default every complete run
    device, batch_size : of the embedder
    shard, executor, workers, progress : as of `canopy_store.ingest.jobs.run_job`

    Raises
    ------
    ConflictError
        The name is stored with another model or prefix.
    DataError
        A rollout without text.
    """
    return run_job(root, open_embeddings, {"embedder": embedder, **options})


def open_embeddings(
    root: str | Path,
    embedder: str,
    *,
    name: str | None = None,
    prompt_prefix: str = "",
    runs: tuple[str, ...] = (),
    device: str | None = None,
    batch_size: int = 64,
    progress: Progress,
) -> Job:
    """The job of `ingest_embeddings`, its model loaded."""
    root = store.writable(root)
    name = name or short_name(embedder)
    encoder, identity = open_embedder(embedder, device)
    plan = store.plan_path(root, "embedder", name)
    if store.exists(plan) and "weights_sha256" in store.read_plan(plan)["settings"]:
        identity = {"weights_sha256": weights_sha256(embedder)}  # it began when that told them apart
    settings = {"embedder": name, **identity, "prompt_prefix": prompt_prefix}

    def rows(unit: Unit, progress: Progress) -> tuple[Columns, int]:
        part = store.read_rows(unit.source, ["prompt_id", "sample", "text", "n_tokens"]).to_pydict()
        texts = text_of(part, "text", "text to embed", unit.group.run_id)
        part["embedding"] = encoder.encode(
            [prompt_prefix + text for text in texts],
            batch_size=batch_size,
            normalize_embeddings=True,
            convert_to_numpy=True,
            show_progress_bar=False,
        )
        tokens = sum(part["n_tokens"])
        progress.tokens(tokens)
        return part, tokens

    def write(unit: Unit, part: Columns) -> None:
        of = (root, name, unit.group.run_id, unit.number)
        write_embeddings(*of, part["prompt_id"], part["sample"], part["embedding"])

    def files(unit: Unit) -> list[Path]:
        return list(embedding_paths(root, name, unit.group.run_id, unit.number))

    return Job(
        root,
        "embeddings",
        name,
        settings,
        rollout_groups(root, "embeddings", name, runs),
        rows,
        write,
        files,
        after=lambda group, _: add_spectra(root, group.run_id),
        device=str(encoder.device),
    )
