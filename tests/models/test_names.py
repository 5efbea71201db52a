"""The mapping between trees and published tensors: layouts, strictness, and the way back."""

import ml_dtypes
import numpy as np
import pytest

from dsad.core.errors import ConfigError
from dsad.core.tree import flatten
from dsad.models.weights import names

ENTRIES = [
    names.one("params/patch/kernel", "embed.weight", names.CONV),
    names.one("params/cls", "cls_token", names.TOKEN),
    names.stacked("params/blocks/fc/kernel", ("b.0.fc.weight", "b.1.fc.weight"), names.DENSE),
    names.stacked("params/blocks/fc/bias", ("b.0.fc.bias", "b.1.fc.bias")),
    names.one("extra/pos", "pos_embed", names.TABLE),
    names.constant("extra/var", 0.5, (2,)),
]


SHAPES = (
    {
        "patch": {"kernel": np.zeros((3, 2, 4, 5))},
        "cls": np.zeros(5),
        "blocks": {"fc": {"kernel": np.zeros((2, 6, 7)), "bias": np.zeros((2, 7))}},
    },
    {"pos": np.zeros((9, 5)), "var": np.zeros(2)},
)
PUBLISHED = {
    "embed.weight": (5, 4, 3, 2), "cls_token": (1, 1, 5), "b.0.fc.weight": (7, 6),
    "b.1.fc.weight": (7, 6), "b.0.fc.bias": (7,), "b.1.fc.bias": (7,), "pos_embed": (1, 9, 5),
}  # fmt: skip


def state(dtype=np.float32, seed=0):
    g = np.random.default_rng(seed)
    return {n: g.standard_normal(s).astype(dtype) for n, s in PUBLISHED.items()}


def trees(tensors, ignored=None):
    return names.to_trees(ENTRIES, tensors, SHAPES, ignored=ignored or {}, what="toy")


def test_layouts_against_written_out_indices():
    tensors = state()
    params, extra = trees(tensors)
    assert params["patch"]["kernel"][2, 1, 3, 4] == tensors["embed.weight"][4, 3, 2, 1]
    assert params["cls"][3] == tensors["cls_token"][0, 0, 3]
    x = np.random.default_rng(1).standard_normal((3, 6)).astype("f4")
    torch_linear = np.einsum("bi,oi->bo", x, tensors["b.1.fc.weight"]) + tensors["b.1.fc.bias"]
    dense = params["blocks"]["fc"]
    np.testing.assert_allclose(x @ dense["kernel"][1] + dense["bias"][1], torch_linear, rtol=1e-5)
    assert extra["pos"][8, 2] == tensors["pos_embed"][0, 8, 2]
    assert (extra["var"] == 0.5).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_in_out_in_is_the_identity_bit_for_bit(dtype):
    tensors = state(dtype)
    first = trees(tensors)
    written = names.to_state(ENTRIES, *first)
    assert {n: t.shape for n, t in written.items()} == PUBLISHED
    for name, tensor in written.items():
        assert tensor.dtype == np.float32
        assert tensor.flags.c_contiguous
        assert tensor.tobytes() == tensors[name].astype(np.float32).tobytes()
    again = trees(written)
    for (path, a), b in zip(flatten(first).items(), flatten(again).values(), strict=True):
        assert a.tobytes() == b.tobytes(), path
        assert a.dtype == np.float32


def test_written_tensors_own_their_memory():
    params, extra = trees(state())
    written = names.to_state(ENTRIES, params, extra)
    for tensor in written.values():
        assert not any(np.shares_memory(tensor, leaf) for leaf in flatten(params).values())


def test_all_faults_come_at_once_in_an_aligned_table():
    tensors = state()
    del tensors["b.1.fc.bias"]
    tensors["cls_token"] = tensors["cls_token"][0]
    tensors["b.0.fc.weight"] = tensors["b.0.fc.weight"].T
    tensors["pos_embed"] = np.zeros((1, 9, 5), np.int8)
    tensors["head.weight"] = np.zeros((3, 5), "f4")
    with pytest.raises(ConfigError) as error:
        trees(tensors)
    title, *lines = str(error.value).splitlines()
    assert title == "weights do not fit toy:"
    assert lines == [
        "  tensor         expected          found",
        "  b.0.fc.weight  (7, 6)            (6, 7)",
        "  b.1.fc.bias    (7,)              missing",
        "  cls_token      (1, 1, 5)         (1, 5)",
        "  head.weight    no tensor of toy  (3, 5)",
        "  pos_embed      (1, 9, 5)         (1, 9, 5) int8",
    ]


def test_blocks_that_tell_the_same_are_one_row():
    tensors = state() | {f"b.{i}.ls.gamma": np.ones(7, "f4") for i in (0, 1, 2, 10)}
    tensors |= {f"b.{i}.k.bias": np.ones(3, "f4") for i in range(3)}
    tensors |= {f"b.{i}.k.bias": np.ones(4, "f4") for i in range(3, 6)}
    with pytest.raises(ConfigError) as error:
        trees(tensors)
    rows = [line.split("  ")[1] for line in str(error.value).splitlines()[2:]]
    assert rows == ["b.*.ls.gamma (4 tensors)", *(f"b.{i}.k.bias" for i in range(6))]


def test_what_is_left_out_has_a_reason_and_is_listed():
    tensors = {**state(), "head.weight": np.zeros((3, 5)), "b.n": np.int64(3), "xhead.": 1.0}
    ignored = {r"head\.": "classifier", r".*\.n$": "counters"}
    assert names.left_out(tensors, ignored) == {
        "classifier": ("head.weight",),
        "counters": ("b.n",),
    }
    with pytest.raises(ConfigError, match="xhead"):
        trees(tensors, ignored)
    del tensors["xhead."]
    trees(tensors, ignored)


def test_a_mapping_that_misses_a_leaf_is_a_fault_of_the_code():
    with pytest.raises(ValueError, match="params/cls"):
        names.to_trees(
            [e for e in ENTRIES if e.path != "params/cls"], state(), SHAPES, ignored={}, what="toy"
        )
