"""A scorer: a checkpoint as it reads given text, in one number format, after a context or none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canopy_store import store
from canopy_store.errors import UsageError
from canopy_store.ingest import models
from canopy_store.ingest.number_formats import Emulation
from canopy_store.ingest.settings import Checkpoint, check_number_format
from canopy_store.store.scorers import add_scorer


@dataclass(frozen=True)
class Scorer:
    """A scorer that is loaded.

    Parameters
    ----------
    model, tokenizer : with transformers' interface
    checkpoint : the row in ``models`` of the weights, as `canopy_store.store.add_model` takes it
    row : its row in ``scorers``
    emulation : of its number format, where it has one
    """

    model: Any
    tokenizer: Any
    checkpoint: dict[str, Any]
    row: dict[str, Any]
    emulation: Emulation | None = None

    @property
    def scorer_id(self) -> str:
        """Its name in the store."""
        return self.row["scorer_id"]

    @property
    def settings(self) -> dict[str, Any]:
        """What a resumed job must repeat of it."""
        named = ("scorer_id", "context_sha256", "number_format", "dtype", "template", "weights_sha256")
        return {
            **{key: self.row[key] for key in named},
            "tokenizer_sha256": self.checkpoint["tokenizer_sha256"],
            "device": self.model.device.type,
        }


def scorer_name(
    checkpoint: Checkpoint,
    template: str = "plain",
    number_format: str | None = None,
    context_sha256: str | None = None,
) -> str:
    """The scorer_id where none is given: ``family.variant``, then what differs from a plain scorer."""
    parts = [checkpoint.family, checkpoint.variant]
    parts += [template] if template != "plain" else []
    parts += [number_format] if number_format else []
    parts += [f"context-{context_sha256[:8]}"] if context_sha256 else []
    return ".".join(parts)


def open_scorer(
    checkpoint: Checkpoint,
    *,
    name: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    template: str = "plain",
    number_format: str | None = None,
    context_sha256: str | None = None,
) -> Scorer:
    """The scorer, its model loaded; nothing is stored yet.

    Parameters
    ----------
    checkpoint : the model, its family and variant
    name : the scorer_id; by default as of `scorer_name`
    device, dtype : of the model
    template : plain, or chat
    number_format : that is emulated; None: the dtype's own
    context_sha256 : of what the caller will put before all that is read; None: nothing

    Raises
    ------
    StoreError, UsageError
        As `canopy_store.ingest.models.load_model`; or a name that cannot be one.
    """
    if number_format is not None:
        check_number_format(number_format)
        dtype = dtype or "float32"
    name = name or scorer_name(checkpoint, template, number_format, context_sha256)
    store.check_name("--name", name)
    model, tokenizer, path = models.load_model(checkpoint.model, device, dtype)
    if template == "chat" and not getattr(tokenizer, "chat_template", None):
        raise UsageError("--template chat: the tokenizer has no chat template; use plain")
    emulation = None if number_format is None else Emulation(model, number_format)
    said = models.checkpoint(checkpoint.model, path, tokenizer)
    row = {
        "scorer_id": name,
        "model_id": f"{checkpoint.family}/{checkpoint.variant}",
        "family": checkpoint.family,
        "variant": checkpoint.variant,
        "context_sha256": context_sha256,
        "number_format": number_format,
        "dtype": str(model.dtype).removeprefix("torch."),
        "template": template,
        "weights_sha256": said["weights_sha256"],
        "macs": None if emulation is None else emulation.macs,
    }
    return Scorer(model, tokenizer, {**_made_how(checkpoint), **said}, row, emulation)


def _made_how(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the caller says of a checkpoint, as columns of ``models``."""
    hyperparameters = checkpoint.hyperparameters
    return {
        "family": checkpoint.family,
        "variant": checkpoint.variant,
        "parent_id": checkpoint.parent,
        "treatment": checkpoint.treatment,
        "hyperparameters": store.canonical(hyperparameters) if hyperparameters else None,
        "data_sha256": checkpoint.data_sha256,
    }


def register_scorer(root: Path, scorer: Scorer) -> str:
    """The scorer_id, whose rows in ``models`` and ``scorers`` are now stored; the same again is once.

    Raises
    ------
    ConflictError
        The model_id is stored with other weights, parent or treatment, or the scorer_id with other
        values; names each difference.
    """
    store.add_model(root, scorer.checkpoint)
    return add_scorer(root, scorer.row)
