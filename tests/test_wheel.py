"""The wheel holds what git tracks, installs away from the checkout, and answers a query there."""

from __future__ import annotations

import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from stores import GOLDEN_ROLLOUTS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # a copy: building leaves build/ and egg-info behind
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)
    for name in subprocess.run(
        ["git", "diff", "HEAD", "--name-only", "--diff-filter=AM"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split():
        (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(source)],
        check=True,
        capture_output=True,
    )
    return next(out.glob("canopy_store-*.whl"))


def test_the_wheel_holds_what_git_tracks(wheel):
    tracked = subprocess.run(
        ["git", "ls-files", "canopy_store", "sql", "ingest"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    links = {"canopy_store/sql", "canopy_store/ingest"}
    expected = {
        f"canopy_store/{name}" if name.startswith(("sql/", "ingest/")) else name
        for name in tracked
        if name not in links
    }
    held = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    assert held == expected


def test_the_wheel_works_in_a_fresh_environment(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    constraints = str(ROOT / "requirements.txt")
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "-c", constraints, str(wheel)],
        check=True,
        capture_output=True,
    )
    canopy = tmp_path / "env" / "bin" / "canopy"
    away = tmp_path / "away"
    away.mkdir()

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([canopy, *arguments], cwd=away, capture_output=True, text=True)

    assert call("import", str(GOLDEN_ROLLOUTS), "--store", "s", "--max-new-tokens", "64").returncode == 0
    done = call("sql", "select count(*) as n from model_metrics", "--store", "s", "--format", "csv")
    assert done.stdout.split() == ["n", "8"], done.stderr
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = call("demo")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert shown.returncode == 0, shown.stderr
    assert "smollm2" in (away / "canopy-demo" / "report.html").read_text(encoding="utf-8")
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30  # seconds of CPU
    missing = call("ingest", "embed", "--store", "s", "--embedder", "x")
    assert missing.returncode == 2
    assert "pip install 'canopy-store[ingest]'" in missing.stderr
