"""Whether the weights of some blocks fit into memory, and what would, in words with the numbers.

Pure: who asks says how many bytes something takes. Knows nothing of files, workers or of who has the memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from dgn_backends.model import ModelConfig
from dgn_backends.span import Span, format_units, span_of_units
from dgnd.words import format_bytes

#: What is offered instead, the better one first.
SMALLER = ("int8", "int4")

#: Of a session that is to find room beside the weights, at least; as many as KV is counted in.
LEAST_POSITIONS = 256

#: Bytes that one span takes as stored with a `quant`.
Needs = Callable[[Span, str], int]


def refusal(spans: Sequence[Span], quant: str, n_blocks: int, free: int, needs: Needs) -> str:
    """Why `spans` do not fit into `free` bytes, with what would; empty where they do."""
    whole = sum(needs(span, quant) for span in spans)
    if whole <= free:
        return ""
    units = [unit for span in spans for unit in span.units()]
    first = _fitting(units, quant, n_blocks, free, needs)
    has_block = any(0 < unit <= n_blocks for unit in first)
    fits = f"{_named(first, n_blocks)} fit" if has_block else "not one block fits"
    smaller = next(
        (f"; as {each} all fit in {format_bytes(size)}" for each, size in _all(spans, quant, whole, needs)
         if size <= free),
        "",
    )  # fmt: skip
    return f"needs {format_bytes(whole)}, {format_bytes(max(free, 0))} free: {fits}{smaller}"


def least_kv(config: ModelConfig, span: Span) -> int:
    """Bytes of KV of one short session through `span`, in f32."""
    block = config.block
    return LEAST_POSITIONS * 2 * block.n_kv_heads * block.head_dim * 4 * (span.stop - span.start)


def _all(spans: Sequence[Span], quant: str, whole: int, needs: Needs) -> Iterable[tuple[str, int]]:
    sizes = [(each, sum(needs(span, each) for span in spans)) for each in SMALLER if each != quant]
    return [(each, size) for each, size in sizes if size < whole]


def _fitting(units: Sequence[int], quant: str, n_blocks: int, free: int, needs: Needs) -> list[int]:
    """The first of `units` that fit, without a hole."""
    first: list[int] = []
    for unit in units:
        if first and unit != first[-1] + 1:
            break
        run = [*first, unit]
        if needs(span_of_units(range(run[0], run[-1] + 1), n_blocks), quant) > free:
            break
        first = run
    return first


def _named(units: Sequence[int], n_blocks: int) -> str:
    text = format_units(units, n_blocks)
    return f"blocks {text}" if text[0].isdigit() else text
