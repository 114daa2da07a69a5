"""Makes the example store that ships with the package, canopy_store/example.zip: python demo/example.py

Rollouts of SmolLM2-135M-Instruct and of the fine-tuned child that demo_real.py makes, on two tasks,
embedded, and exported as a dataset. The weights are de-quantised from 4 bits. Everything follows from
the seed, but for times, and for last bits on another machine. A second run resumes.
"""

from __future__ import annotations

import shutil
import sys
import zipfile
from pathlib import Path

import steps
from demo_real import save_base

ARCHIVE = steps.ROOT / "canopy_store" / "example.zip"
TASKS = ("math", "stories")
# what an export has beside a store's own files: of the SQL that made it, or of files that work adds to
EXPORTED = ("MANIFEST", "croissant.json", "views.sql", "canopy.duckdb")
SYSTEM = "Answer in one short sentence."


def sample(out: Path) -> None:
    """Samples and embeds both models' rollouts."""
    child = ("--parent", "smollm2/base", "--treatment", "sft")
    for task in TASKS:
        for variant, lineage in (("base", ()), ("sft", child)):
            steps.command(
                *("canopy", "ingest", "rollouts", "--store", out / "store"),
                *("--model", out / variant, "--family", "smollm2", "--variant", variant),
                *("--task", task, "--prompts", steps.ROOT / "ingest" / "prompts" / f"{task}.jsonl"),
                *("--limit", 6, "--samples", 10, "--max-new-tokens", 80, "--top-k", 100),
                *("--system", SYSTEM, "--seed", 1, "--prompts-per-shard", 6),
                *lineage,
            )
    steps.command("canopy", "ingest", "embed", "--store", out / "store", "--embedder", steps.EMBEDDER)


def export(out: Path) -> None:
    """The store as a dataset, without what this machine's work took."""
    shutil.rmtree(out / "example", ignore_errors=True)
    tables = "models,prompts,runs,rollouts,embeddings,embedding_spectra"
    steps.command(
        *("canopy", "export", "--store", out / "store", "--out", out / "example"),
        *("--tables", tables, "--license", "apache-2.0"),
    )


def pack(folder: Path, archive: Path) -> None:
    """Packs a store, no export, of an exported folder; the same files give the same archive."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name, data = path.relative_to(folder).as_posix(), path.read_bytes()
            if name in EXPORTED:
                continue
            if name == "README.md":  # how an export is loaded and merged follows
                data = data.partition(b"\n## Use\n")[0]
            entry = zipfile.ZipInfo(name)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            packed.writestr(entry, data)


def main() -> None:
    options = steps.arguments(__doc__.splitlines()[0], "demo-real-output/example", samples=10, prompts=6)
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "base" / "config.json").exists():
        save_base(out / "base")
    steps.make_child(out, "smollm2", count=60, form="messages", steps=16, learning_rate=5e-5)
    sample(out)
    export(out)
    pack(out / "example", ARCHIVE)
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
