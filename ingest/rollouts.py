"""The ingest of rollouts: every prompt of a file, sampled by one model, stored shard by shard."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from canopy_store import sql, store
from canopy_store.errors import ConflictError, DataError, UsageError
from canopy_store.ingest import until_se
from canopy_store.ingest.draw import Job as Draw
from canopy_store.ingest.draw import Rollout, Sampling, uniforms
from canopy_store.ingest.engines import Engine, open_engine
from canopy_store.ingest.jobs import EXECUTORS, Columns, Group, Job, Unit, run_job
from canopy_store.ingest.progress import Progress
from canopy_store.ingest.prompts import read_prompts
from canopy_store.ingest.rendering import read_context, render
from canopy_store.ingest.settings import Checkpoint, Draws, Runner, Source, sort_options
from canopy_store.ingest.sources import check_model, resolve_model
from canopy_store.store.rollouts import write_shard

__all__ = ["EXECUTORS", "ingest_rollouts", "open_rollouts"]


def ingest_rollouts(root: str | Path, model: str, **options: Any) -> str:
    """The id of the run, whose missing shards are now stored: ``samples`` rollouts of each prompt.

    Called again after a break, it samples only the missing shards and gives what an unbroken run
    gives on the same machine. Whoever stores the last shard completes the run.

    Parameters
    ----------
    root : path of the store, made if missing
    model : local folder, GGUF file, hub id, or package:NAME
    options : the fields of `Checkpoint`, `Source`, `Draws` and `Runner` in
        `canopy_store.ingest.settings`, of which family, variant, task and prompts are needed; ``run``,
        the run's name [default: family.variant.task]; and shard, executor, workers and progress, as of
        `canopy_store.ingest.jobs.run_job`

    Raises
    ------
    ConflictError
        The run is stored with other settings; names each difference.
    DataError, StoreError, UsageError
        Bad prompts, an unreadable model or store, impossible settings, an option that is none.
    """
    if options.get("until_se") is not None:
        for name, value in (("--shard", options.get("shard")), ("--executor", options.get("executor"))):
            if value not in (None, "local"):
                raise UsageError(
                    f"{name} {value}: not with --until-se, whose rounds wait for one another; "
                    "spread tasks or variants over jobs instead"
                )
    return run_job(root, open_rollouts, {"model": model, **options})


# what `open_rollouts` takes, by keyword
OPTIONS = tuple(f.name for kind in (Checkpoint, Source, Draws, Runner) for f in fields(kind))


def open_rollouts(
    root: str | Path,
    *,
    run: str | None = None,
    progress: Progress,
    listed: list[dict[str, Any]] | None = None,
    shorten: str = "shorten the prompt",
    loaded: Engine | None = None,
    **options: Any,
) -> Job:
    """The job of `ingest_rollouts`: the model loaded, the prompts read, a group for the run.

    Parameters
    ----------
    loaded : the engine of a model in memory; by default the one that the options name is opened
    listed : prompts that were made of the lines of the file ``prompts``, as `read_prompts` gives them
    shorten : what is to be done about a prompt that is longer than the window
    """
    checkpoint, source, draws, runner = sort_options(options, Checkpoint, Source, Draws, Runner)
    target = draws.target
    if target is not None and target.metric != "mean_length" and runner.engine != "transformers":
        raise UsageError(
            f"--until-se {target.metric}: --engine {runner.engine} gives no entropies to measure it by; "
            "use --engine transformers, or --until-se mean_length=SE"
        )
    run_id = run or f"{checkpoint.family}.{checkpoint.variant}.{source.task}"
    store.check_name("--run", run_id)
    if listed is None:
        listed = read_prompts(source.prompts, source.limit)
    context = read_context(source.system, source.examples)
    root = store.place(root)
    _check_references(root, source, listed)
    engine = loaded
    if engine is None:
        # told before torch takes its seconds to import; a server has the weights of its model itself
        check_model(resolve_model(checkpoint.model), weights=runner.engine != "openai")
        engine = open_engine(
            runner.engine,
            checkpoint.model,
            **{f.name: getattr(runner, f.name) for f in fields(runner) if f.name != "engine"},
        )
    ends = _end_ids(engine, checkpoint.model, draws)
    template = source.template
    if template == "auto":
        template = "chat" if getattr(engine.tokenizer, "chat_template", None) else "plain"
    for prompt in listed:
        line = f"{source.prompts}: line {prompt['line']}"
        prompt["token_ids"] = render(prompt, engine.tokenizer, template, line, context)
    _check_window(engine.window, source.prompts, listed, draws.max_new_tokens, shorten)
    if draws.temperature == 0:
        progress.say("temperature 0 is greedy: every rollout of a prompt is the same, entropy 0")
    sampling = Sampling(
        draws.temperature, draws.top_k, draws.top_p, draws.max_new_tokens, ends, draws.top_logprobs
    )
    of = {"family": checkpoint.family, "variant": checkpoint.variant, "task": source.task}
    settings = {
        "run_id": run_id,
        **of,
        "engine": runner.engine,
        "weights_sha256": engine.checkpoint["weights_sha256"],
        "prompts_sha256": store.content_id([[p["prompt_id"], p["token_ids"]] for p in listed]),
        "template": template,
        **context.settings(),
        "n_prompts": len(listed),
        "n_samples": draws.samples,
        "max_new_tokens": draws.max_new_tokens,
        "temperature": draws.temperature,
        "top_k": draws.top_k,
        "top_p": draws.top_p,
        "seed": draws.seed,
        "top_logprobs": draws.top_logprobs,
        "end_token_ids": list(ends),
        "prompts_per_shard": draws.prompts_per_shard,
        "n_shards": -(-len(listed) // draws.prompts_per_shard),
        **engine.settings,
    }
    if target is not None:
        settings["until_se"] = {"metric": target.metric, "se": target.se, "max_samples": target.most}
        del settings["n_shards"]  # nobody knows yet
    if engine.width is not None:
        settings["batch_size"] = _width(root, run_id, engine.width, sampling, listed, draws)
    elif draws.batch_size or draws.memory:
        raise UsageError(f"--batch-size, --memory: --engine {runner.engine} decides the width itself")
    hyperparameters = checkpoint.hyperparameters
    root = store.init(root)  # not before: what is refused leaves no empty store
    model_id = store.add_model(
        root,
        {
            "family": checkpoint.family,
            "variant": checkpoint.variant,
            "parent_id": checkpoint.parent,
            "treatment": checkpoint.treatment,
            "hyperparameters": store.canonical(hyperparameters) if hyperparameters else None,
            "data_sha256": checkpoint.data_sha256,
            "series": checkpoint.series,
            "step": checkpoint.step,
            "tokens_seen": checkpoint.tokens_seen,
            **engine.checkpoint,
        },
    )
    where = store.folder(root, "rollouts", run=run_id, **of)

    shards = _Shards(where, [prompt["prompt_id"] for prompt in listed], draws, progress)

    def rows(unit: Unit, progress: Progress) -> tuple[Columns, int]:
        members = [(listed[place], samples) for place, samples in shards.pieces[unit.number]]
        # a job that began at the same moment may have had room for another width
        width = job.settings.get("batch_size", sampling.width)
        return _sample(engine, job.settings, members, replace(sampling, width=width), source, progress)

    def finish(group: Group, sampled: list[Path]) -> None:
        row = _run_row(job.settings, model_id, engine)
        prompts = store.add_prompts(root, source.task, listed)
        whole = shards.whole(sampled)
        store.complete_run(root, whole, row, job.settings, prompts, sampled)

    def after(group: Group, progress: Progress) -> None:
        if target is not None:
            until_se.keep_counted(root, run_id, target)
            for path in until_se.stored_rounds(where):  # a break may have left them
                path.unlink(missing_ok=True)

    group = Group({"run": run_id}, len(listed) * draws.samples, shards.units)
    job = Job(
        root,
        "rollouts",
        run_id,
        settings,
        [group],
        rows,
        write=lambda unit, columns: write_shard(unit.target, columns),
        finish=finish,
        after=after,
        yielding=() if draws.batch_size else ("batch_size",),
        device=engine.settings.get("device"),
    )
    return job


class _Shards:
    """The shards of a run, and what each holds: known at once, or round by round."""

    def __init__(self, where: Path, prompt_ids: list[str], draws: Draws, progress: Progress) -> None:
        self.where, self.prompt_ids, self.draws, self.progress = where, prompt_ids, draws, progress
        self.pieces: list[list[until_se.Piece]] = []
        self.told = 1  # rounds

    def units(self, group: Group) -> list[Unit]:
        """Every shard that is known to be needed."""
        draws, target = self.draws, self.draws.target
        path = store.shard_path if target is None else until_se.round_path
        rounds = [until_se.Round([range(draws.samples)] * len(self.prompt_ids))]
        if target is not None:
            stored = until_se.stored_rounds(self.where)
            rounds = until_se.rounds(until_se.drawn_of(stored, self.prompt_ids, target.metric), target)
        for each in rounds[self.told :]:
            kind = "rollouts that count" if each.counted else "more for the pilot"
            self.progress.say(f"run {group.run_id}: {each.rollouts} {kind}, by what is stored")
        self.told = max(self.told, len(rounds))
        size = draws.prompts_per_shard
        self.pieces = [s for each in rounds for s in until_se.shards_of(each, draws.samples, size)]
        return [
            Unit(group, number, sum(len(samples) for _, samples in pieces), path(self.where, number))
            for number, pieces in enumerate(self.pieces)
        ]

    def whole(self, shards: list[Path]) -> list[Path]:
        """The shards to commit: these, or what is made of those of rounds."""
        if self.draws.target is None:
            return shards
        size = self.draws.prompts_per_shard
        return until_se.write_whole(self.where, self.prompt_ids, self.pieces, size)


def _check_references(root: Path, source: Source, listed: list[dict[str, Any]]) -> None:
    """Raises ConflictError where a prompt is stored with another reference: grades go by one."""
    answered = any(p["reference"] is not None for p in listed)
    stored = sql.prompts(root) if answered and store.exists(root / "canopy.json") else {}
    for prompt in listed:
        known = stored.get((source.task, prompt["prompt_id"]), {}).get("reference")
        if known is not None and prompt["reference"] not in (None, known):
            raise ConflictError(
                f"{source.prompts}: line {prompt['line']}: reference {prompt['reference']!r}, and the "
                f"prompt is stored with {known!r}; mend the line, or use another --task"
            )


def _end_ids(engine: Engine, model: str, draws: Draws) -> tuple[int, ...]:
    if draws.no_eos:
        return ()
    ends = tuple(draws.eos_token_ids) or engine.end_ids
    if not ends:
        raise DataError(
            f"{model}: the model has no end-of-sequence token; name one with --eos-token-id ID, "
            "or let every rollout run to --max-new-tokens with --no-eos"
        )
    return ends


def _width(
    root: Path,
    run_id: str,
    fitting: Callable[[Sampling, list[int], int | None], int],
    sampling: Sampling,
    listed: list[dict[str, Any]],
    draws: Draws,
) -> int:
    """Rollouts side by side: as asked for, as the run began (its bits may depend on it), or as fit."""
    path = store.plan_path(root, "run", run_id)
    begun = store.read_plan(path)["settings"].get("batch_size") if store.exists(path) else None
    shard = sorted(len(p["token_ids"]) for p in listed)[-draws.prompts_per_shard :]  # takes the most
    memory = None if draws.memory is None else int(draws.memory * 1e9)
    return draws.batch_size or begun or fitting(sampling, shard, memory)


def _sample(
    engine: Engine,
    settings: Mapping[str, Any],
    prompts: list[tuple[dict[str, Any], range]],
    sampling: Sampling,
    source: Source,
    progress: Progress,
) -> tuple[Columns, int]:
    """The table's columns for these samples of each prompt, and how many tokens they have."""
    run_id = settings["run_id"]
    draws = [
        Draw(
            prompt["token_ids"],
            samples,
            functools.partial(
                uniforms, run_id, settings["seed"], prompt["prompt_id"], steps=sampling.max_new_tokens
            ),
            f"{source.prompts}: line {prompt['line']}",
        )
        for prompt, samples in prompts
    ]
    columns: dict[str, list[Any]] = {}
    tokens = 0
    for (prompt, _), rollouts in zip(prompts, engine.sample(draws, sampling, progress), strict=True):
        _add(columns, run_id, prompt["prompt_id"], rollouts, engine.tokenizer)
        tokens += sum(map(_length, rollouts))
    return columns, tokens


def _length(rollout: Rollout) -> int:
    lists = (rollout.token_ids, rollout.logprob, rollout.entropy)
    return next((len(steps) for steps in lists if steps is not None), rollout.n_tokens or 0)


def _add(
    columns: dict[str, list[Any]], run_id: str, prompt_id: str, rollouts: list[Rollout], tokenizer: Any
) -> None:
    """Adds rollouts to the table's columns; what an engine does not give has no column."""
    undecoded = [r.token_ids for r in rollouts if r.text is None]
    texts = iter(tokenizer.batch_decode(undecoded, skip_special_tokens=True))
    for rollout in rollouts:
        row = {"run_id": run_id, "prompt_id": prompt_id, **vars(rollout)}
        row["text"] = next(texts) if rollout.text is None else rollout.text
        for name in ("top_token_ids", "top_logprobs"):  # Arrow takes no arrays of two dimensions
            row[name] = None if row[name] is None else list(row[name])
        for name, value in row.items():
            if value is not None:
                columns.setdefault(name, []).append(value)


_OF_THE_RUN = (
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
)


def _run_row(settings: Mapping[str, Any], model_id: str, engine: Engine) -> dict[str, Any]:
    """What the table ``runs`` says of the run, the counts aside."""
    return {
        **{key: settings.get(key) for key in _OF_THE_RUN},
        "rendering": settings["template"],
        "model_id": model_id,
        "settings": store.canonical(dict(settings)),
        "versions": store.canonical(engine.versions),
    }


def _check_window(
    window: int | None,
    prompts: str | Path,
    listed: list[dict[str, Any]],
    max_new_tokens: int,
    shorten: str,
) -> None:
    for prompt in listed:
        if window and len(prompt["token_ids"]) + max_new_tokens > window:
            raise DataError(
                f"{prompts}: line {prompt['line']}: {len(prompt['token_ids'])} prompt tokens and "
                f"{max_new_tokens} new ones exceed the context window of {window}; {shorten} "
                "or lower --max-new-tokens"
            )
