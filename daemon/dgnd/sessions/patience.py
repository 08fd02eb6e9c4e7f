"""How long is waited for progress: in what this process itself waited, so that nobody is late while it stands
still, and however much is said meanwhile that is none. Knows nothing of messages.
"""

from __future__ import annotations

#: After so long without progress those who are waited for are looked after.
LOOK_S = 0.75


class Patience:
    """With one thing that is to happen within `limit_s`."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._waited_s = 0.0
        self._unseen_s = 0.0

    @property
    def is_over(self) -> bool:
        """Whether it did not happen."""
        return self._waited_s >= self._limit_s

    @property
    def slice_s(self) -> float:
        """For how long to wait next: until it is over, or until somebody has to be looked after."""
        return max(min(LOOK_S - self._unseen_s, self._limit_s - self._waited_s), 0.0)

    def spend(self, seconds: float) -> bool:
        """So much of a slice went by; whether those who are waited for are to be looked after now."""
        self._waited_s += seconds
        self._unseen_s += seconds
        looks = self._unseen_s >= LOOK_S or self.is_over
        if looks:
            self._unseen_s = 0.0
        return looks

    def renew(self) -> None:
        """It goes on: from now on it may take as long again."""
        self._waited_s = self._unseen_s = 0.0
