"""`make gpu DEVICE=cpu`: the script for a GPU, small, so that it runs where one is at last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_script_for_a_gpu_runs_and_writes_its_table(tmp_path):
    page = tmp_path / "performance.md"
    page.write_text("before\n<!-- gpu: written by make gpu -->\nearlier\n<!-- gpu: end -->\nafter\n")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "gpu.py", "--device", "cpu", "--write", page],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "earlier" not in text
    assert "FAILED" not in text
    for row in (
        "| policy against float64 | record within",
        "| resuming | 400 rollouts",
        "| tiny | 20 | 8 |",
    ):
        assert row in text
