"""A convex model whose optimum is found exactly: the truth for influences of rows and groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class LogisticHead:
    """Multinomial logistic regression on fixed features, with a ridge in every row's loss.

    The loss of row i is its cross-entropy plus ridge/2 |theta|^2, the training loss their mean.
    """

    X: Float[Tensor, "n f"]
    y: Int[Tensor, " n"]
    X_test: Float[Tensor, "t f"]
    y_test: Int[Tensor, " t"]
    classes: int
    ridge: float
    theta: Float[Tensor, " d"]

    def losses(self, theta: Tensor, rows: Sequence[int] | None = None) -> Float[Tensor, " r"]:
        """Each row's loss."""
        X, y = (self.X, self.y) if rows is None else (self.X[list(rows)], self.y[list(rows)])
        logits = X @ theta.view(self.classes, -1).T
        plain = torch.nn.functional.cross_entropy(logits, y, reduction="none")
        return plain + 0.5 * self.ridge * theta.square().sum()

    def test_loss(self, theta: Tensor) -> Tensor:
        """Mean cross-entropy of the target rows."""
        logits = self.X_test @ theta.view(self.classes, -1).T
        return torch.nn.functional.cross_entropy(logits, self.y_test)

    def optimum(self, rows: Sequence[int]) -> Float[Tensor, " d"]:
        """Newton's method on the mean loss of these rows, from the optimum of all."""
        theta = self.theta.clone()

        def loss(at: Tensor) -> Tensor:
            return self.losses(at, rows).mean()

        for _ in range(30):
            gradient = torch.func.grad(loss)(theta)
            if float(gradient.norm()) < 1e-12:
                return theta
            theta = theta - torch.linalg.solve(torch.func.hessian(loss)(theta), gradient)
        raise AssertionError("Newton's method does not end: the oracle is wrong")

    def gradients(self) -> Float[Tensor, "n d"]:
        """Of each row's loss at the optimum; their mean is 0."""
        return torch.func.jacrev(self.losses)(self.theta)

    def target_gradient(self) -> Float[Tensor, " d"]:
        """Of the target loss at the optimum."""
        return torch.func.grad(self.test_loss)(self.theta)

    def hessian(self, rows: Sequence[int] | None = None) -> Float[Tensor, "d d"]:
        """Of the mean loss of these rows (None: all) at the optimum."""
        return torch.func.hessian(lambda at: self.losses(at, rows).mean())(self.theta)

    def leave_one_out(self) -> Float[Tensor, " n"]:
        """Target loss after retraining without each row, minus that with all."""
        n, before = len(self.X), self.test_loss(self.theta)
        without = [self.optimum([j for j in range(n) if j != i]) for i in range(n)]
        return torch.stack([self.test_loss(theta) - before for theta in without])


def logistic_head(
    rows: int, tests: int, seed: int, *, features: int = 6, classes: int = 3, ridge: float = 0.05
) -> LogisticHead:
    """Noisy classes around random centres, at the exact optimum in float64."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, features, generator=generator, dtype=torch.float64)
    y = torch.randint(classes, (rows + tests,), generator=generator)
    noise = torch.randn(rows + tests, features, generator=generator, dtype=torch.float64)
    X = centres[y] + 1.2 * noise
    start = torch.zeros(classes * features, dtype=torch.float64)
    head = LogisticHead(X[:rows], y[:rows], X[rows:], y[rows:], classes, ridge, start)
    head.theta = head.optimum(range(rows))
    return head
