"""Mutants: small faults planted one at a time in a copy of the checkout; does a test fail on each?

    python tests/mutants.py --module canopy_store/analysis/bootstrap.py --number 20 --seed 1
    python tests/mutants.py --sql kl_divergence

In Python a comparison, an operator, a number, a condition, a return or a raise is changed; which of all
that can be, the seed draws. In SQL it is what mutants_sql lists. What survives is to be killed by a new
test, or named in docs/reliability.md with the reason why it may. No part of `make test`: it takes hours.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from mutants_sql import SQL

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

# what all tests import, once for all the forks that run them; nothing of the package itself
for _library in ("duckdb", "hypothesis", "polars", "pyarrow.parquet", "scipy.stats", "transformers"):
    importlib.import_module(_library)


HERE = Path(__file__).parent.parent
# the tests that a module's mutants must fail on, the quickest first
TESTS = {
    "canopy_store/store/commits.py": "test_commits test_remove test_merge test_verify",
    "canopy_store/store/plans.py": "test_merge test_executors test_bad_input",
    "canopy_store/store/format1.py": "test_upgrade",
    "canopy_store/analysis/bootstrap.py": "test_comparison",
    "canopy_store/analysis/comparison.py": "test_units test_comparison test_like_with_like",
    "canopy_store/analysis/intervals.py": "test_units test_comparison test_like_with_like",
    "canopy_store/analysis/unit_rows.py": "test_units",
    "canopy_store/analysis/power.py": "test_power test_comparison",
    "canopy_store/analysis/regression/linear.py": "test_regression",
    "canopy_store/analysis/regression/beta.py": "test_regression",
    "canopy_store/analysis/regression/slopes.py": "test_regression",
    "ingest/policy.py": "test_sampler test_golden test_ground_truth",
}
OF_SQL = "test_step_views test_scored_views test_study_views test_golden test_views test_sql"
SKIPPED = (".git", ".venv*", "demo*output", "build", "__pycache__", ".*_cache", "*.egg-info")
# how an operator is written, and what takes its place
SWAPS = {
    **{ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">")},
    **{ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.In: ("in", "not in")},
    **{ast.NotIn: ("not in", "in"), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is")},
    **{ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*")},
    **{ast.FloorDiv: ("//", "/"), ast.Pow: ("**", "*"), ast.And: ("and", "or"), ast.Or: ("or", "and")},
}


class Mutant(NamedTuple):
    """A fault: in a line of a file, what stands there, and what is put in its place."""

    file: str
    line: int
    old: str
    new: str
    source: str  # all of the file, with the fault


# ---------------------------------------------------------------- what is planted


def of_module(file: str) -> list[Mutant]:
    """Every mutant of a Python module, in the order of its lines."""
    text = (HERE / file).read_text()
    starts = [0]
    for line in text.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    data, mutants = text.encode(), []
    for node, new in _changes(ast.parse(text)):
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        source = (data[:start] + new.encode() + data[end:]).decode()
        mutants.append(Mutant(file, node.lineno, data[start:end].decode(), new, source))
    return sorted(mutants, key=lambda mutant: mutant.line)


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """Nodes below this one, each with what may take its place; nothing of messages and annotations."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise):
            yield child, "pass"
        elif isinstance(child, ast.AnnAssign) and child.value is None:
            continue
        elif not isinstance(child, ast.JoinedStr | ast.arguments):
            yield from ((child, new) for new in _instead(child))
            yield from _changes(child)


def _instead(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Compare):
        first, *others = [SWAPS[type(op)] for op in node.ops]
        signs = [first[1], *(own for own, _ in others)]
        sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
        yield f"({sides[0]} {' '.join(f'{x} {y}' for x, y in zip(signs, sides[1:], strict=True))})"
    elif isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        yield f"({ast.unparse(node.left)} {SWAPS[type(node.op)][1]} {ast.unparse(node.right)})"
    elif isinstance(node, ast.BoolOp):
        yield f"({f' {SWAPS[type(node.op)][1]} '.join(f'({ast.unparse(v)})' for v in node.values)})"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield f"({ast.unparse(node.operand)})"
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        yield repr(not node.value if isinstance(node.value, bool) else node.value + 1)
    elif isinstance(node, ast.Return) and node.value is not None:
        yield "return None"


def of_sql(view: str) -> list[Mutant]:
    """The mutants that the list has of a view, or of the macros."""
    file = f"sql/{view}.sql"
    text = (HERE / file).read_text()
    for old, _ in SQL[view]:
        if text.count(old) != 1:
            sys.exit(f"{file}: {old!r} stands there {text.count(old)} times, needs to be once")
    return [
        Mutant(file, text[: text.index(old)].count("\n") + 1, old, new, text.replace(old, new))
        for old, new in SQL[view]
    ]


# ---------------------------------------------------------------- and whether it is noticed


def fails(copy: Path, tests: str, only: str, limit: float) -> bool:
    """Whether a test fails in the copy, or they do not come to their end in time."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        os.setsid()  # with all that the tests start
        os.nice(10)
        os.chdir(copy)
        paths = {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        os.environ.update(paths)
        sys.path[:1] = [str(copy), str(copy / "tests")]
        sys.dont_write_bytecode = True
        for stream in (1, 2):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
        files = [f"tests/{name}.py" for name in tests.split()]
        os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *files, "-k", only]))
    end = time.monotonic() + limit
    while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return True
        time.sleep(0.1)
    return done[1] != 0


def tried(copy: Path, mutants: list[Mutant], tests: str, only: str) -> Iterator[Mutant]:
    """Those of the mutants on which no test fails."""
    began = time.monotonic()
    if fails(copy, tests, only, 3600):
        sys.exit(f"{tests}: a test fails without any fault; mend that first")
    limit = 60 + 3 * (time.monotonic() - began)
    for mutant in mutants:
        path = copy / mutant.file
        whole = path.read_text()
        path.write_text(mutant.source)
        noticed = fails(copy, tests, only, limit)
        path.write_text(whole)
        what = f"{mutant.file}:{mutant.line}: {mutant.old!r} became {mutant.new!r}"
        print(f"{'killed  ' if noticed else 'SURVIVED'} {' '.join(what.split())}", flush=True)
        if not noticed:
            yield mutant


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--module", choices=[*TESTS], action="append", default=[])
    options.add_argument("--sql", choices=[*SQL, "all"], action="append", default=[])
    options.add_argument("--number", type=int, default=20, help="mutants of each module")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--tests", default="", help="tests instead of the module's")
    options.add_argument("-k", dest="only", default="", help="only these tests, as of pytest")
    asked = options.parse_args()
    views = [*SQL] if "all" in asked.sql else asked.sql
    if not (asked.module or views):
        asked.module, views = [*TESTS], [*SQL]
    with tempfile.TemporaryDirectory(prefix="canopy-mutants-") as folder:
        copy = Path(folder, "checkout")
        shutil.copytree(HERE, copy, symlinks=True, ignore=shutil.ignore_patterns(*SKIPPED))
        targets = [(name, of_module(name), TESTS[name], asked.number) for name in asked.module]
        if views:
            targets.append(("SQL", [m for view in views for m in of_sql(view)], OF_SQL, 10**6))
        for name, mutants, tests, number in targets:
            drawn = random.Random(asked.seed).sample(mutants, min(number, len(mutants)))
            drawn = sorted(drawn, key=lambda mutant: (mutant.file, mutant.line))
            survived = list(tried(copy, drawn, asked.tests or tests, asked.only))
            print(
                f"{name}: {len(drawn)} of {len(mutants)} mutants, {len(survived)} survived", flush=True
            )


if __name__ == "__main__":
    main()
