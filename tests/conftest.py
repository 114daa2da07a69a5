"""Small real models, saved as safetensors and loaded by the real loader; and the command line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from chain import save_chain

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Files of few and slow tests, begun first so that no process is left alone with one at the end.
SLOW = ("test_docs", "test_crash", "test_executors", "test_object_storage", "test_wheel", "test_views")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem not in SLOW)


@pytest.fixture(scope="session")
def chain(tmp_path_factory) -> Path:
    """The folder of the Markov chain model."""
    return save_chain(tmp_path_factory.mktemp("chain"))


@pytest.fixture
def canopy(capfd):
    """Calls the command line: (exit code, stdout, stderr)."""
    from canopy_store.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call
