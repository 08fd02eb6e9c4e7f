"""What quantisation costs in quality: perplexity on held-out text, and the error of the weights.

    python benchmarks/quality.py [--models DIRECTORY] [--backends onnx,torch] [--rows N] [--quick] [--json]

Perplexity is that of each scheme over that of the same model unquantised: with the backend `reference` (f32
with the weights as they are after quantisation), which also takes llama.cpp's q4_0 and q8_0, and with each of
`--backends` by its own kernels, which quantise activations too where they compute so. dgn-demo answers the
questions that were kept out of its training (its answers count, as in training); the models in the folder
`--models` (else $DGN_TEST_MODELS, else ../shared/models) read stories written for this benchmark.

The error of weights is their root-mean-square error over their root mean square: of each kind of layer of the
same models, and of random matrices with the shapes of Llama-3.2-1B, normal and heavy-tailed (Student's t with
5 degrees of freedom), `--rows` rows of each.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench_kit import conditions, report
from bench_kit.held_out import STORIES, Window, demo_windows, text_windows
from bench_kit.llamacpp_formats import FORMATS
from bench_kit.perplexity import perplexity, write_as
from bench_kit.weight_error import NAMES, errors, model_matrices, random_matrices

from dgn_backends.bundled import bundled_model
from dgn_backends.errors import BackendUnavailable
from dgn_backends.hf_config import read_config
from dgn_backends.quant_plan import SCHEMES
from dgnd.errors import DgnError

SHAPE = "Llama-3.2-1B"
DEMO = "dgn-demo"


def default_models() -> Path:
    """Where trained models may lie."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "models"
    return Path(os.environ.get("DGN_TEST_MODELS") or beside)


def trained_models(folder: Path) -> dict[str, Path]:
    """dgn-demo and every model in `folder`, by name."""
    demo = bundled_model(DEMO)
    assert demo is not None  # it comes with the repository
    others = sorted(path.parent for path in folder.glob("*/config.json"))
    return {DEMO: demo} | {path.name: path for path in others}


def windows_of(name: str, model: Path, limit: int | None) -> list[Window]:
    """The held-out text of a model."""
    if name == DEMO:
        return demo_windows(model)[:limit]
    return text_windows(model, STORIES, read_config(model).max_positions)[:limit]


def ratios(model: Path, windows: Sequence[Window], backends: Sequence[str]) -> dict[str, Any]:
    """The model's perplexity in f32, and by backend that of each scheme and format over it."""
    plain = perplexity(model, windows, "reference")
    figures: dict[str, Any] = {"f32": plain, "ids": sum(len(window.ids) - window.first for window in windows)}
    for backend in ("reference", *backends):
        found = {}
        for scheme in SCHEMES:
            try:
                found[scheme] = perplexity(model, windows, backend, scheme) / plain
            except BackendUnavailable:
                continue  # not every backend has every scheme
        figures[backend] = found
    with tempfile.TemporaryDirectory(prefix="dgn-bench-") as directory:
        for name in FORMATS:
            copy = write_as(model, name, Path(directory) / name)
            figures["reference"][name] = perplexity(copy, windows, "reference") / plain
    return figures


def ratio_table(figures: dict[str, Any]) -> str:
    """A row for each scheme, a column for each model and backend."""
    columns = [
        (model, backend)
        for model, found in figures.items()
        for backend, by_scheme in found.items()
        if isinstance(by_scheme, dict) and by_scheme
    ]
    rows = []
    for name in NAMES:
        cells = [figures[model][backend].get(name) for model, backend in columns]
        rows.append([name, *("" if cell is None else f"{cell:.4f}" for cell in cells)])
    header = ["perplexity / f32", *(f"{model}, {backend}" for model, backend in columns)]
    return report.table(header, rows)


def error_table(title: str, figures: dict[str, dict[str, float]]) -> str:
    """A row for each scheme and format, a column for each kind of layer; in per cent."""
    kinds = list(figures[NAMES[0]])
    kinds.append(kinds.pop(kinds.index("all")))
    rows = [[name, *(f"{100 * figures[name][kind]:.2f}" for kind in kinds)] for name in NAMES]
    return report.table([title, *(kind.removesuffix("_proj") for kind in kinds)], rows)


def parse() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--models", type=Path, default=default_models())
    parser.add_argument("--backends", type=lambda text: text.split(","), default=["onnx"])
    parser.add_argument("--rows", type=int, default=1024, help="of each random matrix")
    parser.add_argument(
        "--quick", action="store_true", help="little text, few rows: only to see that it works"
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    """Prints the table of ratios and one of errors for each model and each kind of random weights."""
    options = parse()
    where = conditions.conditions()
    limit, rows = (4, 32) if options.quick else (None, options.rows)
    models = trained_models(options.models)
    perplexities = {
        name: ratios(path, windows_of(name, path, limit), options.backends) for name, path in models.items()
    }
    weights = {name: errors(model_matrices(path)) for name, path in models.items()}
    for tails in ("normal", "heavy"):
        weights[f"{SHAPE}, {tails}"] = errors(random_matrices(SHAPE, tails, rows))
    tables = [
        "; ".join(
            f"{name}: {found['f32']:.3f} in f32 over {found['ids']:,} ids"
            for name, found in perplexities.items()
        ),
        "",
        ratio_table(perplexities),
    ]
    for name, found in weights.items():
        tables += ["", error_table(f"error in %, {name}", found)]
    report.show(options.json, where, {"perplexity": perplexities, "weights": weights}, tables)


if __name__ == "__main__":
    try:
        main()
    except DgnError as error:
        raise SystemExit(error.message) from None
