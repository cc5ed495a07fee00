"""Unpickles arrays and numbers of NumPy in plain containers, and nothing that could run code or break memory.

NumPy's own functions trust what they are given: a type with objects in it makes them follow pointers of the file.
"""

import contextlib
import pickle
import re
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import IO, Any

import numpy as np
from torch import serialization

_PLAIN = re.compile(r"[?]|[<>=|]?[biufcSU][1-9]\d{0,3}")  # numbers and texts, without objects, fields, or subarrays


class _Dtype:
    """Stands in for numpy.dtype; of the pickled state only the order of bytes matters."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if not _PLAIN.fullmatch(code):
            raise pickle.UnpicklingError(f"an array of {code} in place of numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """Stands in for numpy.ndarray; only the pickled state gives it a shape, a type, and values."""

    def __new__(cls, *_: object) -> "_Array":
        return super().__new__(cls, 0, "b")

    def __setstate__(self, state: tuple) -> None:
        version, shape, dtype, is_fortran, data = state
        super().__setstate__((version, shape, dtype.dtype, is_fortran, data))


def _scalar(dtype: _Dtype, data: bytes) -> Any:
    return _frombuffer(data, dtype, (), "C")[()]


def _frombuffer(data: Any, dtype: _Dtype, shape: tuple, order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", data if isinstance(data, str) else bytes(data)))
    return array


_STAND_INS: dict[str, Any] = {"numpy.dtype": _Dtype, "numpy.ndarray": _Array, "argparse.Namespace": Namespace}
for _core in ("numpy.core", "numpy._core"):  # of NumPy 1 and 2
    _STAND_INS[f"{_core}.multiarray._reconstruct"] = partial(_Array)
    _STAND_INS[f"{_core}.multiarray.scalar"] = partial(_scalar)
    _STAND_INS[f"{_core}.numeric._frombuffer"] = partial(_frombuffer)
for _path, _stand_in in _STAND_INS.items():  # PyTorch goes by these
    _stand_in.__module__, _, _stand_in.__qualname__ = _path.rpartition(".")
    _stand_in.__name__ = _stand_in.__qualname__


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        if (module, name) in {("collections", "OrderedDict"), ("_codecs", "encode")}:
            return super().find_class(module, name)
        if f"{module}.{name}" in _STAND_INS:
            return _STAND_INS[f"{module}.{name}"]
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def load_pickle(stream: IO[bytes]) -> object:
    """Reads a pickle. Raises any exception where it is damaged or holds anything else."""
    return _Unpickler(stream, encoding="latin1").load()


@contextlib.contextmanager
def numpy_in_torch() -> Iterator[None]:
    """Lets torch.load, inside the block and with `weights_only`, read NumPy's numbers and arrays too."""
    earlier = serialization.get_safe_globals()
    serialization.add_safe_globals(list(_STAND_INS.values()))
    try:
        yield
    finally:
        serialization.clear_safe_globals()
        serialization.add_safe_globals(earlier)
