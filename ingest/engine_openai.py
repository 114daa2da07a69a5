"""Tokens from a server with OpenAI's completions API: vLLM, SGLang, llama.cpp and others.

A prompt goes as token ids, one request a rollout, so that the server sees what any engine would see.
The API leaves open how token ids come back and whether the end token is among them: each server's own
way is asked for, what comes is read, and an answer that leaves the tokens in doubt is refused.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import anyio
import httpx2
import numpy as np
from anyio.from_thread import start_blocking_portal

from canopy_store.errors import DataError, UsageError
from canopy_store.ingest import models
from canopy_store.ingest.draw import Job, Rollout, Sampling, added
from canopy_store.ingest.engines import Engine, refuse_unknown
from canopy_store.ingest.openai_client import Server
from canopy_store.ingest.progress import Progress
from canopy_store.ingest.sources import resolve_model
from canopy_store.ingest.tokenizer import load_tokenizer
from canopy_store.readers import get
from canopy_store.readers.openai_logprobs import LoggedToken, check_ids, logged_tokens, token_table

# What servers add to the API. Their defaults may come from the model's generation_config.json or from
# their own command line, so every sampler but those of the policy is switched off by name.
_ADDED = {
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,  # vLLM; SGLang the first
}


def open_model(
    source: str,
    base_url: str | None = None,
    served_model: str | None = None,
    concurrency: int | None = None,
) -> Engine:
    """The engine over a server's model, whose tokenizer is at ``source``.

    Parameters
    ----------
    source : local folder, GGUF file, hub id or package:NAME; a tokenizer alone will do
    base_url : the server's address, as in http://localhost:8000/v1
    served_model : what the model is called there; by default the only one
    concurrency : requests at once, by default 32

    Raises
    ------
    UsageError
        No address, no such model there, or several and none named.
    CanopyError
        The server does not answer.
    """
    if not base_url:
        raise UsageError("--engine openai needs --base-url, as in http://localhost:8000/v1")
    if concurrency is not None and concurrency < 1:
        raise UsageError(f"--concurrency {concurrency}: needs at least 1")
    server = Server(base_url, concurrency or 32)
    listed = server.models()
    served = server.served([entry["id"] for entry in listed], served_model)
    entry = next((e for e in listed if e["id"] == served), {})
    path = resolve_model(source)
    tokenizer, config = load_tokenizer(source), models.read_config(path)
    ends = tuple(models.end_token_ids(config, tokenizer))
    windows = [models.context_window(config), entry.get("max_model_len")]
    kind = str(entry.get("owned_by"))[:80]
    vocabulary = models.vocabulary_size(config, tokenizer)
    completions = _Completions(server, served, kind, tokenizer, ends, vocabulary)
    return Engine(
        tokenizer=tokenizer,
        end_ids=ends,
        window=min((w for w in windows if type(w) is int and w > 0), default=None),
        checkpoint=models.checkpoint(source, path, tokenizer),
        # the server's lists are those before temperature, top-k and top-p, unless it was told otherwise
        settings={"server": kind, "served_model": served, "top_logprobs_of": "server"},
        versions={"httpx2": httpx2.__version__},
        width=None,
        sample=completions.sample,
        check=completions.check,
    )


# ---------------------------------------------------------------- rollouts


class _Completions:
    """Rollouts of one served model."""

    def __init__(
        self,
        server: Server,
        served: str,
        kind: str,
        tokenizer: Any,
        end_ids: tuple[int, ...],
        vocabulary: int,
    ) -> None:
        self.server, self.served, self.kind, self.tokenizer = server, served, kind, tokenizer
        self.end_ids, self.vocabulary = end_ids, vocabulary  # the model's own
        self.added = True  # whether the server takes what is not OpenAI's
        self.told: set[str] = set()
        self.table: dict[bytes, int] | None = None

    def check(self, sampling: Sampling) -> None:
        """Raises UsageError for a policy that no field of the protocol asks this server for."""
        if self.kind == "vllm":
            return refuse_unknown(sampling, "vLLM's server")
        known = {"min_p"} if self.kind in ("sglang", "llamacpp") else set()
        for name in added(vars(sampling)).keys() - known:
            raise UsageError(
                f"--{name.replace('_', '-')}: not known to be what it means elsewhere on this server "
                f"({self.kind}); use --engine transformers, or vLLM's server for min-p and repetition "
                "penalty"
            )
        return None

    def sample(self, jobs: Sequence[Job], sampling: Sampling, progress: Progress) -> list[list[Rollout]]:
        """Rollouts as of `Engine`: all requests of the jobs, ``concurrency`` at a time."""
        if self.kind == "sglang" and sampling.top_k and sampling.top_p < 1:
            raise UsageError(
                "--top-k with --top-p: SGLang applies both to the whole softmax, not top-p to "
                "what top-k left; give one of them, or use another engine"
            )
        requests = [
            (f"{job.name}, sample {sample}", self._request(job, sample, sampling))
            for job in jobs
            for sample in job.samples
        ]
        # a loop in a thread of its own: it also runs where one is running already, as in a notebook,
        # and an interrupt here ends every request at once
        with start_blocking_portal() as portal:
            answers = portal.call(self._ask, requests, sampling, progress)
        samples = [sample for job in jobs for sample in job.samples]
        rollouts = [
            self._rollout(sample, body, sampling, name)
            for sample, (name, _), body in zip(samples, requests, answers, strict=True)
        ]
        self._level(rollouts, progress)
        rest = iter(rollouts)
        return [list(itertools.islice(rest, len(job.samples))) for job in jobs]

    def _request(self, job: Job, sample: int, sampling: Sampling) -> dict[str, Any]:
        """A request in OpenAI's own words; its seed is the rollout's first random number."""
        body = {
            "model": self.served,
            "prompt": list(job.prompt_ids),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": int(job.draw(sample)[0] * 2**31),
            "logprobs": max(1, sampling.top_logprobs),
        }
        if sampling.end_ids != self.end_ids:
            if self.kind != "vllm":
                raise UsageError(
                    "--eos-token-id, --no-eos: only vLLM's server can be told which tokens "
                    "end a rollout; leave them out, or use another engine"
                )
            body |= {"ignore_eos": True, "stop_token_ids": list(sampling.end_ids)}
        return body

    async def _ask(
        self, requests: list[tuple[str, dict[str, Any]]], sampling: Sampling, progress: Progress
    ) -> list[dict[str, Any]]:
        """The bodies of the answers, in order."""
        bodies: list[Any] = [None] * len(requests)
        limit = anyio.Semaphore(self.server.concurrency)

        async def one(place: int) -> None:
            async with limit:
                bodies[place] = await self._answer(client, requests[place][1], sampling, progress)
            counted = get(bodies[place], "usage.completion_tokens", int, self.server.url, 0)
            progress.tokens(min(max(counted, 0), sampling.max_new_tokens))

        async with self.server.client() as client:
            try:
                async with anyio.create_task_group() as group:
                    for place in range(len(requests)):
                        group.start_soon(one, place)
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return bodies

    async def _answer(
        self, client: httpx2.AsyncClient, body: dict[str, Any], sampling: Sampling, progress: Progress
    ) -> dict[str, Any]:
        """The body of one answer; once a server refuses what is not OpenAI's, it is left out."""
        most = _longest(body)
        if self.added:
            more = {
                "top_k": sampling.top_k or -1,
                "min_p": sampling.min_p,
                "repetition_penalty": sampling.repetition_penalty,  # vLLM, SGLang
                # llama.cpp: only these, in this order
                "samplers": ["temperature", "top_k", "top_p", *["min_p"] * (sampling.min_p > 0)],
                **_ADDED,
            }
            answer = await self.server.complete(client, body | more, most)
            if answer.status not in (400, 422) or sampling.top_k or added(vars(sampling)):
                return self.server.body(answer)
        reply = self.server.body(await self.server.complete(client, body, most))
        if self.added:
            self.added = False
            self._say(
                progress,
                "the server takes none of the fields that vLLM, SGLang and llama.cpp add to "
                "the API, so samplers of its own that are on cannot be switched off",
            )
        return reply

    def _rollout(self, sample: int, body: dict[str, Any], sampling: Sampling, name: str) -> Rollout:
        """The rollout that an answer tells of.

        Raises
        ------
        DataError
            An answer whose tokens are in doubt.
        """
        where = f"{self.server.url}: {name}"
        choices = get(body, "choices", list, where)
        if len(choices) != 1:
            raise DataError(f"{where}: the answer holds {len(choices)} choices, and one was asked for")
        choice = choices[0]
        reason = get(choice, "finish_reason", str, where)
        if reason not in ("stop", "length"):
            raise DataError(
                f"{where}: finish_reason needs stop or length, and is {self.server.shown(reason, 80)!r}"
            )
        logged = logged_tokens(choice, where)
        ids = self._token_ids(choice, logged, where)
        counted = get(body, "usage.completion_tokens", int, where, None)
        if ids is None:
            return self._without_ids(sample, choice, logged, counted, sampling, where)
        if reason == "stop":
            ids = self._with_end(ids, choice, sampling, where)
        _check(ids, counted, reason, sampling, where)
        logprob, top_ids, top_logprobs = _logs(logged, ids, sampling)
        for tops in top_ids or ():
            check_ids(tops, f"{where}: top_logprobs", self.vocabulary)
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

    def _token_ids(
        self, choice: dict[str, Any], logged: list[LoggedToken], where: str
    ) -> list[int] | None:
        """The ids that an answer names, or whose texts no other token has; else None."""
        ids = get(choice, "token_ids", list, where, None)
        if ids is not None or (not logged and get(choice, "text", str, where)):
            check_ids(ids or [], where, self.vocabulary)
            return ids
        ids = [token.number for token in logged if token.number is not None]
        if len(ids) < len(logged):
            if self.table is None:
                self.table = token_table(self.tokenizer) or {}
            told = [token.token_id(self.table) for token in logged]
            ids = [number for number in told if number is not None]
            if len(ids) < len(logged) or get(choice, "text", str, where) not in self._texts(ids):
                return None
        check_ids(ids, where, self.vocabulary)
        return ids

    def _texts(self, ids: list[int]) -> list[str]:
        """What the tokens spell, and what without the last one: an end token's text is not shown."""
        return [self.tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids[:-1])]

    def _with_end(
        self, ids: list[int], choice: dict[str, Any], sampling: Sampling, where: str
    ) -> list[int]:
        """The ids of a rollout that ended by itself, the end token among them."""
        if ids and ids[-1] in sampling.end_ids:
            return ids
        named = [choice.get(key) for key in ("stop_reason", "matched_stop")]  # vLLM, SGLang
        ended = next((end for end in named if end is not None), None)
        if ended is None and ids and not self.tokenizer.decode(ids[-1:], skip_special_tokens=True):
            ended = ids[-1]  # a special token
        if ended is not None and (type(ended) is not int or ended not in sampling.end_ids):
            raise DataError(
                f"{where}: the rollout ended with {self.server.shown(ended, 80)!r}, and the end tokens "
                f"of --model are {list(sampling.end_ids)}: its generation_config.json needs those of "
                "the served model"
            )
        if ended is None and len(sampling.end_ids) != 1:
            raise DataError(
                f"{where}: the answer does not name which of the end tokens {list(sampling.end_ids)} "
                "ended the rollout; use vLLM, SGLang or llama.cpp, whose answers do"
            )
        return [*ids, sampling.end_ids[0] if ended is None else ended]

    def _without_ids(
        self,
        sample: int,
        choice: dict[str, Any],
        logged: list[LoggedToken],
        counted: int | None,
        sampling: Sampling,
        where: str,
    ) -> Rollout:
        """A rollout of text and what the server counts; its entropies can never be had."""
        length = counted if counted is not None else len(logged)
        if length < 1:
            raise DataError(
                f"{where}: the answer holds neither tokens nor their number; ask the server for logprobs"
            )
        if length > sampling.max_new_tokens:
            raise DataError(
                f"{where}: the server counts {str(length)[:20]} tokens, more than the "
                f"{sampling.max_new_tokens} of --max-new-tokens"
            )
        logprob = _logs(logged, None, sampling)[0] if length == len(logged) else None
        return Rollout(
            sample=sample,
            token_ids=None,
            logprob=logprob,
            entropy=None,
            eos_logprob=None,
            finish_reason=choice["finish_reason"],
            text=get(choice, "text", str, where),
            n_tokens=length,
        )

    def _level(self, rollouts: list[Rollout], progress: Progress) -> None:
        """What one rollout lacks none has: a column of a shard is there whole or not at all."""
        for name in ("token_ids", "logprob", "top_token_ids", "top_logprobs"):
            if any(getattr(rollout, name) is None for rollout in rollouts):
                for rollout in rollouts:
                    if name == "token_ids" and rollout.text is None:
                        rollout.text = self.tokenizer.decode(rollout.token_ids, skip_special_tokens=True)
                    setattr(rollout, name, None)
                if name == "token_ids":
                    self._say(
                        progress,
                        "the server gives no token ids, and they do not follow from its texts: "
                        "entropies of these rollouts cannot be found by rescoring",
                    )

    def _say(self, progress: Progress, line: str) -> None:
        if line not in self.told:
            self.told.add(line)
            progress.say(line)


def _longest(body: dict[str, Any]) -> int:
    """Bytes that an answer may have: what its tokens, their lists and the prompt's ids can take."""
    return (1 << 20) + 16 * len(body["prompt"]) + 512 * body["max_tokens"] * (2 + body["logprobs"])


# ---------------------------------------------------------------- an answer's log


def _logs(
    logged: list[LoggedToken], ids: list[int] | None, sampling: Sampling
) -> tuple[np.ndarray | None, Any, Any]:
    """logprob, top_token_ids and top_logprobs of a rollout, each None where it is not whole.

    A server's log-probabilities are the model's own: those of the policy only where it is the whole
    softmax. Of an end token that was not logged nothing is known: its top list is empty.
    """
    steps = len(logged) if ids is None else len(ids)
    logprob, values = None, [token.logprob for token in logged]
    if sampling.is_model and len(values) == steps and None not in values:
        logprob = np.array(values, np.float32)
    if not sampling.top_logprobs or ids is None or len(logged) not in (steps, steps - 1):
        return logprob, None, None
    rows = [
        sorted(
            ((top.number, top.logprob) for top in token.tops if top.logprob is not None),
            key=lambda top: -top[1],
        )[: sampling.top_logprobs]
        for token in logged
    ]
    if any(token is None for row in rows for token, _ in row):
        return logprob, None, None
    rows += [[]] * (steps - len(rows))
    return logprob, [[t for t, _ in row] for row in rows], [[v for _, v in row] for row in rows]


def _check(ids: list[int], counted: int | None, reason: str, sampling: Sampling, where: str) -> None:
    """Refuses token ids that contradict the rest of the answer, or the request."""
    early = next((i for i in ids[:-1] if i in sampling.end_ids), None)
    if early is not None:
        raise DataError(
            f"{where}: the rollout goes on after token {early}, which ends one of --model; "
            "give the --model that is served"
        )
    # a server that leaves the end token out may or may not count it
    if counted is not None and len(ids) - counted not in ((0, 1) if reason == "stop" else (0,)):
        raise DataError(
            f"{where}: the answer holds {len(ids)} tokens, and its usage counts {str(counted)[:20]}"
        )
    if len(ids) > sampling.max_new_tokens:
        raise DataError(
            f"{where}: {len(ids)} tokens, more than the {sampling.max_new_tokens} of --max-new-tokens"
        )
    if reason == "length" and len(ids) < sampling.max_new_tokens:
        raise DataError(
            f"{where}: the server cut the rollout at {len(ids)} of {sampling.max_new_tokens} tokens: "
            "its context window is smaller; lower --max-new-tokens"
        )
