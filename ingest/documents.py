"""The ingest of documents: whole texts read by a model, each token's log-probability and entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from canopy_store import store
from canopy_store.errors import DataError, UsageError
from canopy_store.ingest import models
from canopy_store.ingest.corpus import read_documents, store_corpus, stored_documents
from canopy_store.ingest.draw import Sampling
from canopy_store.ingest.jobs import Columns, Job, Unit, run_job, shard_group
from canopy_store.ingest.number_formats import Emulation
from canopy_store.ingest.progress import Progress
from canopy_store.ingest.rendering import leading_ids
from canopy_store.ingest.scorer import open_scorer, register_scorer
from canopy_store.ingest.settings import Checkpoint
from canopy_store.ingest.sources import check_model, resolve_model
from canopy_store.ingest.teacher_forcing import score_tokens

Losses = dict[str, tuple[int, float]]


def ingest_documents(root: str | Path, model: str, **options: Any) -> str:
    """The scorer_id under which the scores of a corpus's documents are now stored.

    Every token of a text gets its log-probability under the model's own softmax (temperature 1, all
    tokens kept) given all before it, and the exact entropy of that distribution. The first token needs
    one to follow: what the tokenizer puts before a text, else its beginning-of-sequence token; where it
    has neither, the first token is read and not scored. Shards already scored are skipped, so that it
    resumes.

    Parameters
    ----------
    root : path of the store, made if missing
    model : local folder, GGUF file, hub id, or package:NAME
    family, variant : its names; parent, treatment : what it was made from, and how
    corpus : name of the documents in the store
    documents : JSONL or Parquet file, or a folder of .txt files, as of
        `canopy_store.ingest.corpus.read_documents`; may be left out once the corpus is stored
    name : the scorer_id; by default family.variant
    stride : for texts longer than the window: tokens that each further window scores, with as much
        before them as the window holds
    window : tokens that are read at once, at most; by default what the model can attend to
    bos : False: nothing is put before a text
    device, dtype : of the model
    number_format : emulated in its linear layers, as of `canopy_store.ingest.number_formats`; each
        token's KL from the plain model is then summed too
    batch_tokens : tokens read side by side
    chunk_tokens : steps whose logits are held at once, about five times their number x vocabulary x
        4 bytes
    shard, executor, workers, progress : as of `canopy_store.ingest.jobs.run_job`

    Raises
    ------
    ConflictError
        The corpus is stored with other documents, or the scorer with other settings; names each.
    DataError
        A document that is none, that makes no token, or that is longer than the window where no stride
        is given; logits that are NaN.
    """
    return run_job(root, open_documents, {"model": model, **options})


def open_documents(
    root: str | Path,
    model: str,
    *,
    family: str,
    variant: str,
    corpus: str,
    documents: str | Path | None = None,
    parent: str | None = None,
    treatment: str | None = None,
    name: str | None = None,
    stride: int | None = None,
    window: int | None = None,
    bos: bool = True,
    device: str | None = None,
    dtype: str | None = None,
    number_format: str | None = None,
    batch_tokens: int = 4096,
    chunk_tokens: int = 512,
    progress: Progress,
) -> Job:
    """The job of `ingest_documents`, its model loaded and its corpus stored."""
    checkpoint = Checkpoint(model, family, variant, parent, treatment)
    store.check_name("--corpus", corpus)
    sizes = {"stride": stride, "window": window, "batch-tokens": batch_tokens}
    for option, value in {**sizes, "chunk-tokens": chunk_tokens}.items():
        if value is not None and value < 1:
            raise UsageError(f"--{option} {value}: needs at least 1")
    root = store.place(root)
    listed = stored_documents(root, corpus) if documents is None else read_documents(documents)
    check_model(resolve_model(model))  # told before a model is loaded for nothing
    scorer = open_scorer(checkpoint, name=name, device=device, dtype=dtype, number_format=number_format)
    largest = models.context_window(scorer.model)
    if window is not None and largest is not None and window > largest:
        raise UsageError(f"--window {window}: the model attends to {largest} tokens at most")
    reading = Reading(
        scorer.tokenizer, _before(scorer.tokenizer) if bos else [], window or largest, stride
    )
    for document in listed:
        if document["text"] is not None:
            where = f"{documents or f'corpus {corpus}'}: document {document['document_id']}"
            reading.read(document["text"], where)
    root = store.init(root)  # not before: what is refused leaves no empty store, and no plan
    record = store_corpus(root, corpus, None if documents is None else listed)
    register_scorer(root, scorer)
    settings = {
        **scorer.settings,
        "before_token_ids": reading.before,
        "window": reading.window,
        "stride": stride,
        "batch_tokens": batch_tokens,
        "chunk_tokens": chunk_tokens,
    }

    def rows(unit: Unit, progress: Progress) -> tuple[Columns, int]:
        part = store.read_rows(unit.source, ["document_id", "text"]).to_pydict()
        names = [f"corpus {corpus}: document {each}" for each in part["document_id"]]
        if None in part["text"]:
            raise DataError(
                f"{names[part['text'].index(None)]}: its text was left out when the corpus was "
                "exported; pull a folder that has it"
            )
        read = [reading.read(text, name) for text, name in zip(part["text"], names, strict=True)]
        _check_ids(scorer.model, read, names)
        sizes = batch_tokens, chunk_tokens
        scores = _score(scorer.model, scorer.emulation, read, *sizes, names, progress.tokens)
        columns = {"document_id": part["document_id"], **_columns(read, scores)}
        return columns, sum(len(each.token_ids) for each in read)

    group = shard_group(root, "document_scores", scorer.scorer_id, record)
    return Job(
        root,
        "document_scores",
        scorer.scorer_id,
        settings,
        [group],
        rows,
        device=scorer.model.device.type,
    )


def losses(model: Any, tokenizer: Any, corpus: str, documents: Sequence[dict[str, Any]]) -> Losses:
    """Scored tokens and the sum of their -log-probability, nats, of each split of a corpus.

    Long documents are read in windows that do not overlap.

    Raises
    ------
    DataError
        As `Reading.read`; or logits that are NaN.
    """
    window = models.context_window(model)
    reading = Reading(tokenizer, _before(tokenizer), window, window)
    names = [f"corpus {corpus}: document {each['document_id']}" for each in documents]
    read = [reading.read(each["text"], name) for each, name in zip(documents, names, strict=True)]
    _check_ids(model, read, names)
    found: Losses = {}
    for each, (logprob, _) in zip(documents, _score(model, None, read, 4096, 512, names), strict=True):
        tokens, total = found.get(each["split"], (0, 0.0))
        found[each["split"]] = tokens + len(logprob), total - float(logprob.sum(dtype=np.float64))
    return found


def _before(tokenizer: Any) -> list[int]:
    """What stands before a text: what the tokenizer puts there, else its BOS token, else nothing."""
    bos = tokenizer.bos_token_id
    return leading_ids(tokenizer) or ([] if bos is None else [int(bos)])


# ---------------------------------------------------------------- a text as it is read


@dataclass(frozen=True)
class Text:
    """A text as tokens: ids, the text of each, and the windows that score them.

    ``windows`` are pairs (context, scored) of token ids: end to end, the scored ones are the last
    ``n_tokens`` of ``token_ids``.
    """

    token_ids: list[int]
    tokens: list[str]
    windows: list[tuple[list[int], list[int]]]

    @property
    def n_tokens(self) -> int:
        """Scored tokens."""
        return sum(len(scored) for _, scored in self.windows)


@dataclass(frozen=True)
class Reading:
    """How texts are read.

    Parameters
    ----------
    tokenizer : with transformers' interface
    before : token ids that stand before a text
    window : tokens that are read at once, at most; None: any number
    stride : tokens that each window after the first scores; None: one window has to do
    """

    tokenizer: Any
    before: list[int]
    window: int | None
    stride: int | None

    def read(self, text: str, where: str) -> Text:
        """A text's tokens and windows.

        Raises
        ------
        DataError
            It makes no token, or more than a window holds where no stride is given.
        """
        ids, tokens = token_texts(self.tokenizer, text)
        if not ids:
            raise DataError(f"{where}: the tokenizer makes no token of it; leave it out")
        sequence = [*self.before, *ids]
        first = len(self.before) or 1  # of the sequence, the first that has a token before it
        needed = len(sequence) - 1  # the last token is expected, and not read
        if self.window is not None and needed > self.window and self.stride is None:
            raise DataError(
                f"{where}: {len(sequence)} tokens exceed the window of {self.window}; pass --stride, as "
                f"in --stride {max(1, self.window // 2)}, to read it in windows"
            )
        return Text(ids, tokens, windows(sequence, first, self.window, self.stride))


def windows(
    sequence: Sequence[int], first: int, window: int | None, stride: int | None
) -> list[tuple[list[int], list[int]]]:
    """Context and scored token ids of each window over a sequence, each token scored once.

    The first window scores as many tokens as it holds; each further one the next ``stride``, with all
    before them that it has room for: ``window`` tokens are read, the last scored one aside.

    Parameters
    ----------
    sequence : token ids
    first : place of the first token that is scored
    """
    size = len(sequence) if window is None else window
    pieces: list[tuple[list[int], list[int]]] = []
    at = first
    while at < len(sequence):
        step = max(1, size + 1 - first) if not pieces else min(stride or size, size)
        stop = min(at + step, len(sequence))
        begin = max(0, stop - 1 - size)
        pieces.append((list(sequence[begin:at]), list(sequence[at:stop])))
        at = stop
    return pieces


def token_texts(tokenizer: Any, text: str) -> tuple[list[int], list[str]]:
    """Token ids of a text, without special tokens, and the part of the text that each stands for.

    End to end the parts are the text: what no token covers, such as white space that is split at, goes
    with the token after it (at the end, before it), and of tokens that share a character the first has
    it. Of a tokenizer without offsets, each token as it is decoded alone.
    """
    if not getattr(tokenizer, "is_fast", False):
        ids = [int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
        return ids, [tokenizer.decode([i]) for i in ids]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    parts, at = [], 0
    for _, stop in encoded["offset_mapping"]:
        parts.append(text[at : max(at, stop)])
        at = max(at, stop)
    if parts:
        parts[-1] += text[at:]
    return [int(i) for i in encoded["input_ids"]], parts


# ---------------------------------------------------------------- a shard


def _check_ids(model: Any, read: list[Text], names: list[str]) -> None:
    size = model.get_input_embeddings().weight.shape[0]
    for each, name in zip(read, names, strict=True):
        if max(each.token_ids) >= size:
            raise DataError(
                f"{name}: its tokenizer makes token {max(each.token_ids)}, and the model has "
                f"{size}; use the model's own tokenizer"
            )


def _score(
    model: Any,
    emulation: Emulation | None,
    read: list[Text],
    batch_tokens: int,
    chunk_tokens: int,
    names: list[str],
    on_tokens: Callable[[int], None] | None = None,
) -> list[np.ndarray]:
    """Log-probability and entropy (2, N), float32 nats, of each text's scored tokens; KL too: (3, N)."""
    pieces = [(at, *window) for at, each in enumerate(read) for window in each.windows]
    scores = score_tokens(
        model,
        [context for _, context, _ in pieces],
        [scored for *_, scored in pieces],
        Sampling(width=batch_tokens),
        chunk_tokens,
        on_tokens,
        [names[at] for at, *_ in pieces],
        batch_tokens=batch_tokens,
        emulation=emulation,
    )
    height = 4 if emulation else 3
    joined: list[list[np.ndarray]] = [[np.empty((height, 0), np.float32)] for _ in read]
    for (at, *_), record in zip(pieces, scores, strict=True):
        joined[at].append(record)
    whole = [np.concatenate(parts, axis=1) for parts in joined]
    return [np.stack([np.minimum(each[0], 0), np.maximum(each[1], 0), *each[3:]]) for each in whole]


def _columns(read: list[Text], scores: list[np.ndarray]) -> dict[str, Any]:
    spelt = ["".join(each.tokens[len(each.tokens) - each.n_tokens :]) for each in read]
    return {
        "token_ids": [each.token_ids for each in read],
        "tokens": [each.tokens for each in read],
        "logprob": [each[0] for each in scores],
        "entropy": [each[1] for each in scores],
        "n_tokens": [each.n_tokens for each in read],
        "n_bytes": [len(text.encode()) for text in spelt],
        "logprob_sum": [each[0].sum(dtype=np.float64) for each in scores],
        "entropy_sum": [each[1].sum(dtype=np.float64) for each in scores],
        "kl_sum": [each[2].sum(dtype=np.float64) if len(each) > 2 else None for each in scores],
    }
