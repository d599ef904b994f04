import numpy as np
import pytest

from largerespatch.core.checks import one_of, positive_int, whole_number


@pytest.mark.parametrize("value", [1, 64, np.int16(64), np.uint8(1)])
def test_integers_of_any_kind_become_ints(value):
    checked = positive_int("attn_slice_x", value, "tokens")
    assert type(checked) is int and checked == value


@pytest.mark.parametrize("value", [True, np.True_, 64.0, np.float32(64), "64", None, [64]])
def test_what_is_no_integer_is_a_type_error(value):
    with pytest.raises(TypeError) as error:
        positive_int("attn_slice_x", value, "tokens")
    assert str(error.value) == f"attn_slice_x must be a whole number of tokens, at least 1; got {value!r}"


@pytest.mark.parametrize("value", [0, -3, np.int64(0)])
def test_integers_below_one_are_a_value_error(value):
    with pytest.raises(ValueError) as error:
        positive_int("attn_slice_x", value, "tokens")
    assert str(error.value) == f"attn_slice_x must be a whole number of tokens, at least 1; got {value!r}"


def test_whole_number_takes_its_least_and_no_less():
    assert whole_number("seed", 0, "", least=0) == 0
    with pytest.raises(ValueError, match=r"^seed must be a whole number, at least 0; got -1$"):
        whole_number("seed", -1, "", least=0)


def test_one_of_returns_an_accepted_word():
    assert one_of("attn_shape", "tile", ("brick", "tile")) == "tile"


@pytest.mark.parametrize(
    ("value", "kind"), [("hexagon", ValueError), ("", ValueError), (None, TypeError), (1, TypeError)]
)
def test_one_of_names_what_is_accepted(value, kind):
    with pytest.raises(kind) as error:
        one_of("attn_shape", value, ("brick", "tile"))
    assert str(error.value) == f"attn_shape must be one of 'brick', 'tile'; got {value!r}"
