"""Like with like: the settings in which a treated run may not differ from its baseline's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl

from canopy_store.errors import ConflictError, UsageError
from canopy_store.sql.connection import Connection

# What --allow takes, and the column of `run_settings` that it speaks of.
SETTINGS = {
    "cap": "max_new_tokens",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "repetition_penalty": "repetition_penalty",
    "rendering": "rendering",
    "template": "template",
}
ADDED = ("cap", "allowed", "unrecorded")  # columns that `require_alike` gives rows
_OF_THE_TEMPLATE = ("template_sha256", "system", "examples")  # in the settings of a run
_TOLD = 3  # cells that an error names

Row = Mapping[str, Any]


def run_settings(con: Connection) -> pl.DataFrame:
    """One row per complete run: how it was sampled, for `require_alike`; NULL is not recorded.

    ``rendering`` of an import is NULL: how its prompts became tokens is not recorded. A cap that is not
    recorded is the length at which all that was cut was cut; ``shortest_cut`` is the least such length.
    """
    return con.sql(
        "with cut as (select run_id, min(n_tokens) as shortest, max(n_tokens) as longest "
        "from rollouts where finish_reason = 'length' group by run_id) "
        "select r.run_id, coalesce(r.max_new_tokens, case when shortest = longest then shortest end) "
        "as max_new_tokens, shortest as shortest_cut, r.temperature, r.top_k, r.top_p, "
        # not named they are off
        "coalesce(r.min_p, 0) as min_p, coalesce(r.typical_p, 1) as typical_p, "
        "coalesce(r.repetition_penalty, 1) as repetition_penalty, "
        "nullif(r.rendering, 'import') as rendering, r.n_prompts, r.settings, m.tokenizer_sha256 "
        "from runs r left join models m using (model_id) left join cut using (run_id)"
    ).pl()


def check_allow(allow: Iterable[str]) -> None:
    """Raises UsageError for a name that is none of SETTINGS."""
    for name in allow:
        if name not in SETTINGS:
            raise UsageError(f"--allow {name}: one of {', '.join(SETTINGS)}")


def differences(base: Row, treated: Row) -> dict[str, str]:
    """What each setting that differs is on both sides, ``1 and 0.8``; an unknown one does not differ."""
    out = {}
    for name, column in SETTINGS.items():
        if name != "template":
            ours, theirs = base[column], treated[column]
            if None not in (ours, theirs) and ours != theirs:
                out[name] = f"{_shown(ours)} and {_shown(theirs)}"
    if "rendering" not in out and (text := _templates(base, treated)):
        out["template"] = text
    return out


def _templates(base: Row, treated: Row) -> str:
    """How the templates of two runs differ; '' where they do not, or where nothing tells."""
    ours, theirs = (json.loads(row["settings"] or "{}") for row in (base, treated))
    sampled = all(row["rendering"] is not None for row in (base, treated))
    for name in _OF_THE_TEMPLATE if sampled else ():
        if ours.get(name) != theirs.get(name):
            return f"{name.removesuffix('_sha256')} of the one is not the other's"
    made = [settings.get("prompts_sha256") for settings in (ours, theirs)]
    same = all(
        base[name] is not None and base[name] == treated[name]
        for name in ("tokenizer_sha256", "n_prompts", "rendering", "prompts")
    )
    if same and None not in made and made[0] != made[1]:
        return "the same prompts became other tokens, or came in another order"
    return ""


def unrecorded(base: Row, treated: Row) -> list[str]:
    """The settings that one of two runs does not record, so that nothing tells whether they differ."""
    return [
        name
        for name, column in SETTINGS.items()
        if name != "template" and (base[column] is None or treated[column] is None)
    ]


def require_alike(
    rows: pl.DataFrame,
    settings: pl.DataFrame,
    baseline: str,
    *,
    allow: Sequence[str] = (),
    horizon: int | None = None,
) -> pl.DataFrame:
    """The rows with how they were sampled, once no treated run differs from its baseline's.

    Runs of one family and task are held against each other: tasks may differ. A setting that a run
    does not record is no difference; ``unrecorded`` names it.

    Parameters
    ----------
    rows : of a view, one run a family, checkpoint and task
    settings : what `run_settings` gives
    baseline : the variant that the others are held against
    allow : names of SETTINGS that may differ
    horizon : the common cap that the rows are at: their runs' own caps may then differ

    Returns
    -------
    The rows with ``cap`` (tokens; the horizon where there is one), ``allowed`` (the differences that
    ``allow`` lets pass, in words) and ``unrecorded`` of their run, NULL where there is nothing to say.

    Raises
    ------
    ConflictError
        Runs that differ: every difference is named, with the options that would allow them.
    UsageError
        A name in ``allow`` that is no setting, or a horizon above a cap.
    """
    check_allow(allow)
    prompts = rows.group_by("run_id").agg(pl.col("prompt_id").sort().str.join(",").alias("prompts"))
    keys = ["family", "task", "variant", "run_id"]
    runs = rows.select(keys).unique().sort(keys).join(settings, on="run_id", how="left")
    runs = runs.join(prompts, on="run_id")
    _require_horizon(runs, horizon)
    bases = {(row["family"], row["task"]): row for row in runs.filter(variant=baseline).to_dicts()}
    refused, said = {}, []
    for run in runs.to_dicts():
        base = bases.get((run["family"], run["task"]))
        found = differences(base, run) if base is not None and run["variant"] != baseline else {}
        missing = unrecorded(base, run) if base is not None and run["variant"] != baseline else []
        if horizon is not None:
            found.pop("cap", None)
            missing = [name for name in missing if name != "cap"]
        if wrong := {name: text for name, text in found.items() if name not in allow}:
            refused[run["family"], run["task"], run["variant"]] = wrong
        allowed = "; ".join(f"{name} differs, {text}" for name, text in found.items())
        cap = run["max_new_tokens"] if horizon is None else horizon
        said.append((run["run_id"], cap, allowed or None, ", ".join(missing) or None))
    if refused:
        raise ConflictError(_refusal(refused, baseline, runs))
    schema = {"run_id": pl.String, "cap": pl.Int64, "allowed": pl.String, "unrecorded": pl.String}
    return rows.join(
        pl.DataFrame(said, schema=schema, orient="row"), on="run_id", how="left", maintain_order="left"
    )


def _require_horizon(runs: pl.DataFrame, horizon: int | None) -> None:
    if horizon is None:
        return
    # a rollout may be cut before the cap, where the context is full
    cut_at = pl.min_horizontal("max_new_tokens", "shortest_cut")
    shorter = runs.with_columns(cut_at=cut_at).filter(pl.col("cut_at") < horizon)
    if len(shorter):
        run_id, cap = shorter.sort("cut_at", "run_id").select("run_id", "cut_at").row(0)
        raise UsageError(
            f"--horizon {horizon}: run {run_id} was cut at {cap} tokens; at most --horizon {cap}"
        )


def _refusal(refused: Mapping[Any, Mapping[str, str]], baseline: str, runs: pl.DataFrame) -> str:
    """One line: who differs in what, and what to add."""
    told = []
    for (family, task, variant), found in list(refused.items())[:_TOLD]:
        what = ", ".join(f"{name} ({text})" for name, text in found.items())
        told.append(f"{family} {task}: {baseline} and {variant} differ in {what}")
    if len(refused) > _TOLD:
        told.append(f"and {len(refused) - _TOLD} more")
    names = list(dict.fromkeys(name for found in refused.values() for name in found))
    options = " ".join(f"--allow {name}" for name in names)
    line = f"{'; '.join(told)}: not like with like; to compare them all the same add {options}"
    if "cap" in names:
        caps: list[int] = runs["max_new_tokens"].drop_nulls().to_list()
        line += f"; or compare their first tokens: canopy compare --horizon {min(caps)}"
    return line


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
