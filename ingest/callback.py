"""Rollouts along a training: a callback that samples the model in memory every so many steps.

For transformers' Trainer, and so for every trainer of TRL:

    CanopyCallback("S", "prompts.jsonl", every=50, family="llama", variant="grpo", task="math")

The steps are a series, as of `canopy_store.ingest.series`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import TrainerCallback

from canopy_store import store
from canopy_store.errors import CanopyError, ConflictError, UsageError
from canopy_store.ingest import engine_transformers, models
from canopy_store.ingest.engines import Engine
from canopy_store.ingest.jobs import run_job
from canopy_store.ingest.progress import Progress
from canopy_store.ingest.prompts import read_prompts
from canopy_store.ingest.rollouts import open_rollouts
from canopy_store.ingest.series import step_variant
from canopy_store.ingest.settings import Draws, Source, sort_options

log = transformers.utils.logging.get_logger(__name__)


class CanopyCallback(TrainerCallback):
    """Samples the same prompts before the first step, every ``every`` steps, and after the last one.

    Training goes on as if there were no callback: modes, attention and the states of all random number
    generators are put back, to the bit. The random numbers of a rollout follow from its run, prompt and
    sample alone. What is wrong with the call is raised before the first step. What fails later, a full
    disk or logits that are NaN, is said in a warning, and the step is left out.

    A training that goes on from a saved checkpoint adds its further steps; steps that are stored stay.

    Parameters
    ----------
    root : path of the store, made if missing
    prompts : their file, as of `canopy_store.ingest.prompts.read_prompts`
    every : optimiser steps from one sampling to the next
    family, variant : names of the series; a step is the model FAMILY/VARIANT@STEP
    parent, treatment : of the series; by default FAMILY/base, and the variant's name
    options : task, and the other fields of `Source` and `Draws` in `canopy_store.ingest.settings`:
        samples, max_new_tokens, temperature, …

    Raises
    ------
    DataError, StoreError, UsageError
        Bad prompts, a store that cannot be written, an impossible setting, an option that is none.
    """

    def __init__(
        self,
        root: str | Path,
        prompts: str | Path,
        *,
        every: int,
        family: str,
        variant: str,
        parent: str | None = None,
        treatment: str | None = None,
        **options: Any,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise UsageError(f"every {every}: needs a whole number of steps, at least 1")
        self.root, self.every, self.family, self.variant = root, every, family, variant
        self.options = {**options, "prompts": prompts}
        self.of = {"parent": parent or f"{family}/base", "treatment": treatment or variant}
        source, _ = sort_options(self.options, Source, Draws)
        for option, name in (("family", family), ("variant", variant)):
            store.check_name(option, name)
        read_prompts(source.prompts, source.limit)
        store.place(root)

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Samples the model as it is before the first step."""
        if not state.is_world_process_zero:
            return
        _require_whole(given["model"])
        if state.global_step == 0:
            self._require_new()
        self._sample(state, given)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Samples where the step is one of those asked for."""
        if state.is_world_process_zero and state.global_step % self.every == 0:
            self._sample_or_warn(state, given)

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Samples the model as it is after the last step, where that was no step asked for."""
        if state.is_world_process_zero:
            self._sample_or_warn(state, given)

    def _require_new(self) -> None:
        """Raises ConflictError where another training's steps are stored under the series' name."""
        root = store.place(self.root)
        rows = store.models(root).values() if store.exists(root / "canopy.json") else []
        steps = [r["step"] for r in rows if (r["family"], r["series"]) == (self.family, self.variant)]
        if any(step > 0 for step in steps):
            raise ConflictError(
                f"{root}: series {self.family}/{self.variant} has steps of a training already, up to "
                f"{max(steps)}; give another variant, or go on from its last checkpoint"
            )

    def _sample_or_warn(self, state: Any, given: Any) -> None:
        try:
            self._sample(state, given)
        except (CanopyError, OSError) as error:
            log.warning(f"canopy: step {state.global_step} is left out: {error}")

    def _sample(self, state: Any, given: Any) -> None:
        """Stores the step's run, unless it is stored already."""
        step, variant = state.global_step, step_variant(self.variant, state.global_step)
        run_id = f"{self.family}.{variant}.{self.options['task']}"
        root = store.place(self.root)
        if store.exists(root / "canopy.json"):
            if store.is_complete(root, run_id):
                return
            # the weights of a training that went on are not those that it was stopped with, to the bit
            store.forget_unfinished(root, run_id, "transformers")
        model = given["model"]
        tokens = getattr(state, "num_input_tokens_seen", 0) or None  # 0 where it is not counted
        with undisturbed(model):
            run_job(
                root,
                open_rollouts,
                {
                    "model": f"{self.family}/{self.variant}",
                    "family": self.family,
                    "variant": variant,
                    "series": self.variant,
                    "step": step,
                    "tokens_seen": tokens,
                    "loaded": _engine(model, _tokenizer(given)),
                    "progress": Progress(),
                    **self.of,
                    **self.options,
                },
            )


@contextlib.contextmanager
def undisturbed(model: torch.nn.Module) -> Iterator[None]:
    """Inside, a model that is trained is in eval mode; after it, all is as it was.

    Kept are each module's mode, the attention implementation, and the states of the random number
    generators of python, numpy and torch, on every device.
    """
    modes = {module: module.training for module in model.modules()}
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    attention = config._attn_implementation
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    of_cuda = torch.cuda.get_rng_state_all() if cuda else []
    of_mps = torch.mps.get_rng_state() if mps else None
    try:
        model.eval()
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(of_cuda)
            torch.cuda.empty_cache()  # the room of the rollouts is the training's again
        if of_mps is not None:
            torch.mps.set_rng_state(of_mps)
        if config._attn_implementation != attention:
            model.set_attn_implementation(attention)  # type: ignore[operator]
        for module, mode in modes.items():
            module.training = mode


def _engine(model: Any, tokenizer: Any) -> Engine:
    """The engine over a model in memory, whose weights are no file: their hash is NULL."""
    checkpoint = {
        "weights_sha256": None,
        "tokenizer_sha256": models.tokenizer_sha256(tokenizer),
        "source": None,
    }
    return engine_transformers.engine_of(model, tokenizer, checkpoint)


def _tokenizer(given: Any) -> Any:
    """The trainer's tokenizer: its processing class, or that of a processor."""
    found = given.get("processing_class")
    found = getattr(found, "tokenizer", found)
    if found is None:
        raise UsageError("the trainer has no tokenizer; give it as processing_class")
    return found


def _require_whole(model: Any) -> None:
    """Raises UsageError for a model of which a process holds only a part."""
    parts = any(hasattr(p, "ds_id") or hasattr(p, "placements") for p in model.parameters())
    if parts or any("FullyShardedDataParallel" in type(m).__name__ for m in model.modules()):
        raise UsageError(
            "the model is spread over processes (FSDP, ZeRO-3, tensor parallel), and cannot be sampled "
            "while it is trained; save checkpoints, and sample them: canopy ingest rollouts --model "
            "'runs/checkpoint-*'"
        )
