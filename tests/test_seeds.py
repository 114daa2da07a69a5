"""Training seeds: checkpoints of one variant."""

from __future__ import annotations

import polars as pl
import pytest

from canopy_store.analysis.seeds import as_variants
from canopy_store.errors import UsageError

ROWS = pl.DataFrame({"variant": ["base", "sft-1", "sft-2", "dpo_a", "dpo_b"], "x": range(5)})


def test_variants_that_match_are_checkpoints_of_the_name() -> None:
    rows = as_variants(ROWS, {"sft": "sft-*", "dpo": "dpo_a, dpo_b"}, baseline="base")
    assert rows["variant"].to_list() == ["base", "sft", "sft", "dpo", "dpo"]
    assert rows["checkpoint"].to_list() == ROWS["variant"].to_list()
    assert rows["x"].to_list() == list(range(5))


def test_a_variant_may_give_its_name_to_its_other_checkpoints() -> None:
    rows = as_variants(ROWS, {"sft-1": "sft-1,sft-2"}, baseline="base")
    assert rows["variant"].to_list() == ["base", "sft-1", "sft-1", "dpo_a", "dpo_b"]


def test_without_seeds_a_variant_is_its_own_checkpoint_unless_the_rows_say_more() -> None:
    assert as_variants(ROWS, {})["checkpoint"].to_list() == ROWS["variant"].to_list()
    tuned = pl.DataFrame({"variant": ["base", "sft", "sft"], "seed": [None, 1, 2]})
    assert as_variants(tuned, {})["checkpoint"].to_list() == ["base", "sft/1", "sft/2"]
    named = pl.DataFrame({"variant": ["base", "sft"], "checkpoint": [None, "step-9"]})
    assert as_variants(named, {})["checkpoint"].to_list() == ["base", "step-9"]


@pytest.mark.parametrize(
    ("seeds", "words"),
    [
        ({"sft": "rlhf-*"}, r"sft=rlhf-\*: no such variant; there is base, dpo_a"),
        ({"sft": "sft-*", "one": "*-1"}, "sft-1 is matched twice, by sft and one"),
        ({"tuned": "*"}, "takes in base, the baseline, together with dpo_a, dpo_b, sft-1, sft-2"),
        ({"base": "base,sft-1"}, "takes in base, the baseline, together with sft-1"),
        ({"dpo_a": "sft-*"}, "dpo_a is another variant"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(seeds: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        as_variants(ROWS, seeds, baseline="base")


def test_a_panel_that_names_its_checkpoints_takes_no_patterns() -> None:
    with pytest.raises(UsageError, match="have a column checkpoint"):
        as_variants(ROWS.with_columns(checkpoint=pl.col("variant")), {"sft": "sft-*"})
