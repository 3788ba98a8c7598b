"""Which lines of code belong to which route: from the functions and classes that a framework calls for it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType, MethodType
from typing import Any

from oomsafe.policy.probe import Endpoint

#: How many wrappers around a function are looked through.
DEPTH = 16

#: Functions of one endpoint, at most: a class has one for each method.
FUNCTIONS = 64


def endpoints_of(pairs: Iterable[tuple[Any, str]]) -> list[Endpoint]:
    """The endpoints, given what is called for each route: a function, a method, a partial, a class or an instance of one."""
    found: dict[Endpoint, None] = {}
    for called, route in pairs:
        for function in _functions(called):
            first, last = _lines(function.__code__)
            method = route.partition(" ")[0].lower()
            # of a class, get() serves GET and nothing else
            if isinstance(called, FunctionType) or function.__name__ not in _METHODS or function.__name__ == method:
                found[Endpoint(function.__code__.co_filename, first, last, route)] = None
    return list(found)


_METHODS = frozenset({"get", "post", "put", "patch", "delete", "head", "options", "trace"})


def _functions(called: Any) -> Iterator[FunctionType]:
    """The functions that may run when `called` is called: without the wrappers around them, which serve other routes, too."""
    for _ in range(DEPTH):
        if isinstance(called, functools.partial):
            called = called.func
        elif isinstance(called, MethodType):
            called = called.__func__
        else:
            inner = inspect.getattr_static(called, "__wrapped__", None)
            if inner is None:
                break
            called = inner
    made_of = getattr(called, "view_class", None) or getattr(called, "cls", None) if isinstance(called, FunctionType) else None
    if isinstance(made_of, type):
        called = made_of
    if isinstance(called, FunctionType):
        yield called
        return
    kind = called if isinstance(called, type) else type(called)
    number = 0
    for base in kind.__mro__:
        if base.__module__ == kind.__module__:  # what it inherits from a framework serves other routes, too
            for member in list(vars(base).values()):
                function = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
                if isinstance(function, FunctionType) and number < FUNCTIONS:
                    number += 1
                    yield from [inner for inner in [inspect.unwrap(function)] if isinstance(inner, FunctionType)]


def _lines(code: CodeType) -> tuple[int, int]:
    """The first and the last line, of the functions inside of it, too."""
    lines = [line for _, _, line in code.co_lines() if line is not None]
    inner = [_lines(const) for const in code.co_consts if isinstance(const, CodeType)]
    return min([code.co_firstlineno, *lines]), max([code.co_firstlineno, *lines, *(last for _, last in inner)])
