"""Perplexity by the product's own backends. Knows nothing of what the text is."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bench_kit.held_out import Window
from bench_kit.llamacpp_formats import FORMATS
from dgn_backends.api import LoadRequest, Quant, Step
from dgn_backends.hf_config import read_config
from dgn_backends.registry import load_backend
from dgn_backends.tensor import Tensor
from dgn_backends.testing_models import write_safetensors
from dgn_backends.weights import SINGLE_FILE, ModelFiles, span_tensors, whole_model


def perplexity(model: Path, windows: Sequence[Window], backend: str, quant: Quant = "none") -> float:
    """exp of the mean surprise over every id that the windows have to predict."""
    config = read_config(model)
    request = LoadRequest(
        path=model, config=config, span=whole_model(config), dtype="f32", threads=1, quant=quant
    )
    runner = load_backend(backend).load(request, lambda done, total: None)
    surprise, count = 0.0, 0
    for number, window in enumerate(windows):
        ids = np.array(window.ids, np.int32)
        runner.open(number, runner.span, len(ids))
        rows = tuple(range(window.first - 1, len(ids) - 1))
        step = Step(number, 0, Tensor.from_numpy(ids[:-1], "i32"), rows)
        (output,) = runner.forward([step])
        runner.close(number)
        assert output.logits is not None  # of the whole model
        logits = output.logits.to_numpy().astype(np.float64)
        top = logits.max(axis=1)
        everything = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        surprise += float((everything - logits[range(len(rows)), ids[window.first :]]).sum())
        count += len(rows)
    return math.exp(surprise / count)


def write_as(model: Path, name: str, directory: Path) -> Path:
    """A copy of `model` in f32 whose matrices are what llama.cpp's format `name` makes of them."""
    directory.mkdir(parents=True)
    shutil.copy(model / "config.json", directory)
    config, files = read_config(model), ModelFiles(model)
    weights = {}
    for tensor, shape in span_tensors(config, whole_model(config)).items():
        weight = files.tensor(tensor, shape).to_f32()
        weights[tensor] = FORMATS[name](weight) if len(shape) == 2 else weight
    write_safetensors(directory / SINGLE_FILE, weights, "f32")
    return directory
