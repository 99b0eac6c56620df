"""What a run reads from the Hub, and what of it is in the cache."""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lib.config.sections import ModelSource
from lib.errors import UserError
from lib.hub.cache.contents import file_damage
from lib.hub.cache.files import DATA_CARDS, data_files, missing_parts, missing_shards, model_files
from lib.hub.cache.layout import Repo, find_snapshot, is_repo_id, read_tree, snapshot_files
from lib.hub.endpoint import datasets_cache


@dataclasses.dataclass(frozen=True)
class Need:
    """A repository that a run reads, and the flag that names it."""

    flag: str
    repo: Repo
    revision: str = "main"
    source: str = "hub"
    dataset_config: str | None = None
    allow_pickle: bool = False
    code: bool = False

    def __str__(self) -> str:
        return f"{self.flag} {self.repo.repo_id}" + (f" at {self.revision}" if self.revision != "main" else "")


def model_needs(source: ModelSource) -> list[Need]:
    """The repository of a model; for a folder, that of the model below the adapter in it; none for minilm."""
    folder = Path(source.model)
    if folder.is_dir() or source.model == "minilm":
        return [*base_needs(folder), *base_needs(folder / "model")]  # a run keeps its model in model/
    revision = source.model_revision or ("main" if source.source == "hub" else "master")
    pickle, code = source.allow_pickle, source.trust_remote_code
    return [Need("--model", Repo(source.model), revision, source.source, allow_pickle=pickle, code=code)]


def base_needs(folder: Path | None) -> list[Need]:
    """The model below the adapter in `folder`; none without an adapter, or where that model is not on the Hub."""
    if folder is None or not (folder / "adapter_config.json").is_file():
        return []
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError):
        return []  # loading reports it
    base, revision = named_base(settings)
    if not base or base == "minilm" or Path(base).is_absolute() or Path(base).is_dir():
        return []
    return [Need("--model", Repo(base), revision or "main")]


def named_base(settings: Any) -> tuple[str | None, str | None]:
    """The base model that an adapter_config.json of peft or AdapterHub names, and its revision."""
    if not isinstance(settings, dict):
        return None, None
    base = settings.get("base_model_name_or_path") or settings.get("model_name")
    revision = settings.get("model_revision") or settings.get("revision")
    return (base if isinstance(base, str) else None), (revision if isinstance(revision, str) else None)


def is_lost_folder(model: str) -> bool:
    """Whether a model is the path of a missing folder, not a name on the Hub: the folder above it exists."""
    return "/" in model and Path(model).parent.is_dir() and not Path(model).is_dir()


def check_names(needs: Iterable[Need]) -> None:
    """Raise UserError for a model or data set that is neither a folder nor a name that the Hub allows."""
    for need in needs:
        name = need.repo.repo_id
        if not is_repo_id(name):
            raise UserError(
                f"{need.flag} {name}: no such folder, and not a name of the Hub (user/name); check the path"
            )


def wanted_files(need: Need, names: Iterable[str], card: dict[str, Any] | None) -> list[str]:
    """The files of a repository that the run reads; `card` is the metadata in a data set's README.

    Raises UserError when the data set has several configurations and none, or an unknown one, was chosen.
    """
    names = list(names)
    if need.repo.repo_type == "model":
        return model_files(names, need.allow_pickle, need.code)
    patterns, found = config_patterns(need, card), data_files(names)
    if patterns is None:
        return found
    from huggingface_hub.utils import filter_repo_objects

    chosen = set(filter_repo_objects(found, allow_patterns=patterns))
    return [name for name in found if name in DATA_CARDS or name in chosen]


def config_patterns(need: Need, card: dict[str, Any] | None) -> list[str] | None:
    """Patterns for the files of the chosen configuration; None where the README names none, and all files are read."""
    chosen = chosen_config(need, card)
    if chosen is None:
        return None
    folder, given = str(chosen.get("data_dir") or ""), chosen.get("data_files")
    prefix = f"{folder.strip('./')}/" if folder.strip("./") else ""
    return [prefix + text.removeprefix("./") for text in paths_in(given)] or [f"{prefix}*"]


def chosen_config(need: Need, card: dict[str, Any] | None) -> dict[str, Any] | None:
    """The README's entry for the chosen configuration; None where it has no configurations. Raises UserError as above."""
    listed = (card or {}).get("configs")
    if not listed or not isinstance(listed, list):
        return None
    configs = {str(item.get("config_name", "default")): item for item in listed}
    chosen = need.dataset_config
    if chosen is None:
        marked = [name for name, item in configs.items() if item.get("default")]
        chosen = (marked or [name for name in configs if name == "default"] or list(configs))[0]
        if len(configs) > 1 and not marked and chosen != "default":
            raise UserError(
                f"{need} has several configurations; choose one with --dataset_config: {', '.join(configs)}"
            )
    if chosen not in configs:
        raise UserError(f"--dataset_config {chosen}: {need} has {', '.join(configs)}")
    return configs[chosen]


def paths_in(given: Any) -> list[str]:
    """The patterns in a README's `data_files`, which is a text, a list, or a list of {split, path}."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, dict):
        return paths_in(given.get("path")) if "path" in given else paths_in(list(given.values()))
    return [text for item in given or [] for text in paths_in(item)]


def read_card(path: Path) -> dict[str, Any]:
    """The metadata in a data set's README; empty where there is none or it cannot be parsed."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except Exception:  # any error of YAML or of the file
        return {}


def missing_from_cache(need: Need) -> list[str]:
    """What the cache lacks for a run to start without the Hub; empty when it has everything."""
    snapshot = find_snapshot(need.repo, need.revision)
    if snapshot is None:
        return [] if in_datasets_cache(need) else ["all of it"]
    files = snapshot_files(snapshot)
    missing = missing_parts(files, need.repo.repo_type, need.allow_pickle)
    tree = read_tree(need.repo.folder, snapshot.name)
    card = read_card(snapshot / "README.md") if need.repo.repo_type == "dataset" else None
    if tree and not missing:
        return [name for name in wanted_files(need, tree, card) if name not in files]
    used = set(wanted_files(need, files, card))
    if need.repo.repo_type == "dataset" and not used - DATA_CARDS:
        missing = missing or ["its data files"]
    shards = {name: path for name, path in files.items() if name in used or name.endswith(".index.json")}
    return missing + missing_shards(shards)


def damaged_files(need: Need) -> list[str]:
    """Files of the run in the cache that are damaged, seen without reading all of them."""
    snapshot = find_snapshot(need.repo, need.revision)
    files = snapshot_files(snapshot) if snapshot else {}
    card = read_card(snapshot / "README.md") if snapshot and need.repo.repo_type == "dataset" else None
    wanted = wanted_files(need, files, card)
    return [f"{name} {fault}" for name in wanted if (fault := file_damage(files[name], name))]


def in_datasets_cache(need: Need) -> bool:
    """Whether `datasets` has tables of a data set from an earlier run; it does not know of which revision they are."""
    owner, _, name = need.repo.repo_id.rpartition("/")
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    folders = [datasets_cache() / (f"{owner}___{text}" if owner else text) for text in (name, name.lower(), snake)]
    return need.repo.repo_type == "dataset" and need.revision == "main" and any(folder.is_dir() for folder in folders)
