"""The ranking measures, against their definitions pair by pair."""

from __future__ import annotations

import math

import numpy as np
import pytest
from confidence import auroc, ranks, spearman
from hypothesis import given
from hypothesis import strategies as st

few = st.integers(0, 4).map(float)  # so that there are ties


@given(st.lists(st.tuples(few, st.booleans()), max_size=12))
def test_auroc_is_the_share_of_pairs_in_order(rows):
    good = [score for score, positive in rows if not positive]
    bad = [score for score, positive in rows if positive]
    pairs = [(b > g) + (b == g) / 2 for b in bad for g in good]
    found = auroc([score for score, _ in rows], [positive for _, positive in rows])
    if pairs:
        assert found == pytest.approx(np.mean(pairs))
    else:
        assert math.isnan(found)


@given(st.lists(few, max_size=12))
def test_equal_values_share_their_rank(values):
    expected = [
        sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values
    ]
    assert ranks(values).tolist() == pytest.approx(expected)


@given(st.lists(st.tuples(few, few), min_size=2, max_size=12))
def test_spearman_is_the_correlation_of_ranks(rows):
    a, b = zip(*rows, strict=True)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(spearman(a, b))
    else:
        assert spearman(a, b) == pytest.approx(np.corrcoef(ranks(a), ranks(b))[0, 1])


def test_a_monotone_relation_ranks_perfectly() -> None:
    assert spearman([1, 2, 9], [0.1, 5, 6]) == pytest.approx(1)
    assert spearman([1, 2, 9], [6, 5, 0.1]) == pytest.approx(-1)
