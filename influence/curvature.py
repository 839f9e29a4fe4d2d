"""The target loss's curvature along the candidates' steps: the matrix Q of the robust objective.

Influence Distillation (arXiv 2505.19051, section 3): the second-order Taylor expansion of the
target loss after one step on the weighted pool has the quadratic term w'Qw with
Q = (1/n) A H_T A', where the rows of A are the candidates' steps a * g_i (not normalised) and H_T
is the Hessian of the mean target loss. Q is n x n and of low rank: it is only ever a factor B with
Q = B B'. Two ways to have H_T are here: the covariance of the targets' own gradients (the empirical
Fisher matrix about their mean), and exact Hessian-vector products along a few directions that span
the landmarks' rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.linalg import eigh

from influence.errors import InputError
from influence.loss import Reduction

# f_t = T_t^power: a row's H_t = n_t F and Cov(g_t) = (n_t^2 / T_t) F, with n_t = T_t^(1 - power).
_FISHER_POWER = {"mean": 1.0, "sqrt": 0.5, "sum": 0.0}
# Singular values below this share of the largest are rounding: float32 rows hold seven digits.
_RANK_TOLERANCE = 1e-6
_SUM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Curvature:
    """Q and q of the robust objective over n rows.

    factor: B with Q = B B' (Q's negative part left out, see `clipped`). negative: N, the part left
    out: the whole of Q is B B' - N N'. drift: q = A H_T b; zeros where the step has no offset b.
    offset: b'H_T b. clipped: share of H_T's absolute eigenvalues along the directions that were
    negative and are taken as 0, so that the programme stays convex. asymmetry: of the measured
    V'H_T V, relative to its size, before it was made symmetric (rounding).
    """

    factor: Float[np.ndarray, "n r"]
    negative: Float[np.ndarray, "n s"]
    drift: Float[np.ndarray, " n"]
    offset: float = 0.0
    clipped: float = 0.0
    asymmetry: float = 0.0

    def quadratic(self, weights: Float[np.ndarray, " n"], *, clipped: bool = True) -> float:
        """w'Qw; with the negative part of Q if not `clipped`."""
        along = self.factor.T @ weights
        value = float(along @ along)
        if not clipped:
            below = self.negative.T @ weights
            value -= float(below @ below)
        return value


@dataclass(frozen=True)
class Directions:
    """r directions V = A_L' W in parameter space, as weights over the landmarks' rows.

    weights: W. image: the sketch of V, with orthonormal columns. uncovered: the share of |A_L|^2
    (in the sketch) outside their span.
    """

    weights: Float[np.ndarray, "l r"]
    image: Float[np.ndarray, "d r"]
    uncovered: float


def fisher_curvature(
    products: Float[np.ndarray, "n m"],
    shares: Float[np.ndarray, " m"],
    response_tokens: Int[np.ndarray, " m"],
    offset_products: Float[np.ndarray, " m"] | None = None,
    *,
    reduction: Reduction = "mean",
    total: int | None = None,
) -> Curvature:
    """Q with H_T from the covariance of the target rows' gradients, from <a * g_i, g_t>.

    Let a token's score (the gradient of its own loss) have mean mu and covariance C. Where the
    labels are the model's own, mu is 0 and C is F, the Fisher matrix of one token, which is the
    Hessian of its loss. The gradient g_t of a row of T_t tokens under the `mean` loss then has
    mean mu and covariance C / T_t, so that T_t (g_t - mu)(g_t - mu)' estimates C. Away from the
    optimum mu is not 0, and the second moment T_t g_t g_t' is C + T_t mu mu': a part that is no
    curvature and grows with the rows' length (the empirical Fisher matrix; Kunstner et al., arXiv
    1905.12558, section 3). Therefore about the mean, as gradient noise is measured (McCandlish et
    al., arXiv 1812.06162, section 2.2):

        H_T ~ c sum_t share_t T_t (g_t - g_T)(g_t - g_T)',    g_T = sum_t share_t g_t,
        1/c = 1 - 2 sum share_t^2 + (sum share_t T_t) (sum share_t^2 / T_t),

    where c makes up for g_T being made of the same rows: m / (m - 1) for m equal rows of equal
    length. Under `sqrt` and `sum` a row's gradient and Hessian are n_t = sqrt(T_t) and T_t times
    as large: with h_t = g_t / n_t and u_t = share_t n_t / N, N = sum share_t n_t, it is N times the
    same of h_t and u_t in place of g_t and share_t.

    `shares` are the target rows' shares of the mean target loss (1/m each), `offset_products`
    <b, g_t> of the step's offset (None: there is none). `total` is n, the number of rows that the
    weights are spread over, where `products` has fewer.
    Raises InputError for fewer than two target rows, which have no covariance, and for shares or
    tokens that do not fit.
    """
    centred, weights = _covariance(shares, response_tokens, reduction, products.shape[1])
    n = len(products) if total is None else total
    # One product instead of P - mean: of 10^7 rows every copy is gigabytes.
    factor = products @ (centred * np.sqrt(weights / n)).astype(products.dtype)
    none = np.empty((len(products), 0))
    if offset_products is None:
        return Curvature(factor, none, np.zeros(len(products)))
    along = np.asarray(offset_products, np.float64) @ centred
    drift = (factor @ (np.sqrt(weights * n) * along).astype(products.dtype)).astype(np.float64)
    return Curvature(factor, none, drift, offset=float(weights @ along**2))


def _covariance(
    shares: Float[np.ndarray, " m"], response_tokens: Int[np.ndarray, " m"], reduction: str, m: int
) -> tuple[Float[np.ndarray, "m m"], Float[np.ndarray, " m"]]:
    """(M, w): H_T ~ sum_t w_t d_t d_t', where the deviations d are the columns of G' M."""
    share, tokens = np.asarray(shares, np.float64), np.asarray(response_tokens, np.float64)
    if m < 2:
        raise InputError(
            f"weights.curvature: fisher is the covariance of the target rows' gradients, and there "
            f"is {m} target row; expected at least 2: add target rows, or use "
            "weights.curvature: hvp"
        )
    fits = share.shape == tokens.shape == (m,) and (share > 0).all() and (tokens >= 1).all()
    if not fits or abs(share.sum() - 1) > _SUM_TOLERANCE:
        raise InputError(
            f"curvature: {share.size} shares with sum {share.sum():g} and {tokens.size} numbers of "
            f"response tokens for products with {m} target rows; expected a share above 0 and at "
            "least 1 token for each, and shares with sum 1"
        )
    size = tokens ** (1.0 - _FISHER_POWER[reduction])
    whole = float(share @ size)
    part = share * size / whole
    lost = 2 * (part**2).sum() - (part @ tokens) * (part**2 / tokens).sum()
    centred = np.eye(m) - np.outer(share, size / whole)
    return centred, share * tokens ** _FISHER_POWER[reduction] / (1.0 - lost)


def choose_directions(rows: Float[np.ndarray, "l d"], count: int) -> Directions:
    """The `count` leading right singular directions of the landmarks' (sketched) rows a * g.

    They are the span of that size with the smallest residual sum |a_l - Z V'|^2; fewer where the
    rows have a smaller rank. W = U / s, so that V = A_L' W is orthonormal in the sketch: the same
    weights over the unsketched rows give the directions themselves, as sketching is linear.
    The sign of a direction is fixed by its largest weight, so that the same rows give the same
    bits of it. Raises InputError if every row is zero.
    """
    wide = np.asarray(rows, np.float64)
    # In float64 the Gram matrix, which squares the condition, still holds what float32 rows say.
    gram = wide @ wide.T
    first = max(0, len(gram) - count)
    values, left = eigh(gram, subset_by_index=[first, len(gram) - 1])
    sizes, left = np.sqrt(values[::-1].clip(min=0.0)), left[:, ::-1]
    if not sizes[0] > 0:
        raise InputError("curvature: the landmarks' gradients are all zero; there is no direction")
    kept = int((sizes > _RANK_TOLERANCE * sizes[0]).sum())
    weights = left[:, :kept] / sizes[:kept]
    largest = np.abs(weights).argmax(axis=0)
    weights = weights * np.sign(weights[largest, np.arange(kept)])
    uncovered = max(0.0, 1.0 - float((sizes[:kept] ** 2).sum() / np.trace(gram)))
    return Directions(weights, wide.T @ weights, uncovered)


def coefficients(
    rows: Float[np.ndarray, "n d"], image: Float[np.ndarray, "d r"]
) -> Float[np.ndarray, "n r"]:
    """Z of rows ~ Z V' by least squares in the sketch, where V has orthonormal columns.

    Rows that lie in the span get their exact coefficients, whatever the sketch's noise: sketching
    is linear, so the relation between rows and directions survives it.
    """
    return np.asarray(rows, np.float64) @ image


def subspace_curvature(
    coefficients: Float[np.ndarray, "n r"],
    measured: Float[np.ndarray, "r r"],
    offset_products: Float[np.ndarray, " r"] | None = None,
    *,
    offset: float = 0.0,
    total: int | None = None,
) -> Curvature:
    """Q = (1/n) Z S Z' with S = V'H_T V, from Hessian-vector products along the directions V.

    `measured[j, k]` is v_j'(H_T v_k), `offset_products` V'(H_T b) and `offset` b'H_T b. S is made
    symmetric; negative eigenvalues, which a Hessian may have, are taken as 0:
    B = Z U sqrt(max(s, 0) / n). q = Z V'H_T b is linear in w and stays as it is.
    Raises InputError for numbers that are not finite.
    """
    S = np.asarray(measured, np.float64)
    if not np.isfinite(S).all():
        raise InputError(
            "curvature: a Hessian-vector product of the target loss is not finite; use "
            "model.dtype: float32, or weights.curvature: fisher"
        )
    size = float(np.abs(S).max(initial=0.0))
    asymmetry = float(np.abs(S - S.T).max(initial=0.0)) / size if size > 0 else 0.0
    values, vectors = np.linalg.eigh((S + S.T) / 2)
    absolute = float(np.abs(values).sum())
    clipped = float(-values[values < 0].sum()) / absolute if absolute > 0 else 0.0
    n = len(coefficients) if total is None else total
    into = coefficients @ (vectors * np.sqrt(np.abs(values) / n))
    drift = np.zeros(len(coefficients))
    if offset_products is not None:
        drift = coefficients @ np.asarray(offset_products, np.float64)
    return Curvature(into[:, values > 0], into[:, values < 0], drift, offset, clipped, asymmetry)
