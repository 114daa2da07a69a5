"""The page, written whole or not at all, and its charts as files."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

from canopy_store import store
from canopy_store._version import __version__
from canopy_store.analysis.comparison import CONFIDENCE, REPLICATES, SEED
from canopy_store.errors import StoreError, UsageError
from canopy_store.report.explorer import explorer
from canopy_store.report.facts import Facts, gather, notes

EXPLORER_ROLLOUTS = 400


def write_report(
    root: str | Path,
    out: str | Path,
    *,
    baseline: str = "base",
    selection: str = "all",
    embedder: str | None = None,
    grader: str | None = None,
    runs: Sequence[str] = (),
    allow: Sequence[str] = (),
    seeds: Mapping[str, str] | None = None,
    explorer_rollouts: int = EXPLORER_ROLLOUTS,
    seed: int = SEED,
) -> Path:
    """The path of one self-contained HTML page on the store, written whole or not at all.

    Its changes and intervals are those of `compare` with the same options.

    Parameters
    ----------
    root : path of the store
    out : path of the page
    baseline : the variant that the others are compared with
    selection : named subset of the rollouts
    embedder : needed where the store has several
    grader : of accuracy; needed to show it where the store has several
    runs : only these runs
    allow : settings in which runs may differ, as in `compare`
    seeds : checkpoints of a variant, as in `compare`: pooled where items, documents and training are
        shown, and single where rollouts are
    explorer_rollouts : rollouts that the page carries to be read one by one
    seed : of the bootstrap, and of which rollouts and points are shown

    Raises
    ------
    StoreError
        No store there, or nothing in it.
    DataError
        No such selection, embedder or run, or several runs of one model and task: name the ones to
        compare with ``runs``.
    ConflictError
        Runs that were not sampled alike.
    UsageError
        Several embedders and none named, or what draws the charts is not installed.
    """
    if explorer_rollouts < 0:
        raise UsageError(f"explorer_rollouts {explorer_rollouts}: needs at least 0")
    out = Path(out)
    if out.is_dir():
        raise UsageError(f"{out} is a folder; name a file, such as {out / 'report.html'}")
    _vl_convert()
    facts = gather(
        root,
        baseline=baseline,
        selection=selection,
        embedder=embedder,
        grader=grader,
        runs=runs,
        allow=allow,
        seeds=seeds,
        seed=seed,
        rollouts=explorer_rollouts,
    )
    page = _page(facts, explorer_rollouts)
    with store.replacing(out) as file:
        file.write(_html(page, _library()).encode("utf-8"))
    return out


def write_figures(
    root: str | Path,
    folder: str | Path,
    *,
    baseline: str = "base",
    selection: str = "all",
    embedder: str | None = None,
    grader: str | None = None,
    runs: Sequence[str] = (),
    allow: Sequence[str] = (),
    seeds: Mapping[str, str] | None = None,
    seed: int = SEED,
) -> list[Path]:
    """The paths written: every chart of the report that has data, as a PDF and an SVG file.

    Parameters and errors are those of `write_report`; StoreError also when there is nothing to draw.
    """
    vl_convert = _vl_convert()
    from canopy_store.report import sections

    facts = gather(
        root,
        baseline=baseline,
        selection=selection,
        embedder=embedder,
        grader=grader,
        runs=runs,
        allow=allow,
        seeds=seeds,
        seed=seed,
        rollouts=0,
    )
    drawn = [chart for chart in sections.charts(facts) if "spec" in chart]
    if not drawn:
        raise StoreError(f"{root}: no run is complete, so there is nothing to draw; see canopy status")
    written = []
    for chart in drawn:
        spec = {**chart["spec"], "background": "white"}
        for suffix, content in (
            ("svg", vl_convert.vegalite_to_svg(spec).encode("utf-8")),
            ("pdf", vl_convert.vegalite_to_pdf(spec)),
        ):
            path = Path(folder) / f"{chart['id']}.{suffix}"
            with store.replacing(path) as file:
                file.write(content)
            written.append(path)
    return written


def _page(facts: Facts, explorer_rollouts: int) -> dict[str, Any]:
    """Everything the page shows, ready for JSON."""
    from canopy_store.report import sections
    from canopy_store.report.cards import cards, counts, fine_print, first_line
    from canopy_store.report.charts import config
    from canopy_store.report.tables import tables

    shown = facts.shown
    return {
        "version": __version__,
        "baseline": facts.baseline,
        # a name has one colour, in charts of rollouts and of studies
        "variants": facts.variants or facts.study.variants,
        "treated": facts.treated or facts.study.treated,
        "families": facts.families or facts.study.families,
        "tasks": shown["task"].unique().sort().to_list(),
        "rollouts": not facts.runs.is_empty(),
        "study": facts.study.counts,
        "selection": facts.selection,
        "embedder": facts.embedder,
        "notes": notes(facts),
        "counts": counts(facts),
        "headline": first_line(facts) or facts.study.headline(),
        "fine_print": fine_print(facts),
        "figures": cards(facts),
        "charts": sections.charts(facts),
        "tables": tables(facts),
        "explorer": explorer(facts, explorer_rollouts),
        "bootstrap": {"replicates": REPLICATES, "confidence": CONFIDENCE, "seed": facts.seed},
        "themes": {"light": config(), "dark": config(dark=True)},
    }


def _html(page: dict[str, Any], library: str) -> str:
    """The page with its style, scripts and data inside.

    Only the two scripts whose hashes the policy names may run, so that no text of the store could,
    even were it taken for HTML; and the policy lets nothing be fetched.
    """
    folder = resources("canopy_store.report")
    template, style, script = (
        (folder / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    # "<" is all that could end the data's element; vega bundles are free of "</script"
    data = json.dumps(page, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    hashes = " ".join(f"'sha256-{_sha256(text)}'" for text in (library, script))
    parts = {"hashes": hashes, "style": style, "library": library, "data": data, "script": script}
    # in one pass: what is put in is not looked at again
    return re.sub(r"{{(\w+)}}", lambda found: parts[found[1]], template)


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


@functools.cache
def _library() -> str:
    """Vega, Vega-Lite and vega-embed as one script; bundling takes seconds and never differs."""
    return str(_vl_convert().javascript_bundle("window.vegaEmbed = vegaEmbed;"))


def _vl_convert() -> Any:
    try:
        import altair  # noqa: F401
        import vl_convert
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the report needs {error.name}: install it with: pip install altair vl-convert-python"
        ) from None
    return vl_convert
