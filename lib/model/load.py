"""Tokenizer and classifier: loading, label names, freezing."""

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lib.config.sections import CLASSIFICATION, ModelConfig, ModelSource
from lib.errors import UserError
from lib.hub import packaged
from lib.hub.advice import advice
from lib.hub.cache.files import weight_files
from lib.hub.cache.layout import Repo, find_snapshot, is_repo_id
from lib.hub.endpoint import configure_endpoint
from lib.hub.modelscope import modelscope_folder, read_record
from lib.hub.needs import Need
from lib.model.layers import freeze
from lib.model.overrides import override


def model_name(model: str) -> str:
    """A short name for run names and reports."""
    return model.rstrip("/").split("/")[-1]


def resolve_model(config: ModelSource) -> str:
    """The folder of a model: of minilm, the user's, ModelScope's, or the snapshot in the cache; else its Hub name."""
    if config.model == "minilm":
        return str(packaged.minilm_folder())
    if Path(config.model).is_dir():
        return config.model
    if config.source == "modelscope":
        return str(modelscope_folder(config.model, config.model_revision or "master"))
    snapshot = find_snapshot(Repo(config.model), config.model_revision) if is_repo_id(config.model) else None
    return str(snapshot or config.model)


def model_origin(config: ModelSource) -> dict[str, str]:
    """Commit (or ModelScope revision) and sha256 of the weights of a model that was fetched; nothing for a folder."""
    folder = Path(resolve_model(config))
    record = read_record(config.model, config.model_revision or "master") if config.source == "modelscope" else None
    if record:
        weights = [record["files"][name] for name in weight_files(record["files"], config.allow_pickle)]
        return {"model_source": record["source"], "model_commit": record["revision"], "model_sha256": " ".join(weights)}
    if folder.parent.name != "snapshots" or Path(config.model).is_dir():
        return {}
    names = weight_files([path.name for path in folder.iterdir()], config.allow_pickle)
    blobs = [(folder / name).resolve().name for name in names]
    return {"model_commit": folder.name, "model_sha256": " ".join(blob for blob in blobs if len(blob) == 64)}


def load_settings(config: ModelSource) -> dict[str, Any]:
    """Revision and trust, for every loader: no program of a repository runs unless it was asked for."""
    return {"revision": config.model_revision or "main", "trust_remote_code": config.trust_remote_code}


def weight_settings(config: ModelSource) -> dict[str, Any]:
    """The same for weights, which are safetensors unless pickles are allowed."""
    return load_settings(config) | {"use_safetensors": None if config.allow_pickle else True, "dtype": torch.float32}


def load_tokenizer(config: ModelSource) -> Any:
    """The model's tokenizer, with a padding token also where the model (a decoder) was trained without one.

    Raises UserError when it cannot be loaded.
    """
    with loading(config):
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(config), **load_settings(config))
    if tokenizer.pad_token is None and tokenizer.eos_token is None:
        raise UserError(
            f"--model {config.model}: its tokenizer has neither a padding nor an end token; add a pad_token to it"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    positions = changed_positions(config) if isinstance(config, ModelConfig) and config.config_overrides else None
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions or tokenizer.model_max_length)
    return tokenizer


def longest_input(model: Any) -> int | None:
    """Positions that a model has for text; those of the RoBERTa family begin behind the number of the padding token.

    The virtual tokens of prefix and prompt tuning take some of them.
    """
    positions = getattr(model.config, "max_position_embeddings", None)
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    padding = next((table.padding_idx for table in tables if getattr(table, "padding_idx", None) is not None), -1)
    padding += getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)
    return positions - padding - 1 if isinstance(positions, int) and positions > 0 else None


def changed_positions(config: ModelConfig) -> int | None:
    """The longest input of a model whose number of positions the user changed; None where it is the model's own."""
    with loading(config), fitting(config):
        settings = AutoConfig.from_pretrained(resolve_model(config), **load_settings(config))
        before = getattr(settings, "max_position_embeddings", None)
        override(settings, config.config_overrides)
        if getattr(settings, "max_position_embeddings", None) == before:
            return None
        with torch.device("meta"):
            return longest_input(AutoModel.from_config(settings, trust_remote_code=config.trust_remote_code))


@dataclasses.dataclass(frozen=True)
class Weights:
    """Names of the weights of a model that its checkpoint did not hold, and of those that it held in vain."""

    new: list[str]
    dropped: list[str]


def build_model(
    config: ModelConfig, label_names: list[str], tokenizer: Any, problem_type: str = CLASSIFICATION
) -> tuple[PreTrainedModel, Weights]:
    """A model with an output for each of `label_names`, in float32, and which of its weights are not the checkpoint's.

    Weights are float32 whatever the checkpoint holds, since mixed precision needs a float32 master; a head of another
    size is replaced. Raises UserError when the model cannot be loaded, or its configuration cannot be changed as asked.
    """
    settings = build_settings(config, label_names, tokenizer, problem_type)
    with loading(config), fitting(config):
        model, weights = make_model(config, settings)
    freeze(model, config.freeze)
    return model, weights


def build_settings(config: ModelConfig, label_names: list[str], tokenizer: Any, problem_type: str) -> Any:
    """The configuration of the model, with the user's changes."""
    with loading(config):
        settings = AutoConfig.from_pretrained(resolve_model(config), **load_settings(config))
        settings.num_labels = len(label_names)
        settings.id2label = dict(enumerate(label_names))
        settings.label2id = {name: number for number, name in enumerate(label_names)}
        settings.problem_type = problem_type
        vars(settings).pop("thresholds", None)  # those of labels that it had before
        settings.pad_token_id = tokenizer.pad_token_id if settings.pad_token_id is None else settings.pad_token_id
    override(settings, config.config_overrides)
    return settings


def make_model(config: ModelConfig, settings: Any) -> tuple[PreTrainedModel, Weights]:
    """A classifier of this configuration, with the weights of the checkpoint that fit it unless it starts from scratch."""
    if config.from_scratch:
        trust = config.trust_remote_code
        model = AutoModelForSequenceClassification.from_config(settings, dtype=torch.float32, trust_remote_code=trust)
        return model, Weights(sorted(model.state_dict()), [])
    model, info = AutoModelForSequenceClassification.from_pretrained(
        resolve_model(config),
        config=settings,
        **weight_settings(config),
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    mismatched = [item[0] if isinstance(item, tuple) else item for item in info["mismatched_keys"]]
    return model, Weights(sorted({*info["missing_keys"], *mismatched}), sorted(info["unexpected_keys"]))


@contextlib.contextmanager
def fitting(config: ModelConfig) -> Iterator[None]:
    """Building a model of a changed configuration, with a message where its parts do not go together."""
    try:
        yield
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        if not config.config_overrides:
            raise
        raise UserError(
            f"--config_overrides {' '.join(config.config_overrides)}: no model can be made of that: {error}"
        ) from error


def describe_weights(names: list[str]) -> str:
    """Names of weights in a few words: those of a layer, and of the head of another task, as one."""
    short = dict.fromkeys(re.sub(r"(\.\d+)\..*|^((?:cls|lm_head|qa_outputs))\..*", r"\1\2.*", name) for name in names)
    return ", ".join(list(short)[:6]) + (f", ... ({len(names)} tensors)" if len(short) > 6 else "")


def load_classifier(config: ModelSource) -> PreTrainedModel:
    """An already trained classifier, as it is.

    Raises UserError when it cannot be loaded or its head is not part of the checkpoint.
    """
    return load_trained(config, AutoModelForSequenceClassification, "classifier")


def load_trained(config: ModelSource, kind: Any, name: str) -> PreTrainedModel:
    """An already trained model of one of the Auto classes, as it is; `name` is what messages call it.

    Raises UserError when it cannot be loaded or its head is not part of the checkpoint. A pooler may be missing: models
    without a head do not use it.
    """
    with loading(config):
        model, info = kind.from_pretrained(
            resolve_model(config),
            **weight_settings(config),
            output_loading_info=True,
        )
    headless = kind is AutoModel
    lacking = sorted(key for key in info["missing_keys"] if not (headless and "pooler" in key))
    if lacking:
        missing = ", ".join(lacking[:4])
        raise UserError(f"--model {config.model} is not a trained {name}: its weights lack {missing}; train it first")
    return model


def label_names(model: PreTrainedModel) -> list[str]:
    """The names of a classifier's classes, in order."""
    return [model.config.id2label[number] for number in range(model.config.num_labels)]


@contextlib.contextmanager
def loading(config: ModelSource) -> Iterator[None]:
    """Loading without the library's own report, which the start block replaces, and with a message instead of a trace."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(load_report(config, error)) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def load_report(config: ModelSource, error: Exception) -> str:
    """Why a model could not be loaded, and what to do about it."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        return (
            f"--model {config.model} brings a program of its own, which is not run unless you ask for it: read it, then "
            "--trust_remote_code --model_revision COMMIT"
        )
    folder = Path(resolve_model(config))
    if folder.is_dir() and not config.allow_pickle:
        names = [path.name for path in folder.iterdir()]
        if not weight_files(names, False) and weight_files(names, True):
            return (
                f"--model {config.model} has pickled weights only (.bin), which can run programs when they are loaded; "
                "if you trust who made them: --allow_pickle"
            )
    given = (
        f"--model {config.model} could not be loaded: {reason}\n"
        "Give a folder with config.json and weights, a Hub id with the network or a mirror (HF_ENDPOINT) at hand, "
        "or --model minilm, which needs neither."
    )
    if (folder.is_dir() and Path(config.model).is_dir()) or not is_repo_id(config.model):
        return given
    need = Need("--model", Repo(config.model), config.model_revision or "main")
    return "\n".join([given, "One of:", *(f"  {line}" for line in advice(need, configure_endpoint(None)))])
