"""How biased and how noisy are the estimators, where the truth is known?

    python benchmarks/simulation_estimators.py [--prompts 1000]

Three tables: rho from few rollouts, numbers of distinct rollouts, and estimates of CE* on Markov chains,
whose CE* up to a cap is exact.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from scipy import stats

from canopy_store.analysis import bootstrap
from canopy_store.analysis.control_variate import ce_star_cv

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from chain import chain_policy

RHO = 0.6
P_CLUSTERS = 0.85 ** np.arange(30) / (0.85 ** np.arange(30)).sum()  # how often each is drawn


def correlations(prompts: int) -> None:
    print(f"\nrho of {RHO} in every prompt: mean (sd) over {prompts // 5} runs of 50 prompts\n")
    print("| rollouts a prompt | lengths' spread over prompts | `rho_pearson` | `rho_pooled` |")
    print("|---|---|---|---|")
    names = ["rho_pearson", "rho_pooled"]
    for m, spread in ((4, 0), (8, 0), (16, 0), (40, 0), (4, 0.3), (40, 0.3)):
        rng = np.random.default_rng(m)
        found = []
        for _ in range(prompts // 5):
            x, y = rng.normal(size=(2, 50, m))
            n = x * np.exp(rng.normal(0, spread, (50, 1)))
            r = RHO * x + np.sqrt(1 - RHO**2) * y
            dn, dr = n - n.mean(1, keepdims=True), r - r.mean(1, keepdims=True)
            over, var_n, var_r = ((a * b).sum(1) for a, b in ((dn, dr), (dn, dn), (dr, dr)))
            columns = {
                "n_rollouts": np.full(50, float(m)),
                "mean_length": np.ones(50),
                "ce_star": np.ones(50),
                "rho_pearson": over / np.sqrt(var_n * var_r),
                "cov_length_rate": over / (m - 1),
                "var_length": var_n / (m - 1),
                "var_rate": var_r / (m - 1),
            }
            found.append(bootstrap.pooled(bootstrap.weighted_values(columns, names).sum(1), names))
        mean, sd = np.mean(found, 0), np.std(found, 0, ddof=1)
        kind = "differs by 30%" if spread else "the same"
        print(f"| {m} | {kind} | {mean[0]:.3f} ({sd[0]:.3f}) | {mean[1]:.3f} ({sd[1]:.3f}) |")


def distinct(prompts: int) -> None:
    entropy = -(P_CLUSTERS * np.log(P_CLUSTERS)).sum()
    print(f"\nnumbers of distinct rollouts; limits: Vendi {np.exp(entropy):.2f}, ", end="")
    print(f"order 2 {1 / (P_CLUSTERS**2).sum():.2f}; {prompts} prompts\n")
    print("| rollouts a prompt | `vendi_score` | `diversity_number` |\n|---|---|---|")
    rng = np.random.default_rng(1)
    for m in (8, 16, 64):
        # orthogonal clusters: the kernel's eigenvalues are the shares of the clusters drawn
        share = rng.multinomial(m, P_CLUSTERS, prompts) / m
        logs = np.log(share, where=share > 0, out=np.zeros_like(share))
        vendi = np.exp(np.mean((-share * logs).sum(1)))
        squared = 1 - bootstrap.diversity_of_sum((m * share) ** 2 @ np.ones(len(P_CLUSTERS)), m)
        print(f"| {m} | {vendi:.2f} | {1 / squared.mean():.2f} |")


def walks(policy: np.ndarray, rng: np.random.Generator, rollouts: int, cap: int) -> tuple:
    """Entropy, stop probability and surprisal (n, cap), 0 after the last step; lengths; who stopped."""
    entropy = -(policy * np.log(policy, where=policy > 0, out=np.zeros_like(policy))).sum(1)
    state, alive = np.ones(rollouts, int), np.ones(rollouts, bool)
    h, q, s = (np.zeros((rollouts, cap)) for _ in range(3))
    lengths, edges = np.zeros(rollouts, int), policy.cumsum(1)
    edges[:, -1] = 1
    for t in range(cap):
        drawn = (rng.random(rollouts)[:, None] > edges[state]).sum(1)
        h[alive, t], q[alive, t] = entropy[state[alive]], policy[state[alive], 0]
        s[alive, t] = -np.log(policy[state[alive], drawn[alive]])
        lengths += alive
        state = np.where(alive, drawn, state)
        alive &= state != 0
    return h, q, s, lengths, ~alive


def truth(policy: np.ndarray, cap: int) -> float:
    """CE* of the first ``cap`` tokens, summed over the chance of being in each state at each step."""
    entropy = -(policy * np.log(policy, where=policy > 0, out=np.zeros_like(policy))).sum(1)
    reach, total = np.eye(len(policy))[1], 0.0
    for _ in range(cap):
        reach[0] = 0
        total += reach @ entropy
        reach = reach @ policy
    return total


def estimates(prompts: int) -> None:
    print(f"\nCE* on Markov chains, {prompts} prompts a row; variances over that of `ce_star`\n")
    print(
        "| chain, cap, share cut | rollouts | `surprisal_mean` | both, best weights | `ce_star_cv` "
        "| its bias, in se | jackknife variance over true | 95% interval covers |"
    )
    print("|---|---|---|---|---|---|---|---|")
    stopping = np.array([[1, 0], [0.05, 0.95]])
    chains = {
        "eight states, 24": (chain_policy(1.0, 0), 24),
        "eight states, 200": (chain_policy(1.0, 0), 200),
        "peaked, 64": (chain_policy(0.5, 0), 64),
        "stopping alone, 100": (stopping, 100),
    }
    for name, (policy, cap) in chains.items():
        exact = truth(policy, cap)
        for m in (16, 64):
            rng = np.random.default_rng(m)
            rows = []
            for _ in range(prompts):
                h, q, s, lengths, stopped = walks(policy, rng, m, cap)
                sums, surprisals = h.sum(1), s.sum(1)
                rows.append(
                    (
                        sums.mean(),
                        surprisals.mean(),
                        best_weighted(sums, surprisals),
                        *ce_star_cv(h, q, lengths, stopped, cap),
                        1 - stopped.mean(),
                    )
                )
            plain, surprisal, both, cv, se, cut = np.array(rows).T
            ratio = [x.var() / plain.var() for x in (surprisal, both, cv)]
            bias = (cv.mean() - exact) / (cv.std() / np.sqrt(prompts))
            covers = abs(cv - exact) < stats.t.ppf(0.975, m - 1) * se
            print(
                f"| {name}, {cut.mean():.0%} | {m} | {ratio[0]:.2f} | {ratio[1]:.2f} | {ratio[2]:.2f} "
                f"| {bias:+.1f} | {(se**2).mean() / cv.var():.2f} | {covers.mean():.3f} |"
            )


def best_weighted(h: np.ndarray, s: np.ndarray) -> float:
    """The mean of h + b (s - h), b of each rollout from the others, so that it stays unbiased."""
    m = len(h)
    d = s - h

    def without(x: np.ndarray) -> np.ndarray:
        return (x.sum() - x) / (m - 1)

    over = without(h * d) - without(h) * without(d)
    return float((h - over / (without(d * d) - without(d) ** 2) * d).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=1000)
    prompts = parser.parse_args().prompts
    correlations(prompts)
    distinct(prompts)
    estimates(prompts)


if __name__ == "__main__":
    main()
