"""The ingest of rollouts: every prompt of a file, sampled by one model, stored shard by shard."""

from __future__ import annotations

import functools
import importlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from canopy_store import sql, store
from canopy_store.errors import DataError, UsageError
from canopy_store.ingest.engines import Engine, open_engine
from canopy_store.ingest.progress import Progress
from canopy_store.ingest.prompts import read_prompts, render
from canopy_store.ingest.sample import Job, Rollout, Sampling, uniforms
from canopy_store.store.rollouts import write_shard

# How shards spread over processes; its function sample_shards(root, model, options, …) does it.
EXECUTORS = {"local": None, "ray": "canopy_store.ingest.executor_ray"}


def ingest_rollouts(
    root: str | Path,
    model: str,
    *,
    shard: str | None = None,
    executor: str = "local",
    workers: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> str:
    """The id of the run, whose missing shards are now stored: ``samples`` rollouts of each prompt.

    Called again after a break, it samples only the missing shards and gives what an unbroken run
    gives on the same machine. Whoever stores the last shard completes the run.

    Parameters
    ----------
    root : path of the store, made if missing
    model : local folder, GGUF file, hub id, or package:NAME
    shard : "i/n", from 1: only every n-th shard, for the i-th of n jobs on a scheduler
    executor : local, this process; or ray, the workers of a Ray cluster, whose nodes see store, model
        and prompts under the same paths
    workers : of a Ray cluster, how many; by default one a GPU, or one a node
    options : all that `prepare` takes

    Raises
    ------
    ConflictError
        The run is stored with other settings; names each difference.
    DataError, StoreError, UsageError
        Bad prompts, an unreadable model or store, impossible settings.
    """
    progress = progress or Progress()
    if executor not in EXECUTORS:
        raise UsageError(f"--executor {executor}: one of {', '.join(EXECUTORS)}")
    part = _part(shard)
    module = EXECUTORS[executor]
    if module is not None:
        if shard is not None:
            raise UsageError("--shard: not with --executor ray, which hands the shards out itself")
        spread = importlib.import_module(module).sample_shards
        return spread(root, model, options, workers, progress)
    if workers is not None:
        raise UsageError("--workers: only with --executor ray")
    run = prepare(root, model, progress=progress, **options)
    with store.holding(run.root, run.run_id):
        todo = run.shards_to_do(part)
        run.announce(todo, part, progress)
        started = time.perf_counter()
        for number in todo:
            run.sample_shard(number, progress)
        run.complete(time.perf_counter() - started)
    return run.run_id


def _part(shard: str | None) -> tuple[int, int]:
    """The numbers (i, n) of "i/n"."""
    if shard is None:
        return 1, 1
    first, _, second = shard.partition("/")
    if not (first.isdecimal() and second.isdecimal() and 1 <= int(first) <= int(second)):
        raise UsageError(f"--shard {shard}: needs i/n with i from 1 to n, as in 2/8")
    return int(first), int(second)


@dataclass
class Run:
    """A run under way: its engine, prompts (with token ids) and settings, and where its shards go."""

    root: Path
    run_id: str
    engine: Engine
    prompts: list[dict[str, Any]]
    token_ids: list[list[int]]
    source: str  # the file of the prompts, for errors
    sampling: Sampling
    settings: dict[str, Any]
    model_id: str
    where: Path

    def members(self, shard: int) -> range:
        """The prompts of a shard, by their place in the list."""
        size = self.settings["prompts_per_shard"]
        return range(shard * size, min((shard + 1) * size, len(self.prompts)))

    def shards_to_do(self, part: tuple[int, int] = (1, 1)) -> list[int]:
        """Numbers of the shards not yet stored that fall to the i-th of n jobs; none once complete."""
        if store.is_complete(self.root, self.run_id):
            return []  # whatever its files are now: they may have been compacted
        there = {path.name for path in store.shards(self.where)}
        mine = range(part[0] - 1, self.settings["n_shards"], part[1])
        return [n for n in mine if store.shard_path(self.where, n).name not in there]

    def announce(self, todo: list[int], part: tuple[int, int], progress: Progress) -> None:
        """Tells how many rollouts the job has in all and how many are stored."""
        every = range(part[0] - 1, self.settings["n_shards"], part[1])
        total, left = (
            sum(len(self.members(n)) for n in numbers) * self.settings["n_samples"]
            for numbers in (every, todo)
        )
        progress.start(total, total - left)

    def sample_shard(self, shard: int, progress: Progress) -> None:
        """Samples and stores one shard."""
        members, steps = self.members(shard), self.sampling.max_new_tokens
        jobs = [
            Job(
                self.token_ids[i],
                range(self.settings["n_samples"]),
                functools.partial(
                    uniforms,
                    self.run_id,
                    self.settings["seed"],
                    self.prompts[i]["prompt_id"],
                    steps=steps,
                ),
                f"{self.source}: line {self.prompts[i]['line']}",
            )
            for i in members
        ]
        columns: dict[str, list[Any]] = {}
        for i, rollouts in zip(members, self.engine.sample(jobs, self.sampling, progress), strict=True):
            self._add(columns, self.prompts[i]["prompt_id"], rollouts)
        write_shard(store.shard_path(self.where, shard), columns)
        progress.rollouts(len(members) * self.settings["n_samples"])

    def _add(self, columns: dict[str, list[Any]], prompt_id: str, rollouts: list[Rollout]) -> None:
        """Adds rollouts to the table's columns; what an engine does not give has no column."""
        undecoded = [r for r in rollouts if r.text is None]
        texts = iter(
            self.engine.tokenizer.batch_decode(
                [r.token_ids for r in undecoded], skip_special_tokens=True
            )
        )
        for rollout in rollouts:
            row = {"run_id": self.run_id, "prompt_id": prompt_id, **vars(rollout)}
            row["text"] = next(texts) if rollout.text is None else rollout.text
            for name in ("top_token_ids", "top_logprobs"):  # Arrow takes no arrays of two dimensions
                row[name] = None if row[name] is None else list(row[name])
            for name, value in row.items():
                if value is not None:
                    columns.setdefault(name, []).append(value)

    def complete(self, seconds: float) -> bool:
        """Whether the run is complete, which it is once every shard is stored."""
        done = store.is_complete(self.root, self.run_id)
        if not done and not self.shards_to_do():
            store.add_prompts(self.root, self.settings["task"], self.prompts)
            said = {**self.settings, "rendering": self.settings["template"]}
            store.complete_run(
                self.root,
                self.where,
                {
                    **{
                        k: said.get(k)
                        for k in (
                            "run_id",
                            "family",
                            "variant",
                            "task",
                            "temperature",
                            "top_k",
                            "top_p",
                            "max_new_tokens",
                            "seed",
                            "dtype",
                            "device",
                            "engine",
                            "rendering",
                        )
                    },
                    "model_id": self.model_id,
                    "settings": store.canonical(self.settings),
                    "versions": store.canonical(self.engine.versions),
                    "wall_s": seconds,
                },
            )
            done = True
        sql.write_database(self.root)
        return done


def prepare(
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
    engine: str = "transformers",
    device: str | None = None,
    dtype: str | None = None,
    base_url: str | None = None,
    served_model: str | None = None,
    concurrency: int | None = None,
    batch_size: int | None = None,
    memory: float | None = None,
    prompts_per_shard: int = 4,
    limit: int | None = None,
    run: str | None = None,
    parent: str | None = None,
    treatment: str | None = None,
    hyperparameters: dict[str, Any] | None = None,
    data_sha256: str | None = None,
    progress: Progress | None = None,
) -> Run:
    """A run ready to be sampled: the model loaded, the prompts read, the settings agreed and stored.

    Parameters
    ----------
    root, model : as of `ingest_rollouts`
    family, variant : names of the checkpoint; together they are its model_id
    task, prompts : the task's name and its JSONL file
    samples, max_new_tokens : rollouts per prompt, tokens per rollout at most
    temperature, top_k, top_p : the sampling policy, applied in this order; temperature 0 is greedy
    template : chat, plain, or auto (chat where the tokenizer has a template)
    top_logprobs : also stores so many likeliest ids and log-probabilities per step
    eos_token_ids, no_eos : end tokens instead of the model's; or allow a model that has none
    engine : transformers, with the whole record; others (`engines.ENGINES`) give tokens
    device, dtype : for engines that load the model here
    base_url, served_model, concurrency : for engines behind a server
    batch_size, memory : rollouts sampled side by side; by default what ``memory`` (GB, by default a
        share of what is free) has room for. A resumed run keeps the number it began with
    run : name of the run, by default family.variant.task
    parent, treatment, hyperparameters, data_sha256 : for the checkpoint's row in ``models``

    Raises
    ------
    As `ingest_rollouts`.
    """
    progress = progress or Progress()
    _check_settings(
        samples,
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        batch_size,
        memory,
        top_logprobs,
        prompts_per_shard,
        limit,
        template,
    )
    run_id = store.check_name("--run", run or f"{family}.{variant}.{task}")
    for option, value in (("--family", family), ("--variant", variant), ("--task", task)):
        store.check_name(option, value)
    listed = read_prompts(prompts, limit)
    root = store.init(root)
    opened = open_engine(
        engine,
        model,
        device=device,
        dtype=dtype,
        base_url=base_url,
        served_model=served_model,
        concurrency=concurrency,
    )
    tokenizer = opened.tokenizer
    ends = tuple(eos_token_ids) or opened.end_ids
    if no_eos:
        ends = ()
    elif not ends:
        raise DataError(
            f"{model}: the model has no end-of-sequence token; name one with --eos-token-id ID, "
            "or let every rollout run to --max-new-tokens with --no-eos"
        )
    if template == "auto":
        template = "chat" if getattr(tokenizer, "chat_template", None) else "plain"
    token_ids = [render(p, tokenizer, template, f"{prompts}: line {p['line']}") for p in listed]
    _check_window(opened.window, prompts, listed, token_ids, max_new_tokens)
    if temperature == 0:
        progress.say("temperature 0 is greedy: every rollout of a prompt is the same, entropy 0")
    settings = {
        "run_id": run_id,
        "family": family,
        "variant": variant,
        "task": task,
        "engine": engine,
        "weights_sha256": opened.checkpoint["weights_sha256"],
        "prompts_sha256": store.content_id(
            [[p["prompt_id"], t] for p, t in zip(listed, token_ids, strict=True)]
        ),
        "template": template,
        "n_prompts": len(listed),
        "n_samples": samples,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "top_logprobs": top_logprobs,
        "end_token_ids": list(ends),
        "prompts_per_shard": prompts_per_shard,
        "n_shards": -(-len(listed) // prompts_per_shard),
        **opened.settings,
    }
    sampling = Sampling(temperature, top_k, top_p, max_new_tokens, ends, top_logprobs)
    if opened.width is not None:
        shard = sorted(map(len, token_ids))[-prompts_per_shard:]  # the one that takes the most
        settings["batch_size"] = (
            batch_size
            or _stored_width(root, run_id)
            or opened.width(sampling, shard, None if memory is None else int(memory * 1e9))
        )
    elif batch_size or memory:
        raise UsageError(f"--batch-size, --memory: --engine {engine} decides the width itself")
    model_id = store.add_model(
        root,
        {
            "family": family,
            "variant": variant,
            "parent_id": parent,
            "treatment": treatment,
            "hyperparameters": store.canonical(hyperparameters) if hyperparameters else None,
            "data_sha256": data_sha256,
            **opened.checkpoint,
        },
    )
    # a job that began at the same moment may have had room for another width
    settings = store.plan(root, "run", run_id, settings, () if batch_size else ("batch_size",))
    sampling = replace(sampling, width=settings.get("batch_size", sampling.width))
    where = store.folder(root, "rollouts", family=family, variant=variant, task=task, run=run_id)
    store.remove_leftovers(where)
    return Run(
        root, run_id, opened, listed, token_ids, str(prompts), sampling, settings, model_id, where
    )


def _stored_width(root: Path, run_id: str) -> int | None:
    """The width a run began with: its rollouts' bits may depend on it."""
    path = store.plan_path(root, "run", run_id)
    return store.read_plan(path)["settings"].get("batch_size") if store.exists(path) else None


def _check_settings(
    samples: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    batch_size: int | None,
    memory: float | None,
    top_logprobs: int,
    prompts_per_shard: int,
    limit: int | None,
    template: str,
) -> None:
    for option, value, least in (
        ("--samples", samples, 1),
        ("--max-new-tokens", max_new_tokens, 1),
        ("--top-k", top_k, 0),
        ("--batch-size", 1 if batch_size is None else batch_size, 1),
        ("--top-logprobs", top_logprobs, 0),
        ("--prompts-per-shard", prompts_per_shard, 1),
        ("--limit", 1 if limit is None else limit, 1),
    ):
        if value < least:
            raise UsageError(f"{option} {value}: needs at least {least}")
        if value >= 2**31:
            raise UsageError(f"{option} {value}: needs less than 2147483648")
    if memory is not None and not 0 < memory < float("inf"):
        raise UsageError(f"--memory {memory}: needs more than 0 GB")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"--temperature {temperature}: needs 0 (greedy) or more")
    if not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p}: needs more than 0 and at most 1")
    if template not in ("auto", "chat", "plain"):
        raise UsageError(f"--template {template}: one of auto, chat, plain")


def _check_window(
    window: int | None,
    prompts: str | Path,
    listed: list[dict[str, Any]],
    token_ids: list[list[int]],
    max_new_tokens: int,
) -> None:
    for prompt, ids in zip(listed, token_ids, strict=True):
        if window and len(ids) + max_new_tokens > window:
            raise DataError(
                f"{prompts}: line {prompt['line']}: {len(ids)} prompt tokens and {max_new_tokens} "
                f"new ones exceed the context window of {window}; shorten the prompt or lower "
                "--max-new-tokens"
            )
