"""Checkpoints that a trainer made elsewhere: named in the store, with the curve of their training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from canopy_store import sql, store
from canopy_store.errors import DataError, StoreError
from canopy_store.ingest import models, series
from canopy_store.ingest.tokenizer import load_tokenizer
from canopy_store.store import treatments

# What the files beside the weights say of the treatment: of adapter_config.json, of trainer_state.json.
_ADAPTER = ("peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "base_model_name_or_path")
_TRAINER = ("global_step", "max_steps", "num_train_epochs", "train_batch_size", "best_metric")


def register_checkpoint(
    root: str | Path,
    model: str | Path,
    *,
    family: str,
    variant: str,
    parent: str | None = None,
    treatment: str | None = None,
    data: str | Path | None = None,
) -> str:
    """The model_id of a checkpoint in a local folder, now in ``models``, its curve in ``training``.

    No weights are loaded, and nothing is run: weights and tokenizer are hashed, and of
    adapter_config.json and trainer_state.json (as TRL, axolotl and transformers' Trainer save them)
    known numbers and names are taken.

    Parameters
    ----------
    root : path of the store, made if missing
    model : folder of a model, or of an adapter, with safetensors
    family, variant : its names; parent : by default FAMILY/base
    treatment : by default lora, or the adapter's kind, where there is an adapter; else sft
    data : file that it was trained on, for its hash; named in ``datasets`` if it is not yet

    Raises
    ------
    ConflictError
        The name is stored with other weights, parent or treatment; names each.
    DataError
        A file beside the weights that is no JSON, or a step in it that is no number.
    StoreError
        No such folder, or no safetensors in it.
    """
    folder = Path(model)
    for option, name in (("--family", family), ("--variant", variant)):
        store.check_name(option, name)
    if not any(folder.glob("*.safetensors")):
        raise StoreError(f"{folder}: no folder with safetensors in it; name that of a checkpoint")
    adapter = series.read_object(folder / "adapter_config.json")
    trainer = series.read_object(folder / "trainer_state.json")
    curve = _curve(trainer.get("log_history", []), folder / "trainer_state.json")
    said = {**_plain(adapter, _ADAPTER), **_plain(trainer, _TRAINER)}
    kind = str(adapter["peft_type"]).lower() if "peft_type" in adapter else "sft"
    root = store.init(root)
    row: dict[str, Any] = {
        "family": family,
        "variant": variant,
        "parent_id": parent or f"{family}/base",
        "treatment": treatment or kind,
        "hyperparameters": store.canonical(said) if said else None,
        "weights_sha256": models.weights_sha256(folder),
        "tokenizer_sha256": _tokenizer_sha256(folder),
        "source": folder.resolve().name,
        "step": series.count_of(trainer.get("global_step")),
        "tokens_seen": series.count_of(trainer.get("num_input_tokens_seen")) or None,
    }
    if data is not None:
        row["data_sha256"] = register_dataset(root, data)
    model_id = store.add_model(root, row)
    treatments.add_training(root, family, variant, curve)
    sql.write_database(root)
    return model_id


def register_dataset(root: str | Path, data: str | Path, **said: Any) -> str:
    """The hash of a data file, whose row in ``datasets`` is now stored; ``said``: its other columns.

    Raises
    ------
    ConflictError
        It is stored with other values; names each.
    StoreError
        The file cannot be read.
    """
    path = Path(data)
    content = store.read_input(path)
    root = store.init(root)
    digest = store.sha256(path)
    if said or not any(row["data_sha256"] == digest for row in treatments.datasets(root)):
        lines = len(content.rstrip().split(b"\n"))
        row = {"name": path.stem, "method": "given", **{k: v for k, v in said.items() if v is not None}}
        treatments.add_dataset(root, {"data_sha256": digest, "lines": lines, **row})
    return digest


def _tokenizer_sha256(folder: Path) -> str | None:
    """The hash of the folder's tokenizer, as jobs that sample the model have it; None without one."""
    if not any(any(folder.glob(pattern)) for pattern in models.TOKENIZERS):
        return None
    return models.tokenizer_sha256(load_tokenizer(str(folder)))


def _plain(found: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Those of the named values that are numbers, short texts, or lists of short texts."""

    def is_plain(value: Any) -> bool:
        short = isinstance(value, str) and len(value) <= 200
        return short or (isinstance(value, int | float) and math.isfinite(value))

    kept = {}
    for name in names:
        value = found.get(name)
        if is_plain(value):
            kept[name] = value
        elif (
            isinstance(value, list)
            and len(value) <= 100
            and all(isinstance(each, str) for each in value)
        ):
            kept[name] = sorted(each[:200] for each in value)
    return kept


def _curve(history: Any, path: Path) -> list[dict[str, Any]]:
    """Rows of ``training`` of a trainer's log: loss by step, and every eval_loss and eval_NAME_loss."""
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for entry in history if isinstance(history, list) else []:
        if not isinstance(entry, dict) or "step" not in entry:
            continue
        step = _number(entry["step"], path)
        if step is None or step != int(step) or not 0 <= step < 2**31:
            raise DataError(f"{path}: a step {entry['step']!r} that is no whole number")
        for key, value in entry.items():
            if key != "loss" and not (key.startswith("eval_") and key.endswith("loss")):
                continue
            split = "train" if key == "loss" else key.removesuffix("loss").rstrip("_")
            row: dict[str, Any] = {"step": int(step), "split": split, "loss": _number(value, path)}
            if key == "loss":
                row["lr"] = _number(entry.get("learning_rate"), path)
                row["grad_norm"] = _number(entry.get("grad_norm"), path)
            rows[int(step), split] = row
    return list(rows.values())


def _number(value: Any, path: Path) -> float | None:
    """A number of a log; None where it is not finite, or not given."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"{path}: {str(value)[:40]!r} in its log is no number; take it from a copy")
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None
