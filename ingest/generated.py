"""Training data drawn from a run's rollouts, with a share of real lines: a next generation's data."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from canopy_store import sql, store
from canopy_store.errors import DataError, UsageError
from canopy_store.ingest.training_data import read_records, write_once
from canopy_store.store import treatments

FORMS = ("text", "completion")


def draw_generated(
    root: str | Path,
    out: str | Path,
    *,
    run: str,
    lines: int | None = None,
    real: str | Path | None = None,
    real_share: float | None = None,
    form: str = "text",
    seed: int = 0,
) -> dict[str, Any]:
    """The row of ``datasets`` of a file of training data, which is now written in ``out``.

    Rollouts, and real lines, are drawn without replacement; the same call writes the same bytes.

    Parameters
    ----------
    root : path of the store
    run : whose rollouts are drawn
    lines : of the file; by default as many as there are rollouts
    real, real_share : JSONL of training data, and the share of the lines that are its
    form : text, prompt and rollout as one; or completion, so that the rollout alone is learnt

    Raises
    ------
    ConflictError
        ``out`` is there and holds something else.
    DataError
        Fewer rollouts or real lines than are drawn, or rollouts stored without their texts.
    StoreError, UsageError
        No such run; impossible settings.
    """
    root, out = store.require(root), Path(out)
    if (real is None) != (real_share is None):
        raise UsageError("--real and --real-share: give both, a file and the share of its lines")
    if real_share is not None and not 0 < real_share <= 1:
        raise UsageError(f"--real-share {real_share}: needs more than 0 and at most 1")
    if lines is not None and lines < 1:
        raise UsageError(f"--lines {lines}: needs at least 1")
    if form not in FORMS:
        raise UsageError(f"--form {form}: one of {', '.join(FORMS)}")
    store.complete_runs(root, [run])  # else it says that there is none of this name
    model_id, rollouts = _rollouts(root, run)
    lines = lines or len(rollouts)
    n_real = round(lines * (real_share or 0.0))
    rng = random.Random(seed)
    drawn = _drawn(rng, rollouts, lines - n_real, f"run {run}", "rollouts")
    empty = sum(not (text if form == "completion" else prompt + text) for prompt, text in drawn)
    if empty:
        hint = "take --form text, or " if form == "completion" else ""
        raise DataError(
            f"run {run}: {empty} of the rollouts drawn hold no text, which no line of training data can "
            f"be; {hint}draw others with --seed or fewer with --lines"
        )
    chosen = [_line(prompt, text, form) for prompt, text in drawn]
    behind: dict[str, Any] = {}
    if real is not None:
        digest = store.sha256(Path(real))
        rows = treatments.datasets(root)
        behind = next((row for row in rows if row["data_sha256"] == digest), {})
        records = [record for _, record in read_records(Path(real))]
        chosen += [json.dumps(each) for each in _drawn(rng, records, n_real, str(real), "lines")]
    rng.shuffle(chosen)
    write_once(out, "".join(f"{line}\n" for line in chosen).encode())
    # of a file that a model of the study wrote, too, what it is known to be
    real_part = n_real / lines * (1.0 if behind.get("real") is None else behind["real"])
    replayed = n_real / lines * (behind.get("replayed") or 0.0)
    row = {
        "data_sha256": store.sha256(out),
        "name": out.stem,
        "lines": lines,
        "method": "mixed" if n_real else "rollouts",
        "generator": model_id,
        "generation": 1 + max(generation_of(root, model_id), behind.get("generation") or 0),
        "real": real_part,
        "replayed": replayed,
        "generated": 1 - real_part - replayed,
        "source": f"run {run}",
    }
    treatments.add_dataset(root, row)
    sql.write_database(root)
    return row


def _rollouts(root: Path, run: str) -> tuple[str, list[tuple[str, str]]]:
    """The model of a run, and prompt and text of each of its rollouts, by prompt and sample."""
    with sql.connect(root, relations=()) as con:
        of_run = con.sql("select model_id from runs where run_id = $run", params={"run": run})
        ((model_id,),) = of_run.fetchall()
        rows = con.sql(
            "select p.text, r.text, p.messages from rollouts r join prompts p using (task, prompt_id) "
            "where r.run_id = $run order by r.prompt_id, r.sample",
            params={"run": run},
        ).fetchall()
    if any(messages is not None for *_, messages in rows):
        raise DataError(
            f"run {run}: its prompts are conversations, and a line here is a prompt's text with a "
            "rollout; draw from a run whose prompts are texts"
        )
    if any(None in row[:2] for row in rows):
        raise DataError(
            f"run {run}: its texts were left out when it was exported; pull a folder that has them"
        )
    return model_id, [(prompt, text) for prompt, text, _ in rows]


def _line(prompt: str, text: str, form: str) -> str:
    whole = {"text": prompt + text} if form == "text" else {"prompt": prompt, "completion": text}
    return json.dumps(whole)


def _drawn(rng: random.Random, all_of_them: list[Any], number: int, where: str, what: str) -> list[Any]:
    if number > len(all_of_them):
        raise DataError(
            f"{where}: {len(all_of_them)} {what}, and {number} are to be drawn; lower --lines"
        )
    return rng.sample(all_of_them, number)


def generation_of(root: Path, model_id: str) -> int:
    """Generations of models behind the data that a checkpoint was trained on; 0 where none is known."""
    data = store.models(root).get(model_id, {}).get("data_sha256")
    known = (row["generation"] for row in treatments.datasets(root) if row["data_sha256"] == data)
    return next(known, None) or 0
