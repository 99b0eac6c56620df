"""Tokenizer and classifier: loading, label names, freezing."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lib import embedded
from lib.config import ModelConfig, UserError
from lib.endpoint import settle_endpoint
from lib.hub_cache import REPO_ID, Repo, find_snapshot
from lib.hub_files import weight_files
from lib.hub_needs import Need, advice
from lib.modelscope_source import modelscope_folder, read_record

EMBEDDINGS = re.compile(r"emb|word_emb|layernorm_emb|shared$|wte$|wpe$|project_in$")
"""How the names begin of what lies below the layers, in the models of transformers."""


def model_name(model: str) -> str:
    """A short name for run names and reports."""
    return model.rstrip("/").split("/")[-1]


def resolve_model(config: ModelConfig) -> str:
    """The folder of a model: of minilm, the user's, ModelScope's, or the snapshot in the cache; else its Hub name."""
    if config.model == "minilm":
        return str(embedded.minilm_folder())
    if Path(config.model).is_dir():
        return config.model
    if config.source == "modelscope":
        return str(modelscope_folder(config.model, config.model_revision or "master"))
    snapshot = find_snapshot(Repo(config.model), config.model_revision) if REPO_ID.fullmatch(config.model) else None
    return str(snapshot or config.model)


def model_origin(config: ModelConfig) -> dict[str, str]:
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


def load_settings(config: ModelConfig) -> dict[str, Any]:
    """Revision and trust, for every loader: no program of a repository runs unless it was asked for."""
    return {"revision": config.model_revision or "main", "trust_remote_code": config.trust_remote_code}


def weight_settings(config: ModelConfig) -> dict[str, Any]:
    """The same for weights, which are safetensors unless pickles are allowed."""
    return load_settings(config) | {"use_safetensors": None if config.allow_pickle else True, "dtype": torch.float32}


def load_tokenizer(config: ModelConfig) -> Any:
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
    return tokenizer


def build_model(config: ModelConfig, label_names: list[str], tokenizer: Any) -> tuple[PreTrainedModel, list[str]]:
    """A classifier over `label_names` with float32 weights, and the names of its weights that are new.

    Weights are float32 whatever the checkpoint holds, since mixed precision needs a float32 master; a head of another
    size is replaced. Raises UserError when the model cannot be loaded.
    """
    with loading(config):
        path = resolve_model(config)
        settings = AutoConfig.from_pretrained(path, **load_settings(config))
        settings.num_labels = len(label_names)
        settings.id2label = dict(enumerate(label_names))
        settings.label2id = {name: number for number, name in enumerate(label_names)}
        settings.problem_type = "single_label_classification"
        settings.pad_token_id = tokenizer.pad_token_id if settings.pad_token_id is None else settings.pad_token_id
        model, info = AutoModelForSequenceClassification.from_pretrained(
            path,
            config=settings,
            **weight_settings(config),
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    mismatched = [item[0] if isinstance(item, tuple) else item for item in info["mismatched_keys"]]
    freeze(model, config.freeze)
    return model, sorted({*info["missing_keys"], *mismatched})


def load_classifier(config: ModelConfig) -> PreTrainedModel:
    """An already trained classifier, as it is.

    Raises UserError when it cannot be loaded or its head is not part of the checkpoint.
    """
    return load_trained(config, AutoModelForSequenceClassification, "classifier")


def load_trained(config: ModelConfig, kind: Any, name: str) -> PreTrainedModel:
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
def loading(config: ModelConfig) -> Iterator[None]:
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


def load_report(config: ModelConfig, error: Exception) -> str:
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
    if (folder.is_dir() and Path(config.model).is_dir()) or not REPO_ID.fullmatch(config.model):
        return given
    need = Need("--model", Repo(config.model), config.model_revision or "main")
    return "\n".join([given, "One of:", *(f"  {line}" for line in advice(need, settle_endpoint(None)))])


# ---------------------------------------------------------------------------------------------------- freezing


def freeze(model: PreTrainedModel, part: str | None) -> None:
    """Stop the gradients of the backbone, of the embeddings, or of the embeddings and the n lowest layers.

    Raises UserError when the model has no such part, or n is more than its layers.
    """
    for module in frozen_part(model, part):
        module.requires_grad_(False)


def frozen_part(model: PreTrainedModel, part: str | None) -> list[nn.Module]:
    if part is None:
        return []
    backbone = getattr(model, model.base_model_prefix)
    if part == "backbone":
        return [backbone]
    embeddings = find_embeddings(backbone)
    if part == "embeddings":
        return embeddings
    layers = find_layers(backbone, model.config.num_hidden_layers)
    if int(part) > len(layers):
        raise UserError(f"--freeze {part}: the model has {len(layers)} layers")
    return [*embeddings, *layers[: int(part)]]


def find_embeddings(backbone: Any) -> list[nn.Module]:
    """All that makes vectors of tokens and positions before the first layer, wherever an architecture keeps it.

    Beside the table of tokens that may be one of positions (GPT-2's `wpe`) and a change of width (ELECTRA's
    `embeddings_project`). Tables of relative positions, which each layer reads, are none of it.
    """
    found = {
        name: module
        for name, module in backbone.named_modules()
        if EMBEDDINGS.match(name.rpartition(".")[2]) and not any(part.isdecimal() for part in name.split("."))
    }
    topmost = [found[name] for name in found if not any(name.startswith(f"{other}.") for other in found)]
    return topmost or [backbone.get_input_embeddings()]


def find_layers(backbone: nn.Module, number: int) -> nn.ModuleList:
    """The list of transformer blocks, wherever an architecture keeps it: the only list as long as the model is deep."""
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return module
    raise UserError(
        f"--freeze: {type(backbone).__name__} does not show its {number} layers; use backbone or embeddings"
    )


def set_train_mode(model: nn.Module) -> None:
    """Train mode, but for parts without a trainable parameter: a frozen part gives the same output each time.

    With an adapter the whole model is in train mode: its frozen parts read what adapters below them give, and their
    dropout regularises the adapters, as in the papers and in the libraries whose settings are used here.
    """
    model.train()
    if any(hasattr(module, "adaptation") for module in model.modules()):
        return
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trainable in sizes if trainable), sum(size for size, _ in sizes)
