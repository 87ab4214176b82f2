from __future__ import annotations

import pytest

from mnist.drawing.curves import without_fragments
from mnist.drawing.history import Curve


def test_the_mean_of_a_few_batches_joins_the_record_before_it() -> None:
    """Records every 10 steps and at the ends of epochs of 23 steps; step 1 of a run has nothing to join."""
    joined = without_fragments(
        Curve([10, 20, 23, 30, 40, 46], [1.0, 0.8, 0.2, 0.6, 0.4, 0.3], [0.1, 0.2, 0.9, 0.4, 0.5, 0.6])
    )
    assert joined.steps == [10, 23, 30, 40, 46]
    assert joined.losses == pytest.approx([1.0, (10 * 0.8 + 3 * 0.2) / 13, 0.6, 0.4, 0.3])
    assert joined.accuracies == pytest.approx([0.1, (10 * 0.2 + 3 * 0.9) / 13, 0.4, 0.5, 0.6])
    first = Curve([1, 50, 100], [3.0, 2.0, 1.0], [0.1, 0.2, 0.3])
    assert without_fragments(first) == first
