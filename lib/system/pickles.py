"""Pickles of plain values, instruction by instruction: nothing that a file names is imported, and nothing called."""

import pickletools
import re
from dataclasses import dataclass

import numpy as np


class Foreign(ValueError):
    """Something that does not belong in a history."""


class Named(str):
    """A global that a pickle names, as "module name"; never imported."""


SCALARS = ("numpy.core.multiarray scalar", "numpy._core.multiarray scalar")
DTYPE, ENCODE = "numpy dtype", "_codecs encode"  # the latter makes bytes in the protocols 0 to 2
PLAIN = {  # instructions that put down their own argument
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


def unpickle(data: bytes) -> object:
    """What a pickle of lists, dictionaries (of text), tuples, text, numbers and numpy's scalars holds, the latter as
    Python's numbers. Raises Foreign where it holds anything else, and any exception where it is damaged."""
    stack, marks, memo = [], [], {}

    def above_mark() -> list:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    def set_items(pairs: list) -> None:
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) is not str:
                raise Foreign(f"holds a dictionary with a {type(key).__name__} as key")
            dict.__setitem__(stack[-1], key, value)

    for instruction, argument, _ in pickletools.genops(data):
        match instruction.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                (value,) = stack
                return value
            case "MARK":
                marks.append(len(stack))
            case name if name in PLAIN:
                stack.append(argument)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case name if name in EMPTY:
                stack.append(EMPTY[name]())
            case "LIST":
                stack.append(above_mark())
            case "TUPLE":
                stack.append(tuple(above_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                n = int(name[-1])
                stack[-n:] = [tuple(stack[-n:])]
            case "DICT":
                pairs = above_mark()
                stack.append({})
                set_items(pairs)
            case "APPEND":
                value = stack.pop()
                list.append(stack[-1], value)
            case "APPENDS":
                values = above_mark()
                list.extend(stack[-1], values)
            case "SETITEM":
                pair = stack[-2:]
                del stack[-2:]
                set_items(pair)
            case "SETITEMS":
                set_items(above_mark())
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_named(argument))
            case "STACK_GLOBAL":
                name = f"{stack[-2]} {stack[-1]}"
                stack[-2:] = [_named(name)]
            case "REDUCE":
                named, arguments = stack[-2:]
                stack[-2:] = [_made(named, *arguments)]
            case "BUILD":  # the byte order of a dtype, | where there is none
                _, order, *_ = stack.pop()
                stack[-1] = _Dtype(stack[-1].code, {"<": "<", ">": ">", "|": "="}[order])
            case name:
                raise Foreign(f"has the instruction {name}")
    raise EOFError


@dataclass(frozen=True)
class _Dtype:
    """One of numpy's types of numbers."""

    code: str
    order: str = "="


def _named(name: str) -> Named:
    if name not in (*SCALARS, DTYPE, ENCODE):
        raise Foreign(f"names {name[:60]!r}")
    return Named(name)


def _made(named: Named, first: object, *rest: object) -> object:
    """What a pickle would have the global `named` make of its arguments."""
    if type(named) is not Named:
        raise Foreign(f"calls a {type(named).__name__}")
    if named == ENCODE:
        return first.encode("latin1")
    if named == DTYPE:
        if not re.fullmatch("b1|[iu][1248]|f[248]", first):
            raise Foreign(f"holds a value of numpy's type {first[:20]!r}")
        return _Dtype(first)
    (data,) = rest
    (value,) = np.frombuffer(data, np.dtype(first.order + first.code)).tolist()
    return value
