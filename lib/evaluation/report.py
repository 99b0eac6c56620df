"""The report of a scored split: scores with intervals, tables, a picture, and a file with every prediction."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from lib.config.sections import REGRESSION
from lib.data.load import Data
from lib.evaluation.calibration import cross_entropy, expected_calibration_error
from lib.evaluation.intervals import Interval
from lib.evaluation.plots import PICTURES, draw
from lib.evaluation.predictions import Predictions
from lib.evaluation.scoring import Scored
from lib.evaluation.tables import MOST_PROBABILITIES, MOST_ROWS, build_tables, format_table, format_tables
from lib.runtime.atomic import finite, remove_drafts, replacing, write_atomically

FILE_NAMES = ("report.json", "predictions.jsonl", *PICTURES)
"""The files of a report."""
DIGITS = 6


def write_report(folder: Path, split: str, scored: Scored, intervals: dict[str, Interval], data: Data) -> str:
    """Write `report.json`, `predictions.jsonl` and the pictures to `folder`; return the report as text of bounded size."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_drafts(folder, FILE_NAMES)
    (scores, predictions), names = scored, data.label_names
    size = len(predictions.labels)
    temperature = predictions.temperature
    if predictions.problem_type != REGRESSION:
        scores = scores | {"calibration_error": expected_calibration_error(predictions.uncalibrated)}
    if temperature is not None:
        scores |= {"loss_at_temperature": cross_entropy(predictions)}
        scores |= {"calibration_error_at_temperature": expected_calibration_error(predictions)}
    write_predictions(folder / "predictions.jsonl", predictions, data.texts[split], names)
    tables = build_tables(predictions, names)
    notes = draw(predictions, tables, names, f"{split}, {size} samples", folder)
    if temperature is not None:
        where = ", which is this split, so that the scores at it are optimistic" if split == "validation" else ""
        notes.append(f"Probabilities are those at the temperature {temperature:.4g}, fitted on validation{where}.")
    if broken := int(np.isnan(predictions.logits).any(axis=1).sum()):
        notes.append(
            f"The outputs for {broken:,} of {size:,} samples are NaN, and what is predicted for them means nothing: the "
            "weights of the model are damaged, or too large for the precision (--mixed_precision no)."
        )
    if len(names) > MOST_PROBABILITIES:
        notes.append(f"predictions.jsonl has the {MOST_ROWS} largest probabilities of each sample.")
    record: dict[str, Any] = {"split": split, "samples": size, "scores": scores, "intervals_95": intervals}
    record |= {} if temperature is None else {"temperature": temperature}
    text = json.dumps(finite(record | tables), indent=2, ensure_ascii=False)
    write_atomically(folder / "report.json", text + "\n")
    shown = format_tables(tables, predictions, names, str(folder / "report.json"))
    return format_report(split, Scored(scores, predictions), intervals, [*shown, *notes])


def format_report(split: str, scored: Scored, intervals: dict[str, Interval], blocks: Sequence[str] = ()) -> str:
    """The report as text: scores, with intervals where there are any, then `blocks`: tables and notes."""
    scores, predictions = scored
    rows = [[f"{split} ({len(predictions.labels)} samples)", "value", "95 % interval"]]
    for name, value in scores.items():
        rows.append([name, f"{value:.4f}", "{:.4f} to {:.4f}".format(*intervals[name]) if name in intervals else ""])
    return "\n\n".join([format_table(rows), *blocks])


def write_predictions(path: Path, predictions: Predictions, texts: Dataset, names: Sequence[str]) -> None:
    """One JSON object per line, in input order: index, text, gold, predicted and, except for numbers, probabilities.

    Probabilities are those at the temperature. Of more than MOST_PROBABILITIES the MOST_ROWS largest are written, the
    largest first.
    """
    rows = zip(row_texts(texts), named_rows(predictions, names), strict=True)
    with replacing(path) as file:
        for index, (text, row) in enumerate(rows):
            line = json.dumps(finite({"index": index, "text": text} | row), ensure_ascii=False) + "\n"
            file.write(line.encode(errors="backslashreplace"))


def worst_rows(
    predictions: Predictions, texts: Dataset, names: Sequence[str], limit: int = 100
) -> tuple[list[Any], list[list[Any]]]:
    """(columns, rows) of the samples with the largest losses, the largest first; lists are joined into one text."""
    worst = np.argsort(-predictions.losses, kind="stable")[:limit]
    columns = (row_texts(texts.select(worst)), named_rows(predictions.take(worst), names))
    rows = [
        [index, joined(text), joined(row["gold"]), joined(row["predicted"]), float(predictions.losses[index])]
        for index, text, row in zip(worst.tolist(), *columns, strict=True)
    ]
    return ["index", "text", "gold", "predicted", "loss"], rows


def joined(value: Any) -> Any:
    return " | ".join(value) if isinstance(value, list) else value


def row_texts(texts: Dataset) -> list[Any]:
    """The text of each row; a list of two for pairs."""
    columns = [list(texts[column]) for column in texts.column_names]
    return columns[0] if len(columns) == 1 else [list(row) for row in zip(*columns, strict=True)]


def named_rows(predictions: Predictions, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Gold, predicted and probabilities of each sample: the name of a class, a number, or a list of label names."""
    if predictions.problem_type == REGRESSION:
        for gold, predicted in zip(predictions.labels.tolist(), predictions.predicted.tolist(), strict=True):
            yield {"gold": round(gold, DIGITS), "predicted": round(predicted, DIGITS)}
        return
    for block in predictions.blocks():
        for gold, predicted, row in zip(block.labels, block.predicted, block.probabilities, strict=True):
            shown = range(len(row)) if len(row) <= MOST_PROBABILITIES else np.argsort(-row, kind="stable")[:MOST_ROWS]
            yield {
                "gold": chosen_names(gold, names),
                "predicted": chosen_names(predicted, names),
                "probabilities": {names[place]: round(float(row[place]), DIGITS) for place in shown},
            }


def chosen_names(labels: np.ndarray, names: Sequence[str]) -> str | list[str]:
    """The name of a class, or the names of the labels that are 1."""
    return names[int(labels)] if labels.ndim == 0 else [names[place] for place in np.flatnonzero(labels).tolist()]
