"""The options of hub.py's commands."""

import dataclasses
from typing import Annotated, Literal

from tyro.conf import Positional

from lib.config.limits import COUNT, INPUT_NAME, INPUT_PATH, check_values
from lib.config.sections import HubConfig, Precision, alias
from lib.errors import UserError

RepoType = Literal["model", "dataset"]


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """Put a downloaded folder, .zip or .tar into the cache as a model or data set, after checking and loading it."""

    source: Positional[Annotated[str, INPUT_PATH]]
    """Folder from a browser, ModelScope, network disk, `git clone`, `hf download --local-dir` or a cache; or an archive."""
    repo_id: Annotated[str, INPUT_NAME]
    """Name under which it is loaded, such as roberta-base or user/name."""
    repo_type: RepoType = "model"
    """model or dataset."""
    revision: Annotated[str, INPUT_NAME] = "main"
    """Branch or tag under which it is loaded."""
    commit: Annotated[str | None, INPUT_NAME] = None
    """The commit on the Hub, where you know it and the folder does not record it."""
    sha256: Annotated[str | None, INPUT_PATH] = None
    """List of hashes, as sha256sum prints it, that the files must have."""
    allow_pickle: bool = False
    """Accept a model that has pickled weights (.bin) only."""
    move_ref: bool = False
    """Let the revision name these files even where it names others in the cache."""
    load_check: bool = True
    """Load it offline in a fresh process before it is added."""

    def __post_init__(self) -> None:
        check_values(self)


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """Compare the cache with its hashes, without network; exit code 1 when something is damaged."""

    repos: Positional[tuple[str, ...]] = ()
    """`user/name` or `datasets/user/name`. [default: all]"""


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """Find what prevents a run: cache, endpoint, name server, proxy, token, disk; with the commands that fix it.

    With --model, also what memory the ways to train it would take on this machine.
    """

    model: Annotated[str | None, INPUT_PATH] = None
    """The model of the run. [default: minilm]"""
    model_revision: Annotated[str | None, INPUT_NAME] = None
    """Branch, tag or commit of it."""
    dataset: Annotated[str | None, INPUT_PATH] = None
    """The data set of the run. [default: movie_reviews]"""
    dataset_config: Annotated[str | None, INPUT_NAME] = None
    """Configuration of it."""
    revision: Annotated[str | None, INPUT_NAME] = None
    """Branch, tag or commit of it."""
    train_batch_size: Annotated[int, alias("--bs"), COUNT] = 32
    """Memory: samples per optimizer step."""
    per_device_train_batch_size: Annotated[int | None, COUNT] = None
    """Memory: largest micro-batch. [default: as large as the step]"""
    max_length: Annotated[int, COUNT] = 128
    """Memory: length of the texts in tokens."""
    mixed_precision: Precision = "auto"
    """Memory: precision of the products. `auto`: what train.py would choose here."""
    hub: HubConfig = dataclasses.field(default_factory=HubConfig)

    def __post_init__(self) -> None:
        check_values(self)
        for name in ("train_batch_size", "per_device_train_batch_size", "max_length", "mixed_precision"):
            if self.model is None and getattr(self, name) != getattr(DoctorConfig, name):
                raise UserError(
                    f"--{name} is for the memory that training takes, which needs --model: give it, or leave it out"
                )


COMMANDS = {"import": ImportConfig, "verify": VerifyConfig, "doctor": DoctorConfig}
