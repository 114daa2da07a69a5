"""Right and wrong as measures of a prompt: its accuracy, and what k of its rollouts would give.

pass@k and pass^k are the view ``pass_at_k``'s. The chance that a majority of k is right is counted here,
for SQL would have to go through the sizes of all answers' groups: `majority_at_k`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import polars as pl

from canopy_store.analysis.bootstrap import AT_K, Array
from canopy_store.analysis.one_of import one_of
from canopy_store.errors import DataError, UsageError
from canopy_store.sql.connection import Connection

_MANY = 16  # terms of a sum from which on a matrix product is quicker than their loop
GRADED = ("accuracy", *AT_K)  # measures that need a grader


def majority_at_k(
    sizes: Sequence[int], right: Sequence[float], silent: int, sizes_drawn: Sequence[int]
) -> list[float]:
    """The chance that the commonest answer of k rollouts is right, for each k; NaN where k > n.

    The k are drawn without replacement from the n, and every draw is counted: nothing is simulated. Of
    answers that are equally common one is taken by lot. Rollouts without an answer have no vote; where
    none of the k has one, it is wrong.

    Parameters
    ----------
    sizes : of each distinct answer the rollouts that gave it; n is their sum, and ``silent``
    right : of each the share of these that is right: 0 or 1, where grading follows from the answer
    silent : rollouts without an answer
    sizes_drawn : the k

    Notes
    -----
    For each j the answers that can be drawn j times are gone through one by one, with two sums for every
    number s of rollouts drawn so far and t of answers that have j of them, none having more: the share
    of draws, and the share times the right ones of the t. Answers that fewer than j rollouts gave are
    merged. Then sum_j sum_t (second sum) / t is the chance. Shares are hypergeometric: none overflows.
    """
    n, most = sum(sizes) + silent, max((k for k in sizes_drawn), default=0)
    most = min(most, n)
    logs = np.array([math.lgamma(i + 1) for i in range(n + 1)])  # of i!

    def choose(size: int, part: Array) -> Array:
        """The logarithm of the ways to choose parts of so many."""
        return logs[size] - logs[part] - logs[size - part]

    @functools.lru_cache(maxsize=16)
    def joined(before: int, size: int) -> Array:
        """(K + 1, K + 1) the chance that of s' drawn from both s are of those before."""
        to, s = np.arange(most + 1)[:, None], np.arange(most + 1)[None]
        can = (to >= s) & (to - s <= size) & (s <= before)
        ways = choose(size, np.where(can, to - s, 0)) + choose(before, np.where(can, s, 0))
        return np.where(can, np.exp(ways - choose(before + size, np.where(can, to, 0))), 0)

    def with_group(all_of: Array, before: int, size: int, first: int, last: int) -> Array:
        """What becomes of sums over draws, where first to last of a group of ``size`` come to them."""
        if last - first > _MANY:
            chances = joined(before, size)
            return np.triu(np.tril(chances, -first), -last) @ all_of
        out = np.zeros_like(all_of)
        for i in range(first, last + 1):
            s = np.arange(min(before, most - i) + 1)
            ways = choose(size, np.array(i)) + choose(before, s) - choose(before + size, s + i)
            out[i : i + len(s)] += np.exp(ways)[:, None] * all_of[: len(s)]
        return out

    chance = np.zeros(most + 1)
    for j in range(1, min(most, max(sizes, default=0)) + 1):
        large = [(m, share) for m, share in zip(sizes, right, strict=True) if m >= j]
        if not any(share for _, share in large):
            continue
        rest = n - sum(m for m, _ in large)  # of these any number: no answer among them has j
        shares = np.zeros((most + 1, min(len(large), most // j) + 2))
        shares[: min(rest, most) + 1, 0] = 1.0
        rights, before = np.zeros_like(shares), rest
        for m, share in large:
            tied = with_group(shares[:, :-1], before, m, j, j)
            moved = with_group(rights[:, :-1], before, m, j, j) + share * tied
            shares, rights = (with_group(sums, before, m, 0, j - 1) for sums in (shares, rights))
            rights[:, 1:] += moved
            shares[:, 1:] += tied
            before += m
        chance += (rights[:, 1:] / np.arange(1, rights.shape[1])).sum(1)
    return [float(min(chance[k], 1.0)) if k <= n else math.nan for k in sizes_drawn]


def with_accuracy(
    con: Connection, rows: pl.DataFrame, grader: str | None = None, horizon: int | None = None
) -> pl.DataFrame:
    """Rows of prompts with their ``accuracy``, and ``grader``; without both where there is no grade.

    Parameters
    ----------
    rows : with run_id, prompt_id and selection
    grader : needed to have them where the store has several
    horizon : of the first tokens alone nothing is graded: without them, too

    Raises
    ------
    DataError
        No such grader.
    UsageError
        A grader and a horizon.
    """
    stored = graders(con)
    if grader is not None:
        one_grader(con, "accuracy", grader)
    if horizon is not None:
        if grader is not None:
            raise UsageError(
                "--grader: grades are of whole rollouts, not of their first --horizon tokens"
            )
        return rows
    if grader is None and len(stored) != 1:
        return rows
    grader = grader or stored[0]
    keys = ["run_id", "prompt_id", "selection"]
    graded = con.sql(
        f"select {', '.join(keys)}, accuracy from graded_prompts where grader = $grader",
        params={"grader": grader},
    ).pl()
    rows = rows.join(graded, on=keys, how="left", maintain_order="left")
    return rows.with_columns(grader=pl.lit(grader))


def with_at_k(con: Connection, rows: pl.DataFrame, names: Sequence[str]) -> pl.DataFrame:
    """Rows of `with_accuracy`, with the columns of the measures named that depend on a number k.

    Raises
    ------
    DataError, UsageError
        A graded measure is named, and no grade is stored; or several graders, and none was named.
    """
    asked = [name for name in names if name in GRADED]
    if not asked:
        return rows
    if "grader" not in rows.columns:
        one_grader(con, asked[0], None)
        raise UsageError(
            f"{asked[0]}: grades are of whole rollouts, not of their first --horizon tokens"
        )
    grader, selection = rows["grader"][0], rows["selection"][0]
    where = {"grader": grader, "selection": selection}
    frame = _pass_at(con, [name for name in asked if name in AT_K], where)
    votes = [name for name in asked if name.startswith("maj_at_")]
    if votes:
        frame = frame.join(_votes(con, votes, where), on=["run_id", "prompt_id"], how="left")
    return rows.join(frame, on=["run_id", "prompt_id"], how="left", maintain_order="left")


def graders(con: Connection) -> list[str]:
    """The graders whose grades tell right from wrong, by name."""
    query = "select distinct grader from grades where correct is not null order by all"
    return con.sql(query).pl()["grader"].to_list()


def one_grader(con: Connection, what: str, grader: str | None) -> str:
    """The grader named, or the only one stored.

    Raises
    ------
    DataError
        No such grader, or no rollout is graded; ``what`` is what needs it.
    UsageError
        Several graders and none named.
    """
    stored = graders(con)
    if not stored:
        raise DataError(f"{what}: no rollout is graded; see: canopy ingest grade --help")
    return one_of("--grader", stored, grader)


def _pass_at(con: Connection, names: Sequence[str], where: dict[str, str]) -> pl.DataFrame:
    """A row a prompt, with its columns of pass@k and pass^k."""
    of = {
        "pass_at": "1 - missed_by({}, n_correct, n_graded)",
        "pass_hat": "hit_by_all({}, n_correct, n_graded)",
    }
    columns = ["run_id", "prompt_id"]
    for name in names:
        kind, _, k = name.rpartition("_")
        if kind in of:
            columns.append(f"{of[kind].format(int(k))} as {name}")
    query = f"select {', '.join(columns)} from graded_prompts"
    return con.sql(f"{query} where grader = $grader and selection = $selection", params=where).pl()


def _votes(con: Connection, names: Sequence[str], where: dict[str, str]) -> pl.DataFrame:
    """A row a prompt, with its columns of majorities; NULL where a right rollout names no answer."""
    answers = con.sql(
        "select run_id, prompt_id, answer, count(*)::integer as size, avg(correct::integer) as share "
        "from grades g where grader = $grader and correct is not null and ($selection = 'all' or exists "
        "(from selections s where s.run_id = g.run_id and s.prompt_id = g.prompt_id "
        "and s.sample = g.sample and s.selection = $selection)) group by all order by all",
        params=where,
    ).pl()
    ks = [int(name.rpartition("_")[2]) for name in names]
    known: dict[tuple[object, ...], list[float]] = {}
    found = []
    for (run_id, prompt_id), group in answers.group_by(["run_id", "prompt_id"], maintain_order=True):
        voting = group.filter(pl.col("answer").is_not_null())
        silent = group.filter(pl.col("answer").is_null())
        if silent["share"].sum():
            continue
        sizes, shares = voting["size"].to_list(), voting["share"].to_list()
        # a prompt is its answers' sizes: many prompts are alike
        alike = (*sorted(zip(sizes, shares, strict=True)), silent["size"].sum())
        if alike not in known:
            known[alike] = majority_at_k(sizes, shares, silent["size"].sum(), ks)
        found.append((run_id, prompt_id, *known[alike]))
    kinds = {"run_id": pl.String, "prompt_id": pl.String, **dict.fromkeys(names, pl.Float64)}
    frame = pl.DataFrame(found, schema=kinds, orient="row")
    return frame.with_columns(pl.col(pl.Float64).fill_nan(None))
