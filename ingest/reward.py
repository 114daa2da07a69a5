"""The ingest of rewards: every stored rollout scored by a sequence-classification reward model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from canopy_store import sql, store
from canopy_store.errors import DataError, StoreError, UsageError
from canopy_store.ingest import models
from canopy_store.ingest.progress import Progress


def ingest_rewards(
    root: str | Path,
    model: str,
    *,
    name: str | None = None,
    label: int | None = None,
    runs: tuple[str, ...] = (),
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> str:
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

    Raises
    ------
    ConflictError
        The name is stored with another model or label.
    DataError
        A rollout or prompt without text, or a reward that is not finite.
    """
    progress = progress or Progress()
    root = store.require(root)
    path = models.resolve_model(model)
    name = store.check_name("--name", name or models.short_name(model))
    with store.using_runs(root, runs) as chosen:
        scorer, tokenizer = _load(path, device, dtype)
        labels = scorer.config.num_labels
        if label is None and labels > 1:
            raise UsageError(
                f"{path}: it has {labels} labels; name the one that is the reward: --label I"
            )
        if not 0 <= (label or 0) < labels:
            raise UsageError(f"--label {label}: needs 0 to {labels - 1}")
        settings = {
            "reward_model": name,
            "weights_sha256": models.weights_sha256(path),
            "label": label or 0,
        }
        store.plan(root, "reward_model", name, settings)
        with sql.connect(root) as con:
            prompts = {
                (task, prompt_id): (text, messages)
                for task, prompt_id, text, messages in con.sql(
                    "select task, prompt_id, text, messages from prompts"
                ).fetchall()
            }

        def rewards_of(run: Mapping[str, Any], number: int) -> Path:
            where = store.folder(root, "rewards", reward_model=name, run=run["run_id"])
            return store.shard_path(where, number)

        todo, done = store.shards_to_do(chosen, rewards_of)
        progress.start(sum(s.rows for s in (*todo, *done)), sum(s.rows for s in done))
        for shard in todo:
            run = shard.run
            columns = ["run_id", "prompt_id", "sample", "text", "n_tokens"]
            part = store.read_rows(shard.source, columns).to_pydict()
            inputs = [
                _input(
                    tokenizer,
                    prompts.get((run["task"], prompt_id), (None, None)),
                    text,
                    f"run {run['run_id']}: prompt {prompt_id} sample {sample}",
                )
                for prompt_id, sample, text in zip(
                    part["prompt_id"], part["sample"], part["text"], strict=True
                )
            ]
            rewards = _score(scorer, tokenizer, inputs, label or 0, batch_size)
            if not np.isfinite(rewards).all():
                at = int(np.argmin(np.isfinite(rewards)))
                raise DataError(
                    f"run {run['run_id']}: prompt {part['prompt_id'][at]} sample {part['sample'][at]}: "
                    "the reward is NaN or infinite; the weights are damaged, or try --dtype float32"
                )
            keys = {key: part[key] for key in ("run_id", "prompt_id", "sample")}
            store.write_rows(shard.target, "rewards", {**keys, "reward": rewards})
            progress.tokens(sum(part["n_tokens"]))
            progress.rollouts(shard.rows)
        sql.write_database(root)
        return name


def _load(path: Path, device: str | None, dtype: str | None) -> tuple[Any, Any]:
    device = device or models.default_device()
    dtype = dtype or models.default_dtype(device)
    if not list(path.glob("*.safetensors")):
        raise StoreError(f"{path}: no *.safetensors; pickled weights are not loaded")
    kwargs: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    models.quiet()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
        scorer, found = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=models.DTYPES[dtype], use_safetensors=True, output_loading_info=True, **kwargs
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise StoreError(f"{path}: cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    if found["missing_keys"]:
        # transformers would make the head up: rewards would be noise
        raise StoreError(
            f"{path}: not a reward model: no weights for {sorted(found['missing_keys'])[0]}"
        )
    tokenizer.truncation_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if scorer.config.pad_token_id is None:
        scorer.config.pad_token_id = tokenizer.pad_token_id
    return scorer.to(device).eval(), tokenizer


def _input(
    tokenizer: Any, prompt: tuple[str | None, str | None], text: str | None, name: str
) -> tuple[str, str | None]:
    """What the model reads: one rendered conversation, or the pair of prompt and rollout."""
    asked, messages = prompt
    if text is None or (asked is None and messages is None):
        what = "no text" if text is None else "a prompt that the store has no text of"
        raise DataError(f"{name} has {what}; choose other runs with --run")
    said = json.loads(messages) if messages else [{"role": "user", "content": asked}]
    if getattr(tokenizer, "chat_template", None):
        whole = [*said, {"role": "assistant", "content": text}]
        return tokenizer.apply_chat_template(whole, tokenize=False), None
    return asked or "\n".join(str(m["content"]) for m in said), text


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
