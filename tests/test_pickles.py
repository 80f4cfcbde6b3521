"""Pickles that are read without running anything."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.system.error import InputError
from lib.system.pickles import unpickle


@pytest.mark.parametrize("protocol", range(6))
def test_what_histories_hold_comes_back_as_pythons_own_numbers(protocol):
    numbers = [np.float32(0.1), np.float64(0.1), np.float16(0.5), np.int64(-3), np.uint8(255), np.bool_(True)]
    content = {
        "a": [*numbers, np.dtype(">f4").type(2), 1, -70000, 2**70, 1.5, None, True],
        "b": {"c": ("d", [], {}, ())},
    }
    found = unpickle(pickle.dumps(content, protocol=protocol))
    plain = [0.10000000149011612, 0.1, 0.5, -3, 255, True, 2.0, 1, -70000, 2**70, 1.5, None, True]
    assert found == {"a": plain, "b": {"c": ("d", [], {}, ())}}
    assert [type(value) for value in found["a"]] == [type(value) for value in plain]


def test_other_byte_orders_and_the_names_of_numpy_1():
    swapped = np.array([1.5], dtype=">f8")[0]
    data = pickle.dumps([swapped, np.float32(0.25)], protocol=2)
    assert unpickle(data) == [1.5, 0.25]
    assert b"numpy._core.multiarray" in data
    assert unpickle(data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")) == [1.5, 0.25]


GOOD = (
    pickle.dumps({"a": [np.float32(1), 2.5], "b": (1, None)}, protocol=4),
    pickle.dumps([np.float64(3)] * 2, protocol=0),
)


@pytest.mark.parametrize("good", GOOD)
@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_a_pickle_with_some_other_bytes_is_read_or_refused(good, data):
    content = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(content)))
    try:
        unpickle(bytes(content[:cut]))
    except Exception as error:  # whatever it is, `_read` makes an InputError of it
        assert not isinstance(error, InputError)
