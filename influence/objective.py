"""What a run says of the robust objective that its weights minimise: `objective` in fidelity.json.

JSON has no infinity: a lambda that grew without bound, or a bound over no rows, is null.
"""

from __future__ import annotations

from pydantic import BaseModel, Field


class PathPoint(BaseModel):
    """The programme's optimum for one budget."""

    budget: int
    support: int = Field(description="rows with weight: the budget, or the nearest there is")
    attainable: bool
    lam: float | None = Field(description="null: infinite, all weights are equal")
    effective_rows: float = Field(description="exp of the entropy of the weights' shares")
    predicted_first: float = Field(description="change of the target loss, nats")
    predicted_second: float


class Objective(BaseModel):
    """The second-order programme of a run, and how well it was solved.

    The predicted changes are those of the mean target loss after one step of size `eta` on the
    weighted selection; the second order has the negative curvature, too, that the programme leaves
    out (`clipped`).
    """

    order: int = 2
    curvature: str
    eta: float
    directions: int = Field(description="rank of the factor of Q")
    lam: float | None = Field(description="null: infinite, all weights are equal")
    note: str | None = None
    budget: int = Field(description="rows asked for")
    support: int = Field(description="rows with weight")
    attainable: bool
    kkt: float = Field(description="residual of the optimality conditions, relative")
    iterations: int
    left_out: int = Field(description="rows tied with the last one that the order of ids left out")
    outside: int = Field(description="rows that the solver proved out without looking closely")
    bound: float | None = Field(description="their largest reduced gain, below 0")
    effective_rows: float
    clipped: float = Field(description="share of the curvature that is negative, taken as 0")
    uncovered: float = Field(description="share of |A_L|^2 outside the directions")
    asymmetry: float = Field(description="of the measured Hessian, relative")
    offset_gradient: float = Field(description="g_T'b of the optimiser's offset")
    offset_curvature: float = Field(description="b'H_T b")
    predicted_first: float
    predicted_second: float
    path: list[PathPoint] = Field(default_factory=list)
