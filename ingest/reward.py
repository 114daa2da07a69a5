"""The ingest of rewards: every stored rollout scored by a sequence-classification reward model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from canopy_store import sql, store
from canopy_store.errors import DataError, UsageError
from canopy_store.ingest import models
from canopy_store.ingest.classifier import load_classifier
from canopy_store.ingest.jobs import Columns, Job, Unit, rollout_groups, run_job
from canopy_store.ingest.progress import Progress
from canopy_store.ingest.sources import resolve_model, short_name


def ingest_rewards(root: str | Path, model: str, **options: Any) -> str:
    """The name under which the rewards of all complete runs' rollouts are now stored.

    The model reads prompt and rollout as a conversation where its tokenizer has a chat template, as a
    pair of texts elsewhere; the reward is its logit. Longer input than it takes loses its beginning.
    Shards already scored are skipped, so it resumes, and picks up runs added since.

    Parameters
    ----------
    root : path of the store
    model : folder, hub id or package:NAME of a sequence-classification model, safetensors only
    name : name in the store; by default the folder's or hub id's last part
    label : which logit is the reward, where the model has several
    runs : run ids; by default every complete run
    device, dtype, batch_size : of the model
    shard, executor, workers, progress : as of `canopy_store.ingest.jobs.run_job`

    Raises
    ------
    ConflictError
        The name is stored with another model or label.
    DataError
        A rollout or prompt without text, or a reward that is not finite.
    """
    return run_job(root, open_rewards, {"model": model, **options})


def open_rewards(
    root: str | Path,
    model: str,
    *,
    name: str | None = None,
    label: int | None = None,
    runs: tuple[str, ...] = (),
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 16,
    progress: Progress,
) -> Job:
    """The job of `ingest_rewards`, its model loaded."""
    root = store.writable(root)
    path = resolve_model(model)
    name = name or short_name(model)
    scorer, tokenizer = load_classifier(path, device, dtype, "a reward model")
    tokenizer.truncation_side = "left"
    labels = scorer.config.num_labels
    if label is None and labels > 1:
        raise UsageError(f"{path}: it has {labels} labels; name the one that is the reward: --label I")
    if not 0 <= (label or 0) < labels:
        raise UsageError(f"--label {label}: needs 0 to {labels - 1}")
    weights = models.weights_sha256(path)
    settings = {"reward_model": name, "weights_sha256": weights, "label": label or 0}
    prompts = sql.prompts(root)

    def rows(unit: Unit, progress: Progress) -> tuple[Columns, int]:
        task = unit.group.run["task"]
        columns = ["run_id", "prompt_id", "sample", "text", "n_tokens"]
        part = store.read_rows(unit.source, columns).to_pydict()
        names = [
            f"run {unit.group.run_id}: prompt {p} sample {s}"
            for p, s in zip(part["prompt_id"], part["sample"], strict=True)
        ]
        inputs = [
            _input(tokenizer, prompts.get((task, prompt_id), {}), text, where)
            for prompt_id, text, where in zip(part["prompt_id"], part["text"], names, strict=True)
        ]
        rewards = _score(scorer, tokenizer, inputs, label or 0, batch_size)
        if not np.isfinite(rewards).all():
            raise DataError(
                f"{names[int(np.argmin(np.isfinite(rewards)))]}: the reward is NaN or infinite; the "
                "weights are damaged, or try --dtype float32"
            )
        tokens = sum(part["n_tokens"])
        progress.tokens(tokens)
        return {**{key: part[key] for key in columns[:3]}, "reward": rewards}, tokens

    groups = rollout_groups(root, "rewards", name, runs)
    return Job(root, "rewards", name, settings, groups, rows, device=scorer.device.type)


def _input(
    tokenizer: Any, prompt: Mapping[str, Any], text: str | None, name: str
) -> tuple[str, str | None]:
    """What the model reads: one rendered conversation, or the pair of prompt and rollout."""
    plain, messages = prompt.get("text"), prompt.get("messages")
    if text is None or (plain is None and messages is None):
        what = "no text" if text is None else "a prompt that the store has no text of"
        raise DataError(f"{name} has {what}; choose other runs with --run")
    said = json.loads(messages) if messages else [{"role": "user", "content": plain}]
    if getattr(tokenizer, "chat_template", None):
        whole = [*said, {"role": "assistant", "content": text}]
        return tokenizer.apply_chat_template(whole, tokenize=False), None
    return plain or "\n".join(str(m["content"]) for m in said), text


@torch.inference_mode()
def _score(
    scorer: Any, tokenizer: Any, inputs: list[tuple[str, str | None]], label: int, batch_size: int
) -> np.ndarray:
    """(n,) rewards; inputs of like length share a batch."""
    rewards = np.zeros(len(inputs))
    order = sorted(range(len(inputs)), key=lambda i: sum(len(part or "") for part in inputs[i]))
    window = models.context_window(scorer) or tokenizer.model_max_length
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        pairs = inputs[rows[0]][1] is not None
        batch = tokenizer(
            [inputs[i][0] for i in rows],
            [inputs[i][1] for i in rows] if pairs else None,
            # a chat template writes the special tokens itself
            add_special_tokens=pairs,
            padding=True,
            truncation=True,
            max_length=min(window, 1 << 20),
            return_tensors="pt",
        ).to(scorer.device)
        rewards[rows] = scorer(**batch).logits[:, label].float().cpu().numpy()
    return rewards
