"""What is asked of the sources beside the package: the tests' own, and the scripts that no test runs."""

from __future__ import annotations

import ast
import inspect
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
        if module == "canopy_store.ingest.kernels":  # of Triton, which is where there is a GPU
            continue
        there = f"{module}.{name}" == "canopy_store.ingest.kernels"
        there = there or hasattr(import_module(module), name) or is_module(f"{module}.{name}")
        assert there, f"{module} has no {name}"


def misfitting(path: Path) -> Iterator[str]:
    """Each call of a function of the package in a script that does not fit the function's parameters."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = {}
    for module, name in taken(path):
        function = getattr(import_module(module), name, None)
        if inspect.isfunction(function):
            functions[name] = functions[f"{module.split('.')[-1]}.{name}"] = function
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = functions.get(ast.unparse(call.func))
        unpacked = any(isinstance(given, ast.Starred) for given in call.args)
        if function and not unpacked and all(keyword.arg for keyword in call.keywords):
            try:
                inspect.signature(function).bind(
                    *call.args, **{str(keyword.arg): keyword.value for keyword in call.keywords}
                )
            except TypeError as error:
                yield f"line {call.lineno}: {ast.unparse(call.func)}: {error}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_a_script_calls_of_the_package_takes_its_arguments(path):
    assert list(misfitting(path)) == []


def test_arguments_that_are_gone_are_noticed(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from canopy_store import store\nfrom canopy_store.store import complete_run\n"
        "store.complete_run(1, 2, 3)\nstore.complete_run(1, 2, 3, 4, 5)\ncomplete_run(*given)\n"
        "complete_run(1, 2, 3, 4, prompts=5)\ncomplete_run(1, 2, 3, 4, 5, rows=6)\n"
    )
    assert sorted(line.split(":")[0] for line in misfitting(script)) == ["line 3", "line 7"]


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
