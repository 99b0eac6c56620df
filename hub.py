"""Models and data sets on machines that cannot reach the Hub.

python hub.py doctor --model roberta-base --dataset sst5          what is in the way of a run, and what mends it
python hub.py import FOLDER --repo_id roberta-base                a downloaded folder, .zip or .tar into the cache
python hub.py verify                                              is what the cache holds still what was downloaded?
python hub.py pack roberta-base datasets/SetFit/sst5 --output lab.tar   and on the other machine: hub.py unpack lab.tar
"""

import sys
from pathlib import Path
from typing import Any

from lib.config.cli import parse_command
from lib.config.hub import COMMANDS, DoctorConfig, ImportConfig, PackConfig, UnpackConfig, VerifyConfig
from lib.errors import UserError

if __name__ == "__main__":  # before the other imports: --help answers at once
    CONFIG = parse_command(COMMANDS)

from lib.config.sections import DataConfig, ModelSource
from lib.data.catalog import data_needs
from lib.hub.cache.layout import cached_repos, is_nameless, parse_repo, verify_repo
from lib.hub.doctor import diagnose
from lib.hub.importing.archives import opened, pack, unpack
from lib.hub.importing.folder import import_folder
from lib.hub.needs import model_needs


def run_import(config: ImportConfig) -> int:
    """Import a folder or archive."""
    repo = parse_repo(config.repo_id, config.repo_type)
    checks: dict[str, Any] = {
        "allow_pickle": config.allow_pickle,
        "move_ref": config.move_ref,
        "load_check": config.load_check,
    }
    listed = Path(config.sha256) if config.sha256 else None
    with opened(Path(config.source)) as folder:
        done = import_folder(folder, repo, config.revision, config.commit, listed, **checks)
    flag, at = ("--model", "--model_revision") if repo.repo_type == "model" else ("--dataset", "--revision")
    revision = "" if config.revision == "main" else f" {at} {config.revision}"
    loaded = "   # loaded once offline" if config.load_check else ""
    script = 'predict.py "a text"' if done.base else "train.py"
    print(f"{done}\nuse        python {script} {flag} {repo.repo_id}{revision}{loaded}")
    return 0


def run_verify(config: VerifyConfig) -> int:
    """Verify repositories of the cache; 1 when one is damaged."""
    repos = [parse_repo(name) for name in config.repos] or cached_repos()
    damaged = 0
    for repo in repos:
        faults = list(verify_repo(repo))
        damaged += bool(faults)
        print("\n".join(faults) if faults else f"{repo}: sound", flush=True)
        if not faults and is_nameless(repo):
            print("  but no branch names it: only a run with its commit finds it, and `hf cache prune` would delete it")
    print(f"{len(repos)} in the cache, {damaged} damaged" if repos else "the cache is empty")
    return 1 if damaged else 0


def run_pack(config: PackConfig) -> int:
    """Write an archive."""
    for part in pack(config.repos, Path(config.output), config.revision):
        print(f"packed     {part}")
    print(f"written    {config.output}; on the other machine: python hub.py unpack {Path(config.output).name}")
    return 0


def run_unpack(config: UnpackConfig) -> int:
    """Read an archive."""
    for part in unpack(Path(config.archive), config.move_ref):
        print(f"unpacked   {part}")
    return 0


def run_doctor(config: DoctorConfig) -> int:
    """Print the page; 1 when a run could not start."""
    model = ModelSource(config.model or "minilm", config.model_revision)
    data = DataConfig(config.dataset, config.dataset_config, config.revision)
    page, healthy = diagnose(config, model_needs(model) + data_needs(data))
    print(page)
    return 0 if healthy else 1


def main(config: object) -> int:
    """Run one command; its exit code."""
    runners = {
        ImportConfig: run_import,
        VerifyConfig: run_verify,
        PackConfig: run_pack,
        UnpackConfig: run_unpack,
        DoctorConfig: run_doctor,
    }
    return runners[type(config)](config)  # type: ignore[operator]


if __name__ == "__main__":
    try:
        CODE = main(CONFIG)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        CODE = 2
    sys.exit(CODE)
