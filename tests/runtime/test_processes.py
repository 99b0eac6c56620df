"""What the processes of a run do together."""

import pytest
import torch

from lib.runtime.processes import buckets


def test_gradients_are_summed_in_buckets_of_one_dtype_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lib.runtime.processes.BUCKET_BYTES", 40)
    tensors = [torch.zeros(n, dtype=kind) for n, kind in ((4, torch.float32), (6, torch.float32), (1, torch.float32))]
    tensors += [torch.zeros(30), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)]
    sizes = [[len(tensor) for tensor in bucket] for bucket in buckets(tensors)]
    assert sizes == [[4, 6], [1], [30], [2, 2]]
    assert sum(map(sum, sizes)) == sum(map(len, tensors))
