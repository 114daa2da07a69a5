"""A fine-tuned child of a model: full, or LoRA merged into the weights. One device, AdamW."""

from __future__ import annotations

import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoConfig, get_linear_schedule_with_warmup

from canopy_store import store
from canopy_store.errors import DataError, UsageError
from canopy_store.ingest import models
from canopy_store.ingest.children import (
    RECORD,
    in_use,
    is_free,
    made_by,
    name_child,
    require_new,
    save_child,
)
from canopy_store.ingest.corpus import corpus_sha256, stored_documents
from canopy_store.ingest.documents import Losses
from canopy_store.ingest.documents import losses as corpus_losses
from canopy_store.ingest.register import register_dataset
from canopy_store.ingest.regularise import REGULARISERS, Batch, Penalty, penalty_of
from canopy_store.ingest.sources import check_trainable, resolve_model
from canopy_store.ingest.training_data import read_records, segments
from canopy_store.store import treatments

_IGNORED = -100  # the label that transformers' loss leaves out

TokenLine = tuple[list[int], list[int]]  # token ids and labels


def finetune_child(
    root: str | Path,
    *,
    model: str,
    data: str | Path,
    out: str | Path,
    family: str,
    variant: str,
    parent: str | None = None,
    treatment: str | None = None,
    method: str = "full",
    eval_corpora: Sequence[str] = (),
    **options: Any,
) -> str:
    """The model_id of a new fine-tuned child, saved in ``out`` and named in the store's ``models``.

    Its curve goes to ``training``, and its data to ``datasets``. The same call again trains nothing.

    Parameters
    ----------
    root : path of the store, made if missing
    family, variant : names of the child; together they are its model_id
    parent, treatment : by default FAMILY/base, and sft or lora after the method
    eval_corpora : corpora of the store whose loss is measured in the training
    model, data, out, method, options : as for `finetune`

    Raises
    ------
    ConflictError
        A checkpoint of this name is stored already, and not in ``out``; nothing is trained.
    DataError, StoreError, UsageError
        As for `finetune`.
    """
    root = store.place(root)
    model_id = require_new(root, out, family, variant)  # told before the training, not after it
    if (parent or f"{family}/base") == model_id:
        raise UsageError(f"--variant {variant}: a child needs another name than its parent")
    corpora = {name: _documents(root, name) for name in eval_corpora}
    done = finetune(model, data, out, method=method, eval_corpora=corpora, **options)
    curve = done.pop("curve")
    root = store.init(root)
    register_dataset(root, data)
    name_child(
        root,
        out,
        {
            "family": family,
            "variant": variant,
            "parent_id": parent or f"{family}/base",
            "treatment": treatment or {"full": "sft"}.get(method, method),
            "hyperparameters": store.canonical(
                {k: v for k, v in done.items() if k not in ("data_sha256", "wall_s")}
            ),
            "data_sha256": done["data_sha256"],
            "seed": done["seed"],
        },
    )
    treatments.add_training(root, family, variant, curve)
    return model_id


def _documents(root: Path, corpus: str) -> list[dict[str, Any]]:
    documents = stored_documents(root, corpus)
    if any(each["text"] is None for each in documents):
        raise DataError(f"--eval-corpus {corpus}: its texts were left out when it was exported")
    return documents


def finetune(
    model: str,
    data: str | Path,
    out: str | Path,
    *,
    method: str = "full",
    steps: int | None = None,
    epochs: int | None = None,
    batch_size: int = 4,
    learning_rate: float = 5e-5,
    max_length: int = 512,
    seed: int = 0,
    lora_rank: int = 8,
    regularise: str | None = None,
    strength: float | None = None,
    reference: str | Path | None = None,
    replay: str | Path | None = None,
    replay_share: float | None = None,
    eval_corpora: Mapping[str, list[dict[str, Any]]] | None = None,
    eval_every: int | None = None,
    early_stop: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    show_progress: bool = False,
) -> dict[str, Any]:
    """What was done: the hyperparameters, ``final_loss``, ``data_sha256``, ``wall_s`` and ``curve``.

    The child is saved in ``out`` as safetensors with tokenizer and generation config, in its parent's
    number format, whole or not at all. Every sequence ends with the end-of-sequence token, unless it
    is cut at ``max_length``. The loss is over assistant messages, completions or whole texts; the
    prompt is rendered as an ingest of rollouts renders it.

    Parameters
    ----------
    model : local folder, hub id, or package:NAME
    data : JSONL of {"messages": …}, {"prompt": …, "completion": …} or {"text": …}
    out : folder to make; refused if something is in it, unless the same call made it: then nothing is
        trained again
    method : full, or lora (needs peft)
    steps : optimiser steps; by default what ``epochs`` (1) passes over the data take
    batch_size, max_length : sequences a step, tokens a sequence at most
    learning_rate : its peak; linear warm-up over the first 5% of the steps, then linear to 0
    regularise, strength : a penalty on leaving the parent, as of `canopy_store.ingest.regularise`
    reference : text of the parent's, JSONL as ``data``: what ewc weighs weights by, and what kl is over
        in place of the batch
    replay, replay_share : JSONL as ``data`` whose lines take this share (0.25) of each batch: fresh ones
        at every step, none twice before all were read
    eval_corpora : documents by the name of their corpus, whose loss is measured before the first step,
        every ``eval_every`` (steps/10) steps and at the end
    early_stop : evaluations without a lower loss on the first corpus, after which the training ends;
        what is saved is the model at its lowest
    show_progress : tells on stderr how far it is: a bar on a terminal, elsewhere a line now and then
    dtype : of the weights while they are trained, by default float32; on cuda the float32 forward
        pass runs in bfloat16

    Returns
    -------
    dict
        ``final_loss`` in nats per trained token, mean of the last 8 steps; ``wall_s`` in seconds;
        ``curve``: rows of the table ``training``.

    Raises
    ------
    DataError
        A line that cannot be trained on; names file and line. Or a loss that is not finite.
    StoreError
        A model or data file that cannot be read.
    UsageError
        Impossible settings, ``out`` not empty, or peft not installed.
    """
    started = time.perf_counter()
    out, corpora = Path(out), dict(eval_corpora or {})
    _check_settings(out, method, steps, epochs, batch_size, learning_rate, max_length, lora_rank)
    _check_treatment(method, regularise, strength, reference, replay, replay_share)
    if (eval_every is not None or early_stop is not None) and not corpora:
        option = "--eval-every" if early_stop is None else "--early-stop"
        raise UsageError(f"{option}: needs --eval-corpus, the text whose loss is measured")
    for option, value in (("--eval-every", eval_every), ("--early-stop", early_stop)):
        if value is not None and value < 1:
            raise UsageError(f"{option} {value}: needs at least 1")
    check_trainable(resolve_model(model))
    loaded, tokenizer, folder = models.load_model(model, device, dtype or "float32")
    share = (0.25 if replay_share is None else replay_share) if replay is not None else None
    asked = {
        "parent_sha256": models.weights_sha256(folder),
        "data_sha256": store.sha256(Path(data)),
        "method": method,
        "steps": steps,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "max_length": max_length,
        "seed": seed,
        "lora_rank": lora_rank if method == "lora" else None,
        "dtype": dtype,
        "regularise": regularise,
        "strength": strength,
        "reference_sha256": None if reference is None else store.sha256(Path(reference)),
        "replay_sha256": None if replay is None else store.sha256(Path(replay)),
        "replay_share": share,
        "eval_corpora": {
            name: corpus_sha256(each, ("document_id", "split", "text")) for name, each in corpora.items()
        },
        "eval_every": eval_every,
        "early_stop": early_stop,
    }
    if early_stop is not None and len(corpora) > 1:
        asked["early_stop_on"] = next(iter(corpora))  # the hashes by name have no order
    if not is_free(out):
        return made_by(asked, out)
    saved_dtype = getattr(AutoConfig.from_pretrained(folder), "dtype", None) or loaded.dtype
    window = min(max_length, models.context_window(loaded) or max_length)

    def read(path: str | Path) -> list[TokenLine]:
        return _read_sequences(Path(path), loaded, tokenizer, window)

    sequences = read(data)
    other = None if replay is None else read(replay)
    texts = None if reference is None else read(reference)
    fresh = batch_size * (1 - (share or 0))  # lines of the data a step
    steps = steps or math.ceil(len(sequences) * (epochs or 1) / fresh - 1e-9)
    torch.manual_seed(seed)
    penalty = None
    if regularise is not None:
        batches = (
            None
            if texts is None
            else _batches(
                texts, None, 0, 1 if regularise == "ewc" else batch_size, seed + 2, loaded.device
            )
        )
        assert strength is not None  # checked above
        penalty = penalty_of(regularise, loaded, strength, batches, len(texts or ()))
    trained = _with_lora(loaded, lora_rank) if method == "lora" else loaded
    curve = _train(
        trained,
        _batches(sequences, other, share or 0, batch_size, seed, loaded.device),
        steps,
        learning_rate,
        penalty,
        lambda: _evaluated(trained, tokenizer, corpora),
        (eval_every or max(1, steps // 10)) if corpora else None,
        early_stop,
        show_progress,
    )
    if method == "lora":
        trained = trained.merge_and_unload()
    last = [row["loss"] for row in curve if row["split"] == "train"][-8:]
    done = {
        "method": method,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "max_length": max_length,
        "seed": seed,
        "final_loss": sum(last) / len(last),
        "data_sha256": asked["data_sha256"],
        "wall_s": time.perf_counter() - started,
        **({"lora_rank": lora_rank} if method == "lora" else {}),
        **{key: asked[key] for key in _TREATMENTS if asked[key]},
    }
    if early_stop is not None:
        done["stopped_at"] = curve[-1]["step"]
        done["best_step"] = _best(curve)
    done["curve"] = curve
    save_child(trained.to(saved_dtype), tokenizer, out, {"asked": asked, "done": done})
    return done


# Of what was asked, what a child's row in models says only where it was.
_TREATMENTS = (
    "regularise",
    "strength",
    "reference_sha256",
    "replay_sha256",
    "replay_share",
    "early_stop",
)


def _check_treatment(
    method: str,
    regularise: str | None,
    strength: float | None,
    reference: str | Path | None,
    replay: str | Path | None,
    replay_share: float | None,
) -> None:
    if regularise is None:
        for option, value in (("--strength", strength), ("--reference", reference)):
            if value is not None:
                raise UsageError(f"{option}: needs --regularise, one of {', '.join(REGULARISERS)}")
    elif regularise not in REGULARISERS:
        raise UsageError(f"--regularise {regularise}: one of {', '.join(REGULARISERS)}")
    elif strength is None or not 0 < strength < float("inf"):
        raise UsageError(f"--regularise {regularise}: needs --strength, a number above 0")
    elif regularise == "ewc" and reference is None:
        raise UsageError("--regularise ewc: needs --reference, text that the parent is to keep")
    elif regularise == "l2sp" and reference is not None:
        raise UsageError("--reference: not with --regularise l2sp, which reads no text")
    elif method == "lora" and regularise != "kl":
        raise UsageError(
            f"--regularise {regularise}: of all weights, and --method lora keeps them; use kl"
        )
    if replay is None and replay_share is not None:
        raise UsageError("--replay-share: needs --replay, the file of its lines")
    if replay_share is not None and not 0 < replay_share < 1:
        raise UsageError(f"--replay-share {replay_share}: needs more than 0 and less than 1")


def _check_settings(
    out: Path,
    method: str,
    steps: int | None,
    epochs: int | None,
    batch_size: int,
    learning_rate: float,
    max_length: int,
    lora_rank: int,
) -> None:
    if method not in ("full", "lora"):
        raise UsageError(f"--method {method}: one of full, lora")
    for option, value in (
        ("--steps", 1 if steps is None else steps),
        ("--epochs", 1 if epochs is None else epochs),
        ("--batch-size", batch_size),
        ("--max-length", max_length - 1),
        ("--lora-rank", lora_rank),
    ):
        if value < 1:
            raise UsageError(f"{option}: too small; needs at least {2 if 'length' in option else 1}")
    if not 0 < learning_rate < 1:
        raise UsageError(f"--learning-rate {learning_rate}: needs more than 0 and less than 1")
    if not is_free(out) and not (out / RECORD).is_file():
        raise in_use(out)


# ---------------------------------------------------------------- data


def _read_sequences(path: Path, model: Any, tokenizer: Any, max_length: int) -> list[TokenLine]:
    """Token ids and labels of every line, in order."""
    ends = models.end_token_ids(model, tokenizer)
    if not ends:
        raise DataError("the model has no end-of-sequence token: its child could not learn to stop")
    # of several end tokens the tokenizer's own is the one its texts end with
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in ends else ends[0]
    sequences = []
    for where, record in read_records(path):
        ids: list[int] = []
        labels: list[int] = []
        for text, learnt, special in segments(record, tokenizer, where):
            part = tokenizer(text, add_special_tokens=special)["input_ids"]
            ids += part
            labels += part if learnt else [_IGNORED] * len(part)
        if not ids or ids[-1] not in ends:
            ids, labels = [*ids, end], [*labels, end]
        # the first token is never predicted
        if set(labels[1:max_length]) <= {_IGNORED}:
            raise DataError(
                f"{where}: nothing left to learn in {max_length} tokens; shorten its prompt or raise "
                "--max-length"
            )
        sequences.append((ids[:max_length], labels[:max_length]))
    return sequences


# ---------------------------------------------------------------- training


def _with_lora(model: Any, rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UsageError("--method lora needs peft: pip install 'canopy-store[ingest]'") from None
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, config)


def _train(
    model: Any,
    batches: Iterator[Batch],
    steps: int,
    learning_rate: float,
    penalty: Penalty | None,
    evaluate: Callable[[], Losses],
    eval_every: int | None,
    early_stop: int | None,
    show_progress: bool,
) -> list[dict[str, Any]]:
    """The curve, rows of the table ``training``; ``model`` is changed in place.

    With ``early_stop`` it is left as it was when the loss of the first corpus was lowest.
    """
    # A plain loop and one device: the batch is then the one that the record names.
    device = model.device
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimiser, steps // 20, steps)
    half = torch.autocast(
        device.type, torch.bfloat16, enabled=device.type == "cuda" and model.dtype == torch.float32
    )
    started = time.perf_counter()
    curve: list[dict[str, Any]] = []
    losses: list[float] = []
    best: list[torch.Tensor] = []

    def measure(step: int) -> bool:
        """Whether the training goes on."""
        passed = time.perf_counter() - started
        for split, (tokens, summed) in evaluate().items():
            loss = summed / tokens if tokens else None
            curve.append(
                {"step": step, "split": split, "tokens": tokens, "loss": loss, "wall_s": passed}
            )
        if early_stop is None:
            return True
        if _best(curve) == step:
            best[:] = [p.detach().clone() for p in weights]
        since = {row["step"] for row in curve if row["split"] != "train"}
        return len([each for each in since if each > _best(curve)]) < early_stop

    if eval_every:
        measure(0)
    model.train()
    for step in _steps(steps, losses, show_progress):
        batch = next(batches)
        rate = schedule.get_last_lr()[0]
        with half:
            loss = model(**batch).loss
            added = penalty(model, batch) if penalty else None
        (loss if added is None else loss + added).backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1] + (0.0 if added is None else added.item())):
            raise DataError(
                f"step {step + 1}: the loss is {losses[-1]}; lower --learning-rate, or use "
                "--dtype float32" + ("" if added is None else ", or lower --strength")
            )
        curve.append(
            {
                "step": step + 1,
                "split": "train",
                "tokens": int((batch["labels"][:, 1:] != _IGNORED).sum()),
                "loss": losses[-1],
                "penalty": None if added is None else added.item(),
                "lr": rate,
                "grad_norm": norm.item(),
                "wall_s": time.perf_counter() - started,
            }
        )
        if eval_every and ((step + 1) % eval_every == 0 or step + 1 == steps):
            goes_on = measure(step + 1)
            model.train()
            if not goes_on:
                break
    if best:
        for p, kept in zip(weights, best, strict=True):
            p.data.copy_(kept)
    model.eval()
    return curve


def _best(curve: list[dict[str, Any]]) -> int:
    """The step at which the loss of the first corpus was lowest, over all of its splits."""
    read = [row for row in curve if row["split"] != "train"]
    first = read[0]["split"].partition("/")[0]
    sums: dict[int, list[float]] = {}
    for row in read:
        if row["split"].partition("/")[0] == first and row["loss"] is not None:
            both = sums.setdefault(row["step"], [0.0, 0.0])
            both[0], both[1] = both[0] + row["loss"] * row["tokens"], both[1] + row["tokens"]
    if not sums:
        raise DataError(f"--early-stop: corpus {first} has no token that is scored; name another first")
    return min(sums, key=lambda step: (sums[step][0] / sums[step][1], step))


def _evaluated(model: Any, tokenizer: Any, corpora: Mapping[str, list[dict[str, Any]]]) -> Losses:
    """Tokens and summed loss of each corpus, or of each of its splits where it has several.

    A corpus named train is named with its split in any case: train alone is the loss of the batches.
    """
    model.eval()
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # of LoRA's wrapping
    found: Losses = {}
    for name, documents in corpora.items():
        of_splits = corpus_losses(plain, tokenizer, name, documents)
        for split, both in of_splits.items():
            found[name if len(of_splits) == 1 and name != "train" else f"{name}/{split}"] = both
    return found


_TELL_EVERY = 10.0  # seconds


def _steps(steps: int, losses: list[float], show: bool) -> Iterator[int]:
    """The steps, in order; a bar on a terminal, elsewhere a line now and then, tell how far it is."""
    console = Console(stderr=True)
    if not show or console.is_terminal:
        yield from track(range(steps), "training", console=console, transient=True, disable=not show)
        return
    started = told = time.perf_counter()
    for step in range(steps):
        yield step
        passed = time.perf_counter() - started
        if started + passed - told >= _TELL_EVERY:
            told = started + passed
            left = passed / (step + 1) * (steps - step - 1)
            print(
                f"training: step {step + 1} of {steps}, loss {losses[-1]:.2f}, {passed:.0f} s, about "
                f"{left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )


def _epochs(n: int, seed: int) -> Iterator[int]:
    """Indices of ``n`` sequences without end, each pass in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(n, generator=generator).tolist()


def _batches(
    sequences: list[TokenLine],
    replayed: list[TokenLine] | None,
    share: float,
    batch_size: int,
    seed: int,
    device: Any,
) -> Iterator[Batch]:
    """Batches without end, as (B, T) tensors; ``share`` of their lines are replayed ones."""
    order = _epochs(len(sequences), seed)
    others = _epochs(len(replayed or ()), seed + 1)
    for step in itertools.count():
        # where the share is no whole number of lines, it is on the average
        n = math.floor((step + 1) * batch_size * share + 1e-9) - math.floor(
            step * batch_size * share + 1e-9
        )
        lines = [sequences[i] for i in itertools.islice(order, batch_size - n)]
        lines += [(replayed or [])[i] for i in itertools.islice(others, n)]
        yield {key: value.to(device) for key, value in _pad(lines).items()}


def _pad(batch: list[TokenLine]) -> dict[str, torch.Tensor]:
    """A batch as (B, T) tensors. The mask hides the filling, so no padding token is needed."""
    width = max(len(ids) for ids, _ in batch)
    rows = [(ids, labels, width - len(ids)) for ids, labels in batch]
    return {
        "input_ids": torch.tensor([ids + [0] * gap for ids, _, gap in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * gap for ids, _, gap in rows]),
        "labels": torch.tensor([labels + [_IGNORED] * gap for _, labels, gap in rows]),
    }
