"""`canopy sql` without a query, and what the shell completes."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stores import fill, import_golden, write_prompts

import canopy_store
from canopy_store.analysis.bootstrap import MEASURES

CANOPY = [sys.executable, "-m", "canopy_store.cli"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return import_golden(tmp_path_factory.mktemp("shell") / "s")


# ---------------------------------------------------------------- standard input


def piped(text: str | bytes, *arguments: object) -> tuple[int, str, str]:
    data = text if isinstance(text, bytes) else text.encode()
    done = subprocess.run([*CANOPY, "sql", *map(str, arguments)], input=data, capture_output=True)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_statements_from_standard_input(root):
    code, out, err = piped(
        "select 'a;b' as one; -- first\n\nselect count(*) as runs\nfrom runs",
        "--store",
        root,
        "--format",
        "csv",
    )
    assert (code, err) == (0, "")
    assert out == "one\na;b\nruns\n8\n"
    assert piped("select 3 as n", "-", "--store", root, "--format", "csv") == (0, "n\n3\n", "")


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("  \n", 2, "standard input holds no statement"),
        ("select 1; selec 2;", 1, 'syntax error at or near "selec"'),
        ("select 1; create table t(i int);", 2, "CREATE is refused"),
        (b"select '\xff'", 2, "standard input is not UTF-8 text"),
    ],
)
def test_input_that_is_refused(root, text, code, message):
    got, _, err = piped(text, "--store", root)
    assert (got, err.count("\n")) == (code, 1)
    assert message in err


# ---------------------------------------------------------------- at a terminal


def typed(lines: list[str], *arguments: object, **environment: str) -> str:
    """What a terminal shows while these lines are typed, each after a prompt."""
    pid, terminal = pty.fork()
    if pid == 0:
        # what a shell starts in the background is told to ignore Ctrl-C; the tests may be started so
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.environ.update({"TERM": "dumb", "COLUMNS": "200", **environment})
        os.execv(sys.executable, [*CANOPY, "sql", *map(str, arguments)])
    shown, left, end = "", list(lines), time.monotonic() + 180
    prompt, dropped, quiet = r"(canopy>|\.\.\.>| D) $", False, 0
    while time.monotonic() < end:
        if not select.select([terminal], [], [], 1)[0]:
            # a Ctrl-C between the prompt and the wait for a key is seen with the next one, as by hand
            quiet += 1
            if dropped and quiet % 3 == 0:
                os.write(terminal, b"\x03")
        else:
            quiet = 0
            try:
                shown += os.read(terminal, 65536).decode(errors="replace")
            except OSError:  # the other side is closed
                break
        if left and re.search(prompt, re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", shown)):
            # after Ctrl-C the prompt of the line that is dropped may be shown once more
            dropped = left[0] == "\x03"
            prompt = r"canopy> $" if dropped else r"(canopy>|\.\.\.>| D) $"
            os.write(terminal, left.pop(0).encode(errors="surrogateescape"))
            shown += "\n"
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, shown
    assert not left, shown
    return shown


def test_the_shell_reads_statements_of_several_lines_and_goes_on_after_errors(root, tmp_path):
    stolen = tmp_path / "x.parquet"
    shown = typed(
        [
            "select 'x;\n",
            "y' as b, 40 + 2 as n;\n",
            "selec 1;\n",
            "select '\udcff\udcfe';\n",  # bytes that are no UTF-8
            f"copy (select 1) to '{stolen}';\n",
            "select 1 +\n",
            "\x03",  # Ctrl-C: the line is dropped, the shell goes on
            "select count(*) as runs from runs;\n",
            ".tables\n",
            ".nothing\n",
            ".quit\n",
        ],
        "--store",
        root,
    )
    assert re.search(r"│ x;\s+┆ 42 +│", shown)
    assert 'canopy: Parser Error: syntax error at or near "selec"' in shown
    assert "canopy: this line is not UTF-8 text" in shown
    assert "COPY is refused" in shown
    assert not stolen.exists()
    assert re.search(r"│ runs │\s+╞═+╡\s+│ 8 +│", shown)
    assert "model_metrics" in shown
    assert ".nothing: no such command; see .help" in shown
    assert "Traceback" not in shown


def test_ctrl_d_leaves_the_shell(root):
    assert "canopy>" in typed(["\x04"], "--store", root)


def test_a_shell_on_no_store_is_refused(tmp_path):
    code, _, err = piped("select 1", "--store", tmp_path / "none")
    assert code == 1
    assert "no store here" in err


def test_duckdbs_own_shell_opens_the_stores_files_and_no_other(root, tmp_path):
    outside = tmp_path / "outside.csv"
    outside.write_text("a\n1\n")
    shown = typed(
        [
            "select count(*) + 1000 from runs;\n",
            f"from '{outside}';\n",
            f"copy (select 1) to '{tmp_path / 'x.parquet'}';\n",
            ".quit\n",
        ],
        *("--store", root, "--shell", "duckdb"),
        PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    )
    assert "1008" in shown
    assert shown.count("Permission Error") == 2
    assert not (tmp_path / "x.parquet").exists()


# ---------------------------------------------------------------- completion


def completed(line: str, **environment: str) -> list[str]:
    """What Tab offers at the end of a line; it must print nothing else, whatever the store is."""
    words = line.split(" ")
    done = subprocess.run(
        CANOPY,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "_CANOPY_COMPLETE": "bash_complete",
            "COMP_WORDS": line,
            "COMP_CWORD": str(len(words) - 1),
            **environment,
        },
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return [row.partition(",")[2] for row in done.stdout.splitlines() if row]


@pytest.fixture(scope="module")
def full(tmp_path_factory, chain) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    return fill(folder / "s", chain, write_prompts(folder / "p.jsonl", "a", "b"))


def test_completion_offers_what_the_store_has(root, full):
    runs = sorted(canopy_store.read(root, "runs")["run_id"])
    assert sorted(completed(f"canopy compare --store {root} --run ")) == runs
    assert completed(f"canopy rm-run --store {root} beta.base") == [
        "beta.base.coding",
        "beta.base.completion",
    ]
    assert sorted(completed(f"canopy report --store {root} --baseline ")) == ["base", "instruct"]
    assert completed(f"canopy regress --store {root} --reference-task co") == ["coding", "completion"]
    assert completed(f"canopy ingest rollouts --store {root} --family ") == ["alpha", "beta"]
    assert completed(f"canopy ingest rollouts --store {root} --parent alpha/b") == ["alpha/base"]
    assert completed(f"canopy compare --store {full} --embedder ") == ["E"]
    assert completed(f"canopy compare --store {full} --selection ") == ["all", "reward_top_50"]
    assert completed("canopy compare --run al", CANOPY_STORE=str(root))[0] == "alpha.base.coding"


def test_completion_offers_metrics(root):
    rho = [name for name in MEASURES if name.startswith("rho")]
    assert completed(f"canopy compare --store {root} --metric rho") == rho
    assert completed("canopy compare --margin ce_star") == ["ce_star=", "ce_star_cv="]
    assert "vendi_score" not in completed(f"canopy power --store {root} --metric ")


@pytest.mark.parametrize("store", ["/nowhere", "{damaged}", "s3://no-such-bucket/x"])
def test_completion_of_a_bad_store_offers_nothing(root, tmp_path, store):
    damaged = shutil.copytree(root, tmp_path / "damaged")
    for path in (damaged / "commits" / "rollouts").glob("*.json"):
        path.write_text("{")
    line = f"canopy regress --store {store.format(damaged=damaged)} --reference-task "
    assert completed(line) == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(canopy, shell):
    code, out, _ = canopy("completion", shell)
    assert code == 0
    assert f"_CANOPY_COMPLETE={shell}_complete" in out
