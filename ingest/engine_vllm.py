"""Tokens from vLLM in this process; their entropies come from `canopy ingest score`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from canopy_store.errors import StoreError, UsageError
from canopy_store.ingest import models
from canopy_store.ingest.draw import Job, Rollout, Sampling
from canopy_store.ingest.engines import Engine, refuse_unknown
from canopy_store.ingest.progress import Progress
from canopy_store.ingest.sources import resolve_model
from canopy_store.ingest.tokenizer import load_tokenizer


def open_model(source: str, dtype: str | None = None) -> Engine:
    """The engine over the model at ``source``: a local folder, hub id or package:NAME.

    It takes the device and the memory that vLLM takes by itself.

    Raises
    ------
    UsageError
        vLLM is not installed, or an unknown dtype.
    StoreError
        Nothing to load there, or vLLM cannot load it.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it writes over the progress bar
    try:
        import vllm
    except ImportError as error:
        raise UsageError(
            f"--engine vllm needs vLLM ({error}): pip install 'canopy-store[ingest,vllm]' in an "
            "environment of its own"
        ) from None
    path = resolve_model(source)
    dtype = dtype or models.default_dtype(models.default_device())
    if dtype not in models.DTYPES:
        raise UsageError(f"--dtype {dtype}: one of {', '.join(models.DTYPES)}")
    if not path.is_dir() or not list(path.glob("*.safetensors")):
        raise StoreError(f"{path}: --engine vllm needs a folder with *.safetensors")
    tokenizer, config = load_tokenizer(source), models.read_config(path)
    try:
        llm = vllm.LLM(
            model=str(path),
            dtype=dtype,
            seed=0,
            trust_remote_code=False,
            load_format="safetensors",
            skip_tokenizer_init=True,  # ids go in and come out
            generation_config="vllm",  # no defaults of the model's that the policy does not name
            logprobs_mode="raw_logprobs",
            max_logprobs=-1,
            max_model_len=-1,  # the model's own window, or what the memory holds
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise StoreError(f"{path}: vLLM cannot load it: {' '.join(str(error).split())[:300]}") from None

    def sample(jobs: Sequence[Job], sampling: Sampling, progress: Progress) -> list[list[Rollout]]:
        asked = [(job, number) for job in jobs for number in job.samples]
        answers = iter(
            llm.generate(
                [{"prompt_token_ids": list(job.prompt_ids)} for job, _ in asked],
                [_settings(vllm, job, number, sampling) for job, number in asked],
                use_tqdm=False,
            )
        )
        rollouts = [
            [_rollout(next(answers).outputs[0], number, sampling) for number in job.samples]
            for job in jobs
        ]
        progress.tokens(sum(rollout.n_tokens or 0 for rows in rollouts for rollout in rows))
        return rollouts

    return Engine(
        tokenizer=tokenizer,
        end_ids=tuple(models.end_token_ids(config, tokenizer)),
        window=llm.llm_engine.model_config.max_model_len,
        checkpoint=models.checkpoint(source, path, tokenizer),
        settings={"dtype": dtype, "top_logprobs_of": "model"},
        versions={
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        width=None,
        sample=sample,
        check=lambda sampling: refuse_unknown(sampling, "vLLM"),
    )


def _settings(vllm: Any, job: Job, sample: int, sampling: Sampling) -> Any:
    """vLLM's SamplingParams of a rollout; its seed is the rollout's first random number."""
    return vllm.SamplingParams(
        n=1,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        max_tokens=sampling.max_new_tokens,
        seed=int(job.draw(sample)[0] * 2**31),
        # 0: of the sampled token alone
        logprobs=sampling.top_logprobs or (0 if sampling.is_model else None),
        # exactly these end a rollout, and the one that did stays among its tokens
        ignore_eos=True,
        stop_token_ids=list(sampling.end_ids),
        detokenize=False,
    )


def _rollout(output: Any, sample: int, sampling: Sampling) -> Rollout:
    """The rollout that vLLM's CompletionOutput holds."""
    ids = list(output.token_ids)
    logprob = top_ids = top_logprobs = None
    if sampling.is_model:
        steps = zip(ids, output.logprobs, strict=True)
        logprob = np.array([step[token].logprob for token, step in steps], np.float32)
    if sampling.top_logprobs:
        # the sampled token stands among them even where it is not of the likeliest
        rows = [
            sorted(((token, entry.logprob) for token, entry in step.items()), key=lambda top: -top[1])
            for step in output.logprobs
        ]
        top_ids, top_logprobs = (
            [[top[k] for top in row[: sampling.top_logprobs]] for row in rows] for k in (0, 1)
        )
    return Rollout(
        sample=sample,
        token_ids=np.array(ids, np.int32),
        logprob=logprob,
        entropy=None,
        eos_logprob=None,
        finish_reason="stop" if ids[-1] in sampling.end_ids else "length",
        top_token_ids=top_ids,
        top_logprobs=top_logprobs,
        n_tokens=len(ids),
    )
