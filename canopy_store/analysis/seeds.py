"""Training seeds: several checkpoints of one variant, each a variant of its own in the store."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import polars as pl

from canopy_store.errors import UsageError


def as_variants(
    rows: pl.DataFrame, seeds: Mapping[str, str], *, baseline: str | None = None
) -> pl.DataFrame:
    """The rows with a column ``checkpoint``, and ``variant`` the name that its checkpoints share.

    A checkpoint is one trained model of a family and variant: the variant that the rows had. Where no
    seeds are given, the rows may tell their checkpoints in a column ``checkpoint`` or ``seed`` of their
    own; a NULL there, as a base model has it, stands for the variant.

    Parameters
    ----------
    rows : with a column ``variant``
    seeds : pattern of the checkpoints by the name of their variant, ``{"sft": "sft-*"}``; a pattern is
        one or several names or shell patterns, separated by commas
    baseline : the variant that others are compared with: only checkpoints of its own name may hold it

    Raises
    ------
    UsageError
        A pattern that no variant matches, a variant that two of them match, a name that another
        variant has already, or a baseline that is counted among the checkpoints of another variant.
    """
    if not seeds:
        return rows.with_columns(checkpoint=_own_checkpoints(rows))
    if "checkpoint" in rows.columns:
        raise UsageError("--seeds: the rows have a column checkpoint already; leave the option out")
    variants: list[str] = rows["variant"].drop_nulls().unique().sort().to_list()
    names: dict[str, str] = {}
    for name, pattern in seeds.items():
        wanted = [part.strip() for part in pattern.split(",") if part.strip()]
        patterns = [
            one for one in wanted if one not in variants
        ]  # a name is no pattern, brackets or not
        matching = [v for v in variants if v in wanted or any(fnmatchcase(v, p) for p in patterns)]
        if not matching:
            raise UsageError(
                f"--seeds {name}={pattern}: no such variant; there is {', '.join(variants)}"
            )
        if name in variants and name not in matching:
            raise UsageError(f"--seeds {name}={pattern}: {name} is another variant; choose another name")
        if baseline in matching and len(matching) > 1:
            raise UsageError(
                f"--seeds {name}={pattern}: takes in {baseline}, the baseline, together with "
                f"{', '.join(v for v in matching if v != baseline)}"
            )
        for variant in matching:
            if variant in names:
                raise UsageError(f"--seeds: {variant} is matched twice, by {names[variant]} and {name}")
            names[variant] = name
    renamed = pl.col("variant").replace(names)
    return rows.with_columns(variant=renamed, checkpoint=pl.col("variant"))


def _own_checkpoints(rows: pl.DataFrame) -> pl.Expr:
    """What the rows say of their checkpoints themselves, else their variant."""
    variant = pl.col("variant").cast(pl.String)
    if "checkpoint" in rows.columns:
        return pl.coalesce(pl.col("checkpoint").cast(pl.String), variant)
    if "seed" in rows.columns:
        return pl.coalesce(pl.format("{}/{}", variant, "seed"), variant)
    return variant
