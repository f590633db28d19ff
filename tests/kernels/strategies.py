"""What the property tests draw: masks, and runs of positions."""

from __future__ import annotations

from hypothesis import strategies as st

from cpmpi.kernels.mask import Mask

LAST = 40


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    """Windows and documents around 40 positions, each absent as often as not."""
    window = draw(st.none() | st.integers(1, LAST + 2))
    documents = draw(st.just([]) | st.lists(st.integers(0, LAST), unique=True, max_size=6))
    return Mask(window=window, documents=tuple(sorted(documents)))


@st.composite
def spans(draw: st.DrawFn, min_size: int = 0) -> range:
    """A run of positions below 40."""
    start = draw(st.integers(0, LAST - min_size))
    return range(start, draw(st.integers(start + min_size, LAST)))
