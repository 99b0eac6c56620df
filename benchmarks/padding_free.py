"""Texts of 10 to 500 tokens in one row beside the same texts padded: differences, and milliseconds a pass.

    python benchmarks/padding_free.py           on a GPU: a BERT of base size in bf16, 512 texts
    python benchmarks/padding_free.py --tiny    a trial on any machine, which only says that this check works

The last line is JSON. No GPU has run it yet.
"""

import argparse
import json
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

sys.path.insert(0, ".")

from lib.data.batching import grouped_batches, packed_batches
from lib.data.packing import Tensors, pack
from lib.model.forward import compute_logits
from lib.runtime import segments

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def padded(texts: list[np.ndarray]) -> Tensors:
    lengths = np.array([len(text) for text in texts])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, dtype=np.int64)
    ids[mask] = np.concatenate(texts)
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}


def on(device: torch.device, batches: list[Tensors]) -> list[Tensors]:
    return [{n: t if n == "row_lengths" else t.to(device) for n, t in batch.items()} for batch in batches]


def seconds(model: Any, batches: list[Tensors], device: torch.device) -> tuple[torch.Tensor, float]:
    """The logits of all batches, and how long they took."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    logits = torch.cat([compute_logits(model, batch) for batch in batches]).cpu()  # waits for the device
    return logits, time.perf_counter() - start


def main(arguments: list[str]) -> dict[str, float]:
    """Measure, print, and return what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args(arguments).tiny
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model: Any = BertForSequenceClassification(BertConfig(**(TINY if tiny else {}), num_labels=3)).to(device).eval()
    rng = np.random.default_rng(0)
    lengths = np.exp(rng.uniform(np.log(10), np.log(500), 16 if tiny else 512)).astype(int)
    texts = [rng.integers(1000, 20000, length) for length in lengths]
    most = 2**10 if tiny else 2**15
    grouped, full = grouped_batches(lengths, most), packed_batches(lengths, most)
    rows = on(device, [pack(padded([texts[i] for i in batch])) for batch in full])
    usual = on(device, [padded([texts[i] for i in batch]) for batch in grouped])
    usual_attention, logits = model.config._attn_implementation, {}
    times: dict[str, list[float]] = {"padded": [], "packed": []}
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32):
        for _ in range(2 if tiny else 7):  # the first pass warms up
            for name, batches, attention in (("padded", usual, usual_attention), ("packed", rows, segments.NAME)):
                model.config._attn_implementation = attention
                logits[name], taken = seconds(model, batches, device)
                times[name].append(taken)
    difference = (logits["padded"] - logits["packed"]).abs().max() / logits["padded"].abs().max()
    milliseconds = {name: 1000 * statistics.median(taken[1:]) for name, taken in times.items()}
    found = {
        "largest_difference": float(difference),
        "padding": 1 - lengths.sum() / sum(batch["input_ids"].numel() for batch in usual),
        **{f"{name}_ms": round(value, 2) for name, value in milliseconds.items()},
        "times_faster": round(milliseconds["padded"] / milliseconds["packed"], 2),
    }
    print(json.dumps(found), flush=True)
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
