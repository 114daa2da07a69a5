"""Nats in words: numbers of answers, and which side has how many times as many."""

from __future__ import annotations

import pytest

from canopy_store.analysis import nats

ROW = {
    "baseline_variant": "base",
    "variant": "sft",
    "delta": -63.9,
    "delta_ci_low": -72.0,
    "delta_ci_high": -56.0,
}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "1.0"),
        (0.4, "1.5"),
        (2.301, "10"),
        (8.45, "4,700"),
        (13.8, "980,000"),
        (13.9, "10⁶"),
        (43, "5 × 10¹⁸"),  # e⁴³ = 4.73e18
        (43.7, "10¹⁹"),  # 9.52e18: no digit is 10
        (229.5, "5 × 10⁹⁹"),
        (500, "10²¹⁷"),
    ],
)
def test_a_number_of_answers_is_read_at_a_glance(value, words):
    assert nats.number(value) == words


def test_an_entropy_is_so_many_answers_and_so_much_a_token():
    assert nats.size(43, 70) == (
        "5 × 10¹⁸ equally likely answers; per token 0.61 nats (0.89 bits), a choice among 1.8"
    )
    assert nats.size(43, None) == "5 × 10¹⁸ equally likely answers"


def test_a_change_is_a_number_of_times_with_its_interval():
    assert nats.ratio(ROW) == ("base has 6 × 10²⁷ times as many answers as sft (2 × 10²⁴ to 2 × 10³¹)")
    risen = {**ROW, "delta": 2.0, "delta_ci_low": 1.0, "delta_ci_high": 3.0}
    assert nats.ratio(risen) == "sft has 7.4 times as many answers as base (2.7 to 20)"
    untold = {**ROW, "delta": -0.9, "delta_ci_low": -2.0, "delta_ci_high": 0.6}
    assert nats.ratio(untold) == (
        "base has 2.5 times as many answers as sft (from 1.8 times fewer to 7.4 times as many)"
    )
    alone = {**ROW, "delta_ci_low": None, "delta_ci_high": None}
    assert nats.ratio(alone) == "base has 6 × 10²⁷ times as many answers as sft"
    assert nats.ratio({**ROW, "delta": None}) == ""
