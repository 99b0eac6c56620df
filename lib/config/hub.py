"""The options of hub.py's commands."""

import dataclasses
from typing import Literal

from tyro.conf import Positional

from lib.config.sections import HubConfig
from lib.errors import require

RepoType = Literal["model", "dataset"]


@dataclasses.dataclass(frozen=True)
class ImportConfig:
    """Make a downloaded folder, .zip or .tar a model or data set of the cache, checked and loaded once."""

    source: Positional[str]
    """Folder from a browser, ModelScope, net disk, `git clone`, `hf download --local-dir` or another cache; or an archive."""
    repo_id: str
    """Name under which it is loaded, such as roberta-base or user/name."""
    repo_type: RepoType = "model"
    """model or dataset."""
    revision: str = "main"
    """Branch or tag under which it is loaded."""
    commit: str | None = None
    """The commit on the Hub, where you know it and the folder does not."""
    sha256: str | None = None
    """List of hashes, as sha256sum prints it, that the files must have."""
    allow_pickle: bool = False
    """Accept a model that has pickled weights (.bin) only."""
    move_ref: bool = False
    """Let the revision name these files also where it named others."""
    load_check: bool = True
    """Load it offline in a fresh process before it is kept."""


@dataclasses.dataclass(frozen=True)
class VerifyConfig:
    """Compare what is in the cache with its hashes, without any network; exit code 1 when something is damaged."""

    repos: Positional[tuple[str, ...]] = ()
    """`user/name` or `datasets/user/name`. [default: all]"""


@dataclasses.dataclass(frozen=True)
class PackConfig:
    """Write models and data sets of the cache, with a manifest, to one archive for another machine."""

    repos: Positional[tuple[str, ...]]
    """`user/name` or `datasets/user/name`."""
    output: str
    """Archive to write: .tar, or .tar.gz."""
    revision: str = "main"
    """Branch, tag or commit to take."""

    def __post_init__(self) -> None:
        require(bool(self.repos), "name at least one model or data set to pack")
        require(self.output.endswith((".tar", ".tar.gz")), f"--output {self.output} must end in .tar or .tar.gz")


@dataclasses.dataclass(frozen=True)
class UnpackConfig:
    """Put the models and data sets of a packed archive into the cache, each file compared with the manifest."""

    archive: Positional[str]
    """What `hub.py pack` wrote."""
    move_ref: bool = False
    """Let revisions name the packed commits also where they named others."""


@dataclasses.dataclass(frozen=True)
class DoctorConfig:
    """Find what is in the way of a run: cache, endpoint, name server, proxy, token, disk; with the commands that mend it."""

    model: str | None = None
    """The model of the run. [default: minilm]"""
    model_revision: str | None = None
    """Branch, tag or commit of it."""
    dataset: str | None = None
    """The data set of the run. [default: movie_reviews]"""
    dataset_config: str | None = None
    """Configuration of it."""
    revision: str | None = None
    """Branch, tag or commit of it."""
    hub: HubConfig = dataclasses.field(default_factory=HubConfig)


COMMANDS = {
    "import": ImportConfig,
    "verify": VerifyConfig,
    "pack": PackConfig,
    "unpack": UnpackConfig,
    "doctor": DoctorConfig,
}
