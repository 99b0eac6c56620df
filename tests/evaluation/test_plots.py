"""Pictures: of bounded size, with names of any script in installed fonts, or numbers and one note."""

import dataclasses
import struct
import warnings
from pathlib import Path
from typing import Any

import matplotlib.font_manager
import matplotlib.text
import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import precision_score, recall_score

from lib.config.sections import CLASSIFICATION
from lib.evaluation import fonts, plots
from lib.evaluation.calibration import expected_calibration_error
from lib.evaluation.fonts import DEFAULT, find_fonts
from lib.evaluation.plots import build_figure, draw, picture_names
from lib.evaluation.predictions import Predictions
from lib.evaluation.tables import build_tables
from tests.evaluation.samples import class_predictions, label_predictions, number_predictions

TIBETAN = "བཟང་པོ"


def draw_names(folder: Path, predictions: Predictions, names: list[str]) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return draw(predictions, build_tables(predictions, names), names, "a title", folder)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that is drawn."""
    texts: list[str] = []
    whole = matplotlib.text.Text.draw
    monkeypatch.setattr(matplotlib.text.Text, "draw", lambda self, r: (texts.append(self.get_text()), whole(self, r)))
    return texts


@pytest.mark.parametrize("make", [class_predictions, label_predictions], ids=["classes", "labels"])
@pytest.mark.parametrize("count", [60, 1500])
def test_picture_of_many_classes_with_long_names_is_bounded(tmp_path: Path, make: Any, count: int) -> None:
    predictions = make(2000, count)
    draw_names(tmp_path, predictions, [f"number {number} of names that are long " * 9 for number in range(count)])
    for name in picture_names(predictions.problem_type, count):
        width, height = struct.unpack(">II", (tmp_path / name).read_bytes()[16:24])
        assert max(width, height) <= 2600


@pytest.mark.parametrize("count", [2, 20, 50])
@pytest.mark.parametrize("length", [1, 200])
def test_legend_lies_beside_the_curves_and_inside_the_picture(count: int, length: int) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    predictions = label_predictions(300, count)
    names = [f"{number} " + "W" * length for number in range(count)]
    tables = build_tables(predictions, names)
    shown = plots.chosen_outputs(predictions, tables, "")[0]
    labels = {place: plots.shorten(names[place], plots.NAME_WIDTH) for place in shown}
    figure = build_figure(plots.PRECISION_RECALL, predictions, tables, labels)
    figure.axes[0].set_title("a title\nof two lines")
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    box, axes = legend.get_window_extent(), figure.axes[0].get_window_extent()
    assert not box.overlaps(axes)
    assert len(legend.get_texts()) == min(count, plots.MOST_CURVES)
    assert axes.width > 250
    looks = [(line.get_color(), line.get_linestyle()) for line in legend.get_lines()]
    assert len({*looks}) == len(looks)
    for low, high in ((box.min, box.max), (axes.min, axes.max)):
        assert (low >= 0).all()
        assert (high <= figure.bbox.max).all()
    assert all(text.get_window_extent().y0 >= 0 for text in legend.get_texts())


def marked(figure: Any) -> tuple[float, float]:
    """The point of a picture that is marked."""
    (mark,) = (line for line in figure.axes[0].lines if line.get_marker() == "o")
    return float(mark.get_xdata()[0]), float(mark.get_ydata()[0])


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_curves_of_two_classes_mark_what_is_predicted(threshold: float | None) -> None:
    thresholds = None if threshold is None else np.array([1 - threshold, threshold])
    made = dataclasses.replace(class_predictions(80, 2), thresholds=thresholds)
    tables = build_tables(made, ["no", "yes"])
    labels = {0: "no", 1: "yes"}
    gold, predicted = made.labels == 1, made.predicted == 1
    recall = recall_score(gold, predicted)
    roc, curve = (build_figure(name, made, tables, labels) for name in (plots.ROC, plots.PRECISION_RECALL))
    assert marked(roc) == pytest.approx((1 - recall_score(~gold, ~predicted), recall))
    assert marked(curve) == pytest.approx((recall, precision_score(gold, predicted)))
    for figure, area in ((roc, "roc_auc"), (curve, "average_precision")):
        texts = [text.get_text() for text in figure.legends[0].get_texts()]
        assert f"{tables['curves'][area]:.2f}" in texts[0]
        assert texts[0].startswith("yes")
        assert "0.2" in texts[1] or "0.5" in texts[1]


def test_curves_of_one_class_in_the_split_say_that_they_are_not_defined(tmp_path: Path, drawn: list[str]) -> None:
    made = class_predictions(40, 2)
    assert draw_names(tmp_path, made.take(made.labels == 1), ["no", "yes"]) == []
    assert sum("not defined" in text for text in drawn) >= 2


@pytest.mark.parametrize("make", [class_predictions, label_predictions])
def test_reliability_is_that_of_scikit_learn_before_and_after_the_temperature(make: Any) -> None:
    made = dataclasses.replace(make(500), temperature=3.0)
    figure = build_figure(plots.RELIABILITY, made, build_tables(made, ["a", "b", "c"]), {})
    curves = [line for line in figure.axes[0].lines if line.get_label().count("temperature")]
    for line, found in zip(curves, (made.uncalibrated, made), strict=True):
        if make is label_predictions:
            probabilities, right = found.probabilities.ravel(), made.labels.ravel()
        else:
            probabilities, right = found.probabilities.max(axis=1), found.predicted == made.labels
        true, mean = calibration_curve(right, probabilities, n_bins=15)
        assert line.get_ydata() == pytest.approx(true)
        assert line.get_xdata() == pytest.approx(mean)
        assert f"{expected_calibration_error(found):.3f}" in line.get_label()
    plain = build_figure(plots.RELIABILITY, make(500), {}, {})
    assert sum("temperature" in line.get_label() for line in plain.axes[0].lines) == 1


def test_picture_that_cannot_be_drawn_is_a_note_and_the_others_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such color")

    monkeypatch.setattr(plots, "draw_reliability", fail)
    (note,) = draw_names(tmp_path, class_predictions(60), ["a", "b", "c"])
    assert "reliability.png" in note
    assert "no such color" in note
    assert [path.name for path in tmp_path.iterdir()] == ["confusion_matrix.png"]


def test_disk_that_cannot_be_written_is_no_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "replacing", lambda path: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        draw_names(tmp_path, class_predictions(60), ["a", "b", "c"])


def test_picture_of_an_earlier_report_does_not_stay(tmp_path: Path) -> None:
    draw_names(tmp_path, class_predictions(60, 2), ["a", "b"])
    assert {path.name for path in tmp_path.iterdir()} == {*picture_names(CLASSIFICATION, 2)}
    draw_names(tmp_path, class_predictions(60), ["a", "b", "c"])
    assert {path.name for path in tmp_path.iterdir()} == {"confusion_matrix.png", "reliability.png"}


def test_picture_of_many_classes_shows_those_with_the_most_mistakes(tmp_path: Path, drawn: list[str]) -> None:
    classes = np.repeat(np.arange(100), 2)
    predicted = classes.copy()
    predicted[150:170] = 50
    predictions = Predictions(np.eye(100, dtype=np.float32)[predicted] * 9, classes, np.zeros(200, np.float32))
    draw_names(tmp_path, predictions, [f"class {number}" for number in range(100)])
    shown = {text for text in drawn if text.startswith("class ")}
    assert {"class 50", *(f"class {number}" for number in range(75, 85))} <= shown
    assert len(shown) == 40
    assert any("40 of 100" in text for text in drawn)


@pytest.mark.parametrize("names", [["$5-$10", "a$b", "_"], ["a\tb", "c\nd", "\x1b[1m"], ["\\alpha", "{", "$\\nosuch$"]])
@pytest.mark.parametrize("make", [class_predictions, label_predictions], ids=["classes", "labels"])
def test_name_is_drawn_as_it_is_and_no_formula(tmp_path: Path, make: Any, names: list[str], drawn: list[str]) -> None:
    assert draw_names(tmp_path, make(60), names) == []
    shown = "\n".join(drawn)
    assert all(name.encode("unicode_escape").decode().replace("\\\\", "\\") in shown for name in names)
    assert len({text for text in drawn if "AP = " in text}) == (3 if make is label_predictions else 0)


@pytest.mark.parametrize("make", [class_predictions, label_predictions, number_predictions])
def test_name_that_no_font_has_is_its_number_with_a_legend_in_one_note(
    tmp_path: Path, make: Any, drawn: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matplotlib.font_manager, "findSystemFonts", lambda: [])
    only = [entry for entry in matplotlib.font_manager.fontManager.ttflist if entry.name == DEFAULT]
    monkeypatch.setattr(matplotlib.font_manager.fontManager, "ttflist", only)
    (note,) = draw_names(tmp_path, make(60), [TIBETAN, "good", "größer"])
    assert f"#0 is {TIBETAN}" in note
    shown = "\n".join(drawn)
    assert "#0" in shown
    assert TIBETAN not in shown


def entry(name: str, **settings: Any) -> matplotlib.font_manager.FontEntry:
    return matplotlib.font_manager.FontEntry(fname=f"{name}.ttf", name=name, **({"weight": 400} | settings))


def test_installed_fonts_that_have_the_characters_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upright ones of normal weight first, and the fewest."""
    has = {"Bold.ttf": "正面好", "Some.ttf": "正", "Most.ttf": "正面", "Emoji.ttf": "👍", "Broken.ttf": "评差"}
    has |= {"Plain.ttf": "评", "LastResort.ttf": "正面好评差👍"}
    monkeypatch.setattr(fonts, "characters_of", lambda path: set(map(ord, has.get(path, "abc"))))
    monkeypatch.setattr(fonts, "drawn_by", lambda family, _: family != "Broken")
    entries = [entry("Bold", weight=700), *map(entry, ("Some", "Most", "Emoji", "Broken", "Plain", "LastResort"))]
    monkeypatch.setattr(matplotlib.font_manager.fontManager, "ttflist", entries)
    monkeypatch.setattr(matplotlib.font_manager, "findSystemFonts", lambda: [])
    assert find_fonts(["abc"]) == ([DEFAULT], set())
    assert find_fonts(["正面", "a👍\ufe0f"]) == ([DEFAULT, "Most", "Emoji"], set())
    assert find_fonts(["评"]) == ([DEFAULT, "Plain"], set())
    assert find_fonts(["正差"]) == ([DEFAULT, "Most"], {"差"})


def test_font_installed_after_the_list_of_fonts_was_written_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = matplotlib.font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", [])
    monkeypatch.setattr(fonts, "characters_of", lambda path: set(map(ord, "正" if path == "New.ttf" else "abc")))
    monkeypatch.setattr(fonts, "drawn_by", lambda *_: True)
    monkeypatch.setattr(matplotlib.font_manager, "findSystemFonts", lambda: ["New.ttf"])
    monkeypatch.setattr(manager, "addfont", lambda path: manager.ttflist.append(entry("New")))
    assert find_fonts(["正"]) == ([DEFAULT, "New"], set())


def test_letters_of_other_scripts_are_drawn_by_the_font_of_matplotlib(tmp_path: Path, drawn: list[str]) -> None:
    names = ["جيد", "שלום", "größer"]
    assert draw_names(tmp_path, class_predictions(60), names) == []
    assert set(names) <= set(drawn)


def test_character_that_only_another_installed_font_has_is_drawn_in_that_font(tmp_path: Path, drawn: list[str]) -> None:
    known = fonts.characters_of(matplotlib.font_manager.findfont(DEFAULT))
    others = fonts.characters_of(matplotlib.font_manager.findfont("STIXGeneral"))  # comes with matplotlib as well
    letter = next(char for char in map(chr, sorted(others - known)) if char.isalpha())
    assert len(find_fonts([letter])[0]) == 2
    assert draw_names(tmp_path, class_predictions(60), [letter, "good", "bad"]) == []
    assert letter in drawn
