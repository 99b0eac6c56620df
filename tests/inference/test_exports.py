"""An export appears whole, beside nothing that it could replace, and only with the outputs of the model."""

from types import SimpleNamespace

import numpy as np
import pytest

from lib.errors import UserError
from lib.inference.exports import check_outputs, exporting


class Tokenizer:
    def save_pretrained(self, folder):
        (folder / "tokenizer.json").write_text("words")


def export(folder, error=None):
    model = SimpleNamespace(config=SimpleNamespace(_name_or_path="no-such-model"))
    with exporting("--export_onnx", folder, model, Tokenizer()) as draft:
        (draft / "model.bin").write_text("weights")
        if error:
            raise error


def test_folder_appears_whole_and_replaces_an_empty_one_only(tmp_path):
    for folder in (tmp_path / "deep" / "new", tmp_path / "empty"):
        if folder.name == "empty":
            folder.mkdir()
        export(folder)
        assert {path.name for path in folder.iterdir()} == {"model.bin", "tokenizer.json", "manifest.json"}
        with pytest.raises(UserError, match=r"--export_onnx .*not empty"):
            export(folder)


def test_nothing_is_left_of_an_export_that_failed(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError):
        export(tmp_path / "out", RuntimeError())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not any((tmp_path / "out").iterdir())


def test_file_in_place_of_the_folder_or_above_it_is_told(tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "new"):
        with pytest.raises(UserError, match="file"):
            export(folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_difference_is_relative_to_large_outputs_and_one_that_is_no_number_is_refused():
    wanted = [np.array([0.1, 0.2]), np.array([-10.0, 10.0])]
    assert check_outputs([wanted[0] + 0.01, wanted[1] + 0.05], wanted, 0.02) == pytest.approx(0.01)
    for broken in (0.03, np.nan):
        with pytest.raises(RuntimeError, match="differ"):
            check_outputs([wanted[0] + broken, wanted[1]], wanted, 0.02)
