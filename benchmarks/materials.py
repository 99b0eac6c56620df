"""What all contenders share, made once: the data as files, a model with a head, its FLOPs, the machine.

    python benchmarks/materials.py --folder outputs/bench --samples 2000

writes FOLDER/data/{train,validation,test}.jsonl, FOLDER/model (weights, tokenizer, a head drawn with seed 0) and
FOLDER/materials.json. On a GPU the model is roberta-base in shape, with random weights and the tokenizer of minilm.
"""

import argparse
import json
import platform
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    RobertaConfig,
)

from benchmarks.flops import forward_flops, matmul_rates  # noqa: E402
from lib.config.sections import DataConfig  # noqa: E402
from lib.data.load import subsample  # noqa: E402
from lib.data.sources import load_movie_reviews  # noqa: E402
from lib.hub.packaged import FIVE_NAMES, minilm_folder  # noqa: E402
from lib.run.record import version  # noqa: E402
from lib.runtime.precision import cpu_description, resolve_precision  # noqa: E402

MAX_LENGTH = 128


def write_data(folder: Path, samples: int | None, eval_samples: int | None) -> dict[str, list[str]]:
    """The splits of movie_reviews with five classes as jsonl, columns as in SetFit/sst5; returns their texts."""
    folder.mkdir(parents=True, exist_ok=True)
    limits = DataConfig(max_train_samples=samples, max_eval_samples=eval_samples)
    texts = {}
    for split, dataset in load_movie_reviews("five").items():
        chosen = subsample(len(dataset), split, limits)
        rows = dataset if chosen is None else dataset.select(chosen)
        lines = [json.dumps(row | {"label_text": FIVE_NAMES[row["label"]]}) + "\n" for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        texts[split] = list(rows["text"])
    return texts


def write_model(folder: Path, source: str, device: torch.device) -> PreTrainedModel:
    """A classifier over five classes, saved with its tokenizer: that of `source`, or on a GPU one shaped as roberta-base."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    names: dict[str, Any] = {
        "num_labels": len(FIVE_NAMES),
        "id2label": dict(enumerate(FIVE_NAMES)),
        "label2id": {name: number for number, name in enumerate(FIVE_NAMES)},
    }
    torch.manual_seed(0)
    if device.type == "cuda":
        shape = RobertaConfig(
            max_position_embeddings=514, type_vocab_size=2, pad_token_id=tokenizer.pad_token_id, **names
        )
        model = AutoModelForSequenceClassification.from_config(shape)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32, **names)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def describe_machine(device: torch.device) -> dict[str, Any]:
    """The processor, its cores and threads, and the versions that matter."""
    cores = dict(line.split(":", 1) for line in cpu_description().splitlines() if ":" in line)
    names = {key.strip(): value.strip() for key, value in cores.items()}
    cpu = (
        f"{names.get('model name', platform.processor())}, family {names.get('cpu family')} model {names.get('model')}"
    )
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "fast_bf16": resolve_precision("auto") == "bf16",
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--samples", type=int, help="samples of the train split [default: all]")
    parser.add_argument("--eval_samples", type=int, help="samples of the other splits [default: all]")
    parser.add_argument("--batch_size", type=int, default=32, help="for the shape of the products that are timed")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda: PyTorch sees no GPU")
    device = torch.device(options.device)
    texts = write_data(options.folder / "data", options.samples, options.eval_samples)
    model = write_model(options.folder / "model", str(minilm_folder()), device)
    tokenizer = AutoTokenizer.from_pretrained(options.folder / "model")
    lengths = {
        split: [len(ids) for ids in tokenizer(rows, truncation=True, max_length=MAX_LENGTH)["input_ids"]]
        for split, rows in texts.items()
    }
    rows = round(options.batch_size * sum(lengths["train"]) / len(lengths["train"]))
    materials = {
        "samples": {split: len(rows) for split, rows in texts.items()},
        "tokens": {split: sum(values) for split, values in lengths.items()},
        "forward_flops": {split: forward_flops(model, values) for split, values in lengths.items()},
        "matmul_rates": matmul_rates(model.config.hidden_size, model.config.intermediate_size, rows, device),
        "machine": describe_machine(device),
    }
    (options.folder / "materials.json").write_text(json.dumps(materials, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
