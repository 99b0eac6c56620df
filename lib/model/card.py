"""The model card (README.md) of an exported model: what it is, its scores, how it was trained, how to use it."""

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION
from lib.errors import printable
from lib.hub.packaged import VADER, VADER_VERSION
from lib.runtime.atomic import write_atomically
from lib.runtime.screen import list_some, shorten

SPLITS = {"eval": "validation"}
"""Names of splits that differ from the prefix of their metrics."""

KINDS = {
    CLASSIFICATION: "A text classifier with {} classes",
    REGRESSION: "A text regression model (it predicts a number)",
    MULTI_LABEL: "A multi-label text classifier with {} labels",
}
LOSSES = {
    CLASSIFICATION: "the mean cross entropy in nats",
    REGRESSION: "the mean squared error",
    MULTI_LABEL: "the binary cross entropy in nats, averaged over labels",
}
MINILM_ID = "sentence-transformers/all-MiniLM-L6-v2"

CLASSIFICATION_OPTIONS = ("loss", "focal_gamma", "class_weights", "label_smoothing_factor")
SOFT_OPTIONS = ("loss", "distill_temperature")
OPTIONS = (
    *("learning_rate", "train_batch_size", "num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps"),
    *(
        "weight_decay",
        "max_grad_norm",
        *CLASSIFICATION_OPTIONS,
        "distill_temperature",
        "layerwise_lr_decay",
        "head_learning_rate",
    ),
    *("window_stride", "max_length", "seed", "config_overrides", "from_scratch", "freeze", "adapter"),
)
"""Options in the table of the card."""

MOVIE_REVIEWS_NOTE = (
    f"The data are the movie reviews of {VADER} {VADER_VERSION} (Hutto and Gilbert, ICWSM 2014, MIT license). They "
    "overlap with rotten_tomatoes and SST: do not evaluate this model on those."
)

LIBRARIES = {None: "transformers", "bottleneck": "adapter-transformers"}
"""By --adapter, the Hub's name of the library that loads the files; peft for all others."""

SHOWN_CLASSES = 20
"""Most classes whose rows are counted on the card."""
MOST_LABELS = 100
"""Labels on the card."""
LABEL_WIDTH = 100

VERSIONS = ("torch", "transformers", "accelerate", "datasets")
"""Libraries whose version is on the card."""


def write_model_card(
    folder: Path,
    dataset: str,
    settings: dict[str, Any],
    results: dict[str, Any],
    thresholds: Sequence[float] = (),
    temperature: float | None = None,
) -> None:
    """Write README.md with metadata for the Hub into the folder of a model; paths on this machine are left out.

    `dataset` is the name of the data, `settings` holds the options of the run by flag and its record under `run/`,
    `results` the numbers of the finished run, such as `test/accuracy`, `thresholds` those of the labels or of two classes,
    and `temperature` what logits are divided by.
    """
    problem = settings.get("run/problem_type", CLASSIFICATION)
    base_name, base_id = base_model(settings)
    names = settings["run/label_names"]
    scores = [
        (SPLITS.get(split, split), metric, float(value))
        for split, _, metric, value in ((*key.partition("/"), value) for key, value in results.items())
        if isinstance(value, (int, float)) and metric and split.startswith(("eval", "test", "validation"))
    ]
    metrics = list(dict.fromkeys(metric for _, metric, _ in scores))
    shown = {(split, metric): f"{value:.4f}" for split, metric, value in scores}
    rows = [
        [split, *(shown.get((split, metric), "") for metric in metrics)]
        for split in dict.fromkeys(s for s, *_ in scores)
    ]
    left_out = {*(CLASSIFICATION_OPTIONS if problem != CLASSIFICATION else ()), "distill_temperature"}
    left_out -= {*(SOFT_OPTIONS if settings.get("run/soft_labels") else ())}
    options = [key for key in OPTIONS if key in settings and key not in left_out]
    chosen_by = " by its loss (the metric was not defined)" if results.get("chosen_by") == "loss" else ""
    lines = [
        f"# {plain(settings['run_name'])}",
        "",
        f"{KINDS[problem].format(len(names))}: {plain(base_name)}, fine-tuned on {plain(dataset)}.",
        *(["", MOVIE_REVIEWS_NOTE] if dataset.startswith("movie_reviews") else []),
        *("", "## Results", ""),
        *markdown_table(["split", *metrics], rows),
        "",
        f"One run with seed {settings['seed']}: the best model on validation{chosen_by}, after "
        f"{results.get('best_step', '?')} of {results.get('steps', '?')} steps. `loss` is {LOSSES[problem]}.",
        *average_lines(results.get("averaged_steps", [])),
        *("", "## Use", "", *usage_lines(settings.get("adapter"), plain(base_name), settings.get("load_in")), ""),
        *output_lines(problem, names, thresholds),
        *probability_lines(problem, temperature),
        *data_lines(settings),
        *("", "## Training", ""),
        *markdown_table(["option", "value"], [[key, plain(str(settings[key]))] for key in options]),
        "",
        training_facts(settings, results),
    ]
    metadata = card_metadata(dataset, settings, base_id, scores)
    write_atomically(folder / "README.md", f"---\n{metadata}\n---\n\n" + "\n".join(lines) + "\n")


def card_metadata(
    dataset: str, settings: dict[str, Any], base_id: str | None, scores: Sequence[tuple[str, str, float]]
) -> str:
    """The metadata as YAML: base model, data set, and each score (split, metric, value) as the Hub's model-index."""
    data_id, dataset = hub_id(settings.get("dataset")), printable(dataset)
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type=data_id or dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=metric,
            metric_value=round(value, 6),
        )
        for split, metric, value in scores
    ]
    return ModelCardData(
        library_name=LIBRARIES.get(settings.get("adapter"), "peft"),
        pipeline_tag="text-classification",
        base_model=base_id,
        datasets=[data_id] if data_id else None,
        metrics=sorted({metric for _, metric, _ in scores if metric != "loss"}) or None,
        model_name=printable(settings["run_name"]),
        eval_results=results or None,
    ).to_yaml()


def base_model(settings: dict[str, Any]) -> tuple[str, str | None]:
    """(name, Hub id) of the base model; a folder has no id and is named by its last part."""
    model = str(settings["model"])
    if model == "minilm":
        return MINILM_ID, MINILM_ID
    found = hub_id(model) or (model if "/" not in model and not Path(model).exists() else None)
    return found or Path(model).name, found


def hub_id(name: str | None) -> str | None:
    """`name` where it is a Hub id `user/name`; None for aliases and folders."""
    parts = (name or "").split("/")
    is_id = len(parts) == 2 and all(parts) and parts[0] not in (".", "..") and not Path(str(name)).exists()
    return name if is_id else None


def usage_lines(adapter: str | None, base: str, load_in: str | None = None) -> list[str]:
    """A whole model is used through transformers, an adapter through predict.py, which loads its base model too."""
    if adapter is not None:
        command = 'python predict.py "A film that earns its tears." --model FOLDER'
        held = f", whose linear layers were held in {load_in} and are loaded so again" if load_in else ""
        return [
            f"The files hold an adapter ({adapter}) and a head; they need the base model {base}{held}.",
            "",
            f"    {command}",
        ]
    call = 'pipeline("text-classification", model="FOLDER")("A film that earns its tears.")'
    return ["```python", "from transformers import pipeline", "", call, "```"]


def average_lines(steps: Sequence[int]) -> list[str]:
    """Which weights the model is the mean of, if it is one."""
    if len(steps) < 2:
        return []
    return [
        f"Its weights are the mean of those after steps {', '.join(map(str, steps))}: the best, and each that made the mean",
        "better on validation (greedy soup, Wortsman et al. 2022), so that validation scores are a little too high.",
    ]


def output_lines(problem: str, names: Sequence[str], thresholds: Sequence[float]) -> list[str]:
    """What the outputs of the model are, with their thresholds where these were tuned."""
    if problem == REGRESSION:
        return [f"The only output is {code(names[0])}, in the units of the data."]
    if problem == MULTI_LABEL and thresholds:
        rows = [[code(name), f"{value:.4f}"] for name, value in zip(names, thresholds, strict=True)]
        return [
            "A text gets every label whose probability reaches its threshold. Thresholds were tuned to the best F1 of each",
            "label on validation, so validation scores are too high. `config.json` stores them as `thresholds`;",
            "`predict.py` and `eval.py` use them.",
            "",
            *markdown_table(["label", "threshold"], rows[:MOST_LABELS]),
            *(["", f"`config.json` has {len(rows) - MOST_LABELS:,} more."] if len(rows) > MOST_LABELS else []),
        ]
    if thresholds:  # of two classes
        return [
            f"The labels are {code(names[0])} and {code(names[1])}, the second one from a probability of "
            f"{thresholds[1]:.4f} on:",
            "tuned to its best F1 on validation, where scores are too high. `config.json` stores it in `thresholds`;",
            "`predict.py` and `eval.py` use it, other programs take the more probable class.",
        ]
    more = " of them in `config.json`" if len(names) > MOST_LABELS else ""
    return [f"Labels, in the order of the outputs: {list_some([code(name) for name in names], MOST_LABELS)}{more}."]


def probability_lines(problem: str, temperature: float | None) -> list[str]:
    """How probabilities follow from the logits."""
    if temperature is None:
        return []
    function = "sigmoid" if problem == MULTI_LABEL else "softmax"
    return [
        "",
        f"Probabilities are {function}(logits / {temperature:.4f}): the temperature was fitted on validation and stands in",
        "`config.json` as `calibration_temperature`. `predict.py` and `eval.py` use it; other programs give the",
        f"{function} of the logits themselves.",
    ]


def plain(text: str) -> str:
    """Text on one line in Markdown that is no HTML, link, picture or code."""
    return html.escape(re.sub(r"[\\`\[\]]", r"\\\g<0>", printable(text)), quote=False)


def code(name: str) -> str:
    """A name as code in Markdown, whatever characters it has."""
    text = shorten(name, LABEL_WIDTH)
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if text[:1] in ("`", " ") or text[-1:] in ("`", " ") else ""
    return f"{fence}{space}{text}{space}{fence}"


def data_lines(settings: dict[str, Any]) -> list[str]:
    """Which columns were read, how much of a text, the size of each split and its classes, and notes without paths."""
    if "run/split_sizes" not in settings:
        return []
    stride, length = settings["run/window_stride"], settings["run/max_length"]
    longer = "cut" if stride is None else f"read in windows that share {stride}"
    columns = {
        name: ", ".join(map(code, settings.get(key) or ()))
        for name, key in (("text", "run/text_columns"), ("label", "run/label_columns"), ("soft", "run/soft_labels"))
    }
    labels = [f"label in {columns['label']}"] if columns["label"] else []
    labels += [f"probabilities of labels in {columns['soft']}"] if columns["soft"] else []
    counts, names = settings["run/class_counts"], settings["run/label_names"]
    shown = names if settings["run/problem_type"] != REGRESSION and len(names) <= SHOWN_CLASSES else []
    rows = [
        [split, f"{size:,}", *(f"{counts[split][name]:,}" for name in shown)]
        for split, size in settings["run/split_sizes"].items()
    ]
    return [
        *("", "## Data", ""),
        f"Text in {columns['text']}, {', '.join(labels)}; at most {length:,} tokens, longer texts are {longer}.",
        "",
        *markdown_table(["split", "rows", *map(code, shown)], rows),
        *([""] if settings["run/notes"] else []),
        *(f"- {plain(without_paths(note, settings))}" for note in settings["run/notes"]),
    ]


def without_paths(text: str, settings: dict[str, Any]) -> str:
    """`text` with the last part of each path that an option names."""
    paths = [str(value) for value in settings.values() if isinstance(value, str) and "/" in value]
    for path in sorted(paths, key=len, reverse=True):
        text = text.replace(path, Path(path).name)
    return text


def training_facts(settings: dict[str, Any], results: dict[str, Any]) -> str:
    """Parameters, samples, processes, precision, versions and commit, as far as they are known."""
    versions = [f"{name} {settings[f'run/version_{name}']}" for name in VERSIONS if settings.get(f"run/version_{name}")]
    facts = [
        f"{settings['run/trainable_parameters']:,} of {settings['run/parameters']:,} parameters trained",
        f"{results.get('samples_seen', 0):,} samples seen in {results.get('train_seconds', 0):,} s",
        f"{settings.get('run/num_processes', 1)} process(es), precision {settings.get('run/mixed_precision', 'no')}",
        *versions,
        *([f"base model at {settings['run/model_commit']}"] if settings.get("run/model_commit") else []),
        *([f"base weights sha256 {settings['run/model_sha256']}"] if settings.get("run/model_sha256") else []),
        *([f"commit {settings['run/git_commit']}"] if settings.get("run/git_commit") else []),
    ]
    return f"{'; '.join(facts)}."


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; a line break in a cell becomes a space, and a bar is escaped."""
    lines = [[" ".join(cell.split()).replace("|", "\\|") for cell in cells] for cells in (header, *rows)]
    return [f"| {' | '.join(cells)} |" for cells in (lines[0], ["---"] * len(header), *lines[1:])]
