"""How long a session may become in the KV caches of its hops. Knows nothing of who they are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dgnd.errors import LimitError
from dgnd.wire.messages import HopOpened


@dataclass(frozen=True, slots=True, order=True)
class KvRoom:
    """`positions` fit into the `budget` bytes of the hop `where`."""

    positions: int
    budget: int
    where: str

    def after(self, prompt: int) -> int:
        """How many tokens may follow a prompt of so many positions. Raises LimitError where it can never
        fit, before anything is computed."""
        if not self.positions:
            raise LimitError(
                f"{self.where} has no room for any session: its KV caches may take "
                f"{self.budget if self.budget > 1 else 0:,} bytes; raise memory in [limits] (or kv_bytes, "
                "where it is set) there, or serve fewer blocks",
                prompt_tokens=prompt,
                positions=0,
                budget=self.budget,
            )
        if prompt > self.positions:
            raise LimitError(
                f"the prompt has {prompt:,} tokens; the KV cache of {self.where} holds {self.positions:,} in "
                f"its {self.budget:,} bytes; shorten the prompt, or raise memory in [limits] (or kv_bytes, "
                "where it is set) there",
                prompt_tokens=prompt,
                positions=self.positions,
                budget=self.budget,
            )
        return self.positions - prompt + 1  # the last token is never sent through the model


def least_room(said: Iterable[tuple[str, HopOpened]]) -> KvRoom | None:
    """That of the hop that can hold least, of hops by name; None where none knows a bound."""
    return min(
        (
            KvRoom(opened.kv_positions, opened.kv_budget, where)
            for where, opened in said
            if opened.kv_positions is not None
        ),
        default=None,
    )
