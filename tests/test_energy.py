"""Energy: what counters say, over their end and back; nothing where they say nothing."""

from __future__ import annotations

import pytest
from stores import ingest_arguments, write_prompts

import canopy_store
from canopy_store.ingest import energy


@pytest.fixture
def counters(tmp_path, monkeypatch):
    """Two processors' counters, as Linux shows them: their file's folder by the processor's number."""
    for number, microjoules in enumerate((5_000_000, 61_000_000)):
        zone = tmp_path / f"intel-rapl:{number}"
        zone.mkdir()
        (zone / "energy_uj").write_text(f"{microjoules}\n")
        (zone / "max_energy_range_uj").write_text("64000000\n")
        part = tmp_path / f"intel-rapl:{number}:0"  # of what the package counts already
        part.mkdir()
        (part / "energy_uj").write_text("1\n")
    monkeypatch.setattr(energy, "_POWERCAP", tmp_path)
    energy._counter.cache_clear()
    yield tmp_path
    energy._counter.cache_clear()


def test_energy_is_what_the_counters_rose_by_over_their_end(counters):
    used = energy.meter("cpu")
    (counters / "intel-rapl:0" / "energy_uj").write_text("9500000\n")
    (counters / "intel-rapl:1" / "energy_uj").write_text("1000000\n")  # 3 to its end, and 1
    joules, method = used()
    assert joules == pytest.approx(4.5 + 4)
    assert method == "RAPL, 2 packages"


@pytest.mark.parametrize("broken", ["gone", "not a number"])
def test_a_counter_that_cannot_be_read_gives_no_energy(counters, broken):
    used = energy.meter(None)
    if broken == "gone":
        (counters / "intel-rapl:1" / "energy_uj").unlink()
    else:
        (counters / "intel-rapl:1" / "energy_uj").write_text("")
    assert used() == (None, None)
    assert energy.meter("cpu")() == (None, None)


def test_a_machine_without_counters_gives_no_energy(tmp_path, monkeypatch):
    monkeypatch.setattr(energy, "_POWERCAP", tmp_path / "none")
    energy._counter.cache_clear()
    assert energy.meter("cpu")() == (None, None)
    assert energy.meter("cuda:7")() == (None, None)  # no such GPU, or no driver
    energy._counter.cache_clear()


def test_a_job_notes_the_energy_of_each_shard(counters, chain, tmp_path, monkeypatch, canopy):
    readings = iter(range(10**6))
    plain = energy._rapl

    def rising(zones):
        (counters / "intel-rapl:0" / "energy_uj").write_text(f"{next(readings) * 1_000_000}\n")
        return plain(zones)

    monkeypatch.setattr(energy, "_rapl", rising)
    prompts = write_prompts(tmp_path / "p.jsonl", "a", "b", "c", "d")
    call = ingest_arguments(tmp_path / "s", chain, prompts, samples=3)
    assert canopy(*call, "--prompts-per-shard", 2)[0] == 0
    work = canopy_store.read(tmp_path / "s", "work")
    assert work["energy_j"].to_list() == [1.0, 1.0]
    assert set(work["energy_method"]) == {"RAPL, 2 packages"}
    run = canopy_store.read(tmp_path / "s", "runs").row(0, named=True)
    assert (run["energy_j"], run["energy_method"]) == (2.0, "RAPL, 2 packages")
