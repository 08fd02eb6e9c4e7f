"""Several answers at the same time from one daemon, each to a client of its own, and what they bring together
while all of them decode. Knows nothing of what is compared.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path

from dgnd.control import api
from dgnd.control.client import ControlClient


def together(socket: Path, prompts: list[tuple[int, ...]], tokens: int) -> tuple[float, float]:
    """One answer of `tokens` to each prompt, side by side: seconds until the last of them has begun, and
    tokens a second from then until the first has ended."""
    asked = time.perf_counter()
    arrivals: list[list[float]] = [[] for _ in prompts]
    errors: list[BaseException] = []

    def ask(prompt: tuple[int, ...], times: list[float]) -> None:
        def on_delta(delta: api.GenerateDelta) -> None:
            times.extend([time.perf_counter()] * len(delta.token_ids))

        params = api.GenerateParams(token_ids=prompt, max_tokens=tokens, temperature=0.0)
        try:
            with ControlClient(socket) as client:
                client.generate(params, on_delta)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [
        threading.Thread(target=ask, args=(prompt, times))
        for prompt, times in zip(prompts, arrivals, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    begin, end = max(times[0] for times in arrivals), min(times[-1] for times in arrivals)
    counted = sum(begin < arrival <= end for times in arrivals for arrival in times)
    return begin - asked, counted / (end - begin)
