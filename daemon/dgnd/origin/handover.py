"""A hop that is about to leave is replaced while it lives: at its origin, when others can do what it does.

What is told of it comes from the hop's node; how hops are replaced is `dgnd.sessions.recovery`'s, as if it
had died.
"""

from __future__ import annotations

from collections.abc import Collection

from dgnd.errors import Draining
from dgnd.origin.conversation import Conversation
from dgnd.sessions.navigator import Navigator


def leave_peers(conversation: Conversation, navigator: Navigator, peers: Collection[str]) -> None:
    """Ends the use of all hops at `peers`."""
    driver = conversation.driver
    driver.leaving |= {hop.hop for hop in driver.session.route if hop.peer in peers}
    hand_over(conversation, navigator)


def hand_over(conversation: Conversation, navigator: Navigator) -> None:
    """Ends the use of hops that are about to leave. To be called when one says so, and when offers change.

    Between two answers they are given up at once: the next turn begins with others in their place. In the
    middle of one the answer moves on if somebody else has the blocks; else it stays as long as they do.
    """
    driver = conversation.driver
    if not driver.leaving:
        return
    if not conversation.busy:
        driver.let_go()
    elif driver.usable and navigator.can_spare(driver, conversation.model):
        places = ", ".join(driver.place(hop) for hop in driver.session.route if hop.hop in driver.leaving)
        driver.fail(Draining(f"{places} is about to leave"))
