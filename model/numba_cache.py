"""Numba's on-disk cache of compiled kernels, made to see changes in all code that a kernel is compiled from.

Numba itself looks at the file of the kernel only. A kernel that another one calls is compiled into the caller, and
global constants are compiled in as well; a change of either in another file would leave the old machine code in use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from types import CodeType, FunctionType, ModuleType
from typing import Any

import numpy as np
from numba.core.caching import FunctionCache
from numba.core.dispatcher import Dispatcher


class KernelCache(FunctionCache):
    """The cache of one kernel, in Numba's own place (`NUMBA_CACHE_DIR`, `__pycache__` or the user's cache).

    An entry is used only while its kernel, all that the kernel calls, the constants that it reads and the compiler's
    options are the same. A changed kernel overwrites its old entry.
    """

    def __init__(self, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        """Raises `RuntimeError` if no directory can be written."""
        super().__init__(function)  # type: ignore[no-untyped-call]
        self._function, self._options = function, options

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        # Numba loads before it saves, at the first call: by then, all that the kernel calls has been defined.
        self._cache_file._source_stamp = self._stamp
        return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]

    @cached_property
    def _stamp(self) -> str:
        # Without the time and the size of the file, which Numba compares: they tell nothing that the digest does not,
        # and an installation or a checkout sets a new time.
        return kernel_digest(self._function, self._options)


def kernel_digest(function: Callable[..., Any], options: Mapping[str, Any]) -> str:
    """Return a digest of all that a kernel is compiled from.

    That is the bytecode and default arguments of the kernel and of all functions that it calls, the values of the
    global constants that they read, and the compiler's options.
    """
    parts: list[str] = [_describe(options)]
    pending, seen = [function], set()
    while pending:
        current = pending.pop()
        if current in seen or not isinstance(current, FunctionType):
            continue
        seen.add(current)
        parts.append(_describe(current.__defaults__))
        for code in _code_objects(current.__code__):
            parts += [code.co_code.hex(), _describe(code.co_consts), _describe(code.co_names)]
        for value in _referenced(current):
            called = getattr(value, "__wrapped__", value)  # the function of a kernel or an intrinsic
            if isinstance(called, FunctionType):
                pending.append(called)
            else:
                parts.append(_describe(value))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _code_objects(code: CodeType) -> Iterator[CodeType]:
    """Yield the code of a function and of the functions inside it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_objects(constant)


def _referenced(function: FunctionType) -> Iterator[Any]:
    """Yield the values of the globals and closure variables of a function, and kernels in modules that it names."""
    for cell in function.__closure__ or ():
        yield cell.cell_contents
    for code in _code_objects(function.__code__):
        for name in code.co_names:
            value = function.__globals__.get(name)
            if isinstance(value, ModuleType):
                attributes = (getattr(value, attribute, None) for attribute in code.co_names)
                yield from (attribute for attribute in attributes if isinstance(attribute, Dispatcher))
            yield value


def _describe(value: Any) -> str:
    """Return a text that is the same in all processes and differs between unequal constants."""
    match value:
        case None | bool() | int() | float() | complex() | str() | bytes() | slice() | range() | np.generic():
            return f"{type(value).__name__} {value!r}"
        case np.ndarray():
            return f"array {value.dtype} {value.shape} {value.tobytes().hex()}"
        case Mapping():
            return f"{{{', '.join(sorted(f'{_describe(k)}: {_describe(v)}' for k, v in value.items()))}}}"
        case tuple() | list():
            return f"({', '.join(map(_describe, value))})"
        case set() | frozenset():
            return f"{{{', '.join(sorted(map(_describe, value)))}}}"
        case ModuleType():
            return value.__name__
        case _:
            return f"{type(value).__module__}.{type(value).__qualname__}"
