import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bakeoff.study import Design, Designs

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=4,
)


@given(st.dictionaries(st.text(max_size=3), json_values, max_size=4))
def test_equal_params_are_equal_and_hash_alike_in_any_order(params):
    one = Design("a", "m", params)
    other = Design("a", "m", dict(reversed(params.items())))
    assert one == other
    assert hash(one) == hash(other)
    assert dict(one.params) == params
    assert pickle.loads(pickle.dumps(one)) == one


def test_tuples_and_lists_in_params_say_the_same():
    assert Design("a", "m", {"layers": (1, 2)}) == Design("a", "m", {"layers": [1, 2]})


def test_params_cannot_be_changed_from_outside():
    params = {"layers": [1]}
    design = Design("a", "m", params)
    params["layers"].append(2)
    assert design.params["layers"] == [1]


@pytest.mark.parametrize("params", [{"x": object()}, {"x": float("nan")}, {"x": {1, 2}}])
def test_params_that_are_not_json_are_refused(params):
    with pytest.raises(ValueError, match="params of design 'a' must be JSON-able"):
        Design("a", "m", params)


@pytest.mark.parametrize(("name", "method"), [("", "m"), (3, "m"), ("a", ""), ("a", None)])
def test_name_and_method_must_be_non_empty_strings(name, method):
    with pytest.raises(ValueError, match="must be a non-empty string"):
        Design(name, method)


def test_designs_add_and_multiply():
    poolings = Designs([Design("mean", "mean", {"layer": 1}), Design("last", "last")])
    attention = Designs.axis("attention", ["causal", "full"])
    grid = poolings * attention + Designs([Design("alone", "alone")])
    assert [d.to_json() for d in grid][:2] == [
        {"name": "mean, causal", "method": "mean", "params": {"layer": 1, "attention": "causal"}},
        {"name": "mean, full", "method": "mean", "params": {"layer": 1, "attention": "full"}},
    ]
    assert len(grid) == 5
    assert [d.name for d in grid[3:]] == ["last, full", "alone"]


def test_designs_refuse_ambiguity():
    mean = Designs([Design("mean", "mean", {"layer": 1})])
    with pytest.raises(ValueError, match="distinct names"):
        mean + mean
    with pytest.raises(ValueError, match="only one factor"):
        mean * Designs([Design("last", "last")])
    with pytest.raises(ValueError, match="both factors of a product set"):
        mean * Designs.axis("layer", [2])
