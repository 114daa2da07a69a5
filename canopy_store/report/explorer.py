"""The rollouts that the page carries, to be read step by step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from canopy_store.report.facts import Facts

MAX_BYTES = 2_500_000


def explorer(facts: Facts, rollouts: int) -> dict[str, Any]:
    """Prompts, models and at most ``rollouts`` examples with every step, ready for JSON.

    Steps are whole hundredths of a nat, which halves the page.
    """
    models = facts.shown.select("run_id", "family", "variant", "task").to_dicts()
    places = {model["run_id"]: i for i, model in enumerate(models)}
    prompts: dict[tuple[str, str], dict[str, Any]] = {}
    kept: list[dict[str, Any]] = []
    size = 0
    for row in facts.examples.head(rollouts).iter_rows(named=True):
        one = _rollout(row, places[row["run_id"]])
        size += len(json.dumps(one))
        if size > MAX_BYTES:
            break
        key = (row["task"], row["prompt_id"])
        prompts.setdefault(key, {"place": len(prompts), "task": row["task"], "text": _prompt_text(row)})
        kept.append({**one, "p": prompts[key]["place"]})
    total = int(facts.shown["n_rollouts"].sum()) if len(facts.shown) else 0
    return {"prompts": list(prompts.values()), "models": models, "rollouts": kept, "of": total}


def _rollout(row: Mapping[str, Any], model: int) -> dict[str, Any]:
    def hundredths(values: list[float] | None, sign: int) -> list[int] | None:
        # JSON has no infinity, which is the surprisal of a token of probability zero
        return None if values is None else [round(min(sign * x, 1e6) * 100) for x in values]

    distance = row["semantic_distance"]
    return {
        "m": model,
        "sample": row["sample"],
        "text": row["text"],
        "chars": row["token_chars"],
        "n": row["n_tokens"],
        "end": row["finish_reason"],
        "rate": round(row["entropy_rate"], 4),
        "distance": None if distance is None else round(distance, 4),
        "entropy": hundredths(row["entropy"], 1),
        "surprisal": hundredths(row["logprob"], -1),
    }


def _prompt_text(row: Mapping[str, Any]) -> str:
    """The prompt as text: of a chat, its turns; where it is not stored, its id."""
    if row["prompt_text"]:
        return str(row["prompt_text"])
    try:
        turns = json.loads(row["messages"] or "[]")
        text = "\n".join(str(turn["content"]) for turn in turns)
    except (ValueError, TypeError, KeyError):
        text = ""
    return text or str(row["prompt_id"])
