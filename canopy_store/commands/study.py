"""The commands ``canopy study``: arms, seeds and questions of one file, as commands that answer them.

A study is a list of lines that could be typed by hand. Nothing is kept of how far it came: each line
resumes by itself, and finds what is done already in the store.
"""

from __future__ import annotations

import contextlib
import difflib
import graphlib
import re
import shlex
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import click
import duckdb
import polars as pl

from canopy_store import store
from canopy_store.commands.estimate import estimate
from canopy_store.commands.shared import FORMAT, echo, print_rows
from canopy_store.errors import CanopyError, DataError, UsageError
from canopy_store.store.layout import same_but_case

_MOST_BYTES = 1 << 20  # of a study file
_KEYS = {"name", "family", "store", "models", "seeds", "arms", "ask", "answer"}
_OF_AN_ARM = {"model", "parent", "context"}
# Beside the jobs of `canopy ingest`: a study may be somebody else's, and none of these removes a thing.
_ANSWERS = ("compare", "power", "regress", "report", "sql", "status", "verify", "export")


@dataclass(frozen=True)
class Line:
    """A command as it would be typed: its words after ``canopy``, and what these are read as."""

    words: tuple[str, ...]
    options: Mapping[str, Any]

    @property
    def step(self) -> str:
        """The command's own name."""
        return self.words[1 if self.words[0] == "ingest" else 0]

    def __str__(self) -> str:
        return shlex.join(("canopy", *self.words))


@dataclass(frozen=True)
class _Arm:
    """A variant of one seed: a checkpoint, perhaps in a context."""

    name: str
    seed: int | None
    variant: str
    model: str
    parent: str | None
    context: str | None


class Study:
    """A study file that has been checked: its arms, in an order in which each parent comes first.

    Parameters
    ----------
    path : the file
    commands : the command line, whose commands and options the file's tables name

    Raises
    ------
    DataError
        It is no such file: names the table and what is wrong in it.
    """

    def __init__(self, path: Path, commands: click.Group) -> None:
        self.path = path
        self.commands = commands
        ingest = commands.commands["ingest"]
        assert isinstance(ingest, click.Group)
        self.ingest = ingest
        read = _toml(path)
        self._known(read, _KEYS, "the file")
        self.family = self._text(read, "family", "the file")
        self.name = str(read.get("name", path.stem))
        self.store = str(read.get("store", "store"))
        self.models = str(read.get("models", "models"))
        self.seeds = read.get("seeds", [0])
        if not (isinstance(self.seeds, list) and self.seeds and all(type(s) is int for s in self.seeds)):
            self._fail("seeds", "needs a list of whole numbers, as in [0, 1, 2]")
        if len(set(self.seeds)) < len(self.seeds):
            self._fail("seeds", "one of them is there twice")
        self.arms = self._arms(read.get("arms"))
        self.asked = self._steps(read.get("ask", []), "ask")
        self.answers = self._steps(read.get("answer", []), "answer")
        self._seeded: dict[str, bool] = {}
        for name in self._in_order():
            self._seeded[name] = self._takes_seed(name)
        taken: dict[str, str] = {}
        for name in self.arms:
            for seed in self.seeds if self._seeded[name] else [None]:
                variant = self.variant(name, seed)
                try:
                    store.check_name("arm", variant)
                except UsageError as error:
                    self._fail("arms", str(error))
                for other, arm in taken.items():
                    if other == variant or same_but_case(other, variant):
                        told = f"{other} of arm {arm} and {variant} of arm {name}"
                        self._fail("arms", f"{told}: one name, on some disks; give one arm another")
                taken[variant] = name

    # ------------------------------------------------------------ what the file says

    def _fail(self, where: str, what: str) -> Any:
        raise DataError(f"{self.path}: {where}: {what}")

    def _known(self, table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
        known = sorted(known)
        for key in table:
            if key not in known:
                self._fail(where, f"no {key!r} here; {_hint(key, known)}")

    def _text(self, table: Mapping[str, Any], key: str, where: str) -> str:
        value = table.get(key)
        if not isinstance(value, str) or not value:
            self._fail(where, f'needs {key} = "…"')
        return str(value)

    def _arms(self, arms: Any) -> dict[str, dict[str, Any]]:
        if not isinstance(arms, dict) or not arms:
            self._fail("the file", 'needs arms: [arms.base] and model = "…", for a start')
        steps = set(self.ingest.commands)
        for name, arm in arms.items():
            where = f"arms.{name}"
            if not isinstance(arm, dict):
                self._fail(where, "needs to be a table")
            self._known(arm, _OF_AN_ARM | steps, where)
            if ("model" in arm) == ("parent" in arm):
                self._fail(where, "needs either a model, a checkpoint that is there, or a parent")
            for key in _OF_AN_ARM & arm.keys():
                self._text(arm, key, where)
            makes = [step for step in arm if self._makes(step)]
            if len(makes) > 1:
                self._fail(
                    where, f"{makes[0]} and {makes[1]}: an arm has one treatment; make two arms of it"
                )
            if makes and "model" in arm:
                self._fail(
                    where, f"{makes[0]} needs a parent, which is another arm, in place of a model"
                )
            for step in arm.keys() - _OF_AN_ARM:
                self._options(step, arm[step], f"{where}.{step}")
        for name, arm in arms.items():
            for other in self._needs(arm):
                if other not in arms:
                    hint = _hint(other, arms)
                    self._fail(f"arms.{name}", f"no arm {other!r} to come from; {hint}")
        return arms

    def _steps(self, steps: Any, key: str) -> list[tuple[str, dict[str, Any], list[str] | None]]:
        """Command, options and arms of each table ``[[key]]``."""
        if not isinstance(steps, list):
            self._fail(key, f"needs tables [[{key}]]")
        found = []
        for at, step in enumerate(steps, 1):
            where = f"{key} {at}"
            if not isinstance(step, dict):
                self._fail(where, "needs to be a table")
            named = [name for name in step if name != "arms"]
            if len(named) != 1:
                self._fail(
                    where, 'needs one command and its options, as in rollouts = { task = "math" }'
                )
            arms = step.get("arms")
            if arms is not None:
                if not isinstance(arms, list) or not arms:
                    self._fail(where, "arms needs a list of names")
                for name in arms:
                    if name not in self.arms:
                        self._fail(where, f"no arm {name!r}; {_or(self.arms)}")
            self._options(named[0], step[named[0]], where)
            found.append((named[0], step[named[0]], arms))
        return found

    def _command(self, step: str, where: str) -> tuple[tuple[str, ...], click.Command]:
        """The words of a command and the command; those of ``canopy ingest`` come first."""
        for words, group in ((("ingest",), self.ingest), ((), self.commands)):
            found = group.commands.get(step)
            if found is not None and (words or step in _ANSWERS):
                return (*words, step), found
        hint = _hint(step, [*self.ingest.commands, *_ANSWERS])
        return self._fail(where, f"no command {step!r}; {hint}")

    def _options(self, step: str, options: Any, where: str) -> None:
        """Raises unless these are options of the command, each of a type that a line can hold."""
        _, command = self._command(step, where)
        if not isinstance(options, dict):
            self._fail(where, "needs a table of the command's options, as in { steps = 64 }")
        known = _parameters(command)
        for key, value in options.items():
            option = key.replace("_", "-")
            if option not in known:
                self._fail(where, f"{step} has no option {key!r}; {_hint(option, known)}")
            for each in value if isinstance(value, list) else [value]:
                if not isinstance(each, str | int | float | bool):
                    self._fail(where, f"{key}: needs text, a number, true or false, or a list of these")

    def _makes(self, step: str) -> bool:
        """Whether a command makes a checkpoint."""
        if step in _OF_AN_ARM:
            return False
        known = _parameters(self._command(step, "arms")[1])
        # augment writes a file of data, by a checkpoint that is there
        return "out" in known and "variant" in known and known["out"].metavar == "DIR"

    # ------------------------------------------------------------ arms and seeds

    def _needs(self, arm: Mapping[str, Any]) -> set[str]:
        """The arms that one comes from: its parent, and those that its options name in braces."""
        texts = [
            each
            for step, options in arm.items()
            if step not in _OF_AN_ARM
            for value in options.values()
            for each in (value if isinstance(value, list) else [value])
            if isinstance(each, str)
        ]
        named = {name for text in texts for name in re.findall(r"\{([^{}]+)\}", text)}
        named = {name.removesuffix(".model") for name in named} - {"seed", "arm"}
        return named | ({arm["parent"]} if "parent" in arm else set())

    def _in_order(self) -> list[str]:
        sorter = graphlib.TopologicalSorter({name: self._needs(arm) for name, arm in self.arms.items()})
        try:
            return list(sorter.static_order())
        except graphlib.CycleError as error:
            return self._fail(
                "arms", f"each comes from the next in a circle: {' ← '.join(error.args[1])}"
            )

    def _takes_seed(self, name: str) -> bool:
        """Whether an arm is another one for each seed: it, or one that it comes from, draws by seed."""
        arm = self.arms[name]
        steps = [step for step in arm if step not in _OF_AN_ARM]
        draws = any("seed" in _parameters(self._command(step, name)[1]) for step in steps)
        return draws or any(self._seeded[other] for other in self._needs(arm))

    def variant(self, name: str, seed: int | None) -> str:
        """What an arm of a seed is called in the store."""
        return f"{name}-{seed}" if self._seeded[name] and len(self.seeds) > 1 else name

    def _model(self, name: str, seed: int | None) -> str:
        """Where an arm's checkpoint is: its own, that which is made for it, or its parent's."""
        arm = self.arms[name]
        if "model" in arm:
            return str(arm["model"])
        if any(self._makes(step) for step in arm):
            return f"{self.models}/{self.variant(name, seed)}"
        return self._model(arm["parent"], seed)

    def _context(self, name: str) -> str | None:
        """An arm's context: its own, or that of the arm whose checkpoint it shares."""
        arm = self.arms[name]
        if "context" in arm or "model" in arm or any(self._makes(step) for step in arm):
            return arm.get("context")
        return self._context(arm["parent"])

    def every_arm(self, only: Iterable[str] = ()) -> Iterator[_Arm]:
        """The arms, each for its seeds, in an order in which what one comes from is before it."""
        only = set(only)
        for name in self._in_order():
            if only and name not in only:
                continue
            for seed in self.seeds if self._seeded[name] else [None]:
                parent = self.arms[name].get("parent")
                yield _Arm(
                    name,
                    seed,
                    self.variant(name, seed),
                    self._model(name, seed),
                    None if parent is None else self.variant(parent, seed),
                    self._context(name),
                )

    # ------------------------------------------------------------ lines

    def lines(self, only: Iterable[str] = ()) -> list[Line]:
        """Every command of the study in order; with ``only``, those of these arms alone.

        Raises
        ------
        DataError
            A command lacks an option, or refuses what it is given.
        """
        found = []
        for arm in self.every_arm(only):
            for step in self.arms[arm.name]:
                if step not in _OF_AN_ARM:
                    options = self.arms[arm.name][step]
                    found.append(self._line(step, options, f"arms.{arm.name}", arm, by_parent=True))
            for at, (step, options, arms) in enumerate(self.asked, 1):
                if self._is_of_an_arm(step) and (arms is None or arm.name in arms):
                    found.append(self._line(step, options, f"ask {at}", arm))
        if only:
            return found
        for at, (step, options, arms) in enumerate(self.asked, 1):
            if not self._is_of_an_arm(step):
                # after every arm, so that one may be asked by the checkpoint of another
                of_arms = [None] if arms is None else list(self.every_arm(arms))
                found += [self._line(step, options, f"ask {at}", each) for each in of_arms]
        for at, (step, options, _) in enumerate(self.answers, 1):
            found.append(self._line(step, options, f"answer {at}", None))
        return found

    def _compared(self, options: Mapping[str, Any], where: str) -> list[str]:
        """The arms that were asked for what an answer compares: rollouts, options or documents."""
        from canopy_store.analysis.unit_rows import unit_of  # slow to import

        metrics = options.get("metric", [])
        named = [str(each) for each in (metrics if isinstance(metrics, list) else [metrics])]
        try:
            unit = unit_of(named, options.get("unit"))
        except UsageError as error:
            return list(self._fail(where, str(error)))
        job = {"prompt": "rollouts", "item": "options", "document": "documents"}[unit]
        asked = [arms for step, _, arms in self.asked if step == job]
        own = {name for name, arm in self.arms.items() if job in arm}
        return [
            name
            for name in self.arms
            if name in own or any(arms is None or name in arms for arms in asked)
        ]

    def _is_of_an_arm(self, step: str) -> bool:
        return "variant" in _parameters(self._command(step, "ask")[1])

    def _line(
        self,
        step: str,
        options: Mapping[str, Any],
        where: str,
        arm: _Arm | None,
        by_parent: bool = False,
    ) -> Line:
        """One command; ``by_parent``: what it writes is made by the arm's parent, not by the arm."""
        words, command = self._command(step, where)
        known = _parameters(command)
        given = {
            key.replace("_", "-"): self._filled(value, where, arm) for key, value in options.items()
        }
        of_study: dict[str, Any] = {"store": self.store}
        if arm is not None:
            of_study |= {"model": arm.model, "family": self.family, "variant": arm.variant}
            by_parent = by_parent and arm.parent is not None and "out" in known
            if by_parent:
                of_study["model"] = self._model(self.arms[arm.name]["parent"], arm.seed)
            if self._makes(step):
                of_study["out"] = arm.model
            elif by_parent:
                of_study["variant"] = arm.parent
            if arm.parent is not None and of_study["variant"] == arm.variant:
                of_study["parent"] = f"{self.family}/{arm.parent}"
            if arm.seed is not None:
                of_study["seed"] = arm.seed
            if arm.context is not None:
                of_study["context"] = arm.context
        elif "seeds" in known and len(self.seeds) > 1:
            of_study["seeds"] = [
                f"{name}={','.join(self.variant(name, seed) for seed in self.seeds)}"
                for name in self._compared(given, f"{where}: {step}")
                if self._seeded[name]
            ]
        given = {**{key: value for key, value in of_study.items() if key in known}, **given}
        found = list(words)
        last: list[str] = []
        for key, value in given.items():
            parameter = known[key]
            if isinstance(parameter, click.Argument):
                last += [str(each) for each in (value if isinstance(value, list) else [value])]
            elif isinstance(value, bool) and parameter.is_flag:  # type: ignore[attr-defined]
                if value or parameter.secondary_opts:
                    found.append(f"--{key}" if value else parameter.secondary_opts[0])
            else:
                for each in value if isinstance(value, list) else [value]:
                    found += [f"--{key}", str(each)]
        found += last
        try:
            with command.make_context(" ".join(words), found[len(words) :]) as context:
                return Line(tuple(found), context.params)
        except (click.ClickException, CanopyError) as error:
            said = error.format_message() if isinstance(error, click.ClickException) else str(error)
            return self._fail(f"{where}: {step}", " ".join(said.split()).rstrip("."))

    def _filled(self, value: Any, where: str, arm: _Arm | None) -> Any:
        """A value with names put in: {arm} and {seed} of this arm, {other}, {other.model}."""
        if isinstance(value, list):
            return [self._filled(each, where, arm) for each in value]
        if not isinstance(value, str) or arm is None:
            return value

        def name(found: re.Match[str]) -> str:
            key = found[1]
            if key == "arm":
                return arm.variant
            if key == "seed":
                return str(self.seeds[0] if arm.seed is None else arm.seed)
            other = key.removesuffix(".model")
            if other not in self.arms:
                return str(self._fail(where, f"no arm {other!r} for {found[0]}; {_or(self.arms)}"))
            if arm.seed is None and self._seeded[other] and len(self.seeds) > 1:
                one = f"arm {arm.name} is one for all seeds, and {found[0]} another for each"
                return str(self._fail(where, f"{one}; leave {arm.name} out of arms"))
            return self._model(other, arm.seed) if key != other else self.variant(other, arm.seed)

        return re.sub(r"\{([^{}]+)\}", name, value)


def _hint(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, names := list(names), 1)
    return f"did you mean {near[0]}?" if near else _or(names)


def _or(names: Iterable[str]) -> str:
    return f"there are {', '.join(names)}"


def _parameters(command: click.Command) -> dict[str, click.Parameter]:
    """A command's long options without their dashes, and its arguments by name."""
    found: dict[str, click.Parameter] = {}
    for each in command.params:
        if isinstance(each, click.Argument):
            found[str(each.name)] = each
        for option in each.opts:
            if option.startswith("--"):
                found[option[2:]] = each
    return found


def _toml(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{path}: larger than a study file can be, 1 MiB")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; name a study file") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise DataError(f"{path}: not a TOML file: {error or 'nested too deeply'}") from None


@click.group("study")
def study_group() -> None:
    """A whole study in one file: arms, seeds, what each is asked, and the answers."""


@study_group.command("run")
@click.argument("path", metavar="STUDY.toml")
@click.option("--dry-run", is_flag=True, help="Print the commands, one a line, and run none.")
@click.option(
    "--arm",
    "only",
    multiple=True,
    metavar="NAME",
    help="Only what is of this arm, and no answers: for a job array; repeatable.",
)
@click.option("--estimate", "foretell", is_flag=True, help="Say what it will take, and run none.")
@click.option(
    "--speeds",
    metavar="DIR",
    help="With --estimate: a store of work done on the device that is meant [default: the study's].",
)
@FORMAT
def run_command(
    path: str, dry_run: bool, only: tuple[str, ...], foretell: bool, speeds: str | None, form: str
) -> None:
    """Run every command of the file STUDY.toml in order, in the file's folder.

    Each command resumes by itself, and what is done is not done again: stop the study at any time, and
    run it again to go on. Its tables are those commands' options.

    \b
    family = "llama"
    seeds = [0, 1, 2]               # a checkpoint each, NAME-0, NAME-1, NAME-2, of what draws by seed
    [arms.base]
    model = "./base"
    [arms.sft]
    parent = "base"
    finetune = { data = "sft.jsonl", steps = 64 }
    [arms.icl]
    parent = "base"                 # the same checkpoint, its options asked in a context
    context = "facts.txt"
    [[ask]]                         # of every arm, or of those in arms = ["base", "sft"]
    options = { task = "facts", items = "facts.jsonl" }
    [[ask]]                         # of runs: once for all; with arms = [...] once for each
    score = { scorer = "{base.model}", run = "llama.{arm}.math", policy = "full" }
    arms = ["sft"]
    [[answer]]
    compare = { metric = "accuracy_sum" }

    In an arm's options {arm} and {seed} are its own name and seed, {base} another arm's name in the
    store, {base.model} that arm's checkpoint.

    \b
    Examples:
      canopy study run study.toml --dry-run
      canopy study run study.toml
      canopy study run study.toml --arm sft
      canopy study run study.toml --estimate --speeds pilot
    """
    if speeds is not None and not foretell:
        raise UsageError("--speeds: only with --estimate")
    group = click.get_current_context().find_root().command
    assert isinstance(group, click.Group)
    file = Path(path)
    study = Study(file, group)
    for name in only:
        if name not in study.arms:
            raise UsageError(f"--arm {name}: no such arm; {_or(study.arms)}")
    lines = study.lines(only)
    if foretell:
        _print_estimate(
            lines, file.parent, file.parent / study.store if speeds is None else speeds, form
        )
        return
    if dry_run:
        echo(f"cd {shlex.quote(str(file.parent))}")
        for line in lines:
            echo(line)
        return
    with contextlib.chdir(file.parent):
        for at, line in enumerate(lines, 1):
            echo(f"[{at}/{len(lines)}] {line}", err=True)
            group.main(list(line.words), prog_name="canopy", standalone_mode=False)
    echo(f"{path}: {study.name} is done: {len(lines)} commands, store {study.store}")


def _print_estimate(lines: list[Line], folder: Path, speeds: str | Path, form: str) -> None:
    speeds = Path(speeds).absolute()
    with contextlib.chdir(folder):
        found = estimate([(line.step, line.options) for line in lines], speeds)
    print_rows(duckdb.from_arrow(found.to_arrow()), form)
    unknown = found.filter(pl.col("hours").is_null())["command"].to_list()
    to_come = found.filter(pl.col("rows").is_null())["command"].to_list()
    if form != "table":
        return
    if to_come:
        echo(f"not known of {', '.join(to_come)}: starts from a file that the study has yet to write")
    if unknown := [name for name in unknown if name not in to_come]:
        echo(f"not known of {', '.join(unknown)}: --speeds names a store that has seen such work done")


@study_group.command("list")
def list_command() -> None:
    """List the studies that come with the package; print one with: canopy study show NAME.

    \b
    Example:
      canopy study list
      canopy study show conveyance > study.toml
    """
    for name in _shipped():
        comment = [line[2:] for line in _shipped_text(name).splitlines() if line.startswith("# ")]
        echo(f"{name:12}  {' '.join(comment).split('? ')[0].split('. ')[0]}")


@study_group.command("show")
@click.argument("name")
def show_command(name: str) -> None:
    """Print the file of a study that comes with the package, to be changed and run.

    \b
    Example:
      canopy study show conveyance > study.toml
    """
    if name not in _shipped():
        raise UsageError(f"{name}: no such study; {_or(_shipped())}")
    click.echo(_shipped_text(name), nl=False)


def _shipped() -> list[str]:
    folder = resources("canopy_store").joinpath("studies")
    return sorted(each.name.removesuffix(".toml") for each in folder.iterdir())


def _shipped_text(name: str) -> str:
    return resources("canopy_store").joinpath("studies", f"{name}.toml").read_text(encoding="utf-8")
