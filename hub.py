"""Models and data sets on machines that cannot reach the Hub.

python hub.py doctor --model roberta-base --dataset sst5     what prevents a run, what memory it takes, and what helps
python hub.py import FOLDER --repo_id roberta-base           put a downloaded folder, .zip or .tar into the cache
python hub.py verify                                         is the cache still what was downloaded?
"""

import sys
from pathlib import Path

from lib.config.cli import parse_command
from lib.config.hub import COMMANDS, DoctorConfig, ImportConfig, VerifyConfig
from lib.errors import UserError, one_message, printable, redact
from lib.runtime.streams import keep_writing

if __name__ == "__main__":  # before the other imports: --help answers at once
    keep_writing(only_prints=True)
    CONFIG = parse_command(COMMANDS)

from lib.config.sections import DataConfig, ModelSource
from lib.data.catalog import data_needs
from lib.hub.cache.layout import cached_repos, parse_repo
from lib.hub.cache.verify import has_no_ref, verify_repo
from lib.hub.doctor import diagnose, settings_folder
from lib.hub.importing.folder import import_source
from lib.hub.needs import model_needs


def main(config: ImportConfig | VerifyConfig | DoctorConfig) -> int:
    """Run one command; returns its exit code: 1 for a damaged cache, or a run that could not start."""
    if isinstance(config, ImportConfig):
        print(import_source(config))
        return 0

    if isinstance(config, VerifyConfig):
        repos = [parse_repo(name) for name in config.repos] or cached_repos()
        damaged = 0
        for repo in repos:
            faults = list(verify_repo(repo))
            damaged += bool(faults)
            print("\n".join(map(printable, faults)) if faults else f"{repo}: sound", flush=True)
            if not faults and has_no_ref(repo):
                print("  but no branch names it: only a run with its commit finds it, and `hf cache prune` deletes it")
        print(f"{len(repos)} checked, {damaged} damaged or missing" if repos else "the cache is empty")
        return 1 if damaged else 0

    model = ModelSource(config.model or "minilm", config.model_revision)
    data = DataConfig(config.dataset, config.dataset_config, config.revision)
    page, healthy = diagnose(config, model_needs(model) + data_needs(data))
    print(lines_of(page), flush=True)
    if config.model is not None and healthy:
        with settings_folder(config) as folder:
            print(f"\n{lines_of(memory_page(config, folder))}")
    elif config.model is not None:
        print("\nWhat memory training takes is not counted before a run can start.")
    return 0 if healthy else 1


def lines_of(page: str) -> str:
    """Text that may hold names of others, as it is shown."""
    return "\n".join(map(printable, redact(page).split("\n")))


def memory_page(config: DoctorConfig, folder: Path | None) -> str:
    """What memory training takes, from the config.json in `folder`."""
    if folder is None:
        return "What memory training takes is not known: there is no config.json."
    from lib.runtime.startup import quiet_libraries  # these take seconds to import

    # isort: split
    from lib.run.memory import compare_methods

    quiet_libraries()
    try:
        return compare_methods(config, ModelSource(str(folder)))
    except UserError as error:
        return f"What memory training takes is not known: {error}"


if __name__ == "__main__":
    try:
        CODE = main(CONFIG)
        sys.stdout.flush()
    except (UserError, OSError) as error:
        print(one_message(redact(f"error: {error}")), file=sys.stderr)
        CODE = 2
    sys.exit(CODE)
