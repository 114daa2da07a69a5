"""Plans: the settings that a job began with, and that a resumed one must repeat."""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from canopy_store.errors import ConflictError, DataError, differences
from canopy_store.store.files import create_json, exists, matching, read_json
from canopy_store.store.layout import now, plan_path, same_but_case, unquoted


def plan(
    root: Path, kind: str, name: str, settings: Mapping[str, Any], yielding: Iterable[str] = ()
) -> dict[str, Any]:
    """The settings recorded for the job of this name: these, where it was not begun before.

    Of several jobs that begin at once one records its settings. Those named in ``yielding`` give way
    to the recorded ones; the others must be the same.

    Raises
    ------
    ConflictError
        It was begun with other settings, each of which the message names; or a name that differs
        from this one by case alone is taken.
    """
    path = plan_path(root, kind, name)
    given = json.loads(json.dumps(settings))
    if not exists(path):
        require_own_name(kind, name, (planned for planned, _ in plans(root, kind)))
        create_json(path, {"settings": given, "started_at": now().isoformat()})
    stored = read_plan(path)["settings"]
    given.update({key: stored[key] for key in yielding if key in stored})
    if stored != given:
        option = "--run" if kind == "run" else "--name"
        raise ConflictError(
            f"{kind} {name} is stored with other settings: {differences(stored, given)}; "
            f"repeat the stored ones to resume, or give it another name with {option}"
        )
    return stored


def require_own_name(kind: str, name: str, taken: Iterable[str]) -> None:
    """Raises ConflictError for a name that some disks cannot tell from one that is taken."""
    for other in taken:
        if same_but_case(name, other):
            raise ConflictError(
                f"{kind} {name}: {other} is stored, and some disks cannot tell the two apart; give it "
                "a name that differs by more than case"
            )


def plans(root: Path, kind: str) -> list[tuple[str, Path]]:
    """Name and file of each plan of a kind, in name order."""
    paths = matching(root / "plans", f"{kind}=*.json")
    return [(unquoted(path.stem.removeprefix(f"{kind}=")), path) for path in paths]


def read_plan(path: Path) -> dict[str, Any]:
    """A job's recorded settings and start."""
    try:
        recorded = read_json(path)
        return {
            "settings": dict(recorded["settings"]),
            "started_at": datetime.datetime.fromisoformat(recorded["started_at"]),
        }
    except (ValueError, KeyError, TypeError, DataError):
        raise DataError(f"{path}: not a readable plan; remove it and run the job again") from None
