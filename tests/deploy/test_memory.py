"""The memory plan."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from clicktrain.deploy.memory import ARENA, OUTPUT, Storage, plan_arena

storages = st.builds(
    lambda floats, first, length: Storage(floats, ARENA, first=first, last=first + length),
    st.integers(1, 100), st.integers(0, 20), st.integers(0, 8),
)  # fmt: skip


@given(st.lists(storages, max_size=20))
def test_what_lives_at_the_same_time_does_not_overlap(given_storages: list[Storage]) -> None:
    size = plan_arena(given_storages)
    for one, two in combinations(given_storages, 2):
        together = one.first <= two.last and two.first <= one.last
        apart = one.offset + one.floats <= two.offset or two.offset + two.floats <= one.offset
        assert apart or not together
    assert all(s.offset >= 0 and s.offset + s.floats <= size for s in given_storages)


def test_a_chain_needs_two_results_at_a_time() -> None:
    chain = [Storage(64, ARENA, first=i, last=i + 1) for i in range(10)]
    assert plan_arena(chain) == 128


def test_other_buffers_take_no_room() -> None:
    assert plan_arena([Storage(100, OUTPUT, first=0, last=1)]) == 0
