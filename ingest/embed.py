"""The ingest of embeddings: every stored rollout's text under one embedder, and the spectra."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from canopy_store import sql, store
from canopy_store.errors import DataError
from canopy_store.ingest import models
from canopy_store.ingest.embedder import open_embedder, weights_sha256
from canopy_store.ingest.progress import Progress
from canopy_store.store.embeddings import add_spectra, write_embeddings


def ingest_embeddings(
    root: str | Path,
    embedder: str,
    *,
    name: str | None = None,
    prompt_prefix: str = "",
    runs: tuple[str, ...] = (),
    device: str | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> str:
    """The name under which the embeddings of all complete runs' rollouts are now stored.

    Shards already embedded are skipped, so it resumes, and picks up runs added since.

    Parameters
    ----------
    root : path of the store
    embedder : sentence-transformers folder, hub id, or package:NAME
    name : name in the store; by default the folder's or hub id's last part
    prompt_prefix : put before each text, for embedders trained with one
    runs : run ids; by default every complete run

    Raises
    ------
    ConflictError
        The name is stored with another model or prefix.
    DataError
        A rollout without text.
    """
    progress = progress or Progress()
    root = store.require(root)
    name = store.check_name("--name", name or models.short_name(embedder))
    with store.using_runs(root, runs) as chosen:
        encoder, identity = open_embedder(embedder, device)
        plan = store.plan_path(root, "embedder", name)
        if store.exists(plan) and "weights_sha256" in store.read_plan(plan)["settings"]:
            identity = {"weights_sha256": weights_sha256(embedder)}  # as it was stored at first
        settings = {"embedder": name, **identity, "prompt_prefix": prompt_prefix}
        store.plan(root, "embedder", name, settings)

        def spectra(run: Mapping[str, Any], number: int) -> Path:
            keys = {"embedder": name, "selection": "all", "run": run["run_id"]}
            return store.shard_path(store.folder(root, "embedding_spectra", **keys), number)

        todo, done = store.shards_to_do(chosen, spectra)
        for shard in done:
            add_spectra(root, name, shard.run["run_id"], shard.number)
        progress.start(sum(s.rows for s in (*todo, *done)), sum(s.rows for s in done))
        for shard in todo:
            run_id = shard.run["run_id"]
            part = store.read_rows(shard.source, ["prompt_id", "sample", "text", "n_tokens"]).to_pydict()
            if None in part["text"]:
                at = part["text"].index(None)
                raise DataError(
                    f"run {run_id}: prompt {part['prompt_id'][at]} sample {part['sample'][at]} has no "
                    "text to embed; choose other runs with --run"
                )
            matrix = encoder.encode(
                [prompt_prefix + text for text in part["text"]],
                batch_size=batch_size,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=False,
            )
            write_embeddings(root, name, run_id, shard.number, part["prompt_id"], part["sample"], matrix)
            progress.tokens(sum(part["n_tokens"]))
            progress.rollouts(shard.rows)
        sql.write_database(root)
        return name
