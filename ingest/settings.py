"""What a run is asked to be: a checkpoint, a source of prompts, what is drawn of each, and an engine."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from canopy_store import store
from canopy_store.errors import UsageError
from canopy_store.ingest.until_se import Target, read_target

NUMBER_FORMATS = ("bf16", "fp16", "e4m3", "e5m2", "int8", "int4", "lmul-2 … lmul-23")


def check_number_format(name: str) -> str:
    """The name, of a format that there is.

    Raises
    ------
    UsageError
        There is no such format; lists them.
    """
    bits = re.fullmatch(r"lmul-(\d+)", name)
    if not (name in NUMBER_FORMATS[:-1] or (bits and 2 <= int(bits[1]) <= 23)):
        raise UsageError(f"--number-format {name}: one of {', '.join(NUMBER_FORMATS)}")
    return name


@dataclass(frozen=True)
class Checkpoint:
    """The model that is sampled, and what its row in ``models`` says.

    Parameters
    ----------
    model : local folder, GGUF file, hub id, or package:NAME
    family, variant : its names; together they are its model_id
    parent : model_id of the checkpoint that it was made from
    treatment, hyperparameters, data_sha256 : what was done to the parent
    series, step, tokens_seen : of a checkpoint in a series along one training
    """

    model: str
    family: str
    variant: str
    parent: str | None = None
    treatment: str | None = None
    hyperparameters: dict[str, Any] | None = None
    data_sha256: str | None = None
    series: str | None = None
    step: int | None = None
    tokens_seen: int | None = None

    def __post_init__(self) -> None:
        store.check_name("--family", self.family)
        store.check_name("--variant", self.variant)


@dataclass(frozen=True)
class Source:
    """The prompts, and how they become tokens.

    Parameters
    ----------
    task : their task's name
    prompts : their file: JSONL, CSV or Parquet
    limit : only the first so many
    template : chat, plain, or auto (chat where the tokenizer has a template)
    system, examples : what stands before each, as of `rendering.read_context`
    """

    task: str
    prompts: str | Path
    limit: int | None = None
    template: str = "auto"
    system: str | None = None
    examples: str | Path | None = None

    def __post_init__(self) -> None:
        store.check_name("--task", self.task)
        _at_least("--limit", self.limit, 1)
        if self.template not in ("auto", "chat", "plain"):
            raise UsageError(f"--template {self.template}: one of auto, chat, plain")


@dataclass(frozen=True)
class Draws:
    """What is drawn of each prompt.

    Parameters
    ----------
    samples, max_new_tokens : rollouts per prompt, tokens per rollout at most
    until_se : METRIC=SE: samples in rounds until the metric's standard error, of its mean over these
        prompts, is so small; the first round, which is not counted, has ``samples`` of each prompt
    max_samples : then rollouts of a prompt at most; by default 16 times ``samples``
    temperature, top_k, top_p : the sampling policy, applied in this order; temperature 0 is greedy
    seed : of the run; a rollout's own follows from run, prompt and sample
    top_logprobs : also stores so many likeliest ids and log-probabilities per step
    eos_token_ids, no_eos : end tokens instead of the model's; or allow a model that has none
    batch_size, memory : rollouts sampled side by side; by default what ``memory`` (GB, by default a
        share of what is free) has room for. A resumed run keeps the number it began with
    prompts_per_shard : prompts a file
    """

    samples: int = 16
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    top_logprobs: int = 0
    eos_token_ids: tuple[int, ...] = ()
    no_eos: bool = False
    batch_size: int | None = None
    memory: float | None = None
    prompts_per_shard: int = 4
    until_se: str | None = None
    max_samples: int | None = None

    @property
    def target(self) -> Target | None:
        """What ``until_se`` asks for."""
        if self.until_se is None:
            return None
        return read_target(self.until_se, self.samples, self.max_samples)

    def __post_init__(self) -> None:
        for option in ("samples", "max_new_tokens", "batch_size", "prompts_per_shard"):
            _at_least(f"--{option.replace('_', '-')}", getattr(self, option), 1)
        _at_least("--top-logprobs", self.top_logprobs, 0)
        if self.memory is not None and not 0 < self.memory < float("inf"):
            raise UsageError(f"--memory {self.memory}: needs more than 0 GB")
        check_policy(self.temperature, self.top_k, self.top_p)
        if self.target is None and self.max_samples is not None:
            raise UsageError("--max-samples: only with --until-se; --samples gives a fixed number")


@dataclass(frozen=True)
class Runner:
    """What samples.

    Parameters
    ----------
    engine : transformers, with the whole record; others (`engines.ENGINES`) give tokens
    device, dtype : for engines that load the model here
    base_url, served_model, concurrency : for engines behind a server
    """

    engine: str = "transformers"
    device: str | None = None
    dtype: str | None = None
    base_url: str | None = None
    served_model: str | None = None
    concurrency: int | None = None


def _at_least(option: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise UsageError(f"{option} {value}: needs at least {least}")
    if value is not None and value >= 2**31:
        raise UsageError(f"{option} {value}: needs less than 2147483648")


def check_policy(temperature: float | None, top_k: int | None, top_p: float | None) -> None:
    """Raises UsageError for what no sampling policy can be; None is not checked."""
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise UsageError(f"--temperature {temperature}: needs 0 (greedy) or more")
    _at_least("--top-k", top_k, 0)
    if top_p is not None and not 0 < top_p <= 1:
        raise UsageError(f"--top-p {top_p}: needs more than 0 and at most 1")


def sort_options(options: Mapping[str, Any], *kinds: type) -> list[Any]:
    """One object of each kind, of the options that are its fields.

    Raises
    ------
    UsageError
        An option that none of them has, or one that is missing.
    """
    require_options(options, (f.name for kind in kinds for f in fields(kind)))
    made = []
    for kind in kinds:
        mine = {f.name: options[f.name] for f in fields(kind) if f.name in options}
        needed = [f.name for f in fields(kind) if _is_required(kind, f.name) and f.name not in mine]
        if needed:
            raise UsageError(f"--{needed[0].replace('_', '-')}: missing; give the {needed[0]}")
        made.append(kind(**mine))
    return made


def _is_required(kind: type, name: str) -> bool:
    return inspect.signature(kind).parameters[name].default is inspect.Parameter.empty


def require_options(given: Iterable[str], known: Iterable[str]) -> None:
    """Raises UsageError for the first name given that is not known, with the one that was meant."""
    names = list(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(names))}"
            raise UsageError(f"no option {name!r}: {hint}")


def options_of(function: Callable[..., Any]) -> list[str]:
    """The options of a function that opens a job: all that it takes but the store and the progress."""
    parameters = inspect.signature(function).parameters.values()
    named = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    return [name for name in named[1:] if name != "progress"]
