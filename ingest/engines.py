"""What samples rollouts: a model loaded here, one behind a server, or another engine's.

An engine gives the whole record where it can (transformers), else tokens; entropies that it does not
give exactly stay NULL, and `canopy ingest score` under the run's own model completes them.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from canopy_store.errors import UsageError
from canopy_store.ingest.draw import Job, Rollout, Sampling
from canopy_store.ingest.progress import Progress

# The module of each engine; its function open_model(source, …) gives the Engine.
ENGINES = {
    "transformers": "canopy_store.ingest.engine_transformers",
    "openai": "canopy_store.ingest.engine_openai",
    "vllm": "canopy_store.ingest.engine_vllm",
}


@dataclass
class Engine:
    """A model ready to sample.

    Parameters
    ----------
    tokenizer : renders prompts and decodes rollouts
    end_ids : token ids that end a rollout
    window : most tokens of prompt and rollout together; None where not known
    checkpoint : its weights_sha256, tokenizer_sha256 and source, for the table ``models``
    settings : what decides its rollouts beside the policy; a resumed run must repeat them
    versions : the versions that can change a rollout's bits
    width : rollouts to sample side by side, given the policy, the lengths (tokens) of a shard's
        prompts and the memory to use (bytes, None for its own choice); None where the engine decides
    sample : for each job a rollout for each of its sample numbers, in that order
    check : raises UsageError for a policy that the engine cannot sample
    """

    tokenizer: Any
    end_ids: tuple[int, ...]
    window: int | None
    checkpoint: dict[str, str | None]
    settings: dict[str, Any]
    versions: dict[str, str]
    width: Callable[[Sampling, Sequence[int], int | None], int] | None
    sample: Callable[[Sequence[Job], Sampling, Progress], list[list[Rollout]]]
    check: Callable[[Sampling], None] = lambda sampling: None


def open_engine(name: str, source: str, **options: Any) -> Engine:
    """The engine of this name with the model at ``source``; options that are None are not given.

    Raises
    ------
    UsageError
        No such engine, or an option that is not for it.
    """
    if name not in ENGINES:
        raise UsageError(f"--engine {name}: one of {', '.join(ENGINES)}")
    open_model = importlib.import_module(ENGINES[name]).open_model
    given = {key: value for key, value in options.items() if value is not None}
    unknown = sorted(set(given) - set(inspect.signature(open_model).parameters))
    if unknown:
        raise UsageError(f"--{unknown[0].replace('_', '-')}: not an option of --engine {name}")
    return open_model(source, **given)


def refuse_unknown(sampling: Sampling, name: str) -> None:
    """Raises UsageError for a policy that vLLM, or its server, cannot sample as it is defined."""
    if sampling.typical_p < 1:
        raise UsageError(
            f"--typical-p {sampling.typical_p}: {name} has no typical sampling; use "
            "--engine transformers"
        )
    if sampling.min_p > 0 and sampling.top_p < 1:
        raise UsageError(
            f"--min-p with --top-p: {name} applies min-p first, and top-p to what it left; give one of "
            "them, or use --engine transformers"
        )
