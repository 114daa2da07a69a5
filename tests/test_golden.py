"""The paper's own values: every golden number, through import, selection and the views."""

from __future__ import annotations

import json
import math

import pytest
from stores import EXPECTED, GOLDEN, import_golden

import canopy_store

POLICIES = json.loads((GOLDEN / "policy_entropy_expected.json").read_text())

# golden name -> column of prompt_metrics and model_metrics
COLUMNS = {
    "ce_star": "ce_star",
    "gen_ppl": "gen_ppl",
    "branching_factor": "branching_factor",
    "entropy_rate": "entropy_rate",
    "truncation_rate": "truncation_rate",
    "semantic_diversity": "semantic_diversity",
    "vendi_score": "vendi_score",
    "length_vs_entropy_rate.pearson": "rho_pearson",
    "length_vs_entropy_rate.spearman": "rho_spearman",
    "length_vs_entropy_rate.kendall": "rho_kendall",
    "length_vs_entropy_rate.covariance": "cov_length_rate",
    "length_vs_semantic_diversity.pearson": "rho_length_diversity_pearson",
    "length_vs_semantic_diversity.spearman": "rho_length_diversity_spearman",
    "length_vs_semantic_diversity.kendall": "rho_length_diversity_kendall",
    "length_vs_semantic_diversity.covariance": "cov_length_diversity",
}
TERCILES = "semantic_diversity_by_length_tercile."
KEYS = ("family", "variant", "task", "prompt_id", "selection")


SELECTIONS = ("all", "reward_top_70")


def of(section: str, selection: str) -> list[dict]:
    return [row for row in EXPECTED[section] if row.get("selection", "all") == selection]


def name_of(row: dict) -> str:
    return "-".join(str(row[key]) for key in KEYS if key in row)


def flat(row: dict) -> dict[str, float | None]:
    """The row's values, nested names joined by a dot, keys left out."""
    values = {}
    for name, value in row.items():
        if isinstance(value, dict):
            values.update({f"{name}.{inner}": v for inner, v in value.items()})
        elif name not in KEYS:
            values[name] = value
    return values


def close(found: float | None, expected: float | None) -> bool:
    """Within 1e-5, relative above 1 and absolute below: the reference works in float32."""
    if found is None or expected is None:
        return found is expected
    return math.isfinite(found) and abs(found - expected) <= 1e-5 * max(1.0, abs(expected))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    root = tmp_path_factory.mktemp("golden") / "store"
    import_golden(root)
    assert canopy_store.select_reward(root, 0.7) == "reward_top_70"
    with canopy_store.open(root) as con:
        yield con


def rows(con, view: str, selection: str, *keys: str) -> dict[tuple, dict]:
    found = con.sql(f"select * from {view} where selection = '{selection}'").pl().to_dicts()
    table = {tuple(row[key] for key in keys): row for row in found}
    assert len(table) == len(found)
    return table


def compare(expected: dict, metrics: dict, terciles: dict[str, dict]) -> list[str]:
    """Every value of the golden row that the views do not give."""
    wrong = []
    for name, value in flat(expected).items():
        if name.startswith(TERCILES):
            found = terciles[name.removeprefix(TERCILES)]["semantic_diversity"]
        else:
            found = metrics[COLUMNS[name]]
        if not close(found, value):
            wrong.append(f"{name_of(expected)} {name}: expected {value}, got {found}")
    return wrong


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_prompt(store, selection):
    keys = ("family", "variant", "task", "prompt_id")
    metrics = rows(store, "prompt_metrics", selection, *keys)
    terciles = rows(store, "length_terciles", selection, *keys, "tercile")
    golden = of("prompts", selection)
    assert len(golden) == len(metrics) == 96
    wrong = []
    for expected in golden:
        key = tuple(str(expected[k]) for k in keys)
        assert len(flat(expected)) == 18
        wrong += compare(
            expected, metrics[key], {t: terciles[(*key, t)] for t in ("short", "medium", "long")}
        )
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_pooled_row(store, selection):
    keys = ("family", "variant", "task")
    metrics = rows(store, "model_metrics", selection, *keys)
    terciles = rows(store, "model_length_terciles", selection, *keys, "tercile")
    golden = of("pooled", selection)
    assert len(golden) == len(metrics) == 8
    wrong = []
    for expected in golden:
        key = tuple(expected[k] for k in keys)
        wrong += compare(
            expected, metrics[key], {t: terciles[(*key, t)] for t in ("short", "medium", "long")}
        )
    assert not wrong, "\n".join(wrong)


def test_the_running_entropy_rate(store):
    keys = ("family", "variant", "task", "position")
    trajectory = rows(store, "entropy_trajectory", "all", *keys)
    wrong = []
    for expected in of("running_entropy_rate", "all"):
        points = zip(
            expected["position"], expected["active"], expected["mean_entropy_rate"], strict=True
        )
        for position, active, rate in points:
            found = trajectory[(*(expected[k] for k in keys[:3]), position)]
            if found["active"] != active or not close(found["mean_entropy_rate"], rate):
                wrong.append(f"{name_of(expected)} at {position}: {active}, {rate}; got {found}")
    assert not wrong, "\n".join(wrong)


def policy_name(case: dict) -> str:
    return " ".join(f"{key} {case[key]}" for key in ("temperature", "top_k", "top_p"))


@pytest.mark.parametrize("case", POLICIES["cases"], ids=policy_name)
def test_the_entropy_of_a_policy(case):
    torch = pytest.importorskip("torch")
    from canopy_store.ingest.policy import sampling_policy

    logits = torch.tensor(POLICIES["logits"], dtype=torch.float32)  # (B, V)
    policy = sampling_policy(logits, case["temperature"], case["top_k"], case["top_p"])
    found = policy.entropy().tolist()
    assert len(found) == len(case["entropy"])
    wrong = [(f, e) for f, e in zip(found, case["entropy"], strict=True) if not close(f, e)]
    assert not wrong
