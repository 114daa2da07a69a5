"""The studies that ship, run on tiny models made here: python benchmarks/studies.py collapse --out DIR

Prints how long it took and, for docs/studies.md, the figures of each arm over its seeds. A second call
resumes, as `canopy study run` does.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import polars as pl
import torch

import canopy_store

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "demo"))

from tiny_model import corpus, make_tokenizer, untrained  # noqa: E402


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_collapse(out: Path) -> None:
    """Random weights, 500 real texts, their first words as prompts, 200 texts that are held out."""
    texts = corpus(700, 0)
    real, held_out = texts[:500], texts[500:]
    write(out / "real.jsonl", [{"text": text} for text in real])
    write(out / "held-out.jsonl", [{"document_id": f"d{n}", "text": t} for n, t in enumerate(held_out)])
    first = sorted({" ".join(text.split()[:2]) for text in real[:60]})[:20]
    write(out / "prompts.jsonl", [{"text": words} for words in first])
    tokenizer = make_tokenizer(real, 600)
    model = untrained(tokenizer, 0, width=96, inner=256, layers=2, positions=256)
    model.save_pretrained(out / "untrained")
    tokenizer.save_pretrained(out / "untrained")


def figures_of_collapse(root: Path) -> pl.DataFrame:
    """A row per arm: NLL of held-out real texts and CE* at both temperatures, mean over seeds (each)."""
    nll = canopy_store.read(root, "perplexity").select("variant", pl.col("nll").alias("value"))
    frames = [nll.with_columns(measure=pl.lit("NLL of real text"))]
    metrics = canopy_store.read(root, "model_metrics").filter(selection="all")
    for task, name in (("first-words", "CE* at T 1"), ("colder", "CE* at T 0.8")):
        of_task = metrics.filter(task=task).select("variant", pl.col("ce_star").alias("value"))
        frames.append(of_task.with_columns(measure=pl.lit(name)))
    every = pl.concat(frames).with_columns(arm=pl.col("variant").str.replace(r"-\d+$", ""))
    shown = every.group_by("arm", "measure").agg(
        pl.col("value").mean().round(2).cast(pl.String)
        + " ("
        + pl.col("value").sort_by("variant").round(2).cast(pl.String).str.join(", ")
        + ")"
    )
    columns = [name for name in every["measure"].unique(maintain_order=True)]
    return shown.pivot("measure", index="arm", values="value").select("arm", *columns).sort("arm")


STUDIES = {"collapse": (make_collapse, figures_of_collapse)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", choices=list(STUDIES))
    parser.add_argument("--out", type=Path, required=True, help="folder of the study")
    options = parser.parse_args()
    make, figures = STUDIES[options.study]
    out = options.out
    if not (out / "study.toml").exists():
        out.mkdir(parents=True, exist_ok=True)
        make(out)
        text = files("canopy_store").joinpath("studies", f"{options.study}.toml").read_text()
        (out / "study.toml").write_text(text)
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "canopy_store.cli", "study", "run", out / "study.toml"], check=True
    )
    took = time.perf_counter() - started
    with pl.Config(
        tbl_formatting="MARKDOWN", tbl_hide_column_data_types=True, tbl_hide_dataframe_shape=True
    ):
        pl.Config.set_tbl_rows(-1).set_fmt_str_lengths(60).set_tbl_width_chars(200)
        print(figures(out / "store"))
    print(f"{took:.0f} s on {platform.machine()}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
