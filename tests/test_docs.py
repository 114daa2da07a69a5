"""What the documentation shows runs, and what it lists is what the code has."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_data_dictionary_is_the_schema():
    page = runpy.run_path(str(ROOT / "docs" / "dictionary.py"))["dictionary"]()
    assert (ROOT / "docs" / "dictionary.md").read_text(encoding="utf-8") == page, "run: make docs"


def test_every_example_of_the_readme_runs(tmp_path, chain):
    shutil.copytree(chain, tmp_path / "my-model")
    blocks = re.findall(r"```(sh|python)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) > 8
    script = ["set -euo pipefail"]
    for language, text in blocks:
        if text.startswith("make "):
            continue
        script.append(text if language == "sh" else f"python - <<'PYTHON'\n{text}\nPYTHON")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", "\n".join(script)],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "mine.base.walks" in done.stdout
    assert "incomplete" not in done.stdout
    assert (tmp_path / "report.html").stat().st_size > 100_000
    assert (tmp_path / "panel.csv").read_text().startswith("task,prompt_id,family,variant")


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?m)(?:^|`)make ([a-z-]+)", (ROOT / "README.md").read_text())):
        assert f"\n{target}:" in makefile, target
