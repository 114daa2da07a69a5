"""A panel of prompts and variants: read, checked, and turned into arrays."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from canopy_store import store
from canopy_store.analysis.bootstrap import varies
from canopy_store.analysis.regression.beta import Array, Codes
from canopy_store.analysis.regression.reliability import ERRORS
from canopy_store.analysis.seeds import as_variants
from canopy_store.analysis.selections import only_runs, require_one_run
from canopy_store.errors import DataError, FitError

Columns = dict[str, Array]  # the columns of a design, by the name of the term

FEWEST_PROMPTS = 5  # below, the variance between prompts is not an estimate of anything
KEYS = ("family", "variant", "task", "prompt")
NUMBERS = ("R_bar", "N_bar")
NOT_OUTCOMES = (*ERRORS, "n_rollouts", "reliability")
FACTORS = ("task", "family")  # those that can be left out
_OTHER_NAMES = {"model_name": "family", "model_variant": "variant"}


@dataclass(frozen=True)
class PanelData:
    """A panel as arrays; the first level of each factor is its reference."""

    outcome: str
    y: Array
    r: Array
    n: Array
    levels: dict[str, list[str]]
    codes: dict[str, Codes]
    left_out: int  # rows with a NULL
    checkpoints: list[tuple[str, str, str]]  # family, variant and checkpoint of each code
    rows: Codes  # their places in the frame
    errors: Columns  # the (co)variances of the errors of a row, and its n_rollouts, where they are known

    def dummies(self, factor: str) -> Columns:
        """Treatment contrasts of a factor: none when it has one level."""
        names = self.levels[factor][1:]
        return {f"{factor}[{name}]": (self.codes[factor] == i + 1) * 1.0 for i, name in enumerate(names)}


def read_panel(
    path: str | Path,
    *,
    embedder: str | None = None,
    selection: str | None = None,
    runs: Sequence[str] = (),
) -> pl.DataFrame:
    """Return the panel of a CSV or Parquet file.

    Columns: family, variant, task, prompt, R_bar, N_bar, then every other number of the file: D,
    vendi_score, … The file has those of the view ``panel``, or model_name and model_variant for family
    and variant. ``prompt`` is task/prompt_id. A column ``checkpoint``, or ``seed`` (of the training),
    tells the checkpoints of one variant apart; NULL where there is one.

    Parameters
    ----------
    embedder, selection, runs : the rows to keep, where the file holds several

    Raises
    ------
    StoreError
        There is no such file, or it cannot be read.
    DataError
        It is no panel: it misses a column, or holds several embedders or selections, or several
        runs of one model and task, and none was named.
    """
    frame = panel_file(path)
    return one_panel(frame, str(path), embedder=embedder, selection=selection, runs=runs)


def panel_file(path: str | Path) -> pl.DataFrame:
    """Return every row and column of a CSV or Parquet file.

    Raises
    ------
    StoreError, DataError
        A file that cannot be read, or is neither.
    """
    # as bytes: in a path a bracket would be a pattern, and name other files
    content = io.BytesIO(store.read_input(Path(path)))
    try:
        if Path(path).suffix == ".parquet":
            return pl.read_parquet(content)
        return pl.read_csv(content, infer_schema_length=None)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(f"{path}: not a readable panel ({str(error).splitlines()[0]})") from error


def one_panel(
    frame: pl.DataFrame,
    where: str,
    *,
    embedder: str | None = None,
    selection: str | None = None,
    runs: Sequence[str] = (),
) -> pl.DataFrame:
    """Return the rows of one embedder and selection, one run a model and task, as `read_panel` does.

    ``where`` is what errors call the frame.
    """
    for column, wanted in (("embedder", embedder), ("selection", selection)):
        frame = _keep(frame, column, wanted, where)
    frame = frame.rename({a: b for a, b in _OTHER_NAMES.items() if a in frame.columns})
    if "prompt" not in frame.columns and {"task", "prompt_id"} <= set(frame.columns):
        frame = frame.with_columns(prompt=pl.format("{}/{}", "task", "prompt_id"))
    missing = [c for c in KEYS + NUMBERS if c not in frame.columns]
    if missing:
        raise DataError(f"{where}: no column {', '.join(missing)}")
    own = {"checkpoint", "seed"} & set(frame.columns)
    if own:
        frame = as_variants(frame, {}).drop("seed", strict=False)
    if runs and "run_id" not in frame.columns:
        raise DataError(f"{where}: no column run_id, so --run cannot choose")
    if "run_id" in frame.columns:
        frame = only_runs(frame, runs)
        require_one_run(frame.with_columns(variant="checkpoint") if own else frame)
    try:
        texts = [*KEYS, "checkpoint"] if own else [*KEYS]
        keys = (*texts, "prompt_id", *NUMBERS)
        others = [c for c, kind in frame.schema.items() if kind.is_numeric() and c not in keys]
        numbers = [*NUMBERS, *others]
        return frame.select(pl.col(texts).cast(pl.String), pl.col(numbers).cast(pl.Float64))
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{where}: {str(error).splitlines()[0]}") from error


def _keep(frame: pl.DataFrame, column: str, wanted: str | None, where: str) -> pl.DataFrame:
    if column not in frame.columns:
        if wanted is not None:
            raise DataError(f"{where}: no column {column}")
        return frame
    values = frame[column].drop_nulls().unique().sort().to_list()
    named = ", ".join(map(str, values))
    if wanted is not None and wanted not in values:
        raise DataError(f"{where}: no {column} {wanted!r}; there is {named}")
    if wanted is None and len(values) > 1:
        raise DataError(f"{where}: several values of {column}, name one of {named}")
    return frame if wanted is None else frame.filter(pl.col(column) == wanted)


def panel_data(
    frame: pl.DataFrame,
    outcome: str,
    baseline: str,
    reference_task: str | None,
    drop: Sequence[str],
    known: Sequence[str] = (),
) -> PanelData:
    """The rows that have the outcome, R_bar, N_bar and the columns ``known``, as arrays."""
    finite = pl.col(*{outcome, "R_bar", "N_bar", *known}).is_finite().fill_null(False)
    kept = frame.with_row_index("row").filter(pl.all_horizontal(finite))
    present = {f: kept[f].unique().sort().to_list() for f in KEYS}
    _require_errors(frame, outcome, present["variant"], known)
    variants = ", ".join(present["variant"]) or "none"
    if baseline not in present["variant"]:
        raise FitError(f"no rows of the baseline variant {baseline!r}; there is {variants}")
    if len(present["variant"]) < 2:
        raise FitError(f"nothing to compare: {variants} is the only variant with a value of {outcome}")
    if reference_task is not None and reference_task not in present["task"]:
        raise FitError(f"no rows of the task {reference_task!r}; there is {', '.join(present['task'])}")
    if len(present["prompt"]) < FEWEST_PROMPTS:
        raise FitError(f"too few prompts: {len(present['prompt'])}, and {FEWEST_PROMPTS} are the fewest")
    if kept["prompt"].value_counts()["count"].max() == 1:
        raise FitError("every prompt has one row, so (1|prompt) is not told from the residual")
    twice = kept.filter(pl.struct(*KEYS, "checkpoint").is_duplicated())
    if len(twice):
        row = "/".join(twice.select(KEYS).row(0))
        raise FitError(f"more than one row of {row}: keep one embedder and one selection")
    for column in (outcome, "R_bar", "N_bar"):
        if not varies(kept[column].min(), kept[column].max()):
            raise FitError(f"{column} is constant: nothing to regress")
    for factor in FACTORS:
        if len(present[factor]) == 1 and factor not in drop:
            raise FitError(
                f"one {factor} only ({present[factor][0]}): a {factor} effect cannot be told from the "
                f"intercept; leave it out with --drop {factor}"
            )
    task = reference_task or ("completion" if "completion" in present["task"] else present["task"][0])
    levels = {
        **present,
        "variant": _first(baseline, present["variant"]),
        "task": _first(task, present["task"]),
    }
    codes = {
        f: kept[f].replace_strict(levels[f], range(len(levels[f])), return_dtype=pl.Int64).to_numpy()
        for f in KEYS
    }
    trained = kept.select("family", "variant", "checkpoint")
    checkpoints = trained.unique().sort("family", "variant", "checkpoint").rows()
    of_row = {names: i for i, names in enumerate(checkpoints)}
    codes["checkpoint"] = np.array([of_row[names] for names in trained.rows()])
    for factor in drop:  # one level: its terms vanish
        levels[factor], codes[factor] = ["(dropped)"], np.zeros_like(codes[factor])
    y, r, n = (kept[c].to_numpy() for c in (outcome, "R_bar", "N_bar"))
    errors = {c: kept[c].to_numpy() for c in (*ERRORS, "n_rollouts") if c in kept.columns}
    places = kept["row"].to_numpy()
    return PanelData(
        outcome, y, r, n, levels, codes, len(frame) - len(kept), checkpoints, places, errors
    )


def _require_errors(
    frame: pl.DataFrame, outcome: str, variants: Sequence[str], known: Sequence[str]
) -> None:
    """Raises FitError for a variant that has values, but no row whose errors are known."""
    finite = pl.col(outcome, "R_bar", "N_bar").is_finite().fill_null(False)
    values = frame.filter(pl.all_horizontal(finite))["variant"].drop_nulls().unique().sort().to_list()
    lost = [name for name in values if name not in variants]
    if known and lost:
        raise FitError(
            f"no row of {', '.join(lost)} has all of {', '.join(known)}, so their errors cannot be "
            "taken out (they need 3 rollouts a prompt or more); --errors none shows the uncorrected fit"
        )


def _first(name: str, names: list[str]) -> list[str]:
    return [name, *(other for other in names if other != name)]
