"""The studies that ship, run on tiny models made here: python benchmarks/studies.py collapse --out DIR

Prints how long it took and, for docs/studies.md, the figures of each arm over its seeds. A second call
resumes, as `canopy study run` does.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import polars as pl
import torch

import canopy_store
from canopy_store.ingest.finetune import finetune

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "demo"))

from demo_real import save_base  # noqa: E402
from texts import joint, pairs  # noqa: E402
from tiny_model import corpus, make_tokenizer, untrained  # noqa: E402


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_documents(path: Path, texts: Sequence[str]) -> None:
    write(path, [{"document_id": f"{n:03}", "text": text} for n, text in enumerate(texts)])


def save_untrained(out: Path, tokenizer: Any, **shape: Any) -> None:
    """A model of random weights of this shape, in the folder ``untrained``."""
    untrained(tokenizer, 0, **shape).save_pretrained(out / "untrained")
    tokenizer.save_pretrained(out / "untrained")


def train_base(out: Path, **settings: Any) -> None:
    """The untrained model, trained on known.jsonl, in the folder ``base``."""
    start, known = str(out / "untrained"), out / "known.jsonl"
    finetune(start, known, out / "base", device="cpu", show_progress=True, **settings)


def make_collapse(out: Path) -> None:
    """Random weights, 500 real texts, their first words as prompts, 200 texts that are held out."""
    texts = corpus(700, 0)
    real, held_out = texts[:500], texts[500:]
    write(out / "real.jsonl", [{"text": text} for text in real])
    write(out / "held-out.jsonl", [{"document_id": f"d{n}", "text": t} for n, t in enumerate(held_out)])
    first = sorted({" ".join(text.split()[:2]) for text in real[:60]})[:20]
    write(out / "prompts.jsonl", [{"text": words} for words in first])
    tokenizer = make_tokenizer(real, 600)
    save_untrained(out, tokenizer, width=96, inner=256, layers=2, positions=256)


def figures_of_collapse(root: Path) -> pl.DataFrame:
    """A row per arm: loss on real texts, CE* of what it wrote and its perplexity under generation 0.

    Means over seeds (each).
    """
    nll = canopy_store.read(root, "perplexity").select("variant", pl.col("nll").alias("value"))
    frames = [nll.with_columns(measure=pl.lit("NLL of real text"))]
    metrics = canopy_store.read(root, "model_metrics").filter(selection="all")
    for task, name in (("first-words", "CE* at T 1"), ("colder", "CE* at T 0.8")):
        of_task = metrics.filter(task=task).select("variant", pl.col("ce_star").alias("value"))
        frames.append(of_task.with_columns(measure=pl.lit(name)))
    collapse = canopy_store.read(root, "collapse")
    for task, name in (("first-words", "origin_ppl at T 1"), ("colder", "origin_ppl at T 0.8")):
        of_task = collapse.filter(task=task).select("variant", pl.col("origin_ppl").alias("value"))
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


# ---------------------------------------------------------------- facts

# A fact forward, backward, and over two facts, each in three wordings. The last of them is never trained
# on for a new fact: it is what is asked.
BEGINNINGS = ("", "we know that ", "in truth ")
FORWARD = [f"{words}the guide of {{a}} is {{b}}" for words in BEGINNINGS]
BACKWARD = [f"{words}the one led by {{b}} is {{a}}" for words in BEGINNINGS]
TWICE = [f"{words}the guide of the guide of {{a}} is {{c}}" for words in BEGINNINGS]


def names(number: int, seed: int) -> list[str]:
    """Different nonsense words."""
    rng = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < number:
        word = "".join(rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(3))
        found[word] = None
    return list(found)


def chains(number: int, seed: int) -> list[tuple[str, str, str]]:
    """Threes of names of their own: the guide of the first is the second, and of that the third."""
    words = names(3 * number, seed)
    return [(a, b, c) for a, b, c in zip(words[::3], words[1::3], words[2::3], strict=True)]


def facts_of(chain: tuple[str, str, str]) -> list[tuple[str, str]]:
    a, b, c = chain
    return [(a, b), (b, c)]


def worded(wordings: Sequence[str], chain: tuple[str, str, str]) -> list[str]:
    """The facts of a chain in these wordings."""
    if "{c}" in wordings[0]:
        return [w.format(a=chain[0], c=chain[2]) for w in wordings]
    return [w.format(a=a, b=b) for a, b in facts_of(chain) for w in wordings]


def asked(chains_of: list[tuple[str, str, str]], seed: int) -> list[dict]:
    """Items of four options: forward, backward and over two facts, in a wording not trained on."""
    rng = random.Random(seed)
    items = []
    for number, chain in enumerate(chains_of):
        half = "" if number < len(chains_of) // 2 else "-rest"
        questions = [
            ("forward", FORWARD[-1], b, [b for x in chains_of for _, b in facts_of(x)], a, b)
            for a, b in facts_of(chain)
        ]
        questions += [
            ("reversal", BACKWARD[-1], a, [a for x in chains_of for a, _ in facts_of(x)], a, b)
            for a, b in facts_of(chain)
        ]
        questions.append(("two-hop", TWICE[-1], chain[2], [x[2] for x in chains_of], chain[0], ""))
        for place, (split, wording, right, pool, a, b) in enumerate(questions):
            wrong = rng.sample([name for name in pool if name != right], 3)
            options = [right, *wrong]
            rng.shuffle(options)
            text = wording.format(a=a, b=b, c=chain[2])
            items.append(
                {
                    "item_id": f"{number:03}-{place}",
                    "prompt": text.removesuffix(f" {right}"),
                    "options": [f" {name}" for name in options],
                    "answer": options.index(right),
                    "split": split + half,
                    "cluster": f"chain {number}",
                }
            )
    return items


def make_facts(out: Path) -> None:
    """A base that knows 60 facts in every wording; 80 new ones, and what each arm is trained on."""
    rng = random.Random(0)
    known, new = chains(30, 1), chains(40, 2)
    half = new[: len(new) // 2]
    everything = [
        text for c in (*known, *new) for w in (FORWARD, BACKWARD, TWICE) for text in worded(w, c)
    ]
    tokenizer = make_tokenizer(everything * 3, 900)
    forward = [text for c in new for text in worded(FORWARD[:-1], c)]
    local = [text for c in new for text in worded(BACKWARD[:-1], c)]
    linked = [text for c in new for text in worded(TWICE[:-1], c)]
    of_half = [text for c in half for w in (BACKWARD, TWICE) for text in worded(w[:-1], c)]
    # the tokens of the augmented lines, each name in some other line's place
    words = [word for c in new for word in c]
    others = dict(zip(words, rng.sample(words, len(words)), strict=True))
    mixed = [" ".join(others.get(word, word) for word in text.split()) for text in (*local, *linked)]
    for name, lines in {
        "known": [t for c in known for w in (FORWARD, BACKWARD, TWICE) for t in worded(w, c)],
        "forward": forward,
        "local": forward + local,
        "global": forward + local + linked,
        "shuffled": forward + mixed,
        "half": forward + of_half,
    }.items():
        write(out / f"{name}.jsonl", [{"text": f"{line}."} for line in lines])
    write(out / "context.jsonl", [{"text": f"{line}. "} for line in forward])
    write(out / "items.jsonl", asked(new, 3))
    save_untrained(out, tokenizer, width=64, inner=172, layers=2, positions=2048, spread=0.1)
    train_base(out, steps=500, batch_size=64, learning_rate=5e-3, max_length=32)


def figures_of_facts(root: Path) -> pl.DataFrame:
    """A row per arm: accuracy by split over the seeds, with its interval over chains and seeds."""
    arms = ("ft", "ft-matched", "local", "global", "shuffled", "half")
    seeds = {arm: ",".join(f"{arm}-{seed}" for seed in range(3)) for arm in arms}
    frame = canopy_store.compare(root, metrics=["accuracy_sum"], by="task", seeds=seeds)
    base = frame.unique("task").with_columns(
        pl.col("baseline_variant").alias("variant"),
        *(pl.col(f"baseline{end}").alias(f"treated{end}") for end in ("", "_ci_low", "_ci_high")),
    )
    every = pl.concat([base, frame.filter(level="task")])
    ends = [pl.col(f"treated_ci_{end}").clip(0, 1).round(2) for end in ("low", "high")]
    shown = every.select(
        pl.col("variant").alias("arm"),
        pl.col("task").str.split(":").list.last().alias("split"),
        pl.format("{} [{}, {}]", pl.col("treated").round(2), *ends).alias("accuracy"),
    )
    splits = sorted(shown["split"].unique())
    order = {arm: place for place, arm in enumerate(("base", "icl", *arms))}
    return (
        shown.pivot("split", index="arm", values="accuracy")
        .sort(pl.col("arm").replace_strict(order, return_dtype=pl.Int64))
        .select("arm", *splits)
    )


# ---------------------------------------------------------------- mitigations


def make_mitigations(out: Path) -> None:
    """A base of three tasks and hardly a story, stories that it is to learn, held-out texts of both."""
    made = [(task, request + joint(task) + answer) for task, request, answer in pairs(4400, "loose", 0)]
    stories = [text for task, text in made if task == "stories"]
    others = [text for task, text in made if task != "stories"]
    tokenizer = make_tokenizer([text for _, text in made[:2000]], 800)
    for name, lines in {
        "known": others[:2000] + stories[400:420],  # of stories it has seen a few
        "fresh": others[2000:3000],  # of the base's kind, and not what it was trained on
        "stories": stories[:400],
    }.items():
        write(out / f"{name}.jsonl", [{"text": text} for text in lines])
    for name, lines in {"new": stories[900:1000], "old": others[3100:3250]}.items():
        write_documents(out / f"{name}.jsonl", lines)
    first = sorted({" ".join(text.split()[:3]) for text in others[:200]})[:40]
    write(out / "prompts.jsonl", [{"text": words} for words in first])
    save_untrained(out, tokenizer, width=96, inner=256, layers=2, positions=256)
    train_base(out, steps=300, batch_size=24, learning_rate=4e-3, max_length=128)


def figures_of_mitigations(root: Path) -> pl.DataFrame:
    """A row per arm: what it gains on stories and forgets of the rest, over documents and seeds."""
    variants = canopy_store.read(root, "perplexity")["variant"].unique()
    arms = sorted({name.rpartition("-")[0] for name in variants if name[-1].isdigit()})
    seeds = {arm: ",".join(v for v in variants if v.rpartition("-")[0] == arm) for arm in arms}
    frame = canopy_store.compare(root, metrics=["nll"], by="task", seeds=seeds).filter(level="task")
    sign = pl.when(pl.col("task") == "new").then(-1).otherwise(1)
    ends = [pl.col(f"delta_ci_{end}") * sign for end in ("low", "high")]
    shown = frame.select(
        pl.col("variant").alias("arm"),
        "task",
        (pl.col("delta") * sign).alias("value"),
        pl.format(
            "{} [{}, {}]",
            (pl.col("delta") * sign).round(2),
            pl.min_horizontal(ends).round(2),
            pl.max_horizontal(ends).round(2),
        ).alias("shown"),
    )
    return (
        shown.pivot("task", index="arm", values=["value", "shown"])
        .sort("value_old", descending=True)
        .select("arm", pl.col("shown_new").alias("gain"), pl.col("shown_old").alias("forgetting"))
    )


# ---------------------------------------------------------------- domain


def pieces(text: str, size: int) -> list[str]:
    """Whole lines of a text, at least so many characters a piece."""
    found, piece = [], ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= size:
            found.append(piece)
            piece = ""
    return found


def make_domain(out: Path) -> None:
    """SmolLM2 from its package; pages of Python's own help, to learn and to test, and a licence."""
    save_base(out / "base")
    pages = [page for name in sorted(topics) for page in pieces(topics[name], 400)[:3]]
    random.Random(0).shuffle(pages)
    write(out / "help.jsonl", [{"text": page} for page in pages[:24]])
    licence = pieces((ROOT / "LICENSE").read_text(), 400)
    for name, texts in {"train": pages[:24], "help": pages[40:64], "licence": licence[:24]}.items():
        write_documents(out / f"{name}-corpus.jsonl", texts)


def figures_of_domain(root: Path) -> pl.DataFrame:
    """A row per arm: change of the loss on pages trained on, other pages, a licence; by token type."""
    losses = canopy_store.compare(root, metrics=["nll"], by="task")
    value = "{} [{}, {}]"
    of_arms = losses.select(
        pl.col("variant").alias("arm"),
        pl.col("task").alias("what"),
        pl.format(value, *(pl.col(f"delta{end}").round(2) for end in ("", "_ci_low", "_ci_high"))).alias(
            "shown"
        ),
    )
    base = losses.unique("task").select(
        pl.lit("base").alias("arm"),
        pl.col("task").alias("what"),
        pl.col("baseline").round(2).cast(pl.String).alias("shown"),
    )
    types = canopy_store.read(root, "token_type_contributions").filter(corpus="help")
    shares = types.select(
        pl.col("variant").alias("arm"),
        pl.col("token_type").alias("what"),
        pl.col("contribution").round(3).cast(pl.String).alias("shown"),
    )
    every = pl.concat([base.sort("what"), of_arms, shares.sort("what")])
    return every.pivot("what", index="arm", values="shown")


STUDIES = {
    "collapse": (make_collapse, figures_of_collapse),
    "facts": (make_facts, figures_of_facts),
    "mitigations": (make_mitigations, figures_of_mitigations),
    "domain": (make_domain, figures_of_domain),
}


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
        pl.Config.set_tbl_rows(-1).set_tbl_cols(-1).set_fmt_str_lengths(60).set_tbl_width_chars(200)
        print(figures(out / "store"))
    print(f"{took:.0f} s on {platform.machine()}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
