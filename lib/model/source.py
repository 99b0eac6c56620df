"""Where the files of a model are, and how transformers loads them with errors that a user understands."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lib.config.sections import ModelSource
from lib.errors import UserError, first_line
from lib.hub import packaged
from lib.hub.advice import advice
from lib.hub.cache.files import weight_files
from lib.hub.cache.layout import Repo, find_snapshot, is_repo_id, linked_blob
from lib.hub.endpoint import configure_endpoint
from lib.hub.modelscope import modelscope_folder, read_record
from lib.hub.needs import Need


def model_name(model: str) -> str:
    """The last part of a path or Hub id, for run names and reports."""
    return model.rstrip("/").split("/")[-1]


def resolve_model(source: ModelSource) -> str:
    """The folder of a model: minilm's, the user's, ModelScope's, or the snapshot in the cache; else its Hub id."""
    if source.model == "minilm":
        return str(packaged.minilm_folder())
    if Path(source.model).is_dir():
        return source.model
    if source.source == "modelscope":
        return str(modelscope_folder(source.model, source.model_revision or "master"))
    snapshot = find_snapshot(Repo(source.model), source.model_revision) if is_repo_id(source.model) else None
    return str(snapshot or source.model)


def model_origin(source: ModelSource) -> dict[str, str]:
    """Commit (or ModelScope revision) and SHA-256 of the weights of a downloaded model; empty for a folder."""
    folder = Path(resolve_model(source))
    record = read_record(source.model, source.model_revision or "master") if source.source == "modelscope" else None
    if record:
        weights = [record["files"][name] for name in weight_files(record["files"], source.allow_pickle)]
        return {"model_source": record["source"], "model_commit": record["revision"], "model_sha256": " ".join(weights)}
    if folder.parent.name != "snapshots" or Path(source.model).is_dir():
        return {}
    names = weight_files([path.name for path in folder.iterdir()], source.allow_pickle)
    blobs = [linked_blob(folder / name) for name in names]
    return {"model_commit": folder.name, "model_sha256": " ".join(blob for blob in blobs if len(blob) == 64)}


@dataclasses.dataclass(frozen=True)
class LoadingInfo:
    """How the weights of a model and of its checkpoint differ, by their names."""

    new: list[str]
    """Initialized at random: missing from the checkpoint, or of another shape there."""
    unused: list[str]
    """In the checkpoint, but not in the model."""


def loader_arguments(source: ModelSource) -> dict[str, Any]:
    """Arguments of every `from_pretrained`: the revision, and remote code only where the user trusts it."""
    return {"revision": source.model_revision or "main", "trust_remote_code": source.trust_remote_code}


def load_hf_config(source: ModelSource) -> Any:
    """The configuration of transformers in the model's config.json."""
    return AutoConfig.from_pretrained(resolve_model(source), **loader_arguments(source))


def load_pretrained(source: ModelSource, kind: Any, hf_config: Any = None) -> tuple[PreTrainedModel, LoadingInfo]:
    """A model of one of the Auto classes in float32, from safetensors unless pickles are allowed.

    `hf_config` replaces the configuration of the checkpoint. Weights of another shape than the model's are new.
    """
    model, info = kind.from_pretrained(
        resolve_model(source),
        config=hf_config,
        **loader_arguments(source),
        use_safetensors=None if source.allow_pickle else True,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    mismatched = {name for name, *_ in info["mismatched_keys"]}
    return model, LoadingInfo(sorted({*info["missing_keys"], *mismatched}), sorted(info["unexpected_keys"]))


@contextlib.contextmanager
def loading_errors(source: ModelSource) -> Iterator[None]:
    """Raise UserError if files of `source` cannot be loaded; transformers' own loading report is off meanwhile."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(explain_loading_error(source, error)) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def explain_loading_error(source: ModelSource, error: Exception) -> str:
    """Why a model could not be loaded, and what to do about it."""
    if "trust_remote_code" in str(error):
        return (
            f"--model {source.model} needs remote code (Python files in its repository), which runs only if you trust "
            "it: read it, then add --trust_remote_code --model_revision COMMIT"
        )
    folder = Path(resolve_model(source))
    if folder.is_dir() and not source.allow_pickle:
        names = [path.name for path in folder.iterdir()]
        if not weight_files(names, False) and weight_files(names, True):
            return (
                f"--model {source.model} has pickled weights only (.bin), and loading a pickle can run any code; if you "
                "trust its author, add --allow_pickle"
            )
    message = (
        f"--model {source.model} could not be loaded: {first_line(error)}\n"
        "Give a folder with config.json and weights, a Hub id (needs the network or a mirror, HF_ENDPOINT), or "
        "--model minilm, which needs neither."
    )
    if (folder.is_dir() and Path(source.model).is_dir()) or not is_repo_id(source.model):
        return message
    need = Need("--model", Repo(source.model), source.model_revision or "main")
    return "\n".join([message, "One of:", *(f"  {line}" for line in advice(need, configure_endpoint(None)))])
