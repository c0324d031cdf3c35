"""Curves of many points: what is left out cannot be seen."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.launch.figures.curves import thinned
from shoestring.launch.figures.history import AXES, Curve


@settings(max_examples=100, deadline=None)
@given(values=st.lists(st.just(float("nan")) | st.floats(-1e9, 1e9), min_size=1, max_size=500), most=st.integers(4, 60))
def test_thinning_keeps_ends_and_extremes_of_every_stretch(values, most):
    places = np.arange(len(values), dtype=float)
    curve = Curve(values=np.array(values), at=dict.fromkeys(AXES, places))
    short = thinned(curve, most)
    kept = short.at["step"].astype(int)
    assert {0, len(values) - 1} <= set(kept) and np.all(np.diff(kept) > 0)
    assert np.array_equal(short.values, curve.values[kept], equal_nan=True)
    if len(values) <= most:
        assert len(kept) == len(values)
        return
    assert len(kept) <= 1.3 * most + 4
    size = -(-2 * len(values) // most)
    for start in range(0, len(values), size):
        known = [v for v in values[start : start + size] if v == v]
        shown = short.values[(kept >= start) & (kept < start + size)]
        assert not known or (min(known) in shown and max(known) in shown)
