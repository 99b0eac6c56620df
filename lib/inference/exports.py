"""What exports of a model have in common: a folder that appears only when it is whole, and a check against the model."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lib.errors import UserError, printable
from lib.model.frozen_weights import is_quantized
from lib.run.best_model import KIND
from lib.runtime.atomic import AGAIN, drafting, explaining, publish_folder, write_manifest

TEXTS = (
    "A film that earns its tears.",
    "Dull.",
    "The plot was quite good, the ending was not, and I felt cheated " * 2,
)
"""Texts of different length."""


@contextlib.contextmanager
def exporting(flag: str, folder: Path, model: Any, tokenizer: Any) -> Iterator[Path]:
    """Within, an empty folder to fill; it becomes `folder` at the end, with the tokenizer and the model's card.

    After an error `folder` is what it was. Raises UserError if it is not empty, or cannot be written.
    """
    place = next(path for path in folder.absolute().parents if path.exists())
    card = Path(model.config._name_or_path) / "README.md"
    with explaining(place, AGAIN):
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{flag} {folder}: the folder is not empty; name another")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with drafting(folder) as draft:
            yield draft
            tokenizer.save_pretrained(draft)
            if card.is_file():
                shutil.copy(card, draft)
            write_manifest(draft, KIND)
            publish_folder(draft, folder)


def refuse_quantized(flag: str, model: Any) -> None:
    """Raise UserError for a base model whose weights are quantized in its own files, which says what to use instead."""
    if any(map(is_quantized, model.modules())):
        raise UserError(
            f"{flag}: the weights of the base model are quantized in its own files (quantization_config in its config.json), "
            "so that there is nothing exact to export; use the adapter over it as it is, or train over the model's original"
        )


def describe_export(folder: str, difference: float, load_in: str | None) -> str:
    """Where an export is, and how far it is from the model; `load_in` is how the base of its adapter was held in training."""
    text = f"written to {printable(folder)}; largest difference from the model: {difference:.1e}"
    if load_in is None:
        return text
    return (
        f"{text}. The adapter was trained over its base in {load_in} (--load_in), and the export has the base as it is in its "
        "own files: its scores are others, a little; eval.py --model FOLDER tells them"
    )


def example_batches(tokenizer: Any) -> Iterator[Any]:
    """The tensors of texts one by one, and of all texts padded together."""
    for texts in (*([text] for text in TEXTS[:2]), list(TEXTS)):
        yield tokenizer(texts, padding=True, truncation=True, return_tensors="pt")


@torch.no_grad()
def compute_outputs(model: Any, tokenizer: Any) -> list[np.ndarray]:
    """float32 arrays: what the model returns for each of the example batches, one output after the other."""
    found = (value for batch in example_batches(tokenizer) for value in model(**batch.to(model.device)).values())
    return [value.float().cpu().numpy() for value in found if isinstance(value, torch.Tensor)]


def check_outputs(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray], tolerance: float) -> float:
    """The largest difference of an export's outputs from the model's.

    It is absolute; that of an output with values above 1 is divided by the largest of them. Raises RuntimeError if it is
    above `tolerance`, or not a number.
    """
    pairs = zip(found, wanted, strict=True)
    difference = float(np.max([np.abs(a - b).max() / max(1.0, np.abs(b).max()) for a, b in pairs]))
    if not difference <= tolerance:
        raise RuntimeError(f"the export and the model differ by {difference:.1e}; it is not written")
    return difference
