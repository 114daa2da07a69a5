"""A fine-tuned child of a model: full, or LoRA merged into the weights. One device, AdamW."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoConfig, get_linear_schedule_with_warmup

from canopy_store import store
from canopy_store.errors import ConflictError, DataError, StoreError, UsageError
from canopy_store.ingest import models
from canopy_store.ingest.sources import check_trainable, resolve_model
from canopy_store.ingest.training_data import read_records, segments

_IGNORED = -100  # the label that transformers' loss leaves out


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
    **options: Any,
) -> str:
    """The model_id of a new fine-tuned child, saved in ``out`` and named in the store's ``models``.

    Parameters
    ----------
    root : path of the store, made if missing
    family, variant : names of the child; together they are its model_id
    parent, treatment : by default FAMILY/base, and sft or lora after the method
    model, data, out, method, options : as for `finetune`

    Raises
    ------
    ConflictError
        A checkpoint of this name is stored already; nothing is trained.
    DataError, StoreError, UsageError
        As for `finetune`.
    """
    root = store.place(root)
    for option, name in (("--family", family), ("--variant", variant)):
        store.check_name(option, name)
    model_id = f"{family}/{variant}"
    stored = store.models(root) if store.exists(root / "canopy.json") else {}
    if model_id in stored:  # told before the training, not after it
        raise ConflictError(f"model {model_id} is stored already; give another --variant")
    if (parent or f"{family}/base") == model_id:
        raise UsageError(f"--variant {variant}: a child needs another name than its parent")
    done = finetune(model, data, out, method=method, **options)
    _, tokenizer, folder = models.load_model(str(out), "cpu")  # it must load before it is named
    root = store.init(root)
    return store.add_model(
        root,
        {
            "family": family,
            "variant": variant,
            "parent_id": parent or f"{family}/base",
            "treatment": treatment or {"full": "sft"}.get(method, method),
            "hyperparameters": store.canonical(
                {key: value for key, value in done.items() if key not in ("data_sha256", "wall_s")}
            ),
            "data_sha256": done["data_sha256"],
            "weights_sha256": models.weights_sha256(folder),
            "tokenizer_sha256": models.tokenizer_sha256(tokenizer),
            "seed": done["seed"],
            "source": folder.name,
        },
    )


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
    device: str | None = None,
    dtype: str | None = None,
    show_progress: bool = False,
) -> dict[str, Any]:
    """What was done: the hyperparameters, ``final_loss``, ``data_sha256`` and ``wall_s``.

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
    show_progress : tells on stderr how far it is: a bar on a terminal, elsewhere a line now and then
    dtype : of the weights while they are trained, by default float32; on cuda the float32 forward
        pass runs in bfloat16

    Returns
    -------
    dict
        ``final_loss`` in nats per trained token, mean of the last 8 steps; ``wall_s`` in seconds.

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
    out = Path(out)
    _check_settings(out, method, steps, epochs, batch_size, learning_rate, max_length, lora_rank)
    check_trainable(resolve_model(model))
    loaded, tokenizer, folder = models.load_model(model, device, dtype or "float32")
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
    }
    if not _is_free(out):
        return _made_by(asked, out)
    saved_dtype = getattr(AutoConfig.from_pretrained(folder), "dtype", None) or loaded.dtype
    window = min(max_length, models.context_window(loaded) or max_length)
    sequences = _read_sequences(Path(data), loaded, tokenizer, window)
    steps = steps or -(-len(sequences) * (epochs or 1) // batch_size)
    torch.manual_seed(seed)
    trained = _with_lora(loaded, lora_rank) if method == "lora" else loaded
    final_loss = _train(trained, sequences, steps, batch_size, learning_rate, seed, show_progress)
    if method == "lora":
        trained = trained.merge_and_unload()
    done = {
        "method": method,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "max_length": max_length,
        "seed": seed,
        "final_loss": final_loss,
        "data_sha256": asked["data_sha256"],
        "wall_s": time.perf_counter() - started,
        **({"lora_rank": lora_rank} if method == "lora" else {}),
    }
    _save(trained.to(saved_dtype), tokenizer, out, {"asked": asked, "done": done})
    return done


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
    if not _is_free(out) and not (out / _RECORD).is_file():
        raise _in_use(out)


# In a child's folder: what made it. A call that was killed before the store named the child finds it.
_RECORD = "finetune.json"


def _is_free(out: Path) -> bool:
    return not (out.is_file() or (out.is_dir() and any(out.iterdir())))


def _made_by(asked: dict[str, Any], out: Path) -> dict[str, Any]:
    """What `finetune` returned for the same call, which made ``out``; refused if another one did."""
    try:
        found = json.loads((out / _RECORD).read_text())
        if found["asked"] == asked:
            return dict(found["done"])
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise _in_use(out)


def _in_use(out: Path) -> UsageError:
    return UsageError(f"--out {out}: exists and is not empty; choose a new folder")


# ---------------------------------------------------------------- data


def _read_sequences(
    path: Path, model: Any, tokenizer: Any, max_length: int
) -> list[tuple[list[int], list[int]]]:
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
    sequences: list[tuple[list[int], list[int]]],
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    show_progress: bool,
) -> float:
    """The mean loss of the last 8 steps, in nats per trained token; ``model`` is changed in place."""
    # A plain loop and one device: the batch is then the one that the record names.
    device = model.device
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimiser, steps // 20, steps)
    half = torch.autocast(
        device.type, torch.bfloat16, enabled=device.type == "cuda" and model.dtype == torch.float32
    )
    order = _epochs(len(sequences), seed)
    losses: list[float] = []
    model.train()
    for step in _steps(steps, losses, show_progress):
        batch = [sequences[i] for i in itertools.islice(order, batch_size)]
        with half:
            loss = model(**{k: v.to(device) for k, v in _pad(batch).items()}).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        losses.append(loss.item())
        if losses[-1] != losses[-1] or losses[-1] == float("inf"):
            raise DataError(
                f"step {step + 1}: the loss is {losses[-1]}; lower --learning-rate, or use "
                "--dtype float32"
            )
    model.eval()
    return sum(losses[-8:]) / len(losses[-8:])


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


def _pad(batch: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """A batch as (B, T) tensors. The mask hides the filling, so no padding token is needed."""
    width = max(len(ids) for ids, _ in batch)
    rows = [(ids, labels, width - len(ids)) for ids, labels in batch]
    return {
        "input_ids": torch.tensor([ids + [0] * gap for ids, _, gap in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * gap for ids, _, gap in rows]),
        "labels": torch.tensor([labels + [_IGNORED] * gap for _, labels, gap in rows]),
    }


def _save(model: Any, tokenizer: Any, out: Path, record: dict[str, Any]) -> None:
    """Writes the child beside ``out``, then renames: ``out`` is a whole model or is not there."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        model.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        store.write_json(temporary / _RECORD, record)
        os.replace(temporary, out)
    except OSError as error:
        raise StoreError(f"{out}: cannot write: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
