"""Log-probabilities of options, exact, each shared token read once.

What all questions begin with, a context, is read once and its keys and values are kept. After it a batch
is one sequence of many questions, each its own tokens and then those of its options:

    context | question 1 | option 1a | option 1b | question 2 | option 2a | …

A mask lets each token see the context, its own question and its own option alone, and its position
counts from there. So nothing is padded, a question is read once for all of its options, and the context
stays in one place however many questions there are. A model that does not read such a sequence as it
reads each option alone, which is tried on the first batch, reads whole sequences instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from canopy_store.errors import DataError
from canopy_store.ingest.draw import Sampling
from canopy_store.ingest.teacher_forcing import score_tokens

_LOGITS = 1 << 26  # numbers of a batch's (steps, vocabulary) logits, at most


@dataclass(frozen=True)
class Question:
    """A question's options as token ids.

    Parameters
    ----------
    sequences : of each option, all from the context on
    starts : of each, the tokens before the option's own; at least one
    """

    sequences: list[list[int]]
    starts: list[int]

    @property
    def shared(self) -> int:
        """Tokens that all options have before them alike."""
        return min(common_prefix(self.sequences), *self.starts)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each option."""
        return [len(s) - n for s, n in zip(self.sequences, self.starts, strict=True)]


def common_prefix(sequences: Sequence[list[int]]) -> int:
    """How many tokens all sequences begin with."""
    first, last = min(sequences), max(sequences)  # in order, all others lie between
    same = (at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return next(same, min(len(first), len(last)))


def held_by(questions: Iterable[Question]) -> list[int]:
    """The token ids that all questions begin with, so that each has at least one of its own left."""
    held: list[int] | None = None
    for question in questions:
        first = question.sequences[0]
        held = first if held is None else held
        held = held[: max(0, min(common_prefix([held, first]), question.shared - 1))]
    return held or []


@dataclass
class _Batch:
    """Questions side by side, as one sequence of T tokens after what is shared."""

    numbers: list[int] = field(default_factory=list)  # of its questions
    tokens: list[int] = field(default_factory=list)  # (T,)
    positions: list[int] = field(default_factory=list)  # (T,)
    question: list[int] = field(default_factory=list)  # (T,): whose token it is
    option: list[int] = field(default_factory=list)  # (T,): of which option; -1: of the question
    kept: dict[int, int] = field(default_factory=dict)  # tokens whose logits are wanted: their row
    rows: list[int] = field(default_factory=list)  # (S,): row of the logits of each scored token
    targets: list[int] = field(default_factory=list)  # (S,)

    def add(self, number: int, question: Question, held: int) -> None:
        """Appends a question; its first ``held`` tokens are read already."""
        self.numbers.append(number)
        shared = question.shared
        stem = len(self.tokens) - held  # where the question's token at a position stands
        self._extend(number, -1, question.sequences[0][held:shared], held)
        for which, (sequence, start) in enumerate(zip(question.sequences, question.starts, strict=True)):
            branch = len(self.tokens) - shared
            self._extend(number, which, sequence[shared:-1], shared)  # nothing follows the last token
            for at in range(start, len(sequence)):
                before = at - 1
                token = before + (stem if before < shared else branch)
                self.rows.append(self.kept.setdefault(token, len(self.kept)))
                self.targets.append(sequence[at])

    def _extend(self, question: int, option: int, ids: Sequence[int], position: int) -> None:
        self.tokens += ids
        self.positions += range(position, position + len(ids))
        self.question += [question] * len(ids)
        self.option += [option] * len(ids)

    def mask(self, held: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """What is added to attention (1, 1, T, held + T): 0 where a token sees another."""
        question, option = torch.tensor([self.question, self.option], device=device)
        seen = (question[:, None] == question) & ((option == -1) | (option[:, None] == option))
        seen = torch.nn.functional.pad(seen.tril(), (held, 0), value=True)
        least = torch.zeros(seen.shape, dtype=dtype, device=device)
        return least.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]


class OptionReader:
    """A model that reads questions; what they all begin with is read once.

    Parameters
    ----------
    model : causal model with transformers' interface
    held : token ids that every sequence begins with, as of `held_by`; read when they are first needed
    batch_tokens : tokens of questions and options that are read together
    """

    def __init__(self, model: Any, held: Sequence[int], batch_tokens: int) -> None:
        self.model, self.held, self.batch_tokens = model, list(held), batch_tokens
        self.cache: DynamicCache | None = None
        self.layers: list[tuple[torch.Tensor, torch.Tensor]] = []  # the cache's keys and values of held
        self.shares: bool | None = None if _sees_all(model) else False

    @torch.inference_mode()
    def logprobs(
        self,
        questions: Sequence[Question],
        names: Sequence[str],
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[list[np.ndarray]]:
        """Of each question, for each option, the log-probability (n,) of each of its tokens, nats.

        float32; float64 of a model in float64.

        Parameters
        ----------
        names : what errors call each question
        on_tokens : told how many tokens of options were scored

        Raises
        ------
        DataError
            Logits that are NaN or infinite; names the question.
        """
        if self.shares is None:
            self.shares = self._agrees(questions)
        if not self.shares:
            self.cache, self.layers = None, []
            return self._whole(questions, names, on_tokens)
        results: list[list[np.ndarray]] = [[] for _ in questions]
        for batch in self._batches(questions):
            scored = self._read(batch)
            at = 0
            for number in batch.numbers:
                lengths = questions[number].lengths
                mine = scored[at : at + sum(lengths)]
                _check_finite(mine, names[number])
                results[number] = np.split(mine, np.cumsum(lengths)[:-1])
                at += len(mine)
            if on_tokens:
                on_tokens(len(scored))
        return results

    def _batches(self, questions: Sequence[Question]) -> Iterator[_Batch]:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        most = max(1, _LOGITS // vocabulary)
        batch = _Batch()
        for number, question in enumerate(questions):
            shared, held = question.shared, len(self.held)
            tokens = shared - held + sum(len(s) - 1 - shared for s in question.sequences)
            steps = sum(question.lengths)
            full = len(batch.tokens) + tokens > self.batch_tokens or len(batch.rows) + steps > most
            if batch.tokens and full:
                yield batch
                batch = _Batch()
            batch.add(number, question, held)
        yield batch

    def _read(self, batch: _Batch) -> np.ndarray:
        """Log-probabilities (S,) of the batch's scored tokens."""
        device, held = self.model.device, len(self.held)
        if self.held and self.cache is None:
            self.cache = DynamicCache()
            ids = torch.tensor([self.held], device=device)
            self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.layers = [(layer.keys, layer.values) for layer in self.cache.layers]  # type: ignore
        logits = self.model(
            input_ids=torch.tensor([batch.tokens], device=device),
            position_ids=torch.tensor([batch.positions], device=device),
            attention_mask=batch.mask(held, self.model.dtype, device),
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            logits_to_keep=torch.tensor(list(batch.kept), device=device),
        ).logits[0]  # (rows, V)
        if self.cache is not None:  # without what the batch has added
            for layer, (keys, values) in zip(self.cache.layers, self.layers, strict=True):
                layer.keys, layer.values = keys, values  # type: ignore[union-attr]
        return _logprobs(logits, batch.rows, batch.targets)

    def _agrees(self, questions: Sequence[Question]) -> bool:
        """Whether the first batch's last option, after all the others, gets what it gets alone."""
        batch = next(self._batches(questions))
        question = questions[batch.numbers[-1]]
        sequence, start = question.sequences[-1], question.starts[-1]
        try:
            scored = self._read(batch)
        except (AttributeError, TypeError, ValueError):  # its forward or its cache is of another kind
            return False
        ids = torch.tensor([sequence[:-1]], device=self.model.device)
        logits = self.model(input_ids=ids, use_cache=False).logits[0, start - 1 :]
        expected = _logprobs(logits, range(len(logits)), sequence[start:])
        got = scored[len(scored) - len(expected) :]
        room = 1e-3 if self.model.dtype in (torch.float32, torch.float64) else 0.3
        off = np.abs(got - expected) > room * np.maximum(1, np.abs(expected))
        return not off.any()  # NaN is for `_check_finite` to tell of

    def _whole(
        self,
        questions: Sequence[Question],
        names: Sequence[str],
        on_tokens: Callable[[int], None] | None,
    ) -> list[list[np.ndarray]]:
        """The same, each option's whole sequence read by itself."""
        pairs = [
            (sequence[:start], sequence[start:])
            for question in questions
            for sequence, start in zip(question.sequences, question.starts, strict=True)
        ]
        named = [n for q, n in zip(questions, names, strict=True) for _ in q.sequences]
        prompts, options = zip(*pairs, strict=True)
        scores = iter(
            score_tokens(
                self.model,
                prompts,
                options,
                Sampling(width=self.batch_tokens),
                on_tokens=on_tokens,
                names=named,
                batch_tokens=max(self.batch_tokens, 2048),
            )
        )
        return [[next(scores)[0] for _ in question.sequences] for question in questions]


def _sees_all(model: Any) -> bool:
    """Whether every layer's attention is over all that went before, by transformers' own masks."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return (
        kinds == {"full_attention"}
        and not window
        and config._attn_implementation in ("sdpa", "eager")
        and not getattr(model, "_is_stateful", False)  # state-space layers have no keys to share
    )


def _logprobs(logits: torch.Tensor, rows: Sequence[int], targets: Sequence[int]) -> np.ndarray:
    """log softmax of logits (rows, V) at the targets (S,) of these rows (S,)."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    at = torch.tensor([list(rows), list(targets)], device=logits.device)
    whole = logits.logsumexp(-1)
    return (logits[at[0], at[1]] - whole[at[0]]).cpu().numpy()


def _check_finite(logprobs: np.ndarray, name: str) -> None:
    if not np.isfinite(logprobs).all():
        raise DataError(
            f"{name}: the scorer's logits are NaN or infinite; its weights are damaged, or the number "
            "format overflows: try --dtype float32"
        )
