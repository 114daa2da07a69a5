"""Judges of whether two rollouts mean the same: each a function from pairs to verdicts.

chat     a model behind a server with OpenAI's chat API, asked in words
nli      an entailment model from a folder, asked in both directions
cosine   stored embeddings whose cosine similarity reaches a threshold
grades   the answers that a stored grader found
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canopy_store import store
from canopy_store.errors import DataError, UsageError
from canopy_store.ingest.judge_prompts import JudgePrompts, verdict_of
from canopy_store.ingest.openai_client import Server
from canopy_store.ingest.progress import Progress
from canopy_store.readers import get

_KEPT = 2000  # characters of a reply that are stored
_LABELS = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class Pair:
    """A prompt (its task and its text), and what a judge reads of two of its rollouts."""

    task: str
    prompt: str
    first: Any
    other: Any


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a pair, None where its reply holds no verdict; and the tokens it took."""

    verdict: str | None
    probability: float | None = None
    reply: str | None = None
    tokens: int = 0

    @property
    def alike(self) -> bool:
        """Whether the other text says what the first does."""
        return self.verdict in ("similar", "entailment")


Ask = Callable[[Sequence[Pair], Progress], list[Verdict]]
# What a judge reads of each rollout of a run: (run_id, rows with prompt_id, sample and text).
Reads = Callable[[str, Mapping[str, list[Any]]], list[Any]]


@dataclass(frozen=True)
class Judge:
    """A judge that is ready.

    Parameters
    ----------
    settings : what tells it from others, beside its name
    ask : gives a verdict for each pair, in order
    reads : what of a rollout goes into a pair; None: its text
    both : every pair is asked in both directions; else the reverse only where the first said similar
    device : that it runs on
    """

    settings: Mapping[str, Any]
    ask: Ask
    reads: Reads | None = None
    both: bool = False
    device: str | None = None

    @property
    def reads_texts(self) -> bool:
        """Whether it reads texts, and so is tried on two identical ones first."""
        return self.reads is None


# ---------------------------------------------------------------- a chat model


def chat_judge(
    base_url: str, served_model: str | None, prompts: JudgePrompts, concurrency: int, max_tokens: int
) -> Judge:
    """A chat model behind a server, ``concurrency`` requests at once, at temperature 0.

    Raises
    ------
    UsageError
        No such model there, or several and none named.
    CanopyError
        The server does not answer.
    """
    server = Server(base_url, concurrency)
    model = server.served([entry["id"] for entry in server.models()], served_model)

    def ask(pairs: Sequence[Pair], progress: Progress) -> list[Verdict]:
        bodies = [
            {
                "model": model,
                "messages": [
                    {"role": "user", "content": prompts.of(p.task, p.prompt, p.first, p.other)}
                ],
                "temperature": 0,
                "max_tokens": max_tokens,
            }
            for p in pairs
        ]
        return server.each(bodies, functools.partial(_said, server, progress), "chat/completions")

    settings = {"model": model, "instruction": prompts.id, "max_tokens": max_tokens, "temperature": 0}
    return Judge(settings, ask)


def _said(server: Server, progress: Progress, body: Mapping[str, Any]) -> Verdict:
    """The verdict in the body of an answer.

    Raises
    ------
    DataError
        The body is that of no chat completion.
    """
    choices = get(body, "choices", list, server.url)
    if not choices:
        raise DataError(f"{server.url}: the answer holds no choice")
    reply = get(choices[0], "message.content", str, server.url, "")
    used = [
        get(body, f"usage.{side}", int, server.url, 0) for side in ("prompt_tokens", "completion_tokens")
    ]
    tokens = sum(min(max(count, 0), 1 << 24) for count in used)
    progress.tokens(tokens)
    return Verdict(verdict_of(reply), reply=server.shown(reply, _KEPT), tokens=tokens)


# ---------------------------------------------------------------- an entailment model


def nli_judge(model: str, device: str | None, dtype: str | None, batch_size: int) -> Judge:
    """An entailment model, a cross-encoder: what follows for the other text from the first.

    It reads the two rollouts' texts alone, the longer one cut where they do not fit. Its weights load
    from safetensors only.

    Raises
    ------
    StoreError
        It cannot be loaded.
    DataError
        Its labels are not entailment, neutral and contradiction.
    """
    import torch

    from canopy_store.ingest import models
    from canopy_store.ingest.classifier import load_classifier
    from canopy_store.ingest.sources import resolve_model

    path = resolve_model(model)
    classifier, tokenizer = load_classifier(path, device, dtype, "an entailment model")
    named = {i: str(name).lower() for i, name in classifier.config.id2label.items()}
    labels = [named.get(i, "") for i in range(classifier.config.num_labels)]
    if sorted(labels) != sorted(_LABELS):
        raise DataError(
            f"{path}: its labels are {', '.join(labels)}; an entailment model has {', '.join(_LABELS)}, "
            "named in id2label of its config.json"
        )
    window = min(models.context_window(classifier) or tokenizer.model_max_length, 1 << 20)

    @torch.inference_mode()
    def ask(pairs: Sequence[Pair], progress: Progress) -> list[Verdict]:
        verdicts: list[Any] = [None] * len(pairs)
        # pairs of like length share a batch
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].first) + len(pairs[i].other))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = tokenizer(
                [pairs[i].first for i in rows],
                [pairs[i].other for i in rows],
                padding=True,
                truncation=True,
                max_length=window,
                return_tensors="pt",
            ).to(classifier.device)
            shares = classifier(**batch).logits.float().softmax(-1).cpu().numpy()
            counts = batch["attention_mask"].sum(1).tolist()
            progress.tokens(sum(counts))
            for i, row, count in zip(rows, shares, counts, strict=True):
                if not (row >= 0).all():
                    raise DataError(
                        f"{path}: a logit is NaN or infinite; the weights are damaged, or try --dtype "
                        "float32"
                    )
                verdicts[i] = Verdict(labels[int(row.argmax())], float(row.max()), tokens=count)
        return verdicts

    settings = {"weights_sha256": models.weights_sha256(path)}
    return Judge(settings, ask, both=True, device=classifier.device.type)


# ---------------------------------------------------------------- what is stored already


def cosine_judge(root: Path, embedder: str, threshold: float) -> Judge:
    """Similar are rollouts whose stored embeddings have a cosine of ``threshold`` or more."""
    if not -1 <= threshold <= 1:
        raise UsageError(f"--threshold {threshold:g}: needs -1 to 1, a cosine similarity")

    def ask(pairs: Sequence[Pair], progress: Progress) -> list[Verdict]:
        close = (float(p.first @ p.other) >= threshold for p in pairs)
        return [Verdict("similar" if each else "different") for each in close]

    @functools.lru_cache(maxsize=1)
    def of_run(run_id: str) -> dict[tuple[str, int], Any]:
        vectors: dict[tuple[str, int], Any] = {}
        for part in _stored(root, "embeddings", "embedder", embedder, run_id, "canopy ingest embed"):
            matrix = part["embedding"].combine_chunks()
            rows = matrix.flatten().to_numpy().reshape(len(matrix), -1).astype("float64")
            keys = zip(part["prompt_id"].to_pylist(), part["sample"].to_pylist(), strict=True)
            vectors |= dict(zip(keys, rows, strict=True))
        return vectors

    def reads(run_id: str, part: Mapping[str, list[Any]]) -> list[Any]:
        vectors = of_run(run_id)
        keys = list(zip(part["prompt_id"], part["sample"], strict=True))
        lacking = next((key for key in keys if key not in vectors), None)
        if lacking is not None:
            raise DataError(f"run {run_id}: prompt {lacking[0]} sample {lacking[1]} has no embedding")
        return [vectors[key] for key in keys]

    return Judge({"embedder": embedder, "threshold": threshold}, ask, reads)


def grades_judge(root: Path, grader: str) -> Judge:
    """Similar are two rollouts in which a stored grader found one answer; none is like no answer."""

    def ask(pairs: Sequence[Pair], progress: Progress) -> list[Verdict]:
        same = (p.first[0] is not None and p.first == p.other for p in pairs)
        return [Verdict("similar" if each else "different") for each in same]

    @functools.lru_cache(maxsize=1)
    def of_run(run_id: str) -> dict[tuple[str, int], tuple[str | None]]:
        answers: dict[tuple[str, int], tuple[str | None]] = {}
        for part in _stored(root, "grades", "grader", grader, run_id, "canopy ingest grade"):
            said = part.select(["prompt_id", "sample", "answer"]).to_pydict()
            for prompt_id, sample, answer in zip(*said.values(), strict=True):
                answers[prompt_id, sample] = (None if answer is None else answer.strip(),)
        if answers and all(answer is None for (answer,) in answers.values()):
            raise DataError(
                f"run {run_id}: {grader} stored no answer to compare; they were left out, or none found"
            )
        return answers

    def reads(run_id: str, part: Mapping[str, list[Any]]) -> list[Any]:
        answers = of_run(run_id)
        keys = zip(part["prompt_id"], part["sample"], strict=True)
        return [answers.get(key, (None,)) for key in keys]  # of an import, where it had no answer

    return Judge({"grader": grader}, ask, reads)


def _stored(root: Path, table: str, key: str, name: str, run_id: str, command: str) -> list[Any]:
    """The files of a run that a job of this name made.

    Raises
    ------
    DataError
        It has not done the run.
    """
    record = store.record(root, table, **{key: name, "run": run_id})
    if record is None:
        raise DataError(f"run {run_id}: no {table} by {name}; make them first: {command}")
    return [store.read_rows(root / file) for file in record.of(table)]
