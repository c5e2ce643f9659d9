"""Find the shares of noise and rows with which a module's compressed lengths come out as the real ones."""

from __future__ import annotations

from collections.abc import Callable

SHARES = 65536
GOOD_ENOUGH = 0.004

Shares = tuple[int, int]
Errors = tuple[float, float]


class Tuning:
    """Searches with a function that gives the relative errors of both lengths, .xz first, for some shares."""

    def __init__(self, measure: Callable[[Shares], Errors]) -> None:
        self._measure = measure
        self._known: dict[Shares, Errors] = {}

    def best(self) -> Shares:
        """Return the best shares found."""
        self._newton()
        if self._badness() > GOOD_ENOUGH:
            # At a border only one share is left to choose: let the errors of both lengths cancel out.
            self._bisect(lambda share: (share, 0))
            self._bisect(lambda share: (0, share))
        return min(self._known, key=lambda shares: max(map(abs, self._known[shares])))

    def _badness(self) -> float:
        return min(max(map(abs, errors)) for errors in self._known.values())

    def _errors(self, shares: Shares) -> Errors:
        if shares not in self._known:
            self._known[shares] = self._measure(shares)
        return self._known[shares]

    def _newton(self) -> None:
        """Follow the lengths, nearly linear in the shares but for matches that the compressors find by chance."""
        noise, rows, step = 2000, 2000, 3000
        for _ in range(7):
            errors = self._errors((noise, rows))
            if max(map(abs, errors)) < GOOD_ENOUGH:
                return
            one, two = self._errors((noise + step, rows)), self._errors((noise, rows + step))
            (a, b), (c, d) = ([(e - f) / step for e, f in zip(other, errors, strict=True)] for other in (one, two))
            determinant = a * d - b * c
            if abs(determinant) < 1e-14:
                return
            noise -= round((errors[0] * d - errors[1] * c) / determinant)
            rows -= round((errors[1] * a - errors[0] * b) / determinant)
            if not (noise >= 0 and rows >= 0 and noise + rows <= SHARES - step):
                return
            step = max(300, step // 2)

    def _bisect(self, shares: Callable[[int], Shares]) -> None:
        low, high = 0, SHARES
        for _ in range(10):
            middle = (low + high) // 2
            if sum(self._errors(shares(middle))) < 0:
                low = middle
            else:
                high = middle
