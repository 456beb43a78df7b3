"""A small 0-1 program with two objectives, solved by HiGHS through scipy.

First the repeated share is minimised, then the time among the solutions that reach that minimum.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix

MICROSECONDS = 1e6  # times are scaled to numbers near 1
TOLERANCE = 1e-6  # of the repeated share, above HiGHS's own

Vector = np.ndarray[tuple[int], np.dtype[np.float64]]
Terms = list[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Answer:
    """A solution: the value of each variable, its time, and the repeated share."""

    values: Vector
    seconds: float
    repeated: float


@dataclass
class IntegerProgram:
    """Variables in [0, 1] with costs, and rows ``lower <= sum of terms <= upper``."""

    costs: list[float] = field(default_factory=list)
    repeated: list[float] = field(default_factory=list)
    integral: list[int] = field(default_factory=list)
    entries: list[tuple[int, int, float]] = field(default_factory=list)
    lower: list[float] = field(default_factory=list)
    upper: list[float] = field(default_factory=list)

    def variable(self, seconds: float, repeated: float = 0.0, *, integral: bool = False) -> int:
        """Add a variable and return its column."""
        self.costs.append(seconds * MICROSECONDS)
        self.repeated.append(repeated)
        self.integral.append(int(integral))
        return len(self.costs) - 1

    def row(self, terms: Terms, lower: float, upper: float) -> None:
        """Add a constraint."""
        number = len(self.lower)
        self.entries += [(number, column, value) for column, value in terms]
        self.lower.append(lower)
        self.upper.append(upper)

    def solve(self, *, chosen: int | None = None) -> Answer | None:
        """Return the best solution, None if there is none. `chosen` is a column that must be 1."""
        least = self._minimize(self.repeated, chosen, np.inf)
        if least is None:
            return None
        limit = float(np.dot(least, self.repeated))
        values = self._minimize(self.costs, chosen, limit + TOLERANCE)
        if values is None:
            return None
        seconds = float(np.dot(values, self.costs)) / MICROSECONDS
        return Answer(values, seconds, float(np.dot(values, self.repeated)))

    def _minimize(self, costs: list[float], chosen: int | None, limit: float) -> Vector | None:
        shares = [(column, share) for column, share in enumerate(self.repeated) if share]
        last = len(self.lower)
        entries = [*self.entries, *((last, column, share) for column, share in shares)]
        rows, columns, values = zip(*entries, strict=True)
        matrix = csr_matrix((values, (rows, columns)), shape=(last + 1, len(costs)))
        lower = np.zeros(len(costs))
        if chosen is not None:
            lower[chosen] = 1
        result = milp(
            costs,
            integrality=self.integral,
            bounds=Bounds(lower, 1),
            constraints=LinearConstraint(matrix, [*self.lower, 0], [*self.upper, limit]),
            options={"mip_rel_gap": 0.0},
        )
        found: Vector | None = result.x
        return found
