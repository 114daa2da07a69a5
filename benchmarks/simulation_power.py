"""Do plans reach the power they promise, and does sampling until a standard error bias what it gives?

    python benchmarks/simulation_power.py [--simulations 2000] [--only plans|until-se]

Plans: pilots of 8, 16 and 40 prompts are drawn from a known variance between prompts and within them;
each is planned by the best estimate and by the upper 80% limit, and the real power of that many prompts
follows from the noncentral t with the true variance. Prints how it is spread.

Until a standard error: rollouts of Markov chains, whose CE* is known exactly, and lognormal ones; a
naive rule, which looks at all rollouts after every eight a prompt and stops once their standard error
is as asked for, against the pilot and what is counted after it. Prints bias, coverage and cost.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np

from canopy_store.analysis.power import Aim, Pilot, power_of, prompts_for
from canopy_store.ingest.until_se import Drawn, Target, rounds

Array = np.ndarray
BETWEEN, WITHIN, SAMPLES = 1.0, 4.0, 16  # sd of a difference: between prompts, of one rollout each
PILOT, MOST = 16, 320


# ---------------------------------------------------------------- plans


def pilots(rng: np.random.Generator, prompts: int, simulations: int) -> list[Pilot]:
    """Pilots of two variants, 16 rollouts a prompt."""
    sides = rng.normal(0, WITHIN / np.sqrt(2), (simulations, 2, prompts, SAMPLES))
    differences = rng.normal(0, BETWEEN, (simulations, prompts)) + np.diff(sides.mean(-1), axis=1)[:, 0]
    total = differences.var(-1, ddof=1)
    within = sides.var(-1, ddof=1).sum(1).mean(-1)
    return [Pilot(prompts, 1, SAMPLES, *each) for each in zip(total, within, strict=True)]


def plans(simulations: int) -> None:
    print(
        "| prompts of the pilot | samples planned | plan by | median prompts | mean real power |", end=""
    )
    print(" plans of real power 0.8 or more |\n" + "|---" * 6 + "|")
    for samples, delta in ((16, 0.75), (64, 0.6)):
        aim, truth = Aim(delta), BETWEEN**2 + WITHIN**2 / samples
        reached = np.array([0.0] * 5 + [power_of(p, truth, aim) for p in range(5, 2000)])
        for prompts in (8, 16, 40):
            made = pilots(np.random.default_rng(prompts), prompts, simulations)
            for name in ("best estimate", "upper 80% limit"):
                needed = [
                    prompts_for(p.variance(samples, p.upper if "80" in name else 1.0), aim) for p in made
                ]
                real = reached[np.minimum(needed, 1999)]
                print(
                    f"| {prompts} | {samples} | {name} | {np.median(needed):.0f} | {real.mean():.2f} | "
                    f"{100 * (real >= 0.8).mean():.0f}% |"
                )
        print(f"| the truth | {samples} | | {prompts_for(truth, aim)} | | |")


# ---------------------------------------------------------------- until a standard error

# values (P, M) and tokens (P, M) of M rollouts of each of P prompts
Draw = Callable[[np.random.Generator], tuple[Array, Array]]


def lognormal(prompts: int) -> tuple[Draw, float]:
    """Rollouts whose entropy is lognormal, of skewness 3.7, with the truth of their mean."""
    level = 20 * np.exp(np.linspace(-0.5, 0.5, prompts))[:, None]

    def draw(rng: np.random.Generator) -> tuple[Array, Array]:
        values = level * np.exp(rng.normal(0, 0.8, (prompts, MOST)))
        return values, np.ceil(values / 2)

    return draw, float(level.mean() * np.exp(0.32))


def markov(prompts: int) -> tuple[Draw, float]:
    """Rollouts of Markov chains of eight states, one chain a prompt; CE* by the fundamental matrix."""
    rng = np.random.default_rng(prompts)
    weight = np.exp(rng.normal(0, 1, (prompts, 8, 8)))
    weight[:, :, 0] *= np.exp(rng.normal(-1, 1, (prompts, 8)))  # state 0 ends the rollout
    policy = weight / weight.sum(-1, keepdims=True)
    entropy = -(policy * np.log(policy)).sum(-1)
    inner = np.linalg.inv(np.eye(7) - policy[:, 1:, 1:])
    truth = np.einsum("ps,ps->p", inner[:, 0], entropy[:, 1:])
    edges = policy.cumsum(-1)

    def draw(rng: np.random.Generator) -> tuple[Array, Array]:
        state = np.ones((prompts, MOST), int)
        values, tokens = np.zeros(state.shape), np.zeros(state.shape)
        place = np.arange(prompts)[:, None]
        while state.any():
            values += np.where(state > 0, entropy[place, state], 0)
            tokens += state > 0
            u = rng.random(state.shape)[..., None]
            state = np.where(state > 0, (u > edges[place, state][..., :-1]).sum(-1), 0)
        return values, tokens

    return draw, float(truth.mean())


DATA = {"lognormal": lognormal, "Markov chains": markov}


def estimate(parts: list[Array]) -> tuple[float, float, int]:
    """Mean over prompts, its standard error with the prompts fixed, and rollouts."""
    variance = sum(part.var(ddof=1) / len(part) for part in parts)
    means = [part.mean() for part in parts]
    return float(np.mean(means)), float(np.sqrt(variance)) / len(parts), sum(map(len, parts))


def naive(values: Array, se: float) -> tuple[float, float, int]:
    """All rollouts, eight more of each prompt until their own standard error is as asked for."""
    # the first ones say too little: as long as the pilot is
    for m in range(PILOT, MOST, 8):
        found = estimate(list(values[:, :m]))
        if found[1] <= se:
            return found
    return estimate(list(values))


def until_se(simulations: int) -> None:
    print("| rollouts | prompts | rule | rollouts a prompt | bias, % | bias, standard errors |", end="")
    print(" coverage of 95% | standard error reached |\n" + "|---" * 8 + "|")
    for name, make in DATA.items():
        for prompts in (1, 10):
            draw, truth = make(prompts)
            probe = np.random.default_rng(7)
            spread = np.mean([draw(probe)[0].var(1, ddof=1).mean() for _ in range(100)])
            se = float(np.sqrt(spread / 50 / prompts))  # what 50 rollouts a prompt give
            rng = np.random.default_rng(prompts)
            found: dict[str, list[tuple[float, float, int]]] = {}
            for _ in range(simulations):
                values, tokens = draw(rng)
                target = Target("ce_star", se, PILOT, MOST)
                drawn = [Drawn(v, n) for v, n in zip(values, tokens, strict=True)]
                counted = rounds(drawn, target)[-1].samples
                parts = [
                    (v[: r.stop], v[r.start : r.stop]) for v, r in zip(values, counted, strict=True)
                ]
                found.setdefault("naive", []).append(naive(values, se))
                found.setdefault("all, pilot too", []).append(estimate([a for a, _ in parts]))
                found.setdefault("after the pilot", []).append(estimate([b for _, b in parts]))
                fixed = values[:, -50:]  # by no rule
                found.setdefault("50 of each", []).append(estimate(list(fixed)))
            for rule, rows in found.items():
                value, own, used = np.array(rows).T
                if rule == "after the pilot":
                    used = np.array(found["all, pilot too"])[:, 2]
                off, share = (value - truth) / own, 100 * value / truth - 100
                print(
                    f"| {name} | {prompts} | {rule} | {used.mean() / prompts:.0f} "
                    f"| {share.mean():+.2f} ± {share.std() / len(rows) ** 0.5:.2f} "
                    f"| {(value.mean() - truth) / se:+.2f} | {(abs(off) < 1.96).mean():.3f} "
                    f"| {100 * (own <= se).mean():.0f}% |",
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--only", choices=["plans", "until-se"])
    options = parser.parse_args()
    print(f"{options.simulations} simulations a row\n")
    if options.only != "until-se":
        plans(options.simulations)
        print()
    if options.only != "plans":
        until_se(options.simulations)


if __name__ == "__main__":
    main()
