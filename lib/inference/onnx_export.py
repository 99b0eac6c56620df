"""A model as ONNX: for programs without PyTorch, with the proof that it gives the same numbers."""

import importlib.util
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib.errors import UserError

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4
TEXTS = (
    "A film that earns its tears.",
    "Dull.",
    "The plot was quite good, the ending was not, and I felt cheated " * 2,
)


def export_onnx(model: Any, tokenizer: Any, folder: Path) -> float:
    """Write `model.onnx`, configuration and tokenizer to `folder`; give back the largest difference of an output.

    Batch and length are free. The outputs have the names that the model gives them: logits, start_logits,
    last_hidden_state. The folder appears only when ONNX Runtime gave the numbers of PyTorch for single and for padded
    texts. Raises UserError when a package is missing or the folder is in use, RuntimeError when the numbers differ.
    """
    check_packages()
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--export_onnx {folder}: the folder is not empty; name another")
    fresh = folder.with_name(folder.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
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
        shutil.rmtree(fresh, ignore_errors=True)
    return difference


def check_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"--export_onnx: not installed: {', '.join(missing)}; run: pip install {' '.join(PACKAGES)}")


def write_graph(model: Any, tokenizer: Any, path: Path) -> None:
    """Trace the model with two texts and save the graph; its axes are called batch and sequence."""
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
    """The largest difference between ONNX Runtime and PyTorch, over texts one by one and padded together.

    Absolute, and for outputs above 1 as a share of the largest.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    taken = {item.name for item in session.get_inputs()}
    differences = []
    for texts in ([TEXTS[0]], [TEXTS[1]], list(TEXTS)):
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        found = session.run(None, {name: values.numpy() for name, values in batch.items() if name in taken})
        with torch.no_grad():
            wanted = list(model(**batch.to(model.device)).values())
        pairs = zip(found, [tensor.float().cpu().numpy() for tensor in wanted], strict=True)
        differences += [float(np.abs(a - b).max() / max(1.0, np.abs(b).max())) for a, b in pairs]
    return max(differences)
