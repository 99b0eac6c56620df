"""A run, a report and a comparison replace and remove only what one of their own kind wrote."""

import json
from pathlib import Path

import pytest

from lib.config.cli import dump_config
from lib.config.train import TrackingConfig, TrainConfig, TrainingConfig
from lib.errors import UserError
from lib.experiments.comparison_report import check_comparison_folder
from lib.run.ownership import check_report_folder, check_run_folder
from lib.run.resume import find_checkpoint, open_folder
from lib.runtime.atomic import find_damage
from tests.resuming import make_checkpoints


def config_of(folder: Path) -> TrainConfig:
    return TrainConfig(tracking=TrackingConfig(output_dir=str(folder)))


def content(folder: Path) -> dict[str, bytes | None]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")
    }


def put(folder: Path, name: str) -> None:
    """Something of somebody else, under a name that a run or a report uses."""
    path = folder / name
    if name in ("model", "best", "heartbeats"):
        path.mkdir(parents=True)
        (path / "thesis.bin").write_text("ten years")
    elif name == "link":
        put(folder, "elsewhere/model")
        (folder / "model").symlink_to(folder / "elsewhere" / "model")
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("learning_rate: 1e-5" if name == "config.yaml" else '{"mine": true}')


FOREIGN = [
    *("model", "model/config.json", "link", "checkpoints/step-4/weights.bin", "checkpoints", "heartbeats"),
    *("config.yaml", "record.json", "results.json", "metrics.jsonl", ".lock"),
    *(
        "eval-test/report.json",
        "eval-test/predictions.jsonl",
        "eval-test/confusion_matrix.png",
        "eval-test/results.json",
    ),
]


@pytest.mark.parametrize("name", FOREIGN)
def test_run_is_refused_where_it_would_replace_something_of_others(tmp_path: Path, name: str) -> None:
    put(tmp_path, name)
    before = content(tmp_path)
    named = "model" if name == "link" else name.removesuffix("/weights.bin").split("/")[0]
    with pytest.raises(UserError, match=rf"(?s){named}.*--output_dir"):
        check_run_folder(config_of(tmp_path), tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["model", "link", "checkpoints/step-4/weights.bin"])
def test_folder_of_a_run_is_refused_too_where_others_put_something_in_the_way(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config_of(tmp_path)))
    put(tmp_path, name)
    before = content(tmp_path)
    with pytest.raises(UserError, match="model" if name == "link" else name.removesuffix("/weights.bin")):
        open_folder(config_of(tmp_path), tmp_path)
    assert content(tmp_path) == before


def test_run_may_live_beside_files_that_it_does_not_write_and_behind_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real"
    for name in ("train.py", "data/train.csv", "eval-notes/notes.txt", "best/a", ".tmp-mine/a"):
        put(real, name)
    before = content(real)
    (tmp_path / "linked").symlink_to(real)
    config = config_of(tmp_path / "linked")
    check_run_folder(config, tmp_path / "linked")
    open_folder(config, tmp_path / "linked").release()
    check_run_folder(config, tmp_path / "linked")
    assert before.items() <= content(real).items()


def test_root_and_home_are_no_folders_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in (Path("/"), tmp_path):
        with pytest.raises(UserError, match="--output_dir"):
            check_run_folder(config_of(folder), folder)


def test_starting_anew_removes_checkpoints_and_keeps_what_others_put_beside_them(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, "step-1", "step-2")
    (tmp_path / "step-2" / "manifest.json").unlink()  # half deleted
    put(tmp_path, "step-3/weights.bin")
    put(tmp_path, "notes/a.txt")
    put(tmp_path, ".tmp-mine/a.txt")
    find_checkpoint("never", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-mine", "notes", "step-3"]


def test_model_of_a_run_of_an_earlier_version_gets_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config_of(tmp_path)))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    open_folder(config_of(tmp_path), tmp_path).release()
    assert find_damage(tmp_path / "model") is None


@pytest.mark.parametrize("length", [0, 40, 400])
def test_configuration_that_a_full_disk_cut_is_written_again(tmp_path: Path, length: int) -> None:
    config = config_of(tmp_path)
    whole = dump_config(config)
    (tmp_path / "config.yaml").write_text(whole[:length])
    (tmp_path / "record.json").write_text(json.dumps({"run_name": "a", "num_processes": 1}))
    make_checkpoints(tmp_path / "checkpoints", "step-1")
    check_run_folder(config, tmp_path)
    open_folder(config, tmp_path).release()
    assert (tmp_path / "config.yaml").read_text() == whole


def test_configuration_of_another_run_is_not_written_over_though_it_is_cut(tmp_path: Path) -> None:
    cut = dump_config(TrainConfig(training=TrainingConfig(seed=7)))[:2000]
    (tmp_path / "config.yaml").write_text(cut)
    with pytest.raises(UserError):
        open_folder(config_of(tmp_path), tmp_path)
    assert (tmp_path / "config.yaml").read_text() == cut


def test_report_and_comparison_replace_only_their_own(tmp_path: Path) -> None:
    for name in ("report.json", "predictions.jsonl", "results.json", "confusion_matrix.png", ".lock"):
        put(tmp_path / name, name)
        with pytest.raises(UserError, match=name):
            check_report_folder(tmp_path / name)
    (tmp_path / "results.json" / "results.json").write_text(
        '{"model": "m", "dataset": "d", "samples": 1, "best_step": 4}'
    )
    with pytest.raises(UserError, match=r"results\.json"):  # of a run
        check_report_folder(tmp_path / "results.json")
    own = tmp_path / "own"
    own.mkdir()
    check_report_folder(own)
    (own / "report.json").write_text('{"split": "test", "samples": 1, "scores": {}}')
    (own / "confusion_matrix.png").write_text("")
    check_report_folder(own)
    put(own, "comparison.md")
    with pytest.raises(UserError, match=r"comparison\.md"):
        check_comparison_folder(own)
    (own / "comparison.json").write_text('{"groups": [], "metrics": []}')
    check_comparison_folder(own)


def test_refused_before_data_are_loaded_and_nothing_is_changed(call, roberta: Path, tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("not read")
    home = tmp_path / "home"
    for name in ("model", "checkpoints/step-4/weights.bin", "best"):
        put(home, name)
    before = content(home)
    for more in ([], ["--resume_from_checkpoint", "never"], ["--save_total_limit", 0]):
        flags = [
            "--model",
            roberta,
            "--train_file",
            tmp_path / "train.csv",
            "--report_to",
            "none",
            "--output_dir",
            home,
        ]
        done = call("train.py", *flags, *more, code=2)
        assert "model" in done.stderr
        assert "checkpoints" in done.stderr
        assert content(home) == before


def test_nested_files_of_strangers_are_refused_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text("[" * 100_000)
    (tmp_path / "config.yaml").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"config\.yaml"):
        check_run_folder(TrainConfig(), tmp_path)
