"""States go to safetensors and JSON and come back as they were; what has no form there is named."""

import math
import random

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lite_orpo.checkpoint.tensor_tree import load_tree, save_tree
from lite_orpo.errors import CheckpointError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def there_and_back(tree, folder):
    save_tree(tree, folder / "state")
    return load_tree(folder / "state")


def same(left, right):
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, numpy.ndarray):
        return left.dtype == right.dtype and numpy.array_equal(left, right)
    return left == right or (math.isnan(left) and math.isnan(right))


@settings(max_examples=80, deadline=None)
@given(tree=TREES)
def test_any_plain_state_comes_back_with_its_types(tree, tmp_path_factory):
    assert same(there_and_back(tree, tmp_path_factory.mktemp("tree")), tree)


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.float64],
    ids=str,
)
def test_tensors_come_back_bit_for_bit(dtype, tmp_path):
    tensor = torch.randint(0, 2, (3, 4)).to(dtype)
    shared = torch.randn(8)
    tree = {"a": tensor, "views": (shared[:4], shared[2:], shared.view(2, 4).T), "one": shared[0]}
    assert same(there_and_back(tree, tmp_path), tree)


def test_the_states_of_the_generators_come_back(tmp_path):
    tree = (random.getstate(), numpy.random.get_state(), torch.random.get_rng_state())
    assert same(there_and_back(tree, tmp_path), tree)


@pytest.mark.parametrize(
    ("make", "state_of"),
    [(torch.optim.AdamW, 2), (torch.optim.SGD, 0), (torch.optim.RMSprop, 1)],
)
def test_an_optimisers_state_comes_back(make, state_of, tmp_path):
    weight = torch.nn.Parameter(torch.randn(4, 4))
    optimizer = make([weight], lr=0.1)
    (weight**2).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    again = there_and_back(state, tmp_path)
    assert same(again, state)
    make([weight], lr=0.3).load_state_dict(again)


def test_bitsandbytes_nested_state_comes_back(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.randn(128, 64))
    optimizer = bitsandbytes.optim.AdamW8bit([weight], lr=0.1)
    (weight**2).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    assert same(there_and_back(state, tmp_path), state)


@pytest.mark.parametrize("tree", [{"a": object()}, [{1, 2}], {("a",): 1}, {None: 1}])
def test_what_has_no_form_is_refused_by_its_type(tree, tmp_path):
    with pytest.raises(CheckpointError, match="a state"):
        save_tree(tree, tmp_path / "state")


def test_nothing_is_a_pickle(tmp_path):
    save_tree({"a": torch.ones(2), "b": [1]}, tmp_path / "state")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "state.safetensors"]
    assert all(b"\x80\x04" not in path.read_bytes()[:2] for path in tmp_path.iterdir())
