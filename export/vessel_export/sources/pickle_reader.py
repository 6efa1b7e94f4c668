"""Reads a torch pickle as data: plain values and descriptions of tensors. Nothing that the pickle names is imported or called.

The standard library splits the pickle into opcodes. This module interprets those that torch.save writes and refuses all others.
Does not know files and memory: `torch_file` finds the values of a described tensor.
"""

from __future__ import annotations

import dataclasses
import pickletools
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from vessel_export.errors import UnreadableFile

__all__ = ["INERT", "Pickle", "PickleRefused", "Storage", "StoredTensor", "UnusableTensor", "read_pickle"]

_MOST_OPCODES = 2_000_000  # a Sa2VA checkpoint has 6,000, with its optimizer's state 100,000; each can take about 100 bytes


class PickleRefused(UnreadableFile):
    """A pickle that is damaged or has more than tensors and plain values. The message is a phrase that says why."""


@dataclasses.dataclass(frozen=True)
class _Named:
    """A global that the pickle names."""

    name: str


INERT = _Named("a value that is not read")  # stands for everything except plain values and tensors


@dataclasses.dataclass(frozen=True)
class Storage:
    """The memory of tensors: `values` values of `dtype` ("bfloat16") in the file's record `key`."""

    key: str
    dtype: str
    values: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A dense tensor of `dtype` ("bfloat16") in the storage `key`.

    `offset`, `shape` and `stride` count values. They are non-negative, but not checked against the storage.
    """

    key: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class UnusableTensor:
    """A tensor that is not dense, of the given `kind` ("sparse")."""

    kind: str


@dataclasses.dataclass(frozen=True)
class Pickle:
    """The content of a pickle. In `value`, an OrderedDict is a dict; INERT stands for all but plain values, containers and tensors."""

    value: Any
    storages: Mapping[str, Storage]


def read_pickle(file: BinaryIO) -> Pickle:
    """Read the pickle at the current position of `file`.

    Raises:
        PickleRefused: the pickle is damaged, uses other opcodes than torch.save, or names globals that mmengine's checkpoints do not.
    """
    machine = _Machine()
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(file)):
            if count == _MOST_OPCODES:
                raise PickleRefused(f"its pickle has more than {_MOST_OPCODES:,} opcodes")
            if opcode.name not in _OPERATIONS:
                raise PickleRefused(f"its pickle has the opcode {opcode.name} at byte {position}, which checkpoints do not use")
            _OPERATIONS[opcode.name](machine, argument)
    except PickleRefused:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as e:
        raise PickleRefused(f"its pickle is damaged ({type(e).__name__})") from e
    if machine.foreign:
        raise PickleRefused("its pickle calls " + ", ".join(sorted(machine.foreign)))
    if len(machine.stack) != 1 or machine.marks:
        raise PickleRefused("its pickle is damaged (values are left over)")
    return Pickle(machine.stack[0], machine.storages)


class _Machine:
    """The state of a pickle being read: stack, marks and memo. `foreign` are globals that mmengine's checkpoints do not name."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}
        self.foreign: set[str] = set()

    def push(self, value: object) -> None:
        self.stack.append(value)

    def mark(self, _: object) -> None:
        self.marks.append(len(self.stack))

    def pop(self, count: int) -> list[Any]:
        """Remove and return the top `count` values, but none below the last mark."""
        start = len(self.stack) - count
        if start < (self.marks[-1] if self.marks else 0):
            raise IndexError
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def pop_marked(self) -> list[Any]:
        start = self.marks.pop()
        return self.pop(len(self.stack) - start)

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise IndexError
        return self.stack[-1]

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        self.push(self.memo[index])

    def append(self, values: list[Any]) -> None:
        target = self.top()
        if isinstance(target, list):
            target.extend(values)
        elif target is not INERT:
            raise TypeError

    def set_items(self, values: list[Any]) -> None:
        target = self.top()
        keys, values = values[::2], values[1::2]
        if target is INERT:
            return
        if not isinstance(target, dict):
            raise TypeError
        for key, value in zip(keys, values, strict=True):
            if not _is_key(key):
                raise PickleRefused("its pickle has a dictionary key that is neither text nor a number")
            target[key] = value

    def name(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        full = f"{module.replace('__builtin__', 'builtins')}.{name}"  # protocol 2 uses Python 2's name
        if full not in _KNOWN and not full.startswith(("torch.", "numpy.dtypes.")):
            self.foreign.add(full)
        self.push(_Named(full))

    def reduce(self, _: object) -> None:
        function, arguments = self.pop(2)
        if not isinstance(function, _Named) or not isinstance(arguments, tuple):
            raise TypeError
        self.push(self.called(function.name, arguments))

    def called(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """The value that represents the result of calling `name`. Nothing is called."""
        if name == "collections.OrderedDict" and not arguments:
            return {}
        if name in _CONTAINED:
            return arguments[0]  # nn.Parameter's data
        if name in _DENSE:
            return _dense(name, arguments)
        if name in _UNUSABLE:
            return UnusableTensor(_UNUSABLE[name])
        if name.startswith("torch.") and name not in _KNOWN:
            self.foreign.add(name)
        return INERT

    def storage(self, _: object) -> None:
        [reference] = self.pop(1)
        match reference:
            case ("storage", _Named(kind), str(key), str(), int(values)) | ("storage", _Named(kind), str(key), str(), int(values), None):
                storage = Storage(key, _STORAGES[kind], _count(values))
            case _:
                raise TypeError
        if self.storages.setdefault(key, storage) != storage:
            raise PickleRefused(f"its pickle describes the storage {key} twice, differently")
        self.push(storage)


def _is_key(value: object) -> bool:
    """Hashing a nested tuple could take forever, and integers beyond 60 bits can be chosen to collide."""
    return value is None or isinstance(value, (str, bytes, float)) or (isinstance(value, int) and abs(value) < 1 << 60)


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise PickleRefused("its pickle describes a tensor of impossible size")
    return value


def _dense(name: str, arguments: tuple[Any, ...]) -> StoredTensor | UnusableTensor:
    """torch._utils._rebuild_tensor*: (storage, offset, shape, stride, requires_grad, hooks, metadata or, in v3, dtype, ...)."""
    storage, offset, shape, stride, *rest = arguments
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride):
        raise TypeError
    if len(shape) > 16:
        raise PickleRefused(f"its pickle describes a tensor of {len(shape)} dimensions")
    extra = rest[2] if len(rest) > 2 else None
    dtype = storage.dtype
    if name.endswith("_v3"):
        if not isinstance(extra, _Named) or not re.fullmatch(r"torch\.[a-z0-9_]{1,30}", extra.name):
            raise TypeError
        dtype = extra.name.removeprefix("torch.")
    elif extra:
        return UnusableTensor("conjugated or negated")
    shape, stride = tuple(map(_count, shape)), tuple(map(_count, stride))
    return StoredTensor(storage.key, dtype, _count(offset), shape, stride)


_STORAGES = {"torch.storage.UntypedStorage": "uint8"} | {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16",
        "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
        "ComplexDouble": "complex128", "ComplexFloat": "complex64",
        "QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32", "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4",
    }.items()
}  # fmt: skip
_DENSE = {f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")}
_CONTAINED = {f"torch._utils._rebuild_parameter{kind}" for kind in ("", "_with_state")}
_UNUSABLE = {
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_meta_tensor_no_storage": "meta (without values)",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_wrapper_subclass": "of a subclass",
    "torch._tensor._rebuild_from_type_v2": "of a subclass, or one with attributes",
    "torch._utils._rebuild_device_tensor_from_numpy": "of a foreign device",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "of a foreign device",
}
_KNOWN = {  # globals in mmengine's checkpoints besides tensors, and those that torch itself considers safe
    "collections.OrderedDict", "collections.Counter", "collections.defaultdict", "_codecs.encode",
    "builtins.getattr", "builtins.set", "builtins.dict", "builtins.list", "builtins.bytearray", "builtins.complex",
    "mmengine.logging.history_buffer.HistoryBuffer", "numpy.dtype", "numpy.ndarray",
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),  # NumPy 1 and 2
    "torch.Size", "torch.device", "torch.serialization._get_layout", "torch.nn.parameter.Parameter", "torch.Tensor",
    *_STORAGES, *_DENSE, *_CONTAINED, *_UNUSABLE,
}  # fmt: skip


def _constant(value: object) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(value)


def _last(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(tuple(machine.pop(count)))


def _new_object(machine: _Machine, _: object) -> None:
    if not isinstance(machine.pop(2)[0], _Named):
        raise TypeError
    machine.push(INERT)


_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": lambda machine, version: None,
    "STOP": lambda machine, _: None,
    "NONE": _constant(None),
    "NEWTRUE": _constant(True),
    "NEWFALSE": _constant(False),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES"),
        _Machine.push,
    ),
    "MARK": _Machine.mark,
    "EMPTY_LIST": lambda machine, _: machine.push([]),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_TUPLE": _constant(()),
    "TUPLE": lambda machine, _: machine.push(tuple(machine.pop_marked())),
    "TUPLE1": _last(1),
    "TUPLE2": _last(2),
    "TUPLE3": _last(3),
    "APPEND": lambda machine, _: machine.append(machine.pop(1)),
    "APPENDS": lambda machine, _: machine.append(machine.pop_marked()),
    "SETITEM": lambda machine, _: machine.set_items(machine.pop(2)),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_marked()),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "GLOBAL": _Machine.name,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _new_object,
    "BUILD": lambda machine, _: machine.pop(1)[0],  # an object's state, which is not needed
    "BINPERSID": _Machine.storage,
}
