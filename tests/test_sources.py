"""What is asked of the tests' own sources."""

from __future__ import annotations

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def imported_modules(path: Path) -> set[str]:
    """The first name of every module that a file imports, at its top or inside a function."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
    return modules


def test_no_test_file_imports_another():
    """What two of them need stands in chain.py or stores.py."""
    closed = {path.stem for path in TESTS.glob("test_*.py")} | {"conftest"}
    offending = {
        (path.name, module)
        for path in TESTS.glob("*.py")
        for module in imported_modules(path) & (closed - {path.stem})
    }
    assert offending == set()
    # and what is shared is found by the same reading
    assert {"chain", "stores"} <= imported_modules(TESTS / "test_score.py")
