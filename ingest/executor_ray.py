"""Any job on a Ray cluster: each worker loads the model once and makes whole shards.

The driver hands out the shards; the workers write them to the store, which every node must see under the
same path, as it must every file that the options name. A shard whose worker dies is given
to another; a driver that dies leaves a store that any executor can finish.
"""

from __future__ import annotations

import io
import logging
import os
import queue
import re
import socket
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from canopy_store import sql
from canopy_store.errors import CanopyError, UsageError
from canopy_store.ingest.jobs import (
    Job,
    OpenJob,
    announce,
    complete,
    do_unit,
    holding,
    ready,
    reopen,
    units_to_do,
)
from canopy_store.ingest.progress import Progress

# So many workers may die over one shard, or one after the other before they are ready.
ATTEMPTS = 3
_NEWS_EVERY = 0.5  # seconds
_PATIENCE = 60.0  # seconds without a worker, until the user is told

_Shard = tuple[int, int]  # place of its group, its number
_Told = list[tuple[str, tuple[Any, ...]]]  # methods of Progress to call, with their arguments


def spread(
    root: str | Path,
    open_job: OpenJob,
    options: Mapping[str, Any],
    workers: int | None,
    progress: Progress,
) -> str:
    """The name of the job, whose missing shards the workers of a Ray cluster have stored.

    Connects to the cluster that RAY_ADDRESS or Ray itself names, else starts one in this machine.

    Parameters
    ----------
    root, open_job, options : as of `canopy_store.ingest.jobs.run_job`, the same for every node
    workers : how many; by default one a GPU, or one a node where none has a GPU

    Raises
    ------
    CanopyError
        What a worker raised, as it would have been raised here; or a shard's workers died.
    UsageError
        Ray is not installed, does not answer, or has no CPU.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"--workers {workers}: needs at least 1")
    try:
        import ray
    except ImportError:
        raise UsageError(
            "--executor ray needs ray: install it with: pip install 'canopy-store[ray]'"
        ) from None
    if "://" not in str(root):
        root = Path(root).absolute()
    call = (str(root), open_job, {name: _absolute(name, value) for name, value in options.items()})
    if ray.is_initialized():
        return _spread(ray, call, workers, progress)
    with redirect_stdout(io.StringIO()):  # where Ray tells of each dead worker, at length
        try:
            _connect(ray)
            return _spread(ray, call, workers, progress)
        finally:
            ray.shutdown()


# other options may look like a path
_PLACES = (
    *("model", "embedder", "scorer"),
    *("prompts", "examples", "documents", "items", "context", "data"),
)


def _absolute(name: str, value: Any) -> Any:
    """An option that names a file or folder, so that it does from any folder."""
    if name in _PLACES and value is not None and (path := Path(value).expanduser()).exists():
        return path.absolute() if isinstance(value, Path) else str(path.absolute())
    return value


_Call = tuple[str, OpenJob, Mapping[str, Any]]


def _spread(ray: Any, call: _Call, workers: int | None, progress: Progress) -> str:
    options = call[2]
    here = options.get("base_url") is not None or str(options.get("device")).startswith("cpu")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    count, needs = share(nodes, workers, gpus=not here)
    pool = _Pool(ray, call, needs, progress)
    try:
        return pool.do_all(count)
    finally:
        pool.close()


def _connect(ray: Any) -> None:
    """Connects to the cluster that RAY_ADDRESS names, to one of this machine, or to a new one."""
    named = os.environ.get("RAY_ADDRESS", "")
    noted = Path(os.environ.get("RAY_TMPDIR") or "/tmp", "ray", "ray_current_cluster")
    address = named
    if not named and noted.is_file() and not _answers(noted.read_text()):
        address = "local"  # a cluster that was killed leaves its note
    try:
        # Ray itself would try for minutes
        if named and not _answers(named):
            raise ConnectionError(f"RAY_ADDRESS is {named}")
        ray.init(
            address=address or None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"--executor ray: no Ray cluster answers ({reason}); start one with: ray start --head, or "
            "set RAY_ADDRESS=local to have one in this machine"
        ) from None


def _answers(address: str) -> bool:
    """Whether somebody listens at HOST:PORT; True for addresses of another form."""
    place = re.fullmatch(r"(?:ray://)?([^:/\s]+):(\d+)\s*", address)
    try:
        if place:
            socket.create_connection((place[1], int(place[2])), timeout=10).close()
    except (OSError, OverflowError):
        return False
    return True


def share(nodes: list[dict[str, float]], workers: int | None, gpus: bool) -> tuple[int, dict[str, int]]:
    """How many workers, and the CPUs and GPUs that each asks for.

    Each gets as many CPUs as leave room for all: Ray gives a process one thread a CPU it asked for.

    Parameters
    ----------
    nodes : each node's resources, as Ray names them
    workers : how many are wanted; None for one a GPU, or one a node
    gpus : whether each worker takes a GPU, where there are any
    """
    nodes = [node for node in nodes if node.get("CPU", 0) >= 1]
    if not nodes:
        raise UsageError("--executor ray: no node of the cluster has a CPU to give; add one that has")
    with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
    if gpus and with_gpu:
        room = [(int(node["CPU"]), int(node["GPU"])) for node in with_gpu]
        workers = workers or sum(gpu for _, gpu in room)
    else:
        room = [(int(node["CPU"]), int(node["CPU"])) for node in nodes]
        workers = workers or len(nodes)
    fits = [
        cpus
        for cpus in range(1, max(cpu for cpu, _ in room) + 1)
        if sum(min(cpu // cpus, most) for cpu, most in room) >= workers
    ]
    return workers, {"num_cpus": max(fits, default=1), "num_gpus": int(bool(gpus and with_gpu))}


class _Tally(Progress):
    """What a worker's job tells, kept until the driver asks."""

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()

    def start(self, rollouts: int, done: int) -> None:
        self.told.put(("start", (rollouts, done)))

    def tokens(self, count: int) -> None:
        self.told.put(("tokens", (count,)))

    def rollouts(self, count: int) -> None:
        self.told.put(("rollouts", (count,)))

    def say(self, line: str) -> None:
        self.told.put(("say", (line,)))

    def news(self) -> _Told:
        """All since the last call."""
        return [self.told.get() for _ in range(self.told.qsize())]


class _Worker:
    """A process of the cluster. Each of its methods answers with a result and with news."""

    def __init__(self, root: str, open_job: OpenJob, options: Mapping[str, Any]) -> None:
        self.call = (root, open_job, options)
        self.tally = _Tally()
        self.job: Job | None = None

    def prepare(self) -> tuple[tuple[str, list[_Shard], list[int]], _Told]:
        """Loads the model; the job's name, the shards still to do and the groups, by their places."""
        self.job = ready(*self.call, self.tally)
        for group in self.job.groups:
            with holding(self.job, group):
                reopen(self.job, group)
        announce(self.job, (1, 1), self.tally)
        groups = range(len(self.job.groups))
        todo = [
            (at, unit.number) for at in groups for unit in units_to_do(self.job, self.job.groups[at])
        ]
        return (self.job.name, todo, list(groups)), self.tally.news()

    def make(self, shard: _Shard) -> tuple[None, _Told]:
        """Makes and stores a shard."""
        assert self.job is not None  # prepare has been awaited
        at, number = shard
        group = self.job.groups[at]
        with holding(self.job, group):
            for unit in group.units(group):
                if unit.number == number:
                    do_unit(self.job, unit, self.tally)
        return None, self.tally.news()

    def complete(self, at: int) -> tuple[bool, _Told]:
        """Commits a group."""
        assert self.job is not None
        group = self.job.groups[at]
        with holding(self.job, group):
            return complete(self.job, group, self.tally), self.tally.news()

    def news(self) -> tuple[None, _Told]:
        """What happened meanwhile; called again and again in the actor's second thread."""
        time.sleep(_NEWS_EVERY)  # so that the driver may ask again at once
        return None, self.tally.news()


class _Pool:
    """The workers of a run, by number, and the answers that each of them owes."""

    def __init__(self, ray: Any, call: _Call, needs: dict[str, int], progress: Progress) -> None:
        self.ray, self.call, self.needs, self.progress = ray, call, needs, progress
        self.actor = ray.remote(_Worker).options(
            **needs, max_concurrency=2, scheduling_strategy="SPREAD"
        )
        self.workers: list[Any] = []  # all ever hired; None where dead
        self.ready: set[int] = set()
        self.idle: list[int] = []
        self.pending: dict[Any, tuple[int, str, tuple[Any, ...]]] = {}
        self.queue: deque[tuple[str, tuple[Any, ...]]] = deque()
        self.deaths: Counter[tuple[str, tuple[Any, ...]]] = Counter()
        self.prepared: tuple[str, list[_Shard], list[int]] | None = None
        self.heard: set[tuple[str, Any]] = set()

    def do_all(self, workers: int) -> str:
        """The name of the job, now done."""
        self.hire()  # alone: it settles the job's settings
        while self.prepared is None:
            self.listen()
        name, todo, groups = self.prepared
        for _ in range(min(workers, len(todo)) - 1):
            self.hire()
        self.do("make", todo)
        self.do("complete", groups)
        sql.write_database(self.call[0])
        return name

    def do(self, step: str, arguments: Iterable[Any]) -> None:
        """Returns once workers have taken this step with each of the arguments."""
        self.queue.extend((step, (argument,)) for argument in arguments)
        while self.queue or any(owed == step for _, owed, _ in self.pending.values()):
            while self.queue and self.idle:
                self.ask(self.idle.pop(), *self.queue.popleft())
            self.listen()

    def hire(self) -> None:
        """Starts a worker, which loads the model."""
        self.workers.append(self.actor.remote(*self.call))
        self.ask(len(self.workers) - 1, "prepare", ())
        self.ask(len(self.workers) - 1, "news", ())

    def ask(self, worker: int, step: str, arguments: tuple[Any, ...]) -> None:
        """Has a worker take a step."""
        answer = getattr(self.workers[worker], step).remote(*arguments)
        self.pending[answer] = (worker, step, arguments)

    def listen(self) -> None:
        """Waits for answers and draws the conclusions."""
        answers, _ = self.ray.wait(list(self.pending), timeout=_PATIENCE)
        if not answers:  # even news come from none
            needs = " and ".join(f"{n} {name[4:-1].upper()}" for name, n in self.needs.items() if n)
            self.say(f"no worker has started yet: each takes {needs}; see what is free: ray status")
        for answer in answers:
            if answer not in self.pending:
                continue  # of a worker just found dead
            worker, step, _ = self.pending[answer]
            try:
                result, told = self.ray.get(answer)
            except self.ray.exceptions.RayActorError:
                self.lost(worker)
                continue
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, CanopyError) else error from None
            del self.pending[answer]
            self.tell(told)
            if step == "news":
                self.ask(worker, "news", ())
                continue
            self.idle.append(worker)
            if step == "prepare":
                self.ready.add(worker)
                self.prepared = self.prepared or result
                del self.deaths["prepare", ()]

    def lost(self, worker: int) -> None:
        """Queues what a dead worker had in hand and hires another one."""
        self.ray.kill(self.workers[worker])  # it may live on, out of reach
        self.workers[worker] = None
        self.ready.discard(worker)
        self.idle = [w for w in self.idle if w != worker]
        for answer, (owner, step, arguments) in list(self.pending.items()):
            if owner != worker:
                continue
            del self.pending[answer]
            if step == "news":
                continue
            over = f"shard {arguments[0][1]}" if step == "make" else f"the step {step}"
            self.deaths[step, arguments] += 1
            often = self.deaths[step, arguments] >= ATTEMPTS
            if step != "prepare":
                self.queue.appendleft((step, arguments))
            elif often and self.ready:
                return  # the others do without it
            if often:
                raise CanopyError(
                    f"--executor ray: {ATTEMPTS} workers died over {over}: out of memory, or without "
                    "canopy-store on their node? Ray's logs say, by default in "
                    "/tmp/ray/session_latest/logs; what is stored is whole: run it again to resume"
                )
            self.progress.say(f"a worker died over {over}; another one takes it")
        self.hire()

    def tell(self, told: _Told) -> None:
        """Passes news on; what every worker says, once."""
        for name, arguments in told:
            if name == "start":
                if (name, None) not in self.heard:
                    self.heard.add((name, None))
                    self.progress.start(*arguments)
            elif name == "say":
                self.say(*arguments)
            else:
                getattr(self.progress, name)(*arguments)

    def say(self, line: str) -> None:
        """Says a line that was not said before."""
        if ("say", line) not in self.heard:
            self.heard.add(("say", line))
            self.progress.say(line)

    def close(self) -> None:
        """Ends all workers; what they stored is whole."""
        for worker in self.workers:
            if worker is not None:
                self.ray.kill(worker)
