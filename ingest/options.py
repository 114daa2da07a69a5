"""The ingest of options: what a model finds each answer of an item likely to be, after its question."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from canopy_store import store
from canopy_store.errors import DataError, UsageError
from canopy_store.ingest import models
from canopy_store.ingest.items import read_items
from canopy_store.ingest.jobs import Columns, Job, Unit, run_job, shard_group
from canopy_store.ingest.option_logprobs import OptionReader, Question, common_prefix, held_by
from canopy_store.ingest.progress import Progress
from canopy_store.ingest.rendering import NO_CONTEXT, Context, chat_text, leading_ids, read_context
from canopy_store.ingest.scorer import open_scorer, register_scorer
from canopy_store.ingest.settings import Checkpoint
from canopy_store.ingest.sources import check_model, resolve_model
from canopy_store.ingest.training_data import read_records
from canopy_store.store.items import store_items, stored_items

_NEUTRAL_OPTIONS = 32  # that are read together after the neutral prompt

Item = Sequence[Mapping[str, Any]]


def ingest_options(root: str | Path, model: str, **options: Any) -> str:
    """The scorer_id under which the scores of a task's options are now stored.

    Each token of an option gets its log-probability under the model's own softmax (temperature 1, all
    tokens kept), given the context, the item's prompt and the option's tokens before it. Shards already
    scored are skipped, so that it resumes.

    Parameters
    ----------
    root : path of the store, made if missing
    model : local folder, GGUF file, hub id, or package:NAME
    family, variant : its names; parent, treatment : what it was made from, and how
    task : name of the items in the store
    items : JSONL or Parquet file, as of `canopy_store.ingest.items.read_items`; may be left out once the
        task is stored
    context : file of what stands before every prompt, as of `read_option_context`; part of the scorer
    neutral : prompt after which every option is scored too, in place of the item's own
    template : chat, plain, or auto: chat where an item has messages
    name : the scorer_id; by default family.variant, with a part of the context's hash
    device, dtype : of the model
    number_format : emulated in its linear layers, as of `canopy_store.ingest.number_formats`
    batch_tokens : tokens of questions and options read together [default: 512, 2048 on a GPU]
    shard, executor, workers, progress : as of `canopy_store.ingest.jobs.run_job`

    Raises
    ------
    ConflictError
        The task is stored with other items, or the scorer with other settings; names each.
    DataError
        An item that is none, an option of no tokens, more than the model's window holds; names the line.
    """
    return run_job(root, open_options, {"model": model, **options})


def open_options(
    root: str | Path,
    model: str,
    *,
    family: str,
    variant: str,
    task: str,
    items: str | Path | None = None,
    context: str | Path | None = None,
    neutral: str | None = None,
    template: str = "auto",
    parent: str | None = None,
    treatment: str | None = None,
    name: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    number_format: str | None = None,
    batch_tokens: int | None = None,
    progress: Progress,
) -> Job:
    """The job of `ingest_options`, its model loaded, its items stored and found fit to be read."""
    checkpoint = Checkpoint(model, family, variant, parent, treatment)
    store.check_name("--task", task)
    if template not in ("auto", "chat", "plain"):
        raise UsageError(f"--template {template}: one of auto, chat, plain")
    if batch_tokens is not None and batch_tokens < 1:
        raise UsageError(f"--batch-tokens {batch_tokens}: needs at least 1")
    listed = stored_items(store.place(root), task) if items is None else read_items(items)
    before = NO_CONTEXT if context is None else read_option_context(context)
    check_model(resolve_model(model))  # before torch has loaded anything for nothing
    if template == "auto":
        template = "chat" if any(item[0]["messages"] for item in listed) else "plain"
    scorer = open_scorer(
        checkpoint,
        name=name,
        device=device,
        dtype=dtype,
        template=template,
        number_format=number_format,
        context_sha256=None if context is None else _sha256(before),
    )
    encoder = Encoder(scorer.model, scorer.tokenizer, template, before)
    places = {item[0]["item_id"]: _where(task, item) for item in listed}
    held = held_by(_questions(encoder, listed, places, neutral))  # all proved fit to be read
    root = store.init(root)  # not before: what is refused leaves no empty store
    record = store_items(root, task, listed)
    register_scorer(root, scorer)
    batch_tokens = batch_tokens or (512 if scorer.model.device.type == "cpu" else 2048)
    reader = OptionReader(scorer.model, held, batch_tokens)
    known = {item[0]["item_id"]: item for item in listed}

    def rows(unit: Unit, progress: Progress) -> tuple[Columns, int]:
        part = store.read_rows(unit.source, ["item_id", "option"]).to_pydict()
        mine = [known[item_id] for item_id in dict.fromkeys(part["item_id"])]
        with scorer.emulation.on() if scorer.emulation else nullcontext():
            columns = _score(reader, encoder, mine, places, neutral, progress)
        return {**part, **columns}, sum(columns["n_tokens"])

    return Job(
        root,
        "option_scores",
        scorer.scorer_id,
        {**scorer.settings, **before.settings(), "neutral": neutral, "batch_tokens": batch_tokens},
        [shard_group(root, "option_scores", scorer.scorer_id, record)],
        rows,
        device=scorer.model.device.type,
    )


def _where(task: str, item: Item) -> str:
    """What errors call an item: its line in the file, or its name in the store."""
    return item[0].get("where") or f"task {task}: item {item[0]['item_id']}"


# ---------------------------------------------------------------- what stands before every prompt


def read_option_context(path: str | Path) -> Context:
    """What a file says to put before every prompt: a text, documents, or worked examples.

    A .jsonl file holds documents, {"text": …} a line, or examples, {"prompt": …, "completion": …} or
    {"messages": […]} a line; any other file is a text. In plain text an empty line follows each, and an
    example's completion follows its prompt; of a chat the text is the system message, and examples are
    turns.

    Raises
    ------
    StoreError, DataError
        A file that cannot be read, holds no text, or holds documents and examples; names file and line.
    """
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        try:
            text = store.read_input(path).decode().rstrip("\n")
        except UnicodeDecodeError:
            raise DataError(f"{path}: not UTF-8 text") from None
        if not text.strip():
            raise DataError(f"{path}: holds no text; leave --context out for none")
        return Context(text)
    records = list(read_records(path))
    texts = [r["text"] for _, r in records if "messages" not in r and "prompt" not in r]
    if not texts:
        return read_context(None, path)
    for where, record in records:
        if "messages" in record or "prompt" in record:
            raise DataError(f"{where}: an example among documents; a context holds one of the two")
    return Context("\n\n".join(texts))


def _sha256(context: Context) -> str:
    return hashlib.sha256(store.canonical(context.settings()).encode()).hexdigest()


# ---------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Encoder:
    """How context, prompt and option become tokens.

    The prompt and an option are tokenised as one text, and the option's tokens are those after the
    longest beginning that this has in common with the prompt tokenised alone. So what is scored is
    text as a model meets it, and a token that holds the end of the prompt and the beginning of the
    option, such as a space and the word after it, is the option's. In plain text the context is
    tokenised by itself: it ends with an empty line.
    """

    model: Any
    tokenizer: Any
    template: str
    context: Context

    def question(self, item: Item, where: str) -> Question:
        """The options of an item after their prompts.

        Raises
        ------
        DataError
            An option of no tokens, with nothing before it, or beyond the model's window.
        """
        texts = [row["text"] for row in item]
        if None in texts:
            raise DataError(f"{where}: its texts were left out by an export; give the file with --items")
        return self.options(
            texts, [self._before(row["prompt"], row["messages"], where) for row in item], where
        )

    def after(self, prompt: str, texts: Sequence[str], where: str) -> Question:
        """These options after one prompt."""
        return self.options(texts, [self._before(prompt, None, where)] * len(texts), where)

    def options(self, texts: Sequence[str], befores: Sequence[str], where: str) -> Question:
        """Options after texts: the prompts, or conversations as the template has them."""
        lead = self._lead
        prompts = dict(zip(set(befores), self._ids(list(set(befores))), strict=True))
        wholes = self._ids([before + text for before, text in zip(befores, texts, strict=True)])
        starts = [common_prefix([prompts[b], ids]) for b, ids in zip(befores, wholes, strict=True)]
        for number, (ids, start) in enumerate(zip(wholes, starts, strict=True)):
            if start == len(ids):
                raise DataError(f"{where}: the tokenizer makes no token of option {number}")
        if not lead and not min(starts):
            bos = self.tokenizer.bos_token_id
            if bos is None:
                raise DataError(f"{where}: nothing stands before an option; give it a prompt")
            lead = [int(bos)]
        question = Question([lead + ids for ids in wholes], [len(lead) + start for start in starts])
        self._check(question, where)
        return question

    def _before(self, prompt: str | None, messages: str | None, where: str) -> str:
        """What stands before an item's options, as text."""
        conversation = json.loads(messages) if messages else None
        if self.template == "chat":
            conversation = conversation or [{"role": "user", "content": prompt or ""}]
            return chat_text(conversation, self.tokenizer, where, self.context)
        if conversation is None:
            return prompt or ""
        if len(conversation) > 1:
            raise DataError(f"{where}: several messages need --template chat, or a prompt")
        return conversation[0]["content"]

    @cached_property
    def _lead(self) -> list[int]:
        """Token ids before every prompt: of the context, in plain text, and what the tokenizer adds."""
        if self.template == "chat":
            return []
        text = self.context.text()
        return leading_ids(self.tokenizer) + (self._ids([text])[0] if text else [])

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False)["input_ids"]]

    def _check(self, question: Question, where: str) -> None:
        size = self.model.get_input_embeddings().weight.shape[0]
        window = models.context_window(self.model)
        longest = max(map(len, question.sequences))
        if max(map(max, question.sequences)) >= size:
            raise DataError(f"{where}: token ids need to be below {size}; use the model's own tokenizer")
        if window and longest - 1 > window:
            raise DataError(
                f"{where}: context, prompt and option have {longest} tokens, and the model's window "
                f"holds {window}; shorten them"
            )


def _questions(
    encoder: Encoder, items: Iterable[Item], places: Mapping[str, str], neutral: str | None
) -> Iterator[Question]:
    """Every question of a job, those after the neutral prompt too."""
    tried: set[str] = set()
    for item in items:
        where = places[item[0]["item_id"]]
        yield encoder.question(item, where)
        texts = [row["text"] for row in item if row["text"] not in tried]
        if neutral is not None and texts:
            tried.update(texts)
            yield encoder.after(neutral, texts, f"{where}: --neutral")


# ---------------------------------------------------------------- a shard


def _score(
    reader: OptionReader,
    encoder: Encoder,
    items: Sequence[Item],
    places: Mapping[str, str],
    neutral: str | None,
    progress: Progress,
) -> dict[str, list[Any]]:
    """Columns of ``option_scores``, item after item."""
    names = [places[item[0]["item_id"]] for item in items]
    questions = [encoder.question(item, name) for item, name in zip(items, names, strict=True)]
    # float32, as they are stored, so that the sums are those of what is stored
    scores = [
        np.minimum(row, 0).astype(np.float32)
        for question in reader.logprobs(questions, names, progress.tokens)
        for row in question
    ]
    columns: dict[str, list[Any]] = {
        "n_tokens": [len(row) for row in scores],
        "logprob": scores,
        "logprob_sum": [row.sum(dtype=np.float64) for row in scores],
    }
    if neutral is not None:
        texts = list(dict.fromkeys(row["text"] for item in items for row in item))
        sums = _neutral_sums(reader, encoder, texts, neutral)
        columns["neutral_sum"] = [sums[row["text"]] for item in items for row in item]
    return columns


def _neutral_sums(
    reader: OptionReader, encoder: Encoder, texts: Sequence[str], neutral: str
) -> dict[str, float]:
    """The log-probability of each option after the neutral prompt."""
    parts = [texts[at : at + _NEUTRAL_OPTIONS] for at in range(0, len(texts), _NEUTRAL_OPTIONS)]
    names = ["--neutral"] * len(parts)
    questions = [encoder.after(neutral, part, "--neutral") for part in parts]
    scores = [row for rows in reader.logprobs(questions, names) for row in rows]
    sums = [np.minimum(row, 0).astype(np.float32).sum(dtype=np.float64) for row in scores]
    return dict(zip(texts, sums, strict=True))
