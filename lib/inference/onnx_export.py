"""Export to ONNX, checked against PyTorch."""

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib.errors import UserError
from lib.inference.exports import TEXTS, check_outputs, compute_outputs, example_batches, exporting, refuse_quantized

PACKAGES = ("onnx", "onnxscript", "onnxruntime")

TOLERANCE = 1e-4
"""Largest difference from PyTorch with which a graph is written."""


def export_onnx(model: Any, tokenizer: Any, folder: Path) -> float:
    """Write `model.onnx`, configuration and tokenizer to `folder`; return the largest difference of an output.

    Batch size and length are free; outputs are named as by the model: logits, start_logits, last_hidden_state. The folder
    appears only if ONNX Runtime matches PyTorch for single and padded texts. Raises UserError if a package is missing or
    the folder is not empty, RuntimeError if the outputs differ.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--export_onnx: not installed: {', '.join(missing)}; run: pip install {' '.join(PACKAGES)}")
    refuse_quantized("--export_onnx", model)
    with exporting("--export_onnx", folder, model, tokenizer) as draft:
        write_graph(model, tokenizer, draft / "model.onnx")
        model.config.save_pretrained(draft)
        found = run_graph(tokenizer, draft / "model.onnx")
        return check_outputs(found, compute_outputs(model, tokenizer), TOLERANCE)


def write_graph(model: Any, tokenizer: Any, path: Path) -> None:
    """Trace the model and save its graph, with the axes batch and sequence."""
    model.config.use_cache = False
    example = dict(tokenizer(list(TEXTS[:2]), padding=True, truncation=True, return_tensors="pt").to(model.device))
    with torch.no_grad():
        outputs = list(model(**example).keys())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            kwargs=example,
            dynamo=True,
            dynamic_shapes={name: {0: "batch", 1: "sequence"} for name in example},
            input_names=list(example),
            output_names=outputs,
            verbose=False,
        )
    assert program is not None
    program.save(path)


def run_graph(tokenizer: Any, path: Path) -> list[np.ndarray]:
    """What ONNX Runtime returns for each of the example batches, one output after the other."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {item.name for item in session.get_inputs()}
    batches = (
        {name: values.numpy() for name, values in batch.items() if name in inputs}
        for batch in example_batches(tokenizer)
    )
    return [output for batch in batches for output in session.run(None, batch)]
