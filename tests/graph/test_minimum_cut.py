"""The narrowest places of a graph: found, and the nearest to the sources where there are several."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autojac.graph.cuts.minimum_cut import minimum_cut


def reached(links: list[tuple[int, int]], sources: list[int], without: set[int]) -> set[int]:
    found = set(sources) - without
    for _ in range(len(links)):
        found |= {other for one, other in links if one in found and other not in without}
    return found


@settings(max_examples=100)
@given(st.data())
def test_no_cut_is_smaller(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 7))
    pairs = list(itertools.combinations(range(count), 2))
    links = data.draw(st.lists(st.sampled_from(pairs), unique=True))
    sizes = {n: data.draw(st.sampled_from([1.0, 2.0, 3.0, 64.0, math.inf])) for n in range(count)}
    sources = data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True))
    sinks = data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True))
    cuts = [
        set(cut)
        for size in range(count + 1)
        for cut in itertools.combinations(range(count), size)
        if reached(links, sources, set(cut)).isdisjoint(sinks) and not math.isinf(sum(sizes[n] for n in cut))
    ]
    nearest = data.draw(st.sampled_from(["sources", "sinks"]))
    found = minimum_cut(links, sizes, sources, sinks, nearest)
    least = min((sum(sizes[n] for n in cut) for cut in cuts), default=math.inf)
    if least in (0, math.inf):
        assert not found
    else:
        assert found is not None and set(found) in cuts and sum(sizes[n] for n in found) == least
        # of all smallest cuts it leaves the fewest, or the most, vertices on the side of the sources
        before = reached(links, sources, set(found))
        others = [reached(links, sources, cut) for cut in cuts if sum(sizes[n] for n in cut) == least]
        assert all(before <= other if nearest == "sources" else before >= other for other in others)


@pytest.mark.parametrize(("sources", "sinks"), [([], [2]), ([0], []), ([], [])])
def test_without_ends_there_is_nothing_to_cut(sources: list[int], sinks: list[int]) -> None:
    assert minimum_cut([], {}, sources, sinks) is None
    assert minimum_cut([(0, 1), (1, 2)], {0: 1, 1: 1, 2: 1}, sources, sinks) is None


def test_sizes_beyond_what_can_be_counted_are_not_cut() -> None:
    assert minimum_cut([(0, 1)], {0: 2.0**40, 1: 2.0**40}, [0], [1]) is None
