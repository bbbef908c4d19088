"""The reader of pickles: what Python's pickler writes comes back, and nothing that is not in the table gets in."""

import math
import pickle
import pickletools
import struct

import numpy as np
import pytest

from ipfm.models.checkpoints.unpickler import Inert, Limits, RestrictedUnpickler, read_pickle, shown

SHARED = ["a", "b"]
VALUES = [
    None,
    True,
    False,
    0,
    255,
    256,
    65535,
    65536,
    -1,
    2**31 - 1,
    -(2**31),
    2**31,
    2**63,
    -(2**100),
    0x1950A86A20F9469CFC6C,
    0.0,
    -0.5,
    math.inf,
    1e-300,
    "",
    "text",
    "σ" * 300,
    "n\n\x00\x1b",
    (),
    (1,),
    (1, 2),
    (1, 2, 3),
    (1, 2, 3, 4),
    [],
    [1],
    [1, [2, [3, ()]]],
    {},
    {"a": 1},
    {"a": {"b": [1.5]}, "c": (None,), 3: "d"},
    list(range(3000)),
    {str(i): i for i in range(3000)},
    [SHARED, SHARED, {"x": SHARED}],
]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_comes_back(protocol):
    for value in VALUES:
        back = read_pickle(pickle.dumps(value, protocol), {("_codecs", "encode"): _encode}, where="x")
        assert back == value and type(back) is type(value)
    everything = read_pickle(pickle.dumps(VALUES, protocol), {}, where="x")
    assert everything == VALUES
    again = everything[-1]
    assert again[0] is again[1] is again[2]["x"]


def _encode(text: object, encoding: object) -> bytes:
    assert isinstance(text, str) and encoding == "latin1"
    return text.encode("latin1")


def test_sets_and_bytes():
    assert read_pickle(pickle.dumps({"a", "b"}, 4), {}, where="x") == {"a", "b"}
    for size in (0, 1, 255, 256, 70_000):
        raw = bytes(range(256)) * (size // 256) + bytes(size % 256)
        view = read_pickle(pickle.dumps(raw, 4), {}, where="x")
        assert isinstance(view, memoryview) and view == raw and view.readonly


def test_strings_of_python_2():
    raw = b"\x80\x02(U\x03a\xe9bT\x02\x00\x00\x00cdt."
    assert read_pickle(raw, {}, where="x", encoding="latin1") == ("aéb", "cd")
    assert read_pickle(raw, {}, where="x", encoding="bytes") == (b"a\xe9b", b"cd")
    with pytest.raises(ValueError, match=r"^x: a string is not ASCII \(byte 3\)$"):
        read_pickle(raw, {}, where="x")
    keyed = b"\x80\x02}U\x04dataK\x01s."
    assert read_pickle(keyed, {}, where="x", encoding="bytes") == {b"data": 1}
    with pytest.raises(LookupError):
        read_pickle(raw, {}, where="x", encoding="none such")


def test_what_a_table_admits():
    class Box(Inert):
        state: object = None

        def set_state(self, state: object) -> None:
            self.state = state

    def pair(a: object, b: object = 2) -> tuple[object, object]:
        return a, b

    table = {("m", "Box"): Box, ("m", "pair"): pair, ("m", "value"): 7, ("m", "Inert"): Inert}

    def read(program: bytes) -> object:
        return read_pickle(b"\x80\x02" + program + b".", table, where="x")

    assert read(b"cm\nvalue\n") == 7
    assert read(b"cm\npair\nK\x01\x85R") == (1, 2)
    assert read(b"cm\npair\nK\x01K\x03\x86R") == (1, 3)
    box = read(b"cm\nBox\n)\x81}X\x01\x00\x00\x00aNsb")
    assert isinstance(box, Box) and box.state == {"a": None}
    for program, message in (
        (b"cm\nother\n", "asks for 'm.other', which is not admitted"),
        (b"cm.Box\nset_state\n", "asks for 'm.Box.set_state', which is not admitted"),
        (b"cm\npair\n)R", "pair is called with 0 arguments"),
        (b"cm\npair\n(NNNtR", "pair is called with 3 arguments"),
        (b"cm\nvalue\n)R", "it calls 7"),
        (b"cm\nBox\n)R", "it calls Box"),
        (b"cm\npair\n)\x81", "it makes an object of pair"),
        (b"cm\nBox\nN\x85\x81", "it makes an object of Box"),
        (b"cm\npair\n}b", "sets the state of pair, which is not admitted"),
        (b"cm\nInert\n)\x81}b", "Inert takes no state"),
    ):
        with pytest.raises(ValueError, match=message):
            read(program)


def test_persistent_ids():
    program = b"\x80\x02(X\x01\x00\x00\x00aK\x01tQ."
    assert read_pickle(program, {}, where="x", persistent=lambda what: [what]) == [("a", 1)]
    with pytest.raises(ValueError, match="refers to a persistent object, which a plain pickle cannot"):
        read_pickle(program, {}, where="x")

    def refuse(what: object) -> object:
        raise ValueError(f"{shown(what)} is refused")

    with pytest.raises(ValueError, match=r"^x: a tuple is refused \(byte 12\)$"):
        read_pickle(program, {}, where="x", persistent=refuse)


def test_only_instructions_that_checkpoints_use():
    admitted = set("\x80\x95(01\x94qrhjN\x88\x89KMJ\x8aG\x8cX\x8dCB\x8e\x96UT)t\x85\x86\x87]}\x8faesu\x90c\x93R\x81bQ.")
    for opcode in pickletools.opcodes:
        try:
            read_pickle(b"\x80\x04" + opcode.code.encode("latin1") + bytes(300), {}, where="x")
        except ValueError as error:
            refused = f"the pickle holds {opcode.name}, an instruction not admitted" in str(error)
            assert refused == (opcode.code not in admitted), opcode.name


def test_every_truncation_and_every_flip_ends_in_one_line():
    whole = pickle.dumps({"a": [1, 2.5, ("x", None)], "b": {"c": "long text" * 5}, "d": {"s"}}, 4)
    value = read_pickle(whole, {}, where="x")
    refused = 0
    for length in range(len(whole)):
        with pytest.raises(ValueError) as caught:
            read_pickle(whole[:length], {}, where="x")
        assert str(caught.value).startswith("x: ") and str(caught.value).isprintable()
    for position in range(len(whole)):
        for mask in range(1, 256):
            damaged = bytearray(whole)
            damaged[position] ^= mask
            try:
                read_pickle(bytes(damaged), {}, where="x")
            except ValueError as error:
                refused += 1
                assert str(error).startswith("x: ") and str(error).isprintable()
    assert refused > 100 * len(whole)
    assert read_pickle(whole, {}, where="x") == value


def test_limits():
    def limited(value: object, **limits: int) -> object:
        return read_pickle(pickle.dumps(value, 4), {}, where="x", limits=Limits(**limits))

    deep: object = 1
    for _ in range(10):
        deep = [deep]
    assert limited(deep, depth=10) == deep
    with pytest.raises(ValueError, match=r"nests deeper than 9 levels"):
        limited(deep, depth=9)
    count = sum(1 for _ in pickletools.genops(pickle.dumps(deep, 4)))
    assert limited(deep, operations=count) == deep
    with pytest.raises(ValueError, match=rf"^x: the pickle has more than {count - 1} instructions$"):
        limited(deep, operations=count - 1)
    assert limited("a" * 100, text=100) == "a" * 100
    with pytest.raises(ValueError, match="a string of 101 bytes is longer than the limit of 100"):
        limited("a" * 101, text=100)


def test_nesting_that_no_mark_shows():
    """Tuples around tuples and lists within lists made without marks, and one object reached by two ways."""
    for program in (b")" + b"\x85" * 200, b"]" * 200 + b"a" * 199, b"}K\x01" * 200 + b"}" + b"s" * 200):
        with pytest.raises(ValueError, match="nests deeper than 100 levels"):
            read_pickle(b"\x80\x04" + program + b".", {}, where="x")
    doubled = b"]" + b"".join(b"\x94h" + bytes([i]) + b"\x86" for i in range(90))
    assert isinstance(read_pickle(b"\x80\x04" + doubled + b".", {}, where="x"), tuple)
    itself = read_pickle(b"\x80\x04]\x94h\x00a.", {}, where="x")
    assert isinstance(itself, list) and itself[0] is itself


def test_keys_cost_nothing_and_are_unique():
    for key in (b"G" + struct.pack(">d", 1), b")", b"N", b"\x8a\x05\x00\x00\x00\x00\x01", b"C\x01a"):
        with pytest.raises(ValueError, match="cannot be a key"):
            read_pickle(b"\x80\x04}" + key + b"Ns.", {}, where="x")
    with pytest.raises(ValueError, match="a dictionary has one key twice"):
        read_pickle(b"\x80\x04}(K\x01NK\x01Nu.", {}, where="x")


def test_pickles_one_after_the_other():
    reader = RestrictedUnpickler(pickle.dumps([1]) + pickle.dumps("b") + b"rest", {}, where="x")
    assert (reader.load(), reader.load()) == ([1], "b")
    assert reader.position == len(pickle.dumps([1]) + pickle.dumps("b"))
    with pytest.raises(ValueError, match="4 bytes follow the end of the pickle"):
        read_pickle(pickle.dumps(1) + b"rest", {}, where="x")


def test_values_in_messages():
    assert shown("a\n\x1b\u202e") == r"'a\n\x1b\u202e'"
    assert len(shown("x" * 10**6)) == 60 and shown("x" * 10**6).endswith("...")
    assert shown([["secret"]]) == "a list" and shown(3) == "3" and shown(None) == "None"
    assert shown(np.zeros(3)) == "a ndarray" and shown(dict) == "dict"
