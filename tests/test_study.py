"""A study of one file: the commands it stands for, and that they are run, again and again, one end."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from stores import refused
from tiny import save_tiny

import canopy_store

STUDY = """
family = "llama"
seeds = [3, 5]
[arms.sft]
parent = "base"
finetune = { data = "{arm}/sft.jsonl", steps = 64 }
[arms.base]
model = "./base"
[arms.further]
parent = "sft"
finetune = { data = "{sft}.jsonl", replay_of = "x" }
[arms.icl]
parent = "base"
context = "facts.txt"
[[ask]]
options = { task = "facts", items = "facts.jsonl" }
arms = ["base", "icl", "further"]
[[ask]]
embed = { embedder = "package:e", run = ["a", "b"] }
[[answer]]
compare = { metric = ["ce_star", "vendi_score"], baseline = "base" }
[[answer]]
sql = { query = "from option_accuracy" }
""".replace(', replay_of = "x"', "")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "study.toml"
    path.write_text(STUDY)
    return path


def planned(canopy, file: Path, *options: str) -> list[list[str]]:
    code, out, err = canopy("study", "run", file, "--dry-run", *options)
    assert (code, err) == (0, "")
    first, *lines = out.splitlines()
    assert first == f"cd {shlex.quote(str(file.parent))}"
    return [shlex.split(line) for line in lines]


def option(line: list[str], name: str) -> str | None:
    return line[line.index(f"--{name}") + 1] if f"--{name}" in line else None


def test_arms_become_commands_in_order_a_checkpoint_a_seed(file, canopy):
    lines = planned(canopy, file)
    assert [" ".join(line[1:3]) for line in lines] == [
        "ingest options",  # of base
        "ingest finetune",
        "ingest finetune",
        "ingest options",  # of icl
        "ingest finetune",
        "ingest options",
        "ingest finetune",
        "ingest options",
        "ingest embed",
        "compare --store",
        "sql --store",
    ]
    of = {}
    for line in lines:
        of.setdefault((line[2], option(line, "variant")), line)
    assert option(of["options", "base"], "model") == "./base"
    assert option(of["options", "base"], "context") is None
    assert option(of["options", "icl"], "model") == "./base"
    assert option(of["options", "icl"], "context") == "facts.txt"
    trained = of["finetune", "further-5"]
    assert option(trained, "model") == "models/sft-5"
    assert option(trained, "out") == "models/further-5"
    assert option(trained, "parent") == "llama/sft-5"
    assert option(trained, "data") == "sft-5.jsonl"
    assert option(trained, "seed") == "5"
    assert option(of["finetune", "sft-3"], "data") == "sft-3/sft.jsonl"
    assert option(of["options", "further-3"], "model") == "models/further-3"
    assert lines[-3].count("--run") == 2
    assert "--seeds" not in lines[-2]  # nothing was asked that ce_star is of
    assert lines[-1] == ["canopy", "sql", "--store", "store", "from option_accuracy"]


def test_an_answer_takes_the_seeds_of_the_arms_that_were_asked_for_what_it_compares(file, canopy):
    """By their names: a pattern would take arms whose names begin alike, and other number formats."""
    more = """
[arms.sft-long]
parent = "base"
finetune = { data = "sft.jsonl", steps = 128 }
[[ask]]
options = { task = "facts", items = "facts.jsonl" }
arms = ["base", "sft", "sft-long"]
[[ask]]
documents = { corpus = "c", documents = "c.jsonl" }
arms = ["base", "sft"]
[[answer]]
compare = { metric = "accuracy_sum" }
[[answer]]
compare = { unit = "document" }
[[answer]]
compare = { unit = "item", metric = "nll" }
"""
    file.write_text(STUDY.split("[[ask]]")[0] + more)
    refused(canopy("study", "run", file), 1, "answer 3: compare", "nll is of documents")
    file.write_text(file.read_text().replace(', metric = "nll"', ', seeds = "sft=sft-3"'))
    lines = [line for line in planned(canopy, file) if line[1] == "compare"]
    given = [[line[at + 1] for at, word in enumerate(line) if word == "--seeds"] for line in lines]
    assert given[0] == ["sft=sft-3,sft-5", "sft-long=sft-long-3,sft-long-5"]
    assert given[1:] == [["sft=sft-3,sft-5"], ["sft=sft-3"]]


def test_what_is_of_runs_is_asked_after_all_arms_by_the_checkpoint_of_another(file, canopy):
    file.write_text(
        STUDY.replace(
            "[[answer]]",
            """[[ask]]
score = { scorer = "{sft.model}", run = ["llama.{arm}.a", "llama.{arm}.b"], policy = "full" }
arms = ["further"]
[[answer]]""",
            1,
        )
    )
    lines = planned(canopy, file)
    where = [at for at, line in enumerate(lines) if line[2] == "score"]
    assert min(where) > max(at for at, line in enumerate(lines) if line[2] in ("finetune", "options"))
    told = [
        (option(lines[at], "scorer"), [w for w in lines[at] if w.startswith("llama.")]) for at in where
    ]
    assert sorted(told) == [
        ("models/sft-3", ["llama.further-3.a", "llama.further-3.b"]),
        ("models/sft-5", ["llama.further-5.a", "llama.further-5.b"]),
    ]
    assert "score" not in [line[2] for line in planned(canopy, file, "--arm", "further")]
    file.write_text(file.read_text().replace('arms = ["further"]', 'arms = ["further", "icl"]'))
    refused(canopy("study", "run", file), 1, "ask 3", "arm icl is one for all seeds", "{sft.model}")


def test_one_seed_names_no_seed_and_an_arm_alone_asks_no_answers(file, canopy):
    file.write_text(STUDY.replace("[3, 5]", "[3]"))
    lines = planned(canopy, file, "--arm", "further", "--arm", "icl")
    assert [option(line, "variant") for line in lines] == ["icl", "further", "further"]
    assert option(lines[1], "seed") == "3"
    refused(canopy("study", "run", file, "--arm", "nobody"), 2, "--arm nobody", "base")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('parent = "sft"', 'parent = "stf"', ("arms.further", "no arm 'stf'", "did you mean sft?")),
        ('model = "./base"', 'parent = "further"', ("circle", "base", "sft", "further")),
        ('"{sft}.jsonl"', '"{nobody}.jsonl"', ("arms.further", "no arm 'nobody'")),
        ("steps = 64", "stepz = 64", ("arms.sft.finetune", "did you mean steps?")),
        ("steps = 64", 'steps = "many"', ("arms.sft", "--steps", "not a valid integer")),
        ("steps = 64", "steps = 1979-05-27", ("arms.sft.finetune", "steps: needs text")),
        ("sql = {", "rm-run = {", ("answer 2", "no command 'rm-run'")),
        ('task = "facts", ', "", ("ask 1: options", "--task")),
        ("options = {", "optoins = {", ("ask 1", "no command 'optoins'", "did you mean options?")),
        ('"icl", "further"', '"icl", "nobody"', ("ask 1", "no arm 'nobody'")),
        ("[3, 5]", "[3, 3]", ("seeds", "twice")),
        ("[3, 5]", '["a"]', ("seeds", "whole numbers")),
        ('family = "llama"', "", ("needs family",)),
        ('family = "llama"', 'famly = "llama"', ("did you mean family?",)),
        ("[arms.icl]", '[arms.icl]\nmodel = "./base"', ("arms.icl", "either a model")),
        ("[arms.icl]", "[arms.icl]\nfinetune = 3", ("arms.icl.finetune", "a table of the command's")),
        ('model = "./base"', 'model = "./base"\nfinetune = { data = "x" }', ("arms.base", "a parent")),
        ("[arms.base]", "[arms.base", ("not a TOML file",)),
        ("[arms.icl]", '[arms." "]', ("arm",)),
        ("[arms.icl]", "[arms.sft-5]\nmodel = 'm'\n[arms.icl]", ("sft-5 of arm sft and", "arm sft-5")),
        ("[arms.icl]", "[arms.SFT-5]\nmodel = 'm'\n[arms.icl]", ("sft-5 of arm sft", "arm SFT-5")),
    ],
)
def test_what_is_wrong_in_a_file_is_told_before_anything_runs(file, canopy, old, new, said):
    assert old in STUDY
    file.write_text(STUDY.replace(old, new, 1))
    refused(canopy("study", "run", file), 1, *said)
    assert not (file.parent / "store").exists()


def test_a_study_is_run_and_run_again_does_nothing_anew(tmp_path, chain, canopy, monkeypatch):
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n{"text": "b c"}\n')
    (tmp_path / "d.jsonl").write_text('{"text": "a b c"}\n')
    file = tmp_path / "study.toml"
    file.write_text(
        f"""
name = "two arms"
family = "chain"
store = "s"
[arms.base]
model = {json.dumps(str(chain))}
[arms.other]
parent = "base"
[[ask]]
rollouts = {{ task = "walk", prompts = "p.jsonl", samples = 4, max_new_tokens = 8, seed = 1 }}
[[ask]]
documents = {{ corpus = "c", documents = "d.jsonl" }}
arms = ["base"]
[[answer]]
sql = {{ query = "select variant, n_rollouts from model_metrics order by 1", format = "csv" }}
"""
    )
    monkeypatch.chdir("/")
    code, out, err = canopy("study", "run", file)
    assert code == 0, err
    assert "variant,n_rollouts\nbase,8\nother,8\n" in out
    assert f"{file}: two arms is done: 4 commands, store s" in out
    assert f"[2/4] canopy ingest documents --store s --model {chain}" in err
    before = canopy_store.read(tmp_path / "s", "work").sort("kind", "run_id")
    assert canopy("study", "run", file)[0] == 0
    assert canopy_store.read(tmp_path / "s", "work").sort("kind", "run_id").equals(before)
    assert canopy_store.verify(tmp_path / "s", deep=True).is_empty()


def test_an_interrupted_study_never_trains_twice(tmp_path, canopy, monkeypatch):
    from canopy_store.ingest import finetune

    save_tiny(tmp_path / "base", 0)
    (tmp_path / "d.jsonl").write_text('{"text": "The quick brown fox"}\n')
    (tmp_path / "c.jsonl").write_text('{"document_id": "1", "text": "lazy dogs"}\n')
    file = tmp_path / "study.toml"
    file.write_text(
        """
family = "tiny"
seeds = [0, 1]
[arms.base]
model = "base"
[arms.sft]
parent = "base"
finetune = { data = "d.jsonl", steps = 2 }
[arms.half]
parent = "sft"
interpolate = { with = "{base.model}", alpha = 0.5 }
[[ask]]
documents = { corpus = "c", documents = "c.jsonl" }
[[answer]]
sql = { query = "select variant, distance from forgetting order by all", format = "csv" }
"""
    )
    real, trained = finetune._train, []

    def train(*arguments):
        trained.append(arguments)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(finetune, "_train", train)
    assert canopy("study", "run", file)[0] == 130
    code, out, err = canopy("study", "run", file)
    assert code == 0, err
    assert len(trained) == 3  # the first seed once, the second again
    shown = out[out.index("variant,distance") :].splitlines()[1:7]
    assert shown == ["half-0,1", "half-0,2", "half-1,1", "half-1,2", "sft-0,1", "sft-1,1"]
    assert canopy_store.verify(tmp_path / "store", deep=True).is_empty()
    assert set(canopy_store.read(tmp_path / "store", "training")["model_id"]) == {
        "tiny/sft-0",
        "tiny/sft-1",
    }


def test_what_a_study_takes_is_foretold_from_work_done(tmp_path, chain, canopy):
    (tmp_path / "p.jsonl").write_text('{"text": "a"}\n{"text": "b c"}\n{"text": "d"}\n')
    file = tmp_path / "study.toml"
    file.write_text(
        f"""
family = "chain"
[arms.base]
model = {json.dumps(str(chain))}
[arms.other]
parent = "base"
[[ask]]
rollouts = {{ task = "walk", prompts = "p.jsonl", samples = 40, max_new_tokens = 30 }}
"""
    )

    def foretold(*options):
        code, out, err = canopy("study", "run", file, "--estimate", "--format", "json", *options)
        assert (code, err) == (0, "")
        (row,) = json.loads(out)
        return row

    before = foretold()
    assert before == {
        "command": "rollouts",
        "commands": 2,
        "rows": 2 * 3 * 40,
        "tokens": 2 * 3 * 40 * 30,  # at most
        "bytes": None,
        "hours": None,
    }
    assert "not known of rollouts" in canopy("study", "run", file, "--estimate")[1]
    assert not (tmp_path / "store").exists()
    assert canopy("study", "run", file)[0] == 0
    row = foretold("--speeds", tmp_path / "store")
    assert row == foretold()  # the study's own store
    stored = canopy_store.read(tmp_path / "store", "runs")
    work = canopy_store.read(tmp_path / "store", "work")
    assert row["tokens"] == pytest.approx(stored["n_tokens"].sum(), abs=1)
    assert row["hours"] == pytest.approx(work["seconds"].sum() / 3600, abs=1e-3)
    size = sum(path.stat().st_size for path in (tmp_path / "store" / "rollouts").rglob("*.parquet"))
    assert row["bytes"] == pytest.approx(size, rel=1e-6, abs=1)
    # scored are the runs that are named, and without names all
    ask = '[[ask]]\nscore = { scorer = "base"'
    for named, rows in (("", 240), (', run = "chain.other.walk"', 120)):
        with_scores = file.read_text().split("[[ask]]\nscore")[0] + f"{ask}{named} }}\n"
        file.write_text(with_scores)
        out = canopy("study", "run", file, "--estimate", "--format", "json")[1]
        scored = json.loads(out)[1]
        assert (scored["command"], scored["rows"]) == ("score", rows)
        assert scored["tokens"] == pytest.approx(stored["n_tokens"].sum() * rows / 240, abs=1)
    refused(canopy("study", "run", file, "--speeds", tmp_path), 2, "--speeds", "--estimate")


def test_what_augmenting_takes_is_foretold_too(tmp_path, chain, canopy):
    (tmp_path / "told.txt").write_text("{line}")
    walks = [f"{a} {b}" for a in "abcd" for b in "efg"]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": walk}) + "\n" for walk in walks))
    file = tmp_path / "study.toml"
    file.write_text(
        f"""
family = "chain"
[arms.base]
model = {json.dumps(str(chain))}
[arms.local]
parent = "base"
[arms.local.augment]
method = "local"
data = "d.jsonl"
instruction = "told.txt"
out = "{{arm}}.jsonl"
samples = 3
max-new-tokens = 40
temperature = 1.0
[arms.again]
parent = "base"
[arms.again.augment]
method = "local"
data = "{{local}}.jsonl"
instruction = "told.txt"
out = "{{arm}}.jsonl"
samples = 2
max-new-tokens = 40
temperature = 1.0
[[ask]]
reward = {{ reward-model = "r" }}
"""
    )

    def foretold(*options):
        code, out, err = canopy("study", "run", file, "--estimate", "--format", "json", *options)
        assert (code, err) == (0, "")
        return {row["command"]: row for row in json.loads(out)}

    # what the second starts from is not written yet, and a reward is of its answers too
    nothing = dict.fromkeys(("rows", "tokens", "bytes", "hours"))
    before = foretold()
    assert before["augment"] == {"command": "augment", "commands": 2, **nothing}
    assert before["reward"] == {"command": "reward", "commands": 1, **nothing}
    told = canopy("study", "run", file, "--estimate")[1]
    assert "not known of augment, reward: starts from a file that the study has yet to write" in told
    only = foretold("--arm", "local")["augment"]
    assert (only["rows"], only["tokens"], only["hours"]) == (12 * 3, 12 * 3 * 40, None)

    file.write_text(file.read_text().split("[[ask]]")[0])
    assert canopy("study", "run", file)[0] == 0
    lines = len((tmp_path / "local.jsonl").read_text().splitlines())
    after = foretold()["augment"]
    runs, work = (canopy_store.read(tmp_path / "store", name) for name in ("runs", "work"))
    assert set(runs["task"]) == {"augment-local-d", "augment-local-local"}
    assert after["rows"] == runs["n_rollouts"].sum() == 12 * 3 + lines * 2
    assert after["tokens"] == pytest.approx(runs["n_tokens"].sum(), abs=1)
    assert after["hours"] == pytest.approx(work["seconds"].sum() / 3600, abs=1e-3)
    (tmp_path / "d.jsonl").unlink()
    refused(canopy("study", "run", file, "--estimate"), 1, "d.jsonl")


def test_a_command_that_fails_ends_the_study_with_its_line(tmp_path, chain, canopy):
    file = tmp_path / "study.toml"
    file.write_text(
        f"""
family = "chain"
[arms.base]
model = {json.dumps(str(chain))}
[[ask]]
rollouts = {{ task = "walk", prompts = "none.jsonl" }}
"""
    )
    code, _, err = canopy("study", "run", file)
    assert code in (1, 2)
    assert err.splitlines()[-1].startswith("canopy: ")
    assert "none.jsonl" in err.splitlines()[-1]


def test_the_studies_that_ship_are_studies(tmp_path, canopy):
    code, out, _ = canopy("study", "list")
    assert code == 0
    names = [line.split()[0] for line in out.splitlines()]
    assert "conveyance" in names
    for name in names:
        code, text, _ = canopy("study", "show", name)
        assert code == 0
        (tmp_path / f"{name}.toml").write_text(text)
        assert planned(canopy, tmp_path / f"{name}.toml")
    refused(canopy("study", "show", "nothing"), 2, "no such study", "conveyance")
