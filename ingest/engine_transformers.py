"""The engine with the whole record: a model loaded by transformers, sampled by our own loop."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import transformers

from canopy_store.ingest import models
from canopy_store.ingest.engines import Engine
from canopy_store.ingest.progress import Progress
from canopy_store.ingest.sample import Job, Rollout, Sampling, sample_prompts, width_for


def open_model(source: str, device: str | None = None, dtype: str | None = None) -> Engine:
    """The engine over the model at ``source``: local folder, GGUF file, hub id or package:NAME."""
    model, tokenizer, path = models.load_model(source, device, dtype)
    return engine_of(model, tokenizer, models.checkpoint(source, path, tokenizer))


def engine_of(model: Any, tokenizer: Any, checkpoint: dict[str, str | None]) -> Engine:
    """The engine over a model in memory; ``checkpoint`` as of `Engine`."""

    def sample(jobs: Sequence[Job], sampling: Sampling, progress: Progress) -> list[list[Rollout]]:
        return sample_prompts(model, jobs, sampling, progress.tokens, progress.say)

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return Engine(
        tokenizer=tokenizer,
        end_ids=tuple(models.end_token_ids(model, tokenizer)),
        window=models.context_window(model),
        checkpoint=checkpoint,
        settings={"dtype": str(model.dtype).removeprefix("torch."), "device": model.device.type},
        versions=versions,
        width=functools.partial(width_for, model),
        sample=sample,
    )
