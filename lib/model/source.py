"""Where the files of a model are, and how transformers loads them with errors that a user understands."""

import atexit
import contextlib
import dataclasses
import functools
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, dynamic_module_utils
from transformers.utils import logging as transformers_logging

from lib.config.sections import ModelConfig, ModelSource, literal
from lib.data.trained_on import KEY
from lib.errors import UserError, first_line, redact
from lib.hub import packaged
from lib.hub.advice import advice
from lib.hub.cache.files import ADAPTER_WEIGHTS, weight_files
from lib.hub.cache.layout import Repo, find_snapshot, is_repo_id
from lib.hub.endpoint import configure_endpoint
from lib.hub.modelscope import modelscope_folder, read_record
from lib.hub.needs import Need
from lib.model.attention import set_attention
from lib.model.folder import (
    LABEL_SETTINGS,
    check_outputs,
    check_settings,
    check_stored_types,
    check_tokenizer,
    find_damage,
    has_plain_labels,
    limited_memory,
    object_damage,
    read_config,
    stored_labels,
    unusable,
)
from lib.model.frozen_weights import FLOAT32, PIP, FrozenWeights, load_frozen

logger = logging.getLogger(__name__)

PACKAGES_OF_ATTENTION = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}
"""What pip calls the packages of some values of `attn_implementation`."""

USUAL_OUTPUTS = {"return_dict": True, "output_hidden_states": False, "chunk_size_feed_forward": 0}
"""Settings of config.json that no script here leaves to the model: they change the form of outputs, not the numbers."""

ANSWER_SETTINGS = ("thresholds", "calibration_temperature")
"""Settings of config.json that say how the outputs of one trained head become answers."""

NOT_OF_THE_MODEL = {
    *("_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "torch_dtype"),
    *(
        *LABEL_SETTINGS,
        *ANSWER_SETTINGS,
        "problem_type",
        KEY,
    ),  # of the data that it was trained on before
    *USUAL_OUTPUTS,
}
"""Settings of config.json that a model which is trained here does not depend on."""

OF_TOKENIZER = re.compile(
    r".*(token|vocab|merges|piece|spm|bpe|normalizer|emoji|byte_maps|word_).*\.(json|txt|model|spm|codes|tokenizer)|dict\.txt"
)
"""Files of the tokenizers in transformers."""


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


def model_folder(source: ModelSource) -> Path:
    """The folder of a model, which alone is handed to transformers: by a name it would read the refs of the cache itself.

    Raises UserError if the model is nowhere, and where trusted code would come from another repository.
    """
    folder = Path(resolve_model(source))
    if not folder.is_dir():
        raise UserError(add_hint(source, unusable(source, "it is neither a folder nor in the cache")))
    if source.trust_remote_code:
        use_own_modules()
        for name in ("config.json", "tokenizer_config.json"):
            check_code(source, folder / name)
    return folder


def check_code(source: ModelSource, file: Path) -> None:
    """Raise UserError if the code that a file of settings names is in another repository, of which no commit is pinned."""
    try:
        named = json.loads(file.read_text(encoding="utf-8")).get("auto_map")
    except (OSError, ValueError, AttributeError, RecursionError):
        return  # loading reports it
    others = re.findall(r"[\w./-]+?(?=--)", json.dumps(named))
    if others:
        raise unusable(
            source,
            f"{file} runs code of another repository ({others[0]}), of which --model_revision pins no commit; copy its .py "
            f"files into a folder with the model, remove {others[0]}-- from auto_map there, and give the folder",
        )


@functools.cache
def use_own_modules() -> None:
    """Have transformers copy trusted code to a folder of this process: what a shared one holds may not be that code."""
    place = tempfile.mkdtemp(prefix="modules-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    dynamic_module_utils.HF_MODULES_CACHE = place


def model_origin(source: ModelSource) -> dict[str, str]:
    """Commit (or ModelScope revision) of a downloaded model, and SHA-256 of the weights on disk, also of those in a folder."""
    folder, origin = Path(resolve_model(source)), dict[str, str]()
    record = read_record(source.model, source.model_revision or "master") if source.source == "modelscope" else None
    if record:
        origin = {"model_source": record["source"], "model_commit": record["revision"]}
    elif folder.parent.name == "snapshots" and not Path(source.model).is_dir():
        origin = {"model_commit": folder.name}
    if not folder.is_dir():
        return origin
    names = [path.name for path in folder.iterdir()]
    names = weight_files(names, source.allow_pickle) or sorted(filter(ADAPTER_WEIGHTS.fullmatch, names))
    weights = [folder / name for name in names if not name.endswith(".json")]
    return origin | {"model_sha256": " ".join(file_hashes(folder, weights).values())}


def model_identity(source: ModelConfig) -> dict[str, Any]:
    """What a training run takes from the files of a model, wherever they are; empty where they are in no folder.

    `model_sha256` has the SHA-256 of each file of weights, `model_config` the settings in config.json with
    --config_overrides, `tokenizer_sha256` the files of the tokenizer, `code_sha256` the Python files that are trusted.
    """
    folder = Path(resolve_model(source))
    if not (folder / "config.json").is_file():
        return {}
    content = read_config(source, folder) | {
        name: literal(value) for name, _, value in (item.partition("=") for item in source.config_overrides)
    }
    found = model_origin(source) | {
        "model_config": {name: value for name, value in content.items() if name not in NOT_OF_THE_MODEL},
        "tokenizer_sha256": file_hashes(folder, filter(is_of_tokenizer, folder.iterdir())),
    }
    if not source.trust_remote_code:
        return found
    # Code may also stand in another repository: "user/name--modeling.Model".
    named = re.findall(r'"([\w.-]+(?:/[\w.-]+)?)--', json.dumps(content.get("auto_map")))
    code = file_hashes(folder, folder.rglob("*.py"))
    for name in filter(is_repo_id, sorted({*named})):
        if (other := find_snapshot(Repo(name))) is not None:
            code |= {f"{name}--{file}": digest for file, digest in file_hashes(other, other.rglob("*.py")).items()}
    return found | {"code_sha256": code}


def is_of_tokenizer(path: Path) -> bool:
    return OF_TOKENIZER.fullmatch(path.name) is not None


def file_hashes(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of files below `folder` by their names there, in the order of the names; of several at a time."""
    files = sorted(path for path in paths if path.is_file())
    with ThreadPoolExecutor() as pool:
        hashes = pool.map(packaged.cached_sha256, files)
        return {file.relative_to(folder).as_posix(): digest for file, digest in zip(files, hashes, strict=True)}


@dataclasses.dataclass(frozen=True)
class LoadingInfo:
    """How the weights of a model and of its checkpoint differ, by their names."""

    new: list[str]
    """Initialized at random: missing from the checkpoint, or of another shape there."""
    unused: list[str]
    """In the checkpoint, but not in the model."""
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    """Of the new ones that are in the checkpoint: the shape there, and the model's."""


def loader_arguments(source: ModelSource) -> dict[str, Any]:
    """Arguments of every `from_pretrained`: the revision, and remote code only where the user trusts it."""
    return {"revision": source.model_revision or "main", "trust_remote_code": source.trust_remote_code}


def load_hf_config(source: ModelSource, labels: bool = False) -> Any:
    """The configuration of transformers in the model's config.json.

    Names of labels that transformers cannot read are left out; with `labels` they are read, or refused. Raises UserError
    if the file is damaged.
    """
    folder = model_folder(source)
    if damage := object_damage(folder / "config.json"):
        raise UserError(add_hint(source, unusable(source, f"{folder}/config.json {damage}")))
    content = read_config(source, folder)
    names = stored_labels(source, content, folder / "config.json") if labels else None
    with loading_errors(source), tempfile.TemporaryDirectory() as clean:
        file = folder
        if not has_plain_labels(content):
            file = Path(clean, "config.json")
            rest = {name: value for name, value in content.items() if name not in LABEL_SETTINGS}
            file.write_text(json.dumps(rest), encoding="utf-8")
        hf_config = AutoConfig.from_pretrained(str(file), **loader_arguments(source))
    hf_config._name_or_path = str(folder)
    for name, value in USUAL_OUTPUTS.items():
        setattr(hf_config, name, value)
    check_settings(source, hf_config)
    if names:
        hf_config.id2label = dict(enumerate(names))
        hf_config.label2id = {name: number for number, name in enumerate(names)}
    if labels:
        check_outputs(source, hf_config, folder / "config.json")
    return hf_config


def read_tokenizer(source: ModelSource) -> Any:
    """The tokenizer of a model as its files describe it. Raises UserError if they are damaged or hold no vocabulary."""
    folder, more = model_folder(source), {}
    if (folder / "config.json").is_file():
        # transformers asks the configuration for the architecture, and may not be able to read its labels.
        hf_config = load_hf_config(source)
        more = {} if has_plain_labels(read_config(source, folder)) else {"config": hf_config}
    with loading_errors(source):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), **loader_arguments(source), **more)
    check_tokenizer(source, tokenizer, folder)
    tokenizer.model_max_length = int(tokenizer.model_max_length)  # 512.0 in some files
    return tokenizer


def load_pretrained(
    source: ModelSource, kind: Any, hf_config: Any, changed: bool = False, frozen: FrozenWeights = FLOAT32
) -> tuple[PreTrainedModel, LoadingInfo]:
    """A model of one of the Auto classes in float32, from safetensors unless pickles are allowed.

    `hf_config` replaces the configuration of the checkpoint; `changed` says that the user changed it. Weights of another
    shape than the model's are new. Linear layers of the backbone are held as `frozen` says, from the moment they are read.
    Raises UserError if the files cannot be loaded or memory does not suffice.
    """
    folder = resolve_model(source)
    check_stored_types(source, Path(folder), hf_config)
    set_attention(source, kind, hf_config)
    with loading_errors(source), limited_memory(source, Path(folder), changed, frozen.bytes):
        model, info = load_frozen(
            frozen,
            kind,
            folder,
            config=hf_config,
            **loader_arguments(source),
            use_safetensors=None if source.allow_pickle else True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
        )
    shapes = {name: (tuple(stored), tuple(wanted)) for name, stored, wanted in info["mismatched_keys"]}
    broken = [name for name, p in model.named_parameters() if not torch.isfinite(p.detach().sum(dtype=torch.float32))]
    if broken:
        logger.warning("warning: weights of --model %s are not finite: %s", source.model, ", ".join(broken[:4]))
    return model, LoadingInfo(sorted({*info["missing_keys"], *shapes}), sorted(info["unexpected_keys"]), shapes)


@contextlib.contextmanager
def loading_errors(source: ModelSource) -> Iterator[None]:
    """Raise UserError for whatever a library raises while it loads files of `source`, so keep our own code outside.

    transformers' own loading report is off meanwhile.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # A panic in the libraries written in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(explain_loading_error(source, error)) from error
    finally:
        transformers_logging.set_verbosity(verbosity)


def explain_loading_error(source: ModelSource, error: BaseException) -> str:
    """Why a model could not be loaded, and what to do about it."""
    text = str(error)
    if "trust_remote_code" in text:
        return (
            f"--model {source.model} needs remote code (Python files in its repository), which runs only if you trust "
            "it: read it, then add --trust_remote_code --model_revision COMMIT"
        )
    folder = Path(resolve_model(source))
    if folder.is_dir():
        names = [path.name for path in folder.iterdir()]
        if not source.allow_pickle and not weight_files(names, False) and weight_files(names, True):
            return (
                f"--model {source.model} has pickled weights only (.bin), and loading a pickle can run any code; if you "
                "trust its author, add --allow_pickle"
            )
        if damage := find_damage(folder, source.allow_pickle):
            return add_hint(source, unusable(source, damage))
    if "Unrecognized configuration class" in text:
        return str(unusable(source, explain_architecture(source, text)))
    if (changes := getattr(source, "config_overrides", ())) and not isinstance(error, OSError | ImportError):
        return f"--config_overrides {' '.join(changes)}: no model can be built from that: {reason_of(error)}"
    message = unusable(source, reason_of(error))
    return f"{message}\n{explain_package(folder)}" if isinstance(error, ImportError) else add_hint(source, message)


def add_hint(source: ModelSource, message: UserError) -> str:
    """`message`, then what to do about it: another folder, or how to get the files of a model on the Hub."""
    folder = Path(source.model)
    if (folder / "config.json").is_file():
        return f"{message}\nCheck its files, {folder}/config.json above all, or download the model again."
    text = (
        f"{message}\nGive a folder with config.json and weights, a Hub id (needs the network or a mirror, HF_ENDPOINT), or "
        "--model minilm, which needs neither."
    )
    if folder.is_dir() or not is_repo_id(source.model):
        return text
    need = Need("--model", Repo(source.model), source.model_revision or "main")
    return "\n".join([text, "One of:", *(f"  {line}" for line in advice(need, configure_endpoint(None)))])


def reason_of(error: BaseException) -> str:
    """The first line of an error, with the next one where that only announces it, and the type where it says little."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    reason = " ".join(lines[:2]) if lines and lines[0].endswith(":") else first_line(error)
    bare = isinstance(error, LookupError | AttributeError | TypeError | AssertionError) and lines
    return redact(f"{type(error).__name__}: {reason}" if bare else reason)


def explain_architecture(source: ModelSource, text: str) -> str:
    """That transformers has no model of this architecture for the task; `text` is its own message."""
    wanted = text.partition("AutoModelFor")[2].partition(".")[0]
    task = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", wanted).lower().replace("sequence", "text") or "text"
    kind = json.loads((Path(resolve_model(source)) / "config.json").read_text(encoding="utf-8"))["model_type"]
    return f"transformers has no model for {task} of this architecture ({kind}); choose a model of another one"


def explain_package(folder: Path) -> str:
    """Which setting of config.json makes a library ask for a package, and what to do."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    attention = content.get("attn_implementation") or content.get("_attn_implementation")
    quantization = content.get("quantization_config")
    if isinstance(quantization, dict):
        method = quantization.get("quant_method", "no method")
        install = f"run: {PIP}" if method == "bitsandbytes" else "install the package"
        return (
            f"Its weights are quantized (quantization_config in {folder}/config.json: {method}); {install}, or use the "
            "model's original, whose weights are not."
        )
    if attention:
        package = f" (package {PACKAGES_OF_ATTENTION[attention]})" if attention in PACKAGES_OF_ATTENTION else ""
        return f"{folder}/config.json asks for attn_implementation {attention}{package}; install it, or remove the setting."
    return "Install the package that is named, or choose another model."
