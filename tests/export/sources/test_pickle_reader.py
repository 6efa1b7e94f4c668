"""Pickles read as data: what torch and mmengine write, and what an attacker would."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.checkpoints import FOREIGN, GLOBAL, REDUCE, mutate, proto, text
from tests.support.paths import ROOT
from vessel_export.sources.pickle_reader import INERT, PickleRefused, StoredTensor, UnusableTensor, read_pickle

STORAGE = b"(" + text("storage") + GLOBAL("torch FloatStorage") + text("0") + text("cpu") + b"K\x08tQ"
PUT, GET = b"q\x00", b"h\x00"


def read(*parts: bytes) -> Any:
    return read_pickle(io.BytesIO(proto(*parts))).value


def plain(value: object) -> bytes:
    """The opcodes that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def tensor(*arguments: bytes, function: str = "_rebuild_tensor_v2", storage: bytes = STORAGE) -> bytes:
    return GLOBAL(f"torch._utils {function}") + b"(" + storage + b"".join(arguments) + b"t" + REDUCE


def test_plain_values_are_themselves() -> None:
    value = {"a": [1, -2, 2.5, None, True, "text", ("x", 10**10)], 7: {}}
    assert read_pickle(io.BytesIO(pickle.dumps(value, 2))).value == value


def test_a_tensor_is_described() -> None:
    stored = read(tensor(plain(1), plain((2, 3)), plain((3, 1)), b"\x89", plain({})))
    assert stored == StoredTensor("0", "float32", 1, (2, 3), (3, 1))
    of_eight_bits = tensor(
        plain(0), plain((4,)), plain((1,)), b"\x89", plain({}), GLOBAL("torch float8_e5m2"), function="_rebuild_tensor_v3"
    )
    assert read(of_eight_bits).dtype == "float8_e5m2"


def test_a_parameter_is_its_tensor() -> None:
    inner = tensor(plain(0), plain((8,)), plain((1,)), b"\x89", plain({}))
    parameter = GLOBAL("torch._utils _rebuild_parameter") + inner + b"\x88" + plain({}) + b"\x87" + REDUCE
    assert read(parameter) == read(inner)


@pytest.mark.parametrize("name", [name for name in FOREIGN if name.startswith("torch._utils _rebuild_")])
def test_tensors_of_other_kinds_are_told_apart_and_not_made(name: str) -> None:
    assert isinstance(read(GLOBAL(name) + b")" + REDUCE), UnusableTensor)


@pytest.mark.parametrize(
    "function", ["numpy dtype", "numpy ndarray", "numpy._core.multiarray _reconstruct", "numpy.core.multiarray scalar"]
)
@pytest.mark.parametrize("state", [(3, "|", None, ("a",), {"a": 1}, 1 << 30, -1, 63), (-5, "<", "x"), "not a tuple", None])
def test_numpy_takes_no_state_from_a_file(function: str, state: object) -> None:
    assert read(GLOBAL(function) + b")" + REDUCE + plain(state) + b"b") is INERT


@pytest.mark.parametrize("name", ["os system", "posix system", "builtins eval", "__builtin__ exec", "torch.hub load", "torch load"])
def test_what_a_file_wants_to_call_is_named(name: str) -> None:
    with pytest.raises(PickleRefused, match=name.split(" ")[1]):
        read(GLOBAL(name) + text("touch was_run") + b"\x85" + REDUCE)


def test_a_name_that_is_not_called_is_nothing() -> None:
    assert read(GLOBAL("builtins getattr") + GLOBAL("numpy ndarray") + text("__subclasses__") + b"\x86" + REDUCE) is INERT


@pytest.mark.parametrize(
    "arguments",
    [
        (plain(-1), plain((2,)), plain((1,))),
        (plain(0), plain((-2,)), plain((1,))),
        (plain(0), plain((2,)), plain((-1,))),
        (plain(0), plain((1 << 63,)), plain((1,))),
        (plain(0), plain((2, 2)), plain((1,))),
        (plain(0), plain((1,) * 65), plain((1,) * 65)),
        (plain(0), plain([2]), plain([1])),
        (plain(0.5), plain((2,)), plain((1,))),
        (plain(True), plain((2,)), plain((1,))),
        (),
    ],
)
def test_impossible_tensors(arguments: tuple[bytes, ...]) -> None:
    with pytest.raises(PickleRefused):
        read(tensor(*arguments, b"\x89", plain({})))


@pytest.mark.parametrize(
    "storage",
    [
        plain(("storage", "x", "0", "cpu", 8)) + b"Q",
        b"(" + text("storage") + GLOBAL("torch FloatStorage") + text("0") + text("cpu") + plain(-8) + b"tQ",
        b"(" + text("storage") + GLOBAL("builtins eval") + text("0") + text("cpu") + b"K\x08tQ",
        b"(" + text("module") + GLOBAL("torch FloatStorage") + text("0") + text("cpu") + b"K\x08tQ",
        plain(5),
    ],
)
def test_impossible_storages(storage: bytes) -> None:
    with pytest.raises(PickleRefused):
        read(tensor(plain(0), plain((2,)), plain((1,)), b"\x89", plain({}), storage=storage))


def test_one_storage_is_not_described_twice() -> None:
    with pytest.raises(PickleRefused, match="twice"):
        read(STORAGE + STORAGE.replace(b"FloatStorage", b"LongStorage") + b"\x86")


BOMBS = {
    "a key that takes 2^60 steps to hash": b"}" + b")" + (PUT + GET + b"\x86") * 60 + b"Ns",
    "keys that collide": b"}(" + b"".join(plain(i * ((1 << 61) - 1)) + b"N" for i in range(1, 20_000)) + b"u",
    "two million opcodes": b"N" + PUT * 2_000_000,
    "a text of 4 GB": b"X\xff\xff\xff\xff",
    "an opcode of extensions": b"\x82\x01",
    "an out-of-band buffer": b"\x97",
    "an array of 2^60 bytes": b"\x96" + struct.pack("<Q", 1 << 60),
    "an integer of 5,000 digits": b"L" + b"9" * 5000 + b"L\n",
    "an instance": b"(ios\nsystem\n",
    "nothing to pop": b"s",
    "a mark that is not there": b"t",
    "something under the mark": b"N(\x85",
    "a memo that was not written": b"h\x07",
    "two values": b"NN",
    "no value": b"",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str) -> None:
    with pytest.raises(PickleRefused):
        read(BOMBS[name])


@pytest.mark.parametrize("depth", [1000, 500_000])
def test_depth_costs_nothing(depth: int) -> None:
    assert read(b"]" * depth + b"a" * (depth - 1))
    assert read(b")" + b"\x85" * depth)
    shared = b"()" + PUT + (GET + GET + b"\x86" + PUT) * min(depth, 10_000) + b"t"  # 2^10000 leaves, were it walked
    assert len(read(shared)) == min(depth, 10_000) + 1


def test_a_memo_takes_as_much_as_is_in_it() -> None:
    assert read(b"]r" + struct.pack("<I", (1 << 32) - 1)) == []


@pytest.mark.parametrize("batch", range(4))
def test_mutated_checkpoints_are_read_or_refused_in_a_line(tmp_path: Path, batch: int) -> None:
    """In a process of its own, with bounded memory: a crash, a traceback and an allocation beyond bounds are all its failure."""
    done = subprocess.run(
        [sys.executable, __file__, str(batch * 100), str(tmp_path)],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


def _try(first: int, folder: Path) -> None:
    import contextlib
    import resource

    from vessel_export.errors import CheckpointError
    from vessel_export.sources.checkpoint import open_checkpoint
    from vessel_export.sources.inspection import inspect_checkpoint
    from vessel_export.sources.inspection_report import to_json

    resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
    for number in range(first, first + 100):
        name, data = mutate(random.Random(number))
        (folder / name).write_bytes(data)
        for function in (open_checkpoint, lambda path: to_json(inspect_checkpoint(path))):
            with contextlib.redirect_stderr(io.StringIO()):
                refusal = ""
                try:
                    function(folder / name)
                except CheckpointError as e:
                    refusal = str(e)
                except BaseException as e:
                    raise AssertionError(f"case {number}, {name}") from e
            assert not refusal or (name in refusal and refusal.isprintable()), (number, refusal)


if __name__ == "__main__":
    _try(int(sys.argv[1]), Path(sys.argv[2]))
