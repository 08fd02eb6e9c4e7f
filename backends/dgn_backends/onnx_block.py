"""The nodes of one decoder block, and of the head, in terms of ONNX Runtime's fused operators.

Linear layers see the rows of a whole batch, [rows, width]. For attention the rows are spread over a grid
[slots, longest step] by an index, and collected again by another. Knows nothing of files or of sessions.
"""

from __future__ import annotations

from dataclasses import dataclass

from dgn_backends.model import BlockSpec
from dgn_backends.onnx_graph import FUSED, Array, GraphBuilder
from dgn_backends.onnx_linear import LinearWeights

#: GroupQueryAttention rotates heads of a multiple of 16 only; narrower ones are padded with zeros.
_HEAD_MULTIPLE = 16
_TABLES = ("cos", "sin")


@dataclass(frozen=True, slots=True, eq=False)
class BlockWeights:
    """The weights of one block; norms in the dtype of the rows. Layers that share their input stay apart:
    each is then computed with where it lies in its file, and their results need not be split."""

    input_norm: Array
    q: LinearWeights
    k: LinearWeights
    v: LinearWeights
    q_norm: Array | None
    k_norm: Array | None
    out: LinearWeights
    post_norm: Array
    gate: LinearWeights
    up: LinearWeights
    down: LinearWeights


@dataclass(frozen=True, slots=True)
class Stream:
    """The hidden states between two blocks: `branch` + `residual`, not added yet, since the next norm does
    it; `branch` alone at a span's start."""

    branch: str
    residual: str = ""


def padded_head_dim(head_dim: int) -> int:
    """The width of a head as attention and KV hold it."""
    return -(-head_dim // _HEAD_MULTIPLE) * _HEAD_MULTIPLE


def declare_inputs(
    graph: GraphBuilder, spec: BlockSpec, has_blocks: bool, has_head: bool, is_inner: bool
) -> Stream:
    """The inputs that all blocks share; the span's first hidden states. `is_inner`: there are blocks before,
    and what follows is computed bit by bit as in one graph with them."""
    graph.input("hidden", "f32", ["rows", spec.hidden_size])
    if has_blocks:
        half = padded_head_dim(spec.head_dim) // 2
        graph.input("to_grid", "i32", ["slots", "longest"])  # for each cell of the grid its row, or any row
        graph.input("from_grid", "i32", ["rows"])  # for each row its cell
        graph.input("totals_less_1", "i32", ["slots"])  # positions after the step, less one
        graph.input("counts", "i32", ["slots"])  # new positions; 0 for a slot that has no step
        graph.input("longest_total", "i32", [])
        for table in _TABLES:
            graph.input(table, "f32", ["table", half])
            if graph.numbers.attention != "f32":
                graph.cast(table, "f32", graph.numbers.attention, _cast_table(table))
    if has_head:
        graph.input("wanted", "i32", ["wanted_rows"])
    hidden = graph.cast("hidden", "f32", graph.numbers.rows)
    if not is_inner or graph.numbers.rows != "f32":
        return Stream(hidden)
    # Norms that add and norms that don't round differently: within a graph only the first one doesn't.
    return Stream(graph.node("Sub", [hidden, hidden]), hidden)


def _cast_table(table: str) -> str:
    return f"{table}.cast"


def add_block(graph: GraphBuilder, number: int, spec: BlockSpec, weights: BlockWeights, x: Stream) -> Stream:
    """Appends block `number`; hidden states in, hidden states out. Its KV are the inputs `keys.N` and
    `values.N` [slots, n_kv_heads, capacity, padded head_dim], which the session binds to the same memory as
    the outputs `new_keys.N` and `new_values.N`."""
    normed, residual = _norm(graph, x, weights.input_norm, spec.norm_eps)
    mixed = _attention(graph, number, spec, weights, normed)
    after = Stream(weights.out.add_to(graph, mixed), residual)
    normed, residual = _norm(graph, after, weights.post_norm, spec.norm_eps)
    gate, up = weights.gate.add_to(graph, normed), weights.up.add_to(graph, normed)
    silu = graph.node("QuickGelu", [gate], domain=FUSED, alpha=1.0)  # x * sigmoid(1.0 * x)
    inner = graph.node("Mul", [silu, up])
    return Stream(weights.down.add_to(graph, inner), residual)


def add_end(graph: GraphBuilder, spec: BlockSpec, x: Stream) -> None:
    """The output `hidden_out` of a span without head."""
    total = "hidden_out"
    rows = graph.numbers.rows
    if x.residual and rows == "f32":
        graph.nodes_to([total], "Add", [x.branch, x.residual])
    else:
        out = graph.node("Add", [x.branch, x.residual]) if x.residual else x.branch
        graph.cast(out, rows, "f32", total)
    graph.output(total, "f32", ["rows", spec.hidden_size])


def add_head(
    graph: GraphBuilder, spec: BlockSpec, final_norm: Array, head: LinearWeights, vocab_size: int, x: Stream
) -> None:
    """The output `logits` [wanted_rows, vocab_size], of the wanted rows alone."""
    picked = Stream(
        *(graph.node("Gather", [part, "wanted"], axis=0) if part else "" for part in (x.branch, x.residual))
    )
    normed, _ = _norm(graph, picked, final_norm, spec.norm_eps)
    if graph.numbers.rows == "f32":
        head.add_to(graph, normed, "logits")
    else:
        graph.cast(head.add_to(graph, normed), graph.numbers.rows, "f32", "logits")
    graph.output("logits", "f32", ["wanted_rows", vocab_size])


def _norm(graph: GraphBuilder, x: Stream, gamma: Array, eps: float) -> tuple[str, str]:
    """The normed hidden states, and the hidden states themselves."""
    weight = graph.floats(graph.new_name("norm.weight"), gamma, graph.numbers.rows)
    if not x.residual:
        normed = graph.node(
            "SimplifiedLayerNormalization", [x.branch, weight], axis=-1, epsilon=eps, stash_type=1
        )
        return normed, x.branch
    normed, total = graph.new_name("normed"), graph.new_name("hidden")
    inputs = [x.branch, x.residual, weight]
    graph.nodes_to(
        [normed, "", "", total], "SkipSimplifiedLayerNormalization", inputs, domain=FUSED, epsilon=eps
    )
    return normed, total


def _attention(graph: GraphBuilder, number: int, spec: BlockSpec, weights: BlockWeights, normed: str) -> str:
    """Attention of the normed rows, [rows, n_heads * head_dim]."""
    width = padded_head_dim(spec.head_dim)
    numbers = graph.numbers
    heads = [spec.n_heads, spec.n_kv_heads, spec.n_kv_heads]
    parts: list[str] = []
    layers = (weights.q, weights.k, weights.v)
    for layer, count, gamma in zip(layers, heads, (weights.q_norm, weights.k_norm, None), strict=True):
        part = _norm_heads(graph, spec, count, layer.add_to(graph, normed), gamma)
        padded = graph.cast(_pad(graph, spec, count, part), numbers.rows, numbers.attention)
        parts.append(graph.node("Gather", [padded, "to_grid"], axis=0))
    for kind in ("keys", "values"):
        shape: list[int | str] = ["slots", spec.n_kv_heads, "capacity", width]
        graph.input(f"{kind}.{number}", numbers.attention, shape)
        graph.output(f"new_{kind}.{number}", numbers.attention, shape)
    tables = ["", ""]
    if spec.rotary:
        tables = [table if numbers.attention == "f32" else _cast_table(table) for table in _TABLES]
    mixed = graph.new_name("mixed")
    graph.nodes_to(
        [mixed, f"new_keys.{number}", f"new_values.{number}"],
        "GroupQueryAttention",
        [
            *parts,
            f"keys.{number}",
            f"values.{number}",
            "totals_less_1",
            "longest_total",
            *tables,
            *[""] * 7,  # position ids, bias, sink, scales of a quantised cache, norms of q and k
            "counts",
        ],
        domain=FUSED,
        num_heads=spec.n_heads,
        kv_num_heads=spec.n_kv_heads,
        scale=spec.head_dim**-0.5,
        do_rotary=int(spec.rotary),
        local_window_size=-1 if spec.window is None else spec.window,
    )
    rows = graph.node("Reshape", [mixed, graph.constant([-1, spec.n_heads * width])])
    rows = graph.node("Gather", [rows, "from_grid"], axis=0)
    rows = graph.cast(rows, numbers.attention, numbers.rows)
    return rows if width == spec.head_dim else _narrow(graph, spec, rows)


def _norm_heads(graph: GraphBuilder, spec: BlockSpec, heads: int, x: str, gamma: Array | None) -> str:
    if gamma is None:
        return x
    weight = graph.floats(graph.new_name("norm.weight"), gamma, graph.numbers.rows)
    apart = graph.node("Reshape", [x, graph.constant([-1, heads, spec.head_dim])])
    normed = graph.node(
        "SimplifiedLayerNormalization", [apart, weight], axis=-1, epsilon=spec.norm_eps, stash_type=1
    )
    return graph.node("Reshape", [normed, graph.constant([-1, heads * spec.head_dim])])


def _pad(graph: GraphBuilder, spec: BlockSpec, heads: int, x: str) -> str:
    """Zeros behind each half of each head, so that the halves still hold the coordinates of the pairs."""
    width, half = padded_head_dim(spec.head_dim), spec.head_dim // 2
    if width == spec.head_dim:
        return x
    rows = graph.numbers.rows
    room = rows if rows != "bf16" else "f32"  # nobody pads bf16
    halves = graph.node("Reshape", [graph.cast(x, rows, room), graph.constant([-1, heads * 2, half])])
    padded = graph.node("Pad", [halves, graph.constant([0, 0, 0, 0, 0, width // 2 - half])])
    joined = graph.node("Reshape", [padded, graph.constant([-1, heads * width])])
    return graph.cast(joined, room, rows)


def _narrow(graph: GraphBuilder, spec: BlockSpec, x: str) -> str:
    """Takes the padding away again."""
    width, half = padded_head_dim(spec.head_dim), spec.head_dim // 2
    halves = graph.node("Reshape", [x, graph.constant([-1, spec.n_heads * 2, width // 2])])
    kept = graph.node("Slice", [halves, graph.constant([0]), graph.constant([half]), graph.constant([2])])
    return graph.node("Reshape", [kept, graph.constant([-1, spec.n_heads * spec.head_dim])])
