"""What is asked of the sources beside the package: the tests' own, and the scripts that no test runs."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SCRIPTS = sorted(
    p for part in ("benchmarks", "demo", "docs") for p in (TESTS.parent / part).glob("*.py")
)


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


def taken(path: Path) -> Iterator[tuple[str, str]]:
    """Each name that a script takes of the package or of a module of it, after that module."""
    modules, tree = {"canopy_store": "canopy_store"}, ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("canopy_store"):
            for alias in node.names:
                yield str(node.module), alias.name
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = modules.get(node.value.id)
            if module and is_module(module):
                yield module, node.attr


def is_module(name: str) -> bool:
    """Whether a module of this name can be imported."""
    try:
        import_module(name)
    except ModuleNotFoundError:
        return False
    return True


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_a_script_takes_of_the_package_is_there(path):
    """A name that is moved must be moved in the scripts, too: no test runs most of them."""
    for module, name in taken(path):
        there = hasattr(import_module(module), name) or is_module(f"{module}.{name}")
        assert there, f"{module} has no {name}"


def test_names_that_are_gone_are_noticed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import canopy_store\nfrom canopy_store import store\nfrom canopy_store.schema import TABLES\n"
        "store.gone()\nTABLES.values()\ncanopy_store.read\n"
    )
    assert sorted(taken(script)) == [
        ("canopy_store", "read"),
        ("canopy_store", "store"),
        ("canopy_store.schema", "TABLES"),
        ("canopy_store.store", "gone"),
    ]
