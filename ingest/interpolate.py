"""Weight averaging: a checkpoint between two others of one architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from canopy_store import store
from canopy_store.errors import DataError, UsageError
from canopy_store.ingest import models
from canopy_store.ingest.children import is_free, made_by, name_child, require_new, save_child
from canopy_store.ingest.sources import check_trainable, resolve_model


def interpolate_child(
    root: str | Path,
    *,
    model: str,
    other: str,
    alpha: float,
    out: str | Path,
    family: str,
    variant: str,
    parent: str | None = None,
    treatment: str | None = None,
) -> str:
    """The model_id of a checkpoint with the weights (1 - alpha) A + alpha B, in ``out`` and ``models``.

    Averaged in float32 and saved in A's number format, with A's tokenizer. The same call again makes
    nothing.

    Parameters
    ----------
    root : path of the store, made if missing
    model, other : A and B: local folder, hub id, or package:NAME
    alpha : share of B, above 0 and below 1
    out : folder to make
    family, variant : names of the new one; parent, treatment : by default FAMILY/base and interpolate

    Raises
    ------
    ConflictError
        The name is stored already, or ``out`` was made with other settings; names each.
    DataError
        A and B are not of one architecture.
    UsageError
        An alpha that is no share, ``out`` not empty.
    """
    root, out = store.place(root), Path(out)
    require_new(root, out, family, variant)
    if not 0 < alpha < 1:
        raise UsageError(f"--alpha {alpha}: needs more than 0 and less than 1")
    for source in (model, other):
        check_trainable(resolve_model(source))
    a, tokenizer, folder = models.load_model(model, "cpu", "float32")
    b, _, other_folder = models.load_model(other, "cpu", "float32")
    asked = {
        "first_sha256": models.weights_sha256(folder),
        "second_sha256": models.weights_sha256(other_folder),
        "alpha": alpha,
    }
    if is_free(out):
        saved_dtype = getattr(AutoConfig.from_pretrained(folder), "dtype", None) or a.dtype
        _average(a, b, alpha)
        save_child(a.to(saved_dtype), tokenizer, out, {"asked": asked, "done": asked})
    done = made_by(asked, out)
    row: dict[str, Any] = {
        "family": family,
        "variant": variant,
        "parent_id": parent or f"{family}/base",
        "treatment": treatment or "interpolate",
        "hyperparameters": store.canonical(done),
    }
    return name_child(root, out, row)


@torch.no_grad()
def _average(a: Any, b: Any, alpha: float) -> None:
    """Makes the weights of ``a`` those between it and ``b``."""
    mine, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    shapes = [{name: tuple(p.shape) for name, p in each.items()} for each in (mine, theirs)]
    if shapes[0] != shapes[1]:
        other = sorted(n for n in {**mine, **theirs} if shapes[0].get(n) != shapes[1].get(n))
        raise DataError(
            f"--with: another architecture, first {other[0]}: {shapes[0].get(other[0])} and "
            f"{shapes[1].get(other[0])}; weights are averaged of checkpoints with one parent"
        )
    for name, p in mine.items():
        p.lerp_(theirs[name], alpha)
