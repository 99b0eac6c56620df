"""The next smaller batch after an out-of-memory error."""

import pytest

from lib.errors import UserError
from lib.runtime.memory import halve


def test_halving_goes_down_to_one_sample_and_then_ends_with_advice() -> None:
    sizes = [13]
    while sizes[-1] > 1:
        sizes.append(halve(sizes[-1], "--flag"))
    assert sizes == [13, 6, 3, 1]
    with pytest.raises(UserError, match="--max_length"):
        halve(1, "--flag")
