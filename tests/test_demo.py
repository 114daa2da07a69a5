"""`canopy demo`: the store that ships with the package is sound, and opens without torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import canopy_store
from canopy_store import StoreError, store
from canopy_store.sharing.example import unpack_example

ROOT = Path(__file__).parent.parent
ARCHIVE = ROOT / "canopy_store" / "example.zip"

# an environment of the wheel alone, as far as imports tell
WITHOUT = """
import sys

class Absent:
    names = {"torch", "transformers", "sentence_transformers", "safetensors", "huggingface_hub", "peft"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from canopy_store.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def example(tmp_path_factory) -> Path:
    return unpack_example(tmp_path_factory.mktemp("example") / "store")


def test_the_demo_without_torch(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, "demo", "--out", "D d"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "D d" / "report.html").read_text(encoding="utf-8")
    assert "smollm2" in page
    assert "open it in a browser" in done.stdout
    tried = re.findall(r"(?m)^  canopy (.*)$", done.stdout)
    assert len(tried) == 3
    for line in tried[:2]:  # what it tells to try works as it is printed
        again = subprocess.run(
            [
                "bash",
                "-c",
                f'canopy() {{ "{sys.executable}" -m canopy_store.cli "$@"; }}; canopy {line}',
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert again.returncode == 0, again.stderr
        assert "base" in again.stdout


def test_the_example_is_sound_and_says_what_it_is(example):
    assert canopy_store.verify(example, deep=True).is_empty()
    card = (example / "README.md").read_text(encoding="utf-8")
    assert 'license: "apache-2.0"' in card
    runs = canopy_store.read(example, "runs")
    assert set(runs["variant"]) == {"base", "sft"}
    assert runs["task"].n_unique() >= 2
    assert len(canopy_store.read(example, "embeddings")) == runs["n_rollouts"].sum()
    assert json.loads((example / "canopy.json").read_text())["version"] == 2


def test_the_example_tells_of_no_machine(example):
    told = "".join(
        str(canopy_store.read(example, table).drop("hyperparameters", strict=False).to_dicts())
        for table in ("models", "runs", "work", "prompts")
    )
    told += "".join(p.read_text() for p in example.rglob("*.json"))
    assert not re.findall(r"/(?:tmp|home|root|work|Users|mnt)/", told)
    assert canopy_store.read(example, "work").is_empty()


def test_the_example_shows_something(example):
    """Fine-tuning on short answers changed what it should have changed."""
    rows = canopy_store.compare(example, metrics=["ce_star", "mean_length"], by="all")
    assert (rows["delta"] < 0).all()
    assert len(canopy_store.regress(example, model="interaction", drop=["family"]).coefficients) > 3


def test_the_archive_is_small_and_made_of_plain_files():
    assert ARCHIVE.stat().st_size < 1_500_000
    with zipfile.ZipFile(ARCHIVE) as packed:
        for entry in packed.infolist():
            assert entry.date_time == (1980, 1, 1, 0, 0, 0)
            assert not entry.filename.startswith("/")
            assert ".." not in entry.filename


def test_a_second_demo_uses_the_store_again_and_a_folder_of_others_is_refused(example, tmp_path, canopy):
    before = {p: p.stat().st_mtime_ns for p in example.rglob("*.parquet")}
    assert unpack_example(example) == example
    assert {p: p.stat().st_mtime_ns for p in example.rglob("*.parquet")} == before
    (tmp_path / "mine.txt").write_text("kept")
    code, _, err = canopy("demo", "--out", tmp_path)
    assert code == 2
    assert "exists and is not empty" in err
    with pytest.raises(StoreError, match="not a store and not an empty folder"):
        unpack_example(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_no_demo_inside_a_store(tmp_path, canopy):
    root = store.init(tmp_path / "s")
    for out in (root / "demo", root / "rollouts" / "demo"):
        code, shown, said = canopy("demo", "--out", out)
        assert (code, shown) == (2, "")
        assert f"inside the store {root}" in said
        assert not out.exists()
