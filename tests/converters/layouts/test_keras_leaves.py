"""The variables of one Keras layer as a weight and a bias: dequantised, merged, or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from weightport.converters.checkpoint import Computed, Tensor
from weightport.converters.layouts.keras_leaves import leaf_tensors
from weightport.errors import ConversionError

Array = np.ndarray[Any, Any]
DTYPES = {"f4": "F32", "f2": "F16", "i1": "I8", "u1": "U8"}
DENSE, EMBEDDING = "clip_encoder_layer.3.fc1", "clip_embedding.0.token_embedding"
RNG = np.random.default_rng(0)


def tensor(array: Array, name: str = "t") -> Tensor:
    return Computed(name, DTYPES[array.dtype.str[1:]], array.shape, (), lambda: array, "a test's")


def leaf(layer: str, alpha: Any = None, **variables: Any) -> dict[str, Tensor]:
    named = {name.removeprefix("_at_"): tensor(array, name) for name, array in variables.items()}
    return leaf_tensors(layer, named, alpha)


def floats(*shape: int, dtype: str = "f4") -> Array:
    return RNG.standard_normal(shape).astype(dtype)


def int8s(*shape: int) -> Array:
    return RNG.integers(-127, 128, shape, "i1")


def packed(nibbles: Array) -> Array:
    """Integers -8..7, two per byte along the last axis, the first in the low half."""
    low, high = nibbles[:, 0::2] & 15, nibbles[:, 1::2] & 15
    return (low | high << 4).astype("u1").view("i1")


def int4_dense(rows: int, columns: int, groups: int) -> tuple[dict[str, Array], Array]:
    """Variables of a grouped int4 layer, and the kernel by definition, element by element."""
    nibbles = RNG.integers(-8, 8, (rows, columns))
    scale, zero = floats(groups, columns), RNG.integers(-8, 8, (groups, columns)).astype("i1")
    index = RNG.integers(0, groups, rows).astype("f4")
    kernel = np.zeros((rows, columns), "f4")
    for i in range(rows):
        for j in range(columns):
            kernel[i, j] = (
                np.float32(nibbles[i, j] - int(zero[int(index[i]), j])) * scale[int(index[i]), j]
            )
    return {
        "kernel": packed(nibbles),
        "kernel_scale": scale,
        "kernel_zero": zero,
        "g_idx": index,
    }, kernel


# --- plain ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "bias"),
    [("kernel", "bias"), ("_kernel", "bias"), ("gamma", "beta"), ("_at_0", "_at_1")],
)
def test_plain_variables_pass_through(weight: str, bias: str) -> None:
    values = floats(4, 6), floats(6)
    found = leaf(DENSE, **{bias: values[1], weight: values[0]})
    assert list(found) == ["weight", "bias"]
    assert found["weight"].numpy() is values[0]
    assert found["bias"].numpy() is values[1]


@pytest.mark.parametrize("name", ["embeddings", "_embeddings", "_at_0", "kernel"])
def test_a_layer_without_bias(name: str) -> None:
    assert list(leaf(EMBEDDING, **{name: floats(4, 6)})) == ["weight"]


@pytest.mark.parametrize("names", [["kernel", "bias", "moving_mean"], ["_at_0", "_at_1", "_at_2"]])
def test_unknown_variables_are_refused(names: list[str]) -> None:
    with pytest.raises(
        ConversionError, match=rf"fc1: unknown variable `{names[2].removeprefix('_at_')}`"
    ):
        leaf(DENSE, **dict.fromkeys(names, floats(6)))


@pytest.mark.parametrize("name", ["²", "9" * 5000, "-1"])
def test_names_that_are_no_positions_are_refused(name: str) -> None:
    with pytest.raises(ConversionError, match="unknown variable `0`"):
        leaf_tensors(DENSE, {"0": tensor(floats(4)), name: tensor(floats(4))}, None)


# --- int8 and int4 --------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("kernel", "kernel_scale"), ("_at_0", "_at_1")])
def test_int8_kernel_has_a_scale_per_column(names: tuple[str, str]) -> None:
    kernel, scale = int8s(4, 6), floats(6)
    found = leaf(DENSE, **dict(zip(names, (kernel, scale), strict=True)))
    assert list(found) == ["weight"]
    assert (found["weight"].dtype, found["weight"].shape) == ("F32", (4, 6))
    expected = [[np.float32(kernel[i, j]) / scale[j] for j in range(6)] for i in range(4)]
    assert np.array_equal(found["weight"].numpy(), np.array(expected, "f4"))


def test_int8_with_bias_by_position() -> None:
    kernel, bias, scale = int8s(6, 6), floats(6), floats(6)
    found = leaf(DENSE, _at_0=kernel, _at_1=bias, _at_2=scale)
    assert found["bias"].numpy() is bias
    assert np.array_equal(found["weight"].numpy(), kernel / scale)


@pytest.mark.parametrize("names", [("embeddings", "embeddings_scale"), ("_at_0", "_at_1")])
def test_int8_embedding_has_a_scale_per_row(names: tuple[str, str]) -> None:
    table, scale = int8s(6, 6), floats(6)
    found = leaf(EMBEDDING, **dict(zip(names, (table, scale), strict=True)))
    assert np.array_equal(found["weight"].numpy(), table / scale[:, None])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("by_position", [True, False])
def test_int4_kernel_has_a_scale_and_a_zero_per_group_of_rows(
    by_position: bool, bias: bool
) -> None:
    variables, kernel = int4_dense(rows=12, columns=8, groups=3)
    if bias:
        weight = variables.pop("kernel")
        variables = {"kernel": weight, "bias": floats(8), **variables}
    if by_position:
        variables = {f"_at_{i}": array for i, array in enumerate(variables.values())}
    found = leaf(DENSE, **variables)
    assert list(found) == ["weight", "bias"][: 1 + bias]
    assert (found["weight"].dtype, found["weight"].shape) == ("F32", (12, 8))
    assert np.array_equal(found["weight"].numpy(), kernel)


def test_int4_embedding_has_groups_of_columns() -> None:
    nibbles = RNG.integers(-8, 8, (12, 8))
    scale, zero, groups = (
        floats(12, 2),
        RNG.integers(-8, 8, (12, 2)).astype("i1"),
        RNG.integers(0, 2, 8),
    )
    parts = {"embeddings_scale": scale, "embeddings_zero": zero, "g_idx": groups.astype("f4")}
    found = leaf(EMBEDDING, embeddings=packed(nibbles), **parts)
    assert found["weight"].shape == (12, 8)
    assert np.array_equal(
        found["weight"].numpy(), (nibbles - zero[:, groups]).astype("f4") * scale[:, groups]
    )


def test_every_nibble() -> None:
    """All bytes: the low half is the even column, and both are signed."""
    every = np.arange(256).astype("u1").view("i1")[:, None]
    ones = np.ones((1, 2), "f4")
    found = leaf(
        DENSE,
        kernel=every,
        kernel_scale=ones,
        kernel_zero=(0 * ones).astype("i1"),
        g_idx=np.zeros(256, "f4"),
    )
    signed = [*range(8), *range(-8, 0)]
    assert found["weight"].numpy().tolist() == [
        [signed[byte % 16], signed[byte // 16]] for byte in range(256)
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_scale": None}, "without the scales"),
        ({"kernel_zero": None}, "without the scales"),
        ({"g_idx": None}, "without the scales"),
        ({"kernel": floats(12, 4)}, "without the scales"),
        ({"kernel": None}, "no kernel that they belong to"),
        ({"kernel": int8s(12, 3)}, "do not fit"),
        ({"kernel_scale": floats(3, 7)}, "do not fit"),
        ({"kernel_scale": floats(3)}, "do not fit"),
        ({"kernel_zero": int8s(2, 8)}, "do not fit"),
        ({"g_idx": floats(11)}, "do not fit"),
        ({"kernel_zero": None, "g_idx": None}, "do not fit"),
    ],
)
def test_damaged_int4_is_refused(change: dict[str, Array | None], message: str) -> None:
    variables, _ = int4_dense(rows=12, columns=8, groups=3)
    changed = {name: array for name, array in (variables | change).items() if array is not None}
    with pytest.raises(ConversionError, match=message):
        leaf(DENSE, **changed)


@pytest.mark.parametrize("group", [3, -1, 0.5, np.nan, np.inf])
def test_groups_that_do_not_exist_are_refused(group: float) -> None:
    variables, _ = int4_dense(rows=12, columns=8, groups=3)
    variables["g_idx"][5] = group
    found = leaf(DENSE, **variables)
    with pytest.raises(ConversionError, match=r"fc1: `g_idx` names groups"):
        found["weight"].numpy()


@pytest.mark.parametrize("scale", [floats(5), floats(6, 1), floats()])
def test_int8_scales_that_do_not_fit_are_refused(scale: Array) -> None:
    with pytest.raises(ConversionError, match=r"int8 scales .* do not fit a kernel \[4, 6\]"):
        leaf(DENSE, kernel=int8s(4, 6), kernel_scale=scale)


def test_integers_without_scales_are_refused() -> None:
    with pytest.raises(ConversionError, match="without the scales"):
        leaf(DENSE, kernel=int8s(4, 6), bias=floats(6))


# --- LoRA -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer", "slot"), [(DENSE, "kernel"), (EMBEDDING, "embeddings")])
@pytest.mark.parametrize("alpha", [1.0, 2.0, 16.0])
def test_lora_is_merged(layer: str, slot: str, alpha: float) -> None:
    base, a, b = floats(6, 8), floats(6, 2), floats(2, 8)
    found = leaf(layer, alpha, **{f"lora_{slot}_a": a, f"lora_{slot}_b": b, slot: base})
    np.testing.assert_allclose(
        found["weight"].numpy(), base + alpha / 2 * (a.astype("f8") @ b), rtol=1e-5, atol=1e-6
    )


def test_lora_of_a_convolution_mixes_channels_at_every_tap() -> None:
    base, a, b = floats(3, 3, 4, 5), floats(3, 3, 4, 2), floats(2, 5)
    found = leaf("padded_conv2d.0.conv2d", 2.0, kernel=base, lora_kernel_a=a, lora_kernel_b=b)
    np.testing.assert_allclose(
        found["weight"].numpy(), base + np.einsum("hwir,ro->hwio", a, b), rtol=1e-5, atol=1e-6
    )


def test_lora_keeps_the_dtype() -> None:
    factors = {"lora_kernel_a": floats(6, 2, dtype="f2"), "lora_kernel_b": floats(2, 8, dtype="f2")}
    found = leaf(DENSE, 1.0, kernel=floats(6, 8, dtype="f2"), **factors)
    assert (found["weight"].dtype, found["weight"].numpy().dtype) == ("F16", np.float16)


def test_lora_on_an_int8_kernel() -> None:
    kernel, scale, a, b = int8s(6, 8), floats(8), floats(6, 2), floats(2, 8)
    found = leaf(DENSE, 2.0, kernel=kernel, kernel_scale=scale, lora_kernel_a=a, lora_kernel_b=b)
    np.testing.assert_allclose(
        found["weight"].numpy(), kernel / scale + a @ b, rtol=1e-5, atol=1e-5
    )


def test_lora_without_alpha_is_refused_by_name() -> None:
    factors = {"lora_kernel_a": floats(6, 2), "lora_kernel_b": floats(2, 8)}
    with pytest.raises(
        ConversionError,
        match=r"fc1: holds LoRA factors `lora_kernel_a` of rank 2; give --lora-alpha",
    ):
        leaf(DENSE, kernel=floats(6, 8), **factors)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (floats(6, 2), None, "only one"),
        (None, floats(2, 8), "only one"),
        (floats(6, 0), floats(0, 8), "empty"),
        (floats(6, 2), floats(), "empty"),
        (floats(5, 2), floats(2, 8), "do not fit"),
        (floats(6, 2), floats(3, 8), "do not fit"),
        (floats(6, 2), floats(2, 7), "do not fit"),
    ],
)
def test_damaged_lora_is_refused(a: Array | None, b: Array | None, message: str) -> None:
    factors = {
        name: array
        for name, array in {"lora_kernel_a": a, "lora_kernel_b": b}.items()
        if array is not None
    }
    with pytest.raises(ConversionError, match=message):
        leaf(DENSE, 2.0, kernel=floats(6, 8), **factors)
