"""The ingest of rollouts: every prompt of a file, sampled by one model, stored shard by shard."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from canopy_store import sql, store
from canopy_store.errors import DataError, UsageError
from canopy_store.ingest import models
from canopy_store.ingest.prompts import read_prompts, render
from canopy_store.ingest.sample import Job, Rollout, Sampling, sample_prompts, uniforms
from canopy_store.rollouts import write_shard


class Progress:
    """What a long job tells as it goes; this one says nothing. The command line shows a bar."""

    def start(self, rollouts: int, done: int) -> None:
        """``rollouts`` in all, of which ``done`` are stored already."""

    def tokens(self, count: int) -> None:
        """``count`` tokens more were sampled."""

    def rollouts(self, count: int) -> None:
        """``count`` rollouts more were stored."""

    def say(self, line: str) -> None:
        """A line the user should see."""


def ingest_rollouts(
    root: str | Path,
    model: str,
    *,
    family: str,
    variant: str,
    task: str,
    prompts: str | Path,
    samples: int = 16,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    template: str = "auto",
    top_logprobs: int = 0,
    eos_token_ids: tuple[int, ...] = (),
    no_eos: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    batch_size: int = 32,
    prompts_per_shard: int = 4,
    limit: int | None = None,
    run: str | None = None,
    parent: str | None = None,
    treatment: str | None = None,
    hyperparameters: dict[str, Any] | None = None,
    data_sha256: str | None = None,
    progress: Progress | None = None,
) -> str:
    """The id of the run, complete: ``samples`` rollouts of each prompt, stored.

    Called again after a break, it samples only the missing shards and gives what an unbroken run
    gives on the same machine.

    Parameters
    ----------
    root : path of the store, made if missing
    model : local folder, GGUF file, hub id, or package:NAME
    family, variant : names of the checkpoint; together they are its model_id
    task, prompts : the task's name and its JSONL file
    samples, max_new_tokens : rollouts per prompt, tokens per rollout at most
    temperature, top_k, top_p : the sampling policy, applied in this order; temperature 0 is greedy
    template : chat, plain, or auto (chat where the tokenizer has a template)
    top_logprobs : also stores so many likeliest ids and log-probabilities per step
    eos_token_ids, no_eos : end tokens instead of the model's; or allow a model that has none
    batch_size : rollouts sampled side by side
    run : name of the run, by default family.variant.task
    parent, treatment, hyperparameters, data_sha256 : for the checkpoint's row in ``models``

    Raises
    ------
    ConflictError
        The run is stored with other settings; names each difference.
    DataError, StoreError, UsageError
        Bad prompts, an unreadable model or store, impossible settings.
    """
    progress = progress or Progress()
    _check_settings(samples, max_new_tokens, temperature, top_k, top_p, batch_size, top_logprobs,
                    prompts_per_shard, limit, template)  # fmt: skip
    run_id = store.check_name("--run", run or f"{family}.{variant}.{task}")
    for option, value in (("--family", family), ("--variant", variant), ("--task", task)):
        store.check_name(option, value)
    listed = read_prompts(prompts, limit)
    root = store.init(root)
    loaded, tokenizer, path = models.load_model(model, device, dtype)
    ends = tuple(eos_token_ids) or tuple(models.end_token_ids(loaded, tokenizer))
    if no_eos:
        ends = ()
    elif not ends:
        raise DataError(
            f"{path}: the model has no end-of-sequence token; name one with --eos-token-id ID, "
            "or let every rollout run to --max-new-tokens with --no-eos"
        )
    if template == "auto":
        template = "chat" if getattr(tokenizer, "chat_template", None) else "plain"
    token_ids = [render(p, tokenizer, template, f"{prompts}: line {p['line']}") for p in listed]
    _check_window(loaded, prompts, listed, token_ids, max_new_tokens)
    if temperature == 0:
        progress.say("temperature 0 is greedy: every rollout of a prompt is the same, entropy 0")
    weights = models.weights_sha256(path)
    settings = {
        "run_id": run_id, "family": family, "variant": variant, "task": task,
        "engine": "transformers", "weights_sha256": weights,
        "prompts_sha256": store.content_id([[p["prompt_id"], t] for p, t in
                                            zip(listed, token_ids, strict=True)]),
        "template": template, "n_prompts": len(listed), "n_samples": samples,
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k,
        "top_p": top_p, "seed": seed, "top_logprobs": top_logprobs, "end_token_ids": list(ends),
        "dtype": str(loaded.dtype).removeprefix("torch."), "device": loaded.device.type,
        "batch_size": batch_size, "prompts_per_shard": prompts_per_shard,
        "n_shards": -(-len(listed) // prompts_per_shard),
    }  # fmt: skip
    model_id = store.add_model(root, {
        "family": family, "variant": variant, "parent_id": parent, "treatment": treatment,
        "hyperparameters": store.canonical(hyperparameters) if hyperparameters else None,
        "data_sha256": data_sha256, "weights_sha256": weights,
        "tokenizer_sha256": models.tokenizer_sha256(tokenizer),
        "source": model if "/" in model and not Path(model).exists() else path.name,
    })  # fmt: skip
    store.plan(root, "run", run_id, settings)
    sampling = Sampling(temperature, top_k, top_p, max_new_tokens, ends, top_logprobs, batch_size)
    where = store.folder(root, "rollouts", family=family, variant=variant, task=task, run=run_id)
    store.remove_leftovers(where)
    shards = [
        (number, store.shard_path(where, number), range(first, min(first + prompts_per_shard,
                                                                   len(listed))))
        for number, first in enumerate(range(0, len(listed), prompts_per_shard))
    ]  # fmt: skip
    missing = [shard for shard in shards if not shard[1].exists()]
    progress.start(len(listed) * samples, (len(listed) - sum(len(s[2]) for s in missing)) * samples)
    started = time.perf_counter()
    for _, shard, members in missing:
        jobs = [
            Job(
                token_ids[i], range(samples),
                functools.partial(uniforms, run_id, seed, listed[i]["prompt_id"], steps=max_new_tokens),
                f"{prompts}: line {listed[i]['line']}",
            )
            for i in members
        ]  # fmt: skip
        columns = _Columns()
        for i, rollouts in zip(
            members, sample_prompts(loaded, jobs, sampling, progress.tokens), strict=True
        ):
            columns.add(run_id, listed[i]["prompt_id"], tokenizer, rollouts)
        write_shard(shard, columns.values)
        progress.rollouts(len(members) * samples)
    if not store.is_complete(root, run_id):
        store.add_prompts(root, task, listed)
        store.complete_run(root, where, {
            **{k: settings[k] for k in ("run_id", "family", "variant", "task", "temperature",
                                        "top_k", "top_p", "max_new_tokens", "seed", "dtype",
                                        "device", "engine")},
            "model_id": model_id, "rendering": template, "settings": store.canonical(settings),
            "versions": store.canonical(versions()),
            "wall_s": time.perf_counter() - started,
        })  # fmt: skip
    sql.write_database(root)
    return run_id


def versions() -> dict[str, str]:
    """The versions that can change a rollout's bits."""
    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


class _Columns:
    """Rollouts gathered into the table's columns."""

    def __init__(self) -> None:
        self.values: dict[str, list[Any]] = {}

    def add(self, run_id: str, prompt_id: str, tokenizer: Any, rollouts: list[Rollout]) -> None:
        texts = tokenizer.batch_decode([r.token_ids for r in rollouts], skip_special_tokens=True)
        for text, rollout in zip(texts, rollouts, strict=True):
            row = {"run_id": run_id, "prompt_id": prompt_id, "text": text, **vars(rollout)}
            if rollout.top_token_ids is not None:
                row["top_token_ids"] = rollout.top_token_ids.tolist()
                row["top_logprobs"] = rollout.top_logprobs.tolist()  # type: ignore[union-attr]
            for name, value in row.items():
                if value is not None:
                    self.values.setdefault(name, []).append(value)


def _check_settings(
    samples: int, max_new_tokens: int, temperature: float, top_k: int, top_p: float,
    batch_size: int, top_logprobs: int, prompts_per_shard: int, limit: int | None, template: str,
) -> None:  # fmt: skip
    for option, value, least in (
        ("--samples", samples, 1), ("--max-new-tokens", max_new_tokens, 1),
        ("--top-k", top_k, 0), ("--batch-size", batch_size, 1),
        ("--top-logprobs", top_logprobs, 0), ("--prompts-per-shard", prompts_per_shard, 1),
        ("--limit", 1 if limit is None else limit, 1),
    ):  # fmt: skip
        if value < least:
            raise UsageError(f"{option} {value}: needs at least {least}")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"--temperature {temperature}: needs 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p}: needs more than 0 and at most 1")
    if template not in ("auto", "chat", "plain"):
        raise UsageError(f"--template {template}: one of auto, chat, plain")


def _check_window(
    model: Any, prompts: str | Path, listed: list[dict[str, Any]], token_ids: list[list[int]],
    max_new_tokens: int,
) -> None:  # fmt: skip
    window = models.context_window(model)
    for prompt, ids in zip(listed, token_ids, strict=True):
        if window and len(ids) + max_new_tokens > window:
            raise DataError(
                f"{prompts}: line {prompt['line']}: {len(ids)} prompt tokens and {max_new_tokens} "
                f"new ones exceed the context window of {window}; shorten the prompt or lower "
                "--max-new-tokens"
            )
