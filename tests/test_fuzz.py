"""What fuzzing found stays mended, and a short run of it finds nothing new."""

from __future__ import annotations

from collections import Counter

import pytest
from fuzz_importers import INPUTS, SEEDS, attempt, fuzz, quicken, seed


@pytest.mark.parametrize("path", sorted(SEEDS.glob("*.json")), ids=lambda path: path.stem)
def test_inputs_that_once_broke_an_importer(path):
    attempt(*seed(path))


@pytest.mark.parametrize("kind", list(INPUTS))
def test_damaged_inputs_end_in_errors_of_this_package(kind, monkeypatch):
    quicken(monkeypatch.setattr)
    counts = Counter()
    assert fuzz(kind, 12, counts, derandomize=True) is None
    assert counts[kind] >= 12


def test_the_inputs_are_taken_whole(monkeypatch):
    """Undamaged, every input is one that the importer takes: what is damaged is worth damaging."""
    quicken(monkeypatch.setattr)
    monkeypatch.setattr("fuzz_importers.damage_json", lambda draw, value: value)
    monkeypatch.setattr("fuzz_importers.damage_bytes", lambda draw, raw: raw)
    for kind in INPUTS:
        if kind != "parquet":  # whose columns are damaged elsewhere
            counts = Counter()
            assert fuzz(kind, 2, counts, derandomize=True) is None
            assert counts[f"{kind} taken"] == counts[kind], kind
