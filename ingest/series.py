"""A series of checkpoints along one training: their folders, their steps, and rollouts of each.

Each is a model of its own, whose variant is SERIES@STEP: every view, comparison and export takes it as
any other, and ``series`` and ``step`` in ``models`` say which belong together.
"""

from __future__ import annotations

import gc
import glob
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from canopy_store import store
from canopy_store.errors import DataError, StoreError
from canopy_store.ingest.progress import Progress
from canopy_store.ingest.sources import check_model


@dataclass(frozen=True)
class Step:
    """A checkpoint of a series: its folder, steps done, and tokens trained on where that is known."""

    folder: Path
    step: int
    tokens_seen: int | None


def is_pattern(model: str) -> bool:
    """Whether ``model`` names several folders by a pattern: one in which *, ? or [ stands."""
    return glob.has_magic(model) and not Path(model).expanduser().exists()


def step_variant(series: str, step: int) -> str:
    """The variant of a series' checkpoint."""
    return f"{series}@{step}"


def find_steps(pattern: str) -> list[Step]:
    """The checkpoints whose folders match a pattern, by their steps.

    The step is ``global_step`` of the folder's trainer_state.json, else the number at the end of its
    name, as in checkpoint-500.

    Raises
    ------
    StoreError
        No folder matches, or one holds no model.
    DataError
        A folder that tells no step, or two of one step; names them.
    """
    folders = [Path(each) for each in sorted(glob.glob(str(Path(pattern).expanduser())))]
    steps: dict[int, Step] = {}
    for folder in folders:
        if not folder.is_dir():
            continue
        found = _step(folder)
        if found.step in steps:
            raise DataError(
                f"--model {pattern}: {steps[found.step].folder} and {folder} are both of step "
                f"{found.step}; name one of them, or a pattern that leaves one out"
            )
        check_model(folder)
        steps[found.step] = found
    if not steps:
        raise StoreError(f"--model {pattern}: no folder matches; name those of the checkpoints")
    return [steps[step] for step in sorted(steps)]


def read_object(path: Path) -> dict[str, Any]:
    """What a JSON file beside a checkpoint's weights holds; empty where there is none."""
    if not path.is_file():
        return {}
    found = store.read_json(path)
    if not isinstance(found, dict):
        raise DataError(f"{path}: holds no JSON object; take it from a copy")
    return found


def count_of(value: Any) -> int | None:
    """A count as trainer_state.json has it; None where it is none."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value < 2**63 else None


def _step(folder: Path) -> Step:
    state = read_object(folder / "trainer_state.json")
    step = count_of(state.get("global_step"))
    if step is None:
        named = re.search(r"(\d{1,18})$", folder.name)
        if named is None:
            raise DataError(
                f"{folder}: tells no step: no global_step in a trainer_state.json, and no number at the "
                "end of its name, as in checkpoint-500"
            )
        step = int(named[1])
    # 0 where the trainer was not told to count
    return Step(folder, step, count_of(state.get("num_input_tokens_seen")) or None)


def ingest_series(root: str | Path, model: str, **options: Any) -> list[str]:
    """The ids of the runs of a series, a run a checkpoint, whose missing shards are now stored.

    Called again after a break, or once there are more checkpoints, it samples only what is missing.

    Parameters
    ----------
    root : path of the store, made if missing
    model : pattern of the checkpoints' folders, as of `find_steps`
    options : as of `canopy_store.ingest.rollouts.ingest_rollouts`; ``variant`` names the series, and a
        ``run`` that is given gets the step behind its name

    Raises
    ------
    As of `find_steps` and `ingest_rollouts`.
    """
    steps = find_steps(model)
    from canopy_store.ingest.rollouts import ingest_rollouts

    series, run = options.pop("variant"), options.pop("run", None)
    progress = options.pop("progress", None) or Progress()
    runs = []
    for number, each in enumerate(steps):
        runs.append(
            ingest_rollouts(
                root,
                str(each.folder),
                variant=step_variant(series, each.step),
                series=series,
                step=each.step,
                tokens_seen=each.tokens_seen,
                run=None if run is None else step_variant(run, each.step),
                progress=_Part(progress, number, len(steps)),
                **options,
            )
        )
        gc.collect()  # the model of one is gone before that of the next comes
    return runs


class _Part(Progress):
    """The progress of a checkpoint as that of its series, in which each has as many rollouts."""

    def __init__(self, whole: Progress, number: int, of: int) -> None:
        self.whole, self.number, self.of = whole, number, of
        self.tokens, self.rollouts, self.say = whole.tokens, whole.rollouts, whole.say  # type: ignore

    def start(self, rollouts: int, done: int) -> None:
        self.whole.start(rollouts * self.of, rollouts * self.number + done)
