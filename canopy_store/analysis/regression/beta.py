"""Beta regression with a prompt and a family effect: maximum likelihood, Laplace approximation.

    y_i ~ Beta(mu_i phi_i, (1 - mu_i) phi_i)
    logit mu = eta  = X b + u_prompt + v_family,   u ~ N(0, sd_prompt²), v ~ N(0, sd_family²)
    log phi  = zeta = W g

Each row belongs to one prompt and one family, so the Hessian of the joint log density in (u, v) is an
arrow: two diagonal blocks and one border. Everything below is linear in rows and prompts.

The gradient is analytic. With H the negative Hessian at the mode, h_i = (Z H⁻¹ Z')_ii and subscripts of
the log density l for its derivatives, the Laplace log-likelihood l(mode) − ½ log det H moves with the
parameters directly, through the weights −l_ηη, and through the mode; the last takes one more solve with
H (Skaug and Fournier 2006, doi:10.1016/j.csda.2006.03.005).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, special

from canopy_store.errors import FitError

Array = np.ndarray[Any, np.dtype[np.float64]]
Codes = np.ndarray[Any, np.dtype[np.intp]]

ZERO_SD = np.log(1e-6)  # a log sd that stands for 0: its effect on the log-likelihood is below 1e-7
EXACT = 14.0  # a log precision at which an outcome has a standard deviation below 0.0005
LARGEST_SD = np.log(20.0)  # on the logit scale, far outside anything an outcome in (0, 1) can show


@dataclass(frozen=True)
class BetaFit:
    """Estimates of one fit: theta is (b, g, log sd_prompt, log sd_family), cov its covariance.

    A log sd held at 0 has variance nan. ``prompt_effects`` and ``family_effects`` are the modes.
    """

    theta: Array
    cov: Array
    loglik: float
    gradient: Array
    zero_sd: list[str]
    prompt_effects: Array
    family_effects: Array


@dataclass(frozen=True)
class _Derivatives:
    """Derivatives of the log density of each row in eta (e) and zeta (z)."""

    e: Array
    ee: Array
    z: Array
    eee: Array
    ez: Array
    eez: Array


def log_density(y: Array, eta: Array, zeta: Array) -> Array:
    """Log density of each row, mean expit(eta), precision exp(zeta)."""
    mu, phi = special.expit(eta), np.exp(zeta)
    a, b = mu * phi, special.expit(-eta) * phi
    return (
        special.gammaln(phi)
        - special.gammaln(a)
        - special.gammaln(b)
        + (a - 1) * np.log(y)
        + (b - 1) * np.log1p(-y)
    )


def _score_and_weight(y: Array, eta: Array, phi: Array) -> tuple[Array, Array, Array]:
    """Return l_eta, the observed weight −l_etaeta and the expected weight, which is never negative."""
    mu = special.expit(eta)
    g = mu * (1 - mu)
    a, b = mu * phi, (1 - mu) * phi
    surprise = np.log(y) - np.log1p(-y) - special.digamma(a) + special.digamma(b)
    expected = (phi * g) ** 2 * (special.zeta(2, a) + special.zeta(2, b))  # zeta(2, ·) is trigamma
    return phi * g * surprise, expected - phi * g * (1 - 2 * mu) * surprise, expected


def _derivatives(y: Array, eta: Array, zeta: Array) -> _Derivatives:
    mu, phi = special.expit(eta), np.exp(zeta)
    g, skew = mu * (1 - mu), 1 - 2 * mu  # d mu / d eta, and g' = g skew, g'' = g (1 − 6 g)
    a, b = mu * phi, (1 - mu) * phi
    log_y, log_1y = np.log(y), np.log1p(-y)
    digamma_a, digamma_b = special.digamma(a), special.digamma(b)
    tri_a, tri_b = special.zeta(2, a), special.zeta(2, b)
    tetra_a, tetra_b = -2 * special.zeta(3, a), -2 * special.zeta(3, b)
    surprise = log_y - log_1y - digamma_a + digamma_b
    m, mm, mmm = phi * surprise, -(phi**2) * (tri_a + tri_b), -(phi**3) * (tetra_a - tetra_b)
    p = special.digamma(phi) + mu * (log_y - digamma_a) + (1 - mu) * (log_1y - digamma_b)
    mp = surprise - phi * (mu * tri_a - (1 - mu) * tri_b)
    mmp = -2 * phi * (tri_a + tri_b) - phi**2 * (mu * tetra_a + (1 - mu) * tetra_b)
    return _Derivatives(
        e=m * g,
        ee=mm * g**2 + m * g * skew,
        z=p * phi,
        eee=mmm * g**3 + 3 * mm * g**2 * skew + m * g * (1 - 6 * g),
        ez=mp * g * phi,
        eez=phi * (mmp * g**2 + mp * g * skew),
    )


def _sums(rows: Array, codes: Codes, levels: int) -> Array:
    return np.bincount(codes, rows, levels).astype(np.float64)


class _Arrow:
    """H = Z' diag(w) Z + P over (prompts, families), kept as its blocks; not positive: LinAlgError."""

    def __init__(
        self, w: Array, prompt: Codes, family: Codes, penalty_p: Array, penalty_f: Array
    ) -> None:
        n_p, n_f = len(penalty_p), len(penalty_f)
        self.prompt, self.family = prompt, family
        self.diagonal = _sums(w, prompt, n_p) + penalty_p  # (P,)
        if self.diagonal.min() <= 0:
            raise np.linalg.LinAlgError("not positive definite")
        border = _sums(w, prompt * n_f + family, n_p * n_f).reshape(n_p, n_f)
        self.ratio = border / self.diagonal[:, None]  # (P, F)
        corner = np.diag(_sums(w, family, n_f) + penalty_f)
        schur = corner - border.T @ self.ratio
        factor = np.linalg.cholesky(schur)
        self.schur_inv = np.linalg.inv(schur)
        self.log_det = float(np.log(self.diagonal).sum() + 2 * np.log(np.diag(factor)).sum())

    def solve(self, rhs_p: Array, rhs_f: Array) -> tuple[Array, Array]:
        """Return H⁻¹ rhs, prompts and families apart."""
        f = self.schur_inv @ (rhs_f - self.ratio.T @ rhs_p)
        return rhs_p / self.diagonal - self.ratio @ f, f

    def inverse_diagonals(self) -> tuple[Array, Array, Array]:
        """Return diag(H⁻¹) for prompts and for families, and h = diag(Z H⁻¹ Z') for rows."""
        crossed = self.ratio @ self.schur_inv  # minus the prompt-by-family block of H⁻¹
        prompts = 1 / self.diagonal + (crossed * self.ratio).sum(axis=1)
        families = np.diag(self.schur_inv)
        rows = prompts[self.prompt] + families[self.family] - 2 * crossed[self.prompt, self.family]
        return prompts, families, rows


class Laplace:
    """The Laplace log-likelihood of one data set, as a function of theta.

    Parameters
    ----------
    y : (n,) outcome in (0, 1)
    X, W : (n, p) and (n, q) designs of the logit mean and of the log precision
    prompt, family : (n,) level of each row, from 0
    """

    def __init__(self, y: Array, X: Array, W: Array, prompt: Codes, family: Codes) -> None:
        self.y, self.X, self.W, self.prompt, self.family = y, X, W, prompt, family
        self.u = np.zeros(prompt.max() + 1)
        self.v = np.zeros(family.max() + 1)

    def split(self, theta: Array) -> tuple[Array, Array, float, float]:
        """Return b, g, log sd_prompt and log sd_family."""
        p = self.X.shape[1]
        return theta[:p], theta[p:-2], float(theta[-2]), float(theta[-1])

    def _joint(self, eta: Array, zeta: Array, u: Array, v: Array, lp: float, lf: float) -> float:
        rows = log_density(self.y, eta + u[self.prompt] + v[self.family], zeta).sum()
        prior = (u**2).sum() * np.exp(-2 * lp) / 2 + (v**2).sum() * np.exp(-2 * lf) / 2
        return float(rows - prior - len(u) * lp - len(v) * lf)

    def _to_mode(self, eta: Array, zeta: Array, lp: float, lf: float) -> None:
        """Move (u, v) to the mode of the joint density, by Newton's method with halved steps."""
        u, v, phi = self.u, self.v, np.exp(zeta)
        pen_p, pen_f = np.full(len(u), np.exp(-2 * lp)), np.full(len(v), np.exp(-2 * lf))
        value = self._joint(eta, zeta, u, v, lp, lf)
        for _ in range(100):
            e, observed, expected = _score_and_weight(self.y, eta + u[self.prompt] + v[self.family], phi)
            try:
                arrow = _Arrow(observed, self.prompt, self.family, pen_p, pen_f)
            except np.linalg.LinAlgError:  # far from the mode; the expected weights always ascend
                arrow = _Arrow(expected, self.prompt, self.family, pen_p, pen_f)
            grad_p = _sums(e, self.prompt, len(u)) - pen_p * u
            grad_f = _sums(e, self.family, len(v)) - pen_f * v
            step_p, step_f = arrow.solve(grad_p, grad_f)
            decrement = grad_p @ step_p + grad_f @ step_f
            if decrement < 1e-13:
                self.u, self.v = u + step_p, v + step_f
                return
            scale = 1.0
            while True:
                trial = self._joint(eta, zeta, u + scale * step_p, v + scale * step_f, lp, lf)
                if trial >= value - 1e-9 * abs(value) or scale < 1e-8:
                    break
                scale /= 2
            u, v, value = u + scale * step_p, v + scale * step_f, trial
        raise np.linalg.LinAlgError("the mode of the random effects was not found")

    def value_and_gradient(self, theta: Array) -> tuple[float, Array]:
        """Return the log-likelihood and its gradient; −inf and zeros where it is not defined."""
        b, g, lp, lf = self.split(theta)
        eta, zeta = self.X @ b, self.W @ g
        try:
            with np.errstate(all="ignore"):
                return self._laplace(eta, zeta, lp, lf)
        except np.linalg.LinAlgError:
            self.u, self.v = np.zeros_like(self.u), np.zeros_like(self.v)
            return -np.inf, np.zeros_like(theta)

    def _laplace(self, eta: Array, zeta: Array, lp: float, lf: float) -> tuple[float, Array]:
        self._to_mode(eta, zeta, lp, lf)
        u, v, pen_p, pen_f = self.u, self.v, np.exp(-2 * lp), np.exp(-2 * lf)
        d = _derivatives(self.y, eta + u[self.prompt] + v[self.family], zeta)
        arrow = _Arrow(-d.ee, self.prompt, self.family, np.full(len(u), pen_p), np.full(len(v), pen_f))
        value = self._joint(eta, zeta, u, v, lp, lf) - arrow.log_det / 2
        if not np.isfinite(value):
            raise np.linalg.LinAlgError("not finite")
        inverse_p, inverse_f, h = arrow.inverse_diagonals()
        pull = h * d.eee / 2  # −½ d log det H / d eta, row by row
        a_p, a_f = arrow.solve(  # the adjoint: what a move of the mode does to log det H
            _sums(pull, self.prompt, len(u)), _sums(pull, self.family, len(v))
        )
        moved = a_p[self.prompt] + a_f[self.family]
        gradient = np.concatenate(
            [
                self.X.T @ (d.e + pull + d.ee * moved),
                self.W.T @ (d.z + h * d.eez / 2 + d.ez * moved),
                [
                    ((u**2 + inverse_p + 2 * u * a_p) * pen_p - 1).sum(),
                    ((v**2 + inverse_f + 2 * v * a_f) * pen_f - 1).sum(),
                ],
            ]
        )
        return value, gradient


def _starting_values(y: Array, X: Array, W: Array, prompt: Codes) -> Array:
    """Return a theta from least squares on the logit scale; X and W have orthogonal columns."""
    n = len(y)
    logit = special.logit(np.clip(y, 0.001, 0.999))
    b = X.T @ logit / n
    residual = logit - X @ b
    sizes = np.bincount(prompt)
    between = np.bincount(prompt, residual) / sizes
    within = residual - between[prompt]
    mu = special.expit(X @ b)
    noise = max(float((within**2).sum() / max(n - len(sizes), 1)), 1e-4)
    precision = 1 / max(noise * float((mu * (1 - mu)).mean()), 1e-6)
    sd = np.sqrt(max(float(between.var()) - noise / float(sizes.mean()), 0.01))
    g = W.T @ np.full(n, np.log(precision)) / n
    return np.concatenate([b, g, [np.log(sd), np.log(0.3)]])


def _hessian(laplace: Laplace, theta: Array, free: Codes, step: float = 1e-4) -> Array:
    """Return the Hessian over the free parameters: central differences of the analytic gradient."""
    rows = []
    for j in free:
        ahead, behind = theta.copy(), theta.copy()
        ahead[j] += step
        behind[j] -= step
        upper, lower = laplace.value_and_gradient(ahead), laplace.value_and_gradient(behind)
        if not (np.isfinite(upper[0]) and np.isfinite(lower[0])):
            raise FitError("beta: the log-likelihood is not defined around its maximum")
        rows.append((upper[1] - lower[1])[free] / (2 * step))
    hessian = np.array(rows)
    return (hessian + hessian.T) / 2


def _climb(laplace: Laplace, theta: Array, free: Codes) -> Array:
    """Return theta moved up the log-likelihood over its free entries, by L-BFGS within bounds."""

    def negative(x: Array) -> tuple[float, Array]:
        trial = theta.copy()
        trial[free] = x
        value, gradient = laplace.value_and_gradient(trial)
        return (-value, -gradient[free]) if np.isfinite(value) else (1e10, np.zeros(len(free)))

    last = len(theta) - 2
    bounds = [(ZERO_SD, LARGEST_SD) if j >= last else (None, None) for j in free]
    options = {"maxiter": 2000, "maxfun": 4000, "ftol": 1e-12, "gtol": 1e-5, "maxcor": 30}
    found = optimize.minimize(
        negative, theta[free], jac=True, method="L-BFGS-B", bounds=bounds, options=options
    )
    moved = theta.copy()
    moved[free] = found.x
    return moved


def _newton(laplace: Laplace, theta: Array, free: Codes, names: Sequence[str], back: Array) -> Any:
    """Return theta at the maximum, the covariance of its free entries, the value and the gradient."""
    for _ in range(20):
        hessian = -_hessian(laplace, theta, free)
        values, vectors = np.linalg.eigh(hessian)
        if values[0] <= 1e-8 * values[-1]:
            flat = np.zeros(len(theta))
            flat[free] = vectors[:, 0]
            term = names[int(np.argmax(np.abs(back @ flat)))]
            raise FitError(f"beta: this panel does not determine {term} (flat log-likelihood)")
        value, gradient = laplace.value_and_gradient(theta)
        step = vectors @ (vectors.T @ gradient[free] / values)
        gain = float(gradient[free] @ step) / 2
        if gain < 1e-9:
            cov = (vectors / values) @ vectors.T
            return theta, cov, value, gradient
        theta = _ascend(laplace, theta, free, step, value)
    raise FitError(f"beta: no convergence, {gain:.2g} of log-likelihood still to gain")


def _ascend(laplace: Laplace, theta: Array, free: Codes, step: Array, value: float) -> Array:
    for scale in 0.5 ** np.arange(20):
        trial = theta.copy()
        trial[free] += scale * step
        if laplace.value_and_gradient(trial)[0] >= value - 1e-9:
            return trial
    raise FitError("beta: no convergence, no step raises the log-likelihood")


def fit_beta(
    y: Array,
    X: Array,
    W: Array,
    prompt: Codes,
    family: Codes,
    names: Sequence[str],
    with_family: bool = True,
) -> BetaFit:
    """Return the maximum likelihood fit.

    Parameters
    ----------
    y : (n,) outcome in (0, 1)
    X, W : (n, p) and (n, q) designs of the logit mean and of the log precision, of full rank
    prompt, family : (n,) level of each row, from 0
    names : p + q + 2 names, as FitError is to call the parameters
    with_family : without, the family effect is held at 0

    Raises
    ------
    FitError
        The log-likelihood is flat in some direction (the term is named) or has no maximum found.
    """
    n, m = len(y), X.shape[1] + W.shape[1]
    held = [] if with_family else [m + 1]
    laplace, back, theta, zero = _search(y, X, W, prompt, family, held)
    free = _all_but(len(theta), zero)
    exact = int((laplace.W @ laplace.split(theta)[1] > EXACT).sum())
    try:
        theta, cov, value, gradient = _newton(laplace, theta, free, names, back)
    except FitError as error:
        if not exact:
            raise
        raise FitError(
            f"beta: the log precision grows without bound in {exact} of {n} rows: "
            "too few prompts for its terms, which --precision variant has fewer of, or an outcome "
            "without noise"
        ) from error
    full = np.full((len(theta), len(theta)), np.nan)
    full[np.ix_(free, free)] = back[np.ix_(free, free)] @ cov @ back[np.ix_(free, free)].T
    at_zero = [names[j] for j in zero if j not in held]
    return BetaFit(
        back @ theta, full, value, gradient[free], at_zero, laplace.u.copy(), laplace.v.copy()
    )


def highest_likelihood(
    y: Array, X: Array, W: Array, prompt: Codes, family: Codes, with_family: bool = True
) -> tuple[float, Array]:
    """Return the largest log-likelihood that the search reaches, and theta there.

    As `fit_beta`, without its covariance and its tests that the maximum is one.
    """
    held = [] if with_family else [X.shape[1] + W.shape[1] + 1]
    laplace, back, theta, _ = _search(y, X, W, prompt, family, held)
    return laplace.value_and_gradient(theta)[0], back @ theta


def _search(
    y: Array, X: Array, W: Array, prompt: Codes, family: Codes, held: list[int]
) -> tuple[Laplace, Array, Array, list[int]]:
    """Return the problem in orthogonal columns, the way back, theta at its top, and what is held there.

    Orthogonal columns of unit mean square: the search then sees a round hill, whatever the splines.
    """
    n, p, m = len(y), X.shape[1], X.shape[1] + W.shape[1]
    (q_x, r_x), (q_w, r_w) = np.linalg.qr(X), np.linalg.qr(W)
    back = np.eye(m + 2)
    back[:p, :p] = np.linalg.inv(r_x) * np.sqrt(n)
    back[p:m, p:m] = np.linalg.inv(r_w) * np.sqrt(n)
    laplace = Laplace(y, q_x * np.sqrt(n), q_w * np.sqrt(n), prompt, family)
    theta = _starting_values(y, laplace.X, laplace.W, prompt)
    theta[held] = ZERO_SD
    theta = _climb(laplace, theta, _all_but(len(theta), held))
    theta, zero = _drop_zero_sds(laplace, theta, held)
    return laplace, back, theta, zero


def _all_but(n: int, held: Sequence[int]) -> Codes:
    return np.array([j for j in range(n) if j not in held])


def _drop_zero_sds(laplace: Laplace, theta: Array, held: list[int]) -> tuple[Array, list[int]]:
    """Return theta and what is held, each sd whose best value is 0 set there.

    On the log scale the hill only levels off towards an sd of 0, so the search stops somewhere small.
    """
    zero = list(held)
    for j in (len(theta) - 2, len(theta) - 1):
        if j in zero or theta[j] > np.log(0.05):
            continue
        trial = theta.copy()
        trial[j] = ZERO_SD
        if laplace.value_and_gradient(trial)[0] >= laplace.value_and_gradient(theta)[0] - 1e-6:
            zero.append(j)
            theta = _climb(laplace, trial, _all_but(len(theta), zero))
    return theta, zero
