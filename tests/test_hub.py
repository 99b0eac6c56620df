"""Models and data sets by their Hub names, against a Hub on the loopback interface."""

import json

from tests.conftest import results_of, sentences, tiny_roberta
from tests.loopback_hub import loopback_hub

NAMES = ("very negative", "negative", "neutral", "positive", "very positive")


def write_sst5(folder):
    """SST-5 in small, stored as the real one: JSON lines with label and label_text, no ClassLabel."""
    folder.mkdir(parents=True)
    for split, size, name in (("train", 40, "train"), ("validation", 20, "dev"), ("test", 20, "test")):
        rows = [
            {"text": f"{text} {split}", "label": i % 5, "label_text": NAMES[i % 5]}
            for i, (text, _) in enumerate(sentences(size))
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def environment(endpoint, folder):
    caches = {
        "HF_HOME": str(folder / "hf"),
        "HF_DATASETS_CACHE": str(folder / "ds"),
        "HF_MODULES_CACHE": str(folder / "m"),
    }
    return caches | {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}


def test_the_line_of_the_readme_runs_end_to_end_with_hub_names(run, tmp_path):
    tiny_roberta(tmp_path / "hub" / "models" / "roberta-base")
    write_sst5(tmp_path / "hub" / "datasets" / "SetFit" / "sst5")
    with loopback_hub(tmp_path / "hub") as (endpoint, requests):
        flags = ["--model", "roberta-base", "--dataset", "sst5", "--epochs", 1, "--report_to", "none"]
        done = run("train.py", *flags, processes=1, env=environment(endpoint, tmp_path))
    assert any("SetFit/sst5" in path for path in requests)
    assert any("model.safetensors" in path for path in requests)
    assert results_of(done)["samples_seen"] == 40
    folder = tmp_path / "outputs" / "roberta-base-sst5-lr5e-05-bs32-ep1-s42"
    names = json.loads((folder / "model" / "config.json").read_text())["id2label"]
    assert tuple(names.values()) == NAMES


def test_an_unknown_hub_name_ends_with_the_names_there_are(run, tmp_path):
    (tmp_path / "hub").mkdir()
    with loopback_hub(tmp_path / "hub") as (endpoint, _):
        done = run("train.py", "--dataset", "nobody/nothing", code=2, env=environment(endpoint, tmp_path))
    assert "--dataset nobody/nothing" in done.stderr
    assert "movie_reviews" in done.stderr
    assert "Traceback" not in done.stderr
