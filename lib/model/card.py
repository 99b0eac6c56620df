"""The README.md beside an exported model: what it is, what it scored, how it was made, how to use it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from lib.config.sections import CLASSIFICATION, MULTI_LABEL, REGRESSION
from lib.hub.packaged import VADER, VADER_VERSION

SPLITS = {"eval": "validation"}
"""What a split is called where its keys have another word."""
KINDS = {
    CLASSIFICATION: "A text classifier of {} classes",
    REGRESSION: "A text model that predicts a number",
    MULTI_LABEL: "A text classifier of {} labels, of which a text may have several",
}
LOSSES = {
    CLASSIFICATION: "the mean cross entropy in nats",
    REGRESSION: "the mean squared error",
    MULTI_LABEL: "the binary cross entropy in nats, averaged over labels",
}
MINILM_ID = "sentence-transformers/all-MiniLM-L6-v2"
RECIPE = (
    *("learning_rate", "train_batch_size", "num_train_epochs", "max_steps", "lr_scheduler_type", "warmup_steps"),
    *("weight_decay", "max_grad_norm", "loss", "focal_gamma", "class_weights", "label_smoothing_factor"),
    *("layerwise_lr_decay", "head_learning_rate", "window_stride"),
    *("max_length", "seed", "config_overrides", "from_scratch", "freeze", "adapter"),
)
OF_CLASSES = ("loss", "focal_gamma", "class_weights", "label_smoothing_factor")
LIBRARIES = {None: "transformers", "bottleneck": "adapter-transformers"}
"""By --adapter, what the Hub calls the library that reads the files; of all others it is peft."""

MADE_WITH = ("torch", "transformers", "accelerate", "datasets")


def write_model_card(
    folder: Path, dataset: str, settings: dict[str, Any], results: dict[str, Any], thresholds: Sequence[float] = ()
) -> None:
    """Write README.md to the folder of a model, with a head that the Hub reads.

    `dataset` is the name of the data, `settings` all options of the run by their flag and under `run/` what it was made
    with, `results` the numbers of the finished run, such as `test/accuracy`, `thresholds` those of several labels.
    Folders of the machine are not named.
    """
    body = card_text(dataset, settings, results, thresholds)
    text = f"---\n{metadata(dataset, settings, results)}\n---\n\n{body}"
    (folder / "README.md").write_text(text, encoding="utf-8")


def metadata(dataset: str, settings: dict[str, Any], results: dict[str, Any]) -> str:
    """The head of the card as YAML: base model, data set, and each score as the Hub's model-index has it."""
    scores = [
        EvalResult(
            task_type="text-classification",
            dataset_type=hub_id(settings.get("dataset")) or dataset,
            dataset_name=dataset,
            dataset_split=SPLITS.get(split, split),
            metric_type=metric,
            metric_value=round(value, 6),
        )
        for split, metric, value in score_rows(results)
    ]
    data_id = hub_id(settings.get("dataset"))
    card = ModelCardData(
        library_name=LIBRARIES.get(settings.get("adapter"), "peft"),
        pipeline_tag="text-classification",
        base_model=base_model(settings)[1],
        datasets=[data_id] if data_id else None,
        metrics=sorted({metric for _, metric, _ in score_rows(results) if metric != "loss"}) or None,
        model_name=settings["run_name"],
        eval_results=scores or None,
    )
    return card.to_yaml()


def card_text(dataset: str, settings: dict[str, Any], results: dict[str, Any], thresholds: Sequence[float] = ()) -> str:
    """The card below its head: scores, use, outputs, options, and what the model was made with."""
    name, names = base_model(settings)[0], settings["run/label_names"]
    problem = settings.get("run/problem_type", CLASSIFICATION)
    recipe = [key for key in RECIPE if problem == CLASSIFICATION or key not in OF_CLASSES]
    scores = score_rows(results)
    metrics = list(dict.fromkeys(metric for _, metric, _ in scores))
    table = {(split, metric): f"{value:.4f}" for split, metric, value in scores}
    splits = list(dict.fromkeys(split for split, _, _ in scores))
    lines = [
        f"# {settings['run_name']}",
        "",
        f"{KINDS[problem].format(len(names))}: {name}, fine-tuned on {dataset}.",
        *(["", movie_review_note()] if dataset.startswith("movie_reviews") else []),
        *("", "## Results", ""),
        *markdown_table(
            ["split", *metrics], [[SPLITS.get(s, s), *(table.get((s, m), "") for m in metrics)] for s in splits]
        ),
        "",
        f"One run with seed {settings['seed']}; the best model on validation after {results.get('best_step', '?')} of "
        f"{results.get('steps', '?')} steps. `loss` is {LOSSES[problem]}.",
        *("", "## Use", "", *use_lines(settings.get("adapter"), name), ""),
        *output_lines(problem, names, thresholds),
        *("", "## How it was made", ""),
        *markdown_table(["option", "value"], [[key, str(settings[key])] for key in recipe if key in settings]),
        "",
        made_with(settings, results),
    ]
    return "\n".join(lines) + "\n"


def output_lines(problem: str, names: Sequence[str], thresholds: Sequence[float]) -> list[str]:
    """The outputs of the model; of several labels each with its threshold, where it was tuned."""
    if problem == REGRESSION:
        return [f"Its one output is `{names[0]}`, a number as in the data."]
    if problem == MULTI_LABEL and thresholds:
        rows = [[f"`{name}`", f"{value:.4f}"] for name, value in zip(names, thresholds, strict=True)]
        return [
            "A text has a label from this probability on; tuned on validation to the best F1 of each, so that scores on",
            "validation are too good. `config.json` holds them as `thresholds`; `predict.py` and `eval.py` use them.",
            "",
            *markdown_table(["label", "threshold"], rows),
        ]
    return [f"Classes, in order: {', '.join(f'`{label}`' for label in names)}."]


def use_lines(adapter: str | None, base: str) -> list[str]:
    """A whole model by transformers alone; an adapter by predict.py, which puts it over its base."""
    if adapter is not None:
        command = 'python predict.py "A film that earns its tears." --model FOLDER'
        return [f"These are an adapter ({adapter}) and a head; {base} is loaded below them.", "", f"    {command}"]
    call = 'pipeline("text-classification", model="FOLDER")("A film that earns its tears.")'
    return ["```python", "from transformers import pipeline", "", call, "```"]


def made_with(settings: dict[str, Any], results: dict[str, Any]) -> str:
    """Precision, processes, parameters, versions and commit, as far as they are known."""
    versions = [
        f"{name} {settings[f'run/version_{name}']}" for name in MADE_WITH if settings.get(f"run/version_{name}")
    ]
    facts = [
        f"{settings['run/trainable_parameters']:,} of {settings['run/parameters']:,} parameters trained",
        f"{results.get('samples_seen', 0):,} samples seen in {results.get('train_seconds', 0):,} s",
        f"{settings.get('run/num_processes', 1)} process(es), precision {settings.get('run/mixed_precision', 'no')}",
        *versions,
        *([f"commit {settings['run/git_commit']}"] if settings.get("run/git_commit") else []),
    ]
    return f"{'; '.join(facts)}."


def score_rows(results: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(split, metric, value) of every score that is a number."""
    rows = [(*key.split("/", 1), value) for key, value in results.items() if "/" in key]
    return [
        (split, metric, float(value))
        for split, metric, value in rows
        if isinstance(value, (int, float)) and split.startswith(("eval", "test", "validation"))
    ]


def base_model(settings: dict[str, Any]) -> tuple[str, str | None]:
    """What the base is called, and its Hub id: a folder has none and is called by its last part."""
    model = str(settings["model"])
    if model == "minilm":
        return MINILM_ID, MINILM_ID
    found = hub_id(model) or (model if "/" not in model and not Path(model).exists() else None)
    return found or Path(model).name, found


def hub_id(name: str | None) -> str | None:
    """`user/name` as it is; None for aliases and folders."""
    parts = (name or "").split("/")
    return (
        name
        if len(parts) == 2 and all(parts) and parts[0] not in (".", "..") and not Path(str(name)).exists()
        else None
    )


def movie_review_note() -> str:
    return (
        f"The data are the movie reviews of {VADER} {VADER_VERSION} (Hutto and Gilbert, ICWSM 2014, MIT licence); they "
        "overlap rotten_tomatoes and SST, so that scores on those would say nothing."
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
