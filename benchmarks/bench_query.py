"""model_metrics over 80,000 rollouts: one query, beside a per-prompt PyTorch loop and the bare scan.

    python benchmarks/bench_query.py [--prompts 100] [--samples 100] [--store DIR]

Makes a store of 8 runs x 100 prompts x 100 rollouts, about 240 tokens each, 384-d embeddings; times the
three in turn, five rounds, and prints medians and ratios; then bytes a token, per column, and each
encoding of the float lists beside the others. With --sizes STORE: the bytes a token of that store alone.
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

import canopy_store
from canopy_store import sql, store
from canopy_store.store.embeddings import write_embeddings
from canopy_store.store.rollouts import write_shard

RUNS, DIMENSION, MEAN_LENGTH = 8, 384, 240


def make_store(root: Path, prompts: int, samples: int, runs: int = RUNS, shards: int = 5) -> None:
    """Numbers shaped like a language model's: most steps nearly certain, a few wide open.

    ``shards`` are those of one run.
    """
    rng = np.random.default_rng(0)
    store.init(root)
    for number in range(runs):
        keys = {"family": f"f{number // 2}", "variant": ("base", "sft")[number % 2], "task": "t"}
        run_id = ".".join(keys.values())
        settings = {"run_id": run_id, "engine": "benchmark", **keys}
        store.plan(root, "run", run_id, settings)
        where = store.folder(root, "rollouts", run=run_id, **keys)
        rollouts, embedded = [], []
        for shard, members in enumerate(np.array_split(np.arange(prompts), shards)):
            ids = [f"p{p:04d}" for p in members]
            rows = len(ids) * samples
            lengths = rng.integers(MEAN_LENGTH // 2, MEAN_LENGTH * 3 // 2 + 1, rows)
            steps = int(lengths.sum())
            offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
            entropy = (rng.gamma(0.4, 2.0, steps)).astype(np.float32)
            surprisal = entropy * rng.gamma(1.0, 1.0, steps).astype(np.float32)
            eos = -rng.gamma(3.0, 3.0, steps).astype(np.float32)

            def lists(values: np.ndarray, at: pa.Array = offsets) -> pa.Array:
                return pa.ListArray.from_arrays(at, pa.array(values))

            prompt_ids = [p for p in ids for _ in range(samples)]
            sample = [s for _ in ids for s in range(samples)]
            rollouts.append(store.shard_path(where, shard))
            write_shard(
                rollouts[-1],
                {
                    "run_id": [run_id] * rows,
                    "prompt_id": prompt_ids,
                    "sample": sample,
                    "text": [f"rollout {i} " + "lorem ipsum " * 40 for i in range(rows)],
                    "token_ids": lists(rng.integers(0, 49152, steps).astype(np.int32)),
                    "finish_reason": ["stop"] * rows,
                    "entropy": lists(entropy),
                    "logprob": lists(-surprisal),
                    "eos_logprob": lists(eos),
                },
            )
            centre = rng.normal(size=(len(ids), 1, DIMENSION))
            vectors = (centre + rng.normal(size=(len(ids), samples, DIMENSION))).reshape(rows, -1)
            embedded += write_embeddings(root, "minilm", run_id, shard, prompt_ids, sample, vectors)
        store.add_model(root, {k: keys[k] for k in ("family", "variant")})
        rows_of_prompts = [{"prompt_id": f"p{p:04d}"} for p in range(prompts)]
        prompt_files = store.add_prompts(root, keys["task"], rows_of_prompts)
        store.commit(root, "embeddings", {"embedder": "minilm", "run": run_id}, embedded, {})
        store.complete_run(
            root,
            rollouts,
            {
                "run_id": run_id,
                **keys,
                "model_id": f"{keys['family']}/{keys['variant']}",
                "rendering": "plain",
                "engine": "benchmark",
                "settings": store.canonical(settings),
                "versions": "{}",
            },
            settings,
            prompt_files,
        )
    sql.write_database(root)


def query(root: Path) -> pl.DataFrame:
    """The measured thing: every column of model_metrics."""
    return canopy_store.read(root, "model_metrics").sort("run_id")


def bare_scan(root: Path) -> None:
    """Reads the same columns and does nothing with them but keep the largest value of each."""
    with canopy_store.open(root) as con:
        con.sql(
            "select max(run_id), max(prompt_id), max(sample), max(n_tokens), max(entropy_sum), "
            "max(surprisal_sum), max(stop_entropy_sum), max(finish_reason) from rollouts"
        ).fetchall()
        con.sql(
            "select max(prompt_id), max(n), max(samples), max(semantic_distances), "
            "max(embedding_sum), max(eigenvalues) from embedding_spectra"
        ).fetchall()


def torch_loop(root: Path) -> pl.DataFrame:
    """The same numbers as scripts take them: load each shard, then one prompt at a time in PyTorch."""
    import torch

    rows = []
    for run in store.runs(root):
        prompts = []
        where = store.folder(root, "embeddings", embedder="minilm", run=run["run_id"])
        for number, shard in enumerate(run["shards"]):
            columns = ["prompt_id", "n_tokens", "entropy", "logprob", "eos_logprob", "finish_reason"]
            data = pq.ParquetFile(shard).read(columns)
            embedded = pq.ParquetFile(store.shard_path(where, number)).read(["embedding"])
            vectors = torch.tensor(
                embedded["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, DIMENSION)
            )
            lengths = torch.from_numpy(data["n_tokens"].to_numpy().astype(np.int64))
            ends = lengths.cumsum(0)
            steps = {
                name: torch.tensor(data[name].combine_chunks().flatten().to_numpy())
                for name in ("entropy", "logprob", "eos_logprob")
            }
            ids = np.array(data["prompt_id"].to_pylist())
            stopped = np.array(data["finish_reason"].to_pylist()) == "length"
            for prompt in dict.fromkeys(ids):
                members = np.flatnonzero(ids == prompt)
                prompts.append(one_prompt(members, lengths, ends, steps, vectors, stopped))
        stacked = {key: torch.tensor([p[key] for p in prompts]) for key in prompts[0]}
        pooled = {key: float(value.nanmean()) for key, value in stacked.items()}
        for key in ("pearson", "spearman", "pearson_d", "spearman_d"):
            pooled[key] = float(torch.tanh(torch.atanh(stacked[key].clip(-0.999999, 0.999999)).mean()))
        pooled["vendi"] = float(torch.exp(stacked["vendi"].log().mean()))
        rows.append({"run_id": run["run_id"], **pooled})
    return pl.DataFrame(rows)


def one_prompt(members, lengths, ends, steps, vectors, truncated) -> dict[str, float]:  # type: ignore
    """Every per-prompt measure of one prompt's rollouts."""
    import torch

    n = lengths[members].double()
    sums = {name: [] for name in steps}  # type: ignore[var-annotated]
    for i in members:
        begin, end = int(ends[i] - lengths[i]), int(ends[i])
        for name, values in steps.items():
            sums[name].append(values[begin:end].double().sum())
    total = torch.stack(sums["entropy"])
    rate = total / n
    e = vectors[members].double()
    kernel = e @ e.T
    m = len(members)
    distance = 1 - (kernel.sum(1) - 1) / (m - 1)
    eigenvalues = torch.linalg.eigvalsh(kernel / m).clip(min=1e-15)

    def pearson(x, y):  # type: ignore
        return float(torch.corrcoef(torch.stack([x, y]))[0, 1])

    def ranks(x):  # type: ignore
        _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
        top = counts.cumsum(0).double()
        return (top - (counts.double() - 1) / 2)[inverse]

    def kendall(x, y):  # type: ignore
        a, b = torch.sign(x[:, None] - x[None]), torch.sign(y[:, None] - y[None])
        return float((a * b).sum() / torch.sqrt(a.abs().sum() * b.abs().sum()))

    return {
        "ce_star": float(total.mean()),
        "surprisal": float(-torch.stack(sums["logprob"]).mean()),
        "mean_length": float(n.mean()),
        "entropy_rate": float(rate.mean()),
        "pearson": pearson(n, rate),
        "spearman": pearson(ranks(n), ranks(rate)),
        "kendall": kendall(n, rate),
        "pearson_d": pearson(n, distance),
        "spearman_d": pearson(ranks(n), ranks(distance)),
        "kendall_d": kendall(n, distance),
        "truncation": float(truncated[members].mean()),
        "diversity": float(1 - (kernel.sum() - kernel.trace()) / (m * (m - 1))),
        "vendi": float(torch.exp(-(eigenvalues * eigenvalues.log()).sum())),
    }


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def bytes_per_token(root: Path) -> pl.DataFrame:
    """Bytes a token of every rollouts column: as decoded lists, encoded, and compressed."""
    tokens, sizes = 0, {}  # type: ignore[var-annotated]
    for path in store.files(root, "rollouts"):
        metadata = pq.read_metadata(path)
        tokens += sum(pq.ParquetFile(path).read(["n_tokens"])["n_tokens"].to_numpy())
        for group in range(metadata.num_row_groups):
            for leaf in range(metadata.num_columns):
                column = metadata.row_group(group).column(leaf)
                name = column.path_in_schema.split(".")[0]
                plain, packed = sizes.get(name, (0, 0))
                sizes[name] = (
                    plain + column.total_uncompressed_size,
                    packed + column.total_compressed_size,
                )
    return pl.DataFrame(
        [
            {"column": name, "uncompressed": plain / tokens, "compressed": packed / tokens}
            for name, (plain, packed) in sizes.items()
        ]
    ).sort("compressed", descending=True)


def encodings(root: Path) -> pl.DataFrame:
    """Bytes a token of each float list under zstd, plain beside byte-stream-split."""
    path = store.files(root, "rollouts")[0]
    rows = []
    for name in ("entropy", "logprob", "eos_logprob"):
        column = pq.ParquetFile(path).read([name])
        tokens = len(column[name].combine_chunks().flatten())
        sizes = {}
        for label, split in (("plain", False), ("byte-stream-split", [f"{name}.list.element"])):
            buffer = io.BytesIO()
            pq.write_table(
                column, buffer, compression="zstd", use_dictionary=False, use_byte_stream_split=split
            )
            sizes[label] = len(buffer.getvalue()) / tokens
        rows.append({"column": name, **sizes})
    return pl.DataFrame(rows)


def show(title: str, table: pl.DataFrame) -> None:
    with pl.Config(
        tbl_rows=-1,
        float_precision=2,
        tbl_hide_dataframe_shape=True,
        tbl_hide_column_data_types=True,
        tbl_formatting="ASCII_MARKDOWN",
    ):
        print(f"\n{title}\n{table}")


def machine() -> str:
    """What this was measured on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        model = named[0].partition(":")[2].strip() if named else model
    return f"{os.cpu_count()} cores, {model}, Python {platform.python_version()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--samples", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", help="keep the store here and use it again")
    parser.add_argument("--sizes", metavar="STORE", help="only the bytes a token of this store")
    arguments = parser.parse_args()
    if arguments.sizes:
        show("bytes a token on disk", bytes_per_token(Path(arguments.sizes)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(arguments.store or scratch) / "bench"
        if not (root / "canopy.duckdb").exists():
            make_store(root, arguments.prompts, arguments.samples)
        ours, theirs = query(root), torch_loop(root).sort("run_id")  # warm both, and compare
        for mine, other in (
            ("ce_star", "ce_star"),
            ("rho_kendall", "kendall"),
            ("vendi_score", "vendi"),
        ):
            difference = (ours[mine] - theirs[other]).abs().max()
            assert difference < 1e-4, (mine, difference)  # type: ignore[operator]
        times: dict[str, list[float]] = {"query": [], "bare scan": [], "PyTorch loop": []}
        for number in range(arguments.rounds):
            times["query"].append(timed(lambda: query(root)))
            times["bare scan"].append(timed(lambda: bare_scan(root)))
            if number < 2:  # the loop is long, and steady
                times["PyTorch loop"].append(timed(lambda: torch_loop(root)))
        median = {name: statistics.median(values) for name, values in times.items()}
        print(f"{machine()}; {RUNS} runs x {arguments.prompts} prompts x {arguments.samples} rollouts")
        for name, value in median.items():
            print(f"{name:>14}: {value:7.2f} s median of {len(times[name])}")
        print(f"the loop takes {median['PyTorch loop'] / median['query']:.1f} times the query")
        print(
            f"the query takes {median['query'] / median['bare scan']:.2f} times the bare scan; "
            f"aim: at most 3 x + 0.3 s = {3 * median['bare scan'] + 0.3:.2f} s"
        )
        show("bytes a token on disk", bytes_per_token(root))
        show("bytes a token by encoding, zstd after it", encodings(root))


if __name__ == "__main__":
    main()
