from __future__ import annotations

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clicktrain import toml

scalars = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(allow_nan=False),
    st.text(st.characters(exclude_categories=["Cs"])),
)
keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(keys, values, max_size=4))
def test_what_is_written_is_read_back(document: dict[str, Any]) -> None:
    assert tomllib.loads(toml.dumps(document)) == document


def test_layout() -> None:
    document = {"a": 1, "section": {"x": 0.5, "list": [1, {"y": "é"}], "sub table": {"on": True}, "unset": None}}
    assert toml.dumps(document) == (
        'a = 1\n\n[section]\nx = 0.5\nlist = [1, {y = "é"}]\n\n[section."sub table"]\non = true\n'
    )


@pytest.mark.parametrize("value", [{"x": object()}, {"x": [None]}, {"x": {1: 2}}, {"x": 1j}])
def test_what_toml_cannot_hold(value: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="is not a string"):
        toml.dumps(value)
