"""Views at a common cap: `model_metrics_at(horizon)` shows model_metrics as if every rollout had been
cut at its first `horizon` tokens.

Sums are taken anew from the stored steps. A rollout that its own run cut earlier cannot be made longer:
a horizon above a run's max_new_tokens is that of a run with a lower cap, and nobody's measure.
"""

from __future__ import annotations

import re

# Of these a file of SQL says what a cut makes of them; the others are their own texts over these.
CUT = ("selected_rollouts", "embedding_spectra", "runs")
AT_HORIZON = (
    *CUT,
    "rollout_metrics",
    "prompt_metrics",
    "model_metrics",
    "ce_star_decomposition",
    "panel",
    "logging_check",
    "stop_check",
    "truncation",
)
# Of these a macro NAME_by(patterns) tells tokens apart by patterns of one's own, as token_type_by does.
BY_PATTERNS = ("token_type_contributions",)
_READ = re.compile(rf"\b(from|join) ({'|'.join(AT_HORIZON)})\b")


def file_at(name: str) -> str:
    """The name of the file of SQL that the macro of a relation is made of."""
    return f"{name}_at" if name in CUT else name


def macro_at(name: str, text: str) -> str:
    """The statement that makes a relation's macro, of the text of its file."""
    if name not in CUT:
        text = _READ.sub(r"\1 \2_at(horizon)", text)
    return f"create or replace macro {name}_at(horizon) as table\n{text.rstrip()}"


def macro_by(name: str, text: str) -> str:
    """The statement that makes a relation's macro by patterns, of the text of its file."""
    text = text.replace("token_type(token)", "token_type_by(token, patterns)")
    return f"create or replace macro {name}_by(patterns) as table\n{text.rstrip()}"
