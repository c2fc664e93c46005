"""Neurons and sets of neurons: set operations, indices in tensors, files."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tn_lens import Neuron, NeuronSet
from tn_lens.neurons import NEURON_SITES, NeuronSpace, hook_name

SPACE = NeuronSpace(n_layers=4, d_mlp=7, n_heads=3, d_head=5)
places = st.lists(
    st.one_of(
        st.tuples(st.just("mlp"), st.integers(0, 3), st.none(), st.integers(0, 6)),
        st.tuples(st.just("attn"), st.integers(0, 3), st.integers(0, 2), st.integers(0, 4)),
    )
)


def of(listed: list) -> NeuronSet:
    return NeuronSet(Neuron(*place) for place in listed)


def test_names() -> None:
    assert hook_name("mlp", 3) == "blocks.3.mlp.hook_post"
    assert hook_name("attn", 0) == "blocks.0.attn.hook_z"
    assert str(Neuron("attn", 2, 1, 4)) == "attn 2.h1:4"
    assert str(Neuron("mlp", 2, None, 4)) == "mlp 2:4"
    assert SPACE.n_neurons == 4 * (7 + 15)


@given(places, places)
def test_sets_behave_as_sets(listed: list, others: list) -> None:
    a, b = of(listed), of(others)
    assert set(a | b) == set(a) | set(b)
    assert set(a & b) == set(a) & set(b)
    assert set(a - b) == set(a) - set(b)
    assert isinstance(a | b, NeuronSet)
    assert list(a) == sorted(a)
    assert hash(a) == hash(NeuronSet(reversed(list(a))))
    assert a.jaccard(b) == b.jaccard(a)
    assert a.jaccard(a) == 1


@given(places)
def test_masks_and_back(listed: list) -> None:
    neurons = of(listed)
    back = [
        NeuronSet(SPACE.at({site: SPACE.mask(neurons, site).flatten().nonzero().flatten()})) for site in NEURON_SITES
    ]
    assert back[0] | back[1] == neurons
    counts = neurons.by_layer(4)
    assert [sum(column) for column in zip(*counts.values(), strict=True)] == [
        sum(n.layer == layer for n in neurons) for layer in range(4)
    ]


@given(places)
def test_files_give_back_the_set(listed: list) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "neurons.json"
        of(listed).save(path, model="a model", adaptive_threshold=0.2)
        assert NeuronSet.load(path) == of(listed)
        assert json.loads(path.read_text())["adaptive_threshold"] == 0.2


@pytest.mark.parametrize(
    "content",
    [
        "not json",
        "[]",
        '{"neurons": 3}',
        '{"neurons": [{"site": "mlp", "layer": 0}]}',
        '{"neurons": [{"site": "mlp", "layer": 0, "head": 1, "index": 2}]}',
        '{"neurons": [{"site": "resid", "layer": 0, "head": null, "index": 2}]}',
        '{"neurons": [{"site": "attn", "layer": 0, "head": null, "index": 2}]}',
        '{"neurons": [{"site": "mlp", "layer": -1, "head": null, "index": 2}]}',
    ],
)
def test_damaged_files_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "neurons.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="neuron"):
        NeuronSet.load(path)
    with pytest.raises(ValueError, match="neuron"):
        NeuronSet.load(tmp_path / "absent.json")


def test_flat_is_head_times_size_plus_index() -> None:
    flat = torch.arange(15).reshape(3, 5)
    assert SPACE.flat(Neuron("attn", 0, 2, 3)) == flat[2, 3]
    assert SPACE.neuron("attn", 0, 13) == Neuron("attn", 0, 2, 3)
