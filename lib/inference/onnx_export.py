"""Export to ONNX, checked against PyTorch."""

import importlib.util
import logging
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib.errors import UserError
from lib.runtime.atomic import umask

PACKAGES = ("onnx", "onnxscript", "onnxruntime")

TOLERANCE = 1e-4
"""Largest difference from PyTorch with which a graph is written."""

TEXTS = (
    "A film that earns its tears.",
    "Dull.",
    "The plot was quite good, the ending was not, and I felt cheated " * 2,
)
"""Texts of different length: the first two to trace the model, all three to compare."""


def export_onnx(model: Any, tokenizer: Any, folder: Path) -> float:
    """Write `model.onnx`, configuration and tokenizer to `folder`; return the largest difference of an output.

    Batch size and length are free; outputs are named as by the model: logits, start_logits, last_hidden_state. The folder
    appears only if ONNX Runtime matches PyTorch for single and padded texts. Raises UserError if a package is missing or
    the folder is not empty, RuntimeError if the outputs differ.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--export_onnx: not installed: {', '.join(missing)}; run: pip install {' '.join(PACKAGES)}")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--export_onnx {folder}: the folder is not empty; name another")
    fresh = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
        fresh.chmod(0o777 & ~umask())
        write_graph(model, tokenizer, fresh / "model.onnx")
        difference = compare(model, tokenizer, fresh / "model.onnx")
        if difference > TOLERANCE:
            raise RuntimeError(f"ONNX Runtime and PyTorch differ by {difference:.1e}; the export is not written")
        model.config.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        card = Path(model.config._name_or_path) / "README.md"
        if card.is_file():
            shutil.copy(card, fresh)
        if folder.exists():
            folder.rmdir()
        os.replace(fresh, folder)
    except OSError as error:
        raise UserError(f"--export_onnx {folder} cannot be written: {error}") from error
    finally:
        if fresh is not None:
            shutil.rmtree(fresh, ignore_errors=True)
    return difference


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


def compare(model: Any, tokenizer: Any, path: Path) -> float:
    """The largest difference between ONNX Runtime and PyTorch, for texts one by one and padded together.

    The difference is absolute; that of an output with values above 1 is divided by the largest of them.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    inputs = {item.name for item in session.get_inputs()}
    differences = []
    for texts in ([TEXTS[0]], [TEXTS[1]], list(TEXTS)):
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        found = session.run(None, {name: values.numpy() for name, values in batch.items() if name in inputs})
        with torch.no_grad():
            wanted = list(model(**batch.to(model.device)).values())
        pairs = zip(found, [tensor.float().cpu().numpy() for tensor in wanted], strict=True)
        differences += [float(np.abs(a - b).max() / max(1.0, np.abs(b).max())) for a, b in pairs]
    return max(differences)
