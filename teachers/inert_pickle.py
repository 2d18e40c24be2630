"""Reading a pickle as data: nothing that the file names is imported or called.

A pickle is a program for a small stack machine. :func:`read` runs the instructions of protocol 4 that only build data,
and wherever the program would import or call something it writes down a :class:`Record` of what was asked for. Whoever
reads the result decides what a record means. Globals outside the caller's list, and every other instruction, are refused.
"""

import pickletools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

# Instructions that put their argument, or this constant, on the stack.
PUSH_ARGUMENT = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
    "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
}  # fmt: skip
PUSH_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
PUSH_NEW = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": list}  # a set's elements are not hashed either
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
IGNORED = {"PROTO", "FRAME"}
# What a key of a dictionary may be. Hashing nested tuples takes exponential time.
KEYS = str | int | float | bool | None
MAX_INSTRUCTIONS = 1_000_000  # a file of a thousand tensors has 40,000
MAX_TUPLES = 8  # inside each other; torch.save writes 2


class PickleRefused(ValueError):
    """The file is not a pickle, is damaged, or asks for something that is not allowed."""


@dataclass(eq=False)
class Record:
    """An object that the pickle wanted made: by calling the global ``name`` with ``args``, or the bare global itself.

    ``state`` is what would have been given to ``__setstate__``, ``items`` and ``elements`` what was stored in it as in a
    dictionary or a list.
    """

    name: str
    args: tuple | None = None  # None: the bare global
    state: Any = None
    items: dict = field(default_factory=dict)
    elements: list = field(default_factory=list)


MARK = object()


class Reader:
    """The stack machine."""

    def __init__(self, allowed: Collection[str], where: str):
        self.allowed, self.where = allowed, where
        self.stack: list = []
        self.memo: dict[int, Any] = {}

    def refuse(self, why: str) -> PickleRefused:
        return PickleRefused(f"{self.where} {why}")

    def run(self, data: bytes) -> Any:
        try:
            for instruction, argument in instructions(data):
                if instruction.name == "STOP":
                    return self.pop()
                self.step(instruction.name, argument)
        except PickleRefused:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise self.refuse(f"is not a readable pickle (truncated or corrupt): {error}") from None
        raise self.refuse("is not a readable pickle (truncated): it has no end")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in IGNORED:
            return
        if name in PUSH_ARGUMENT:
            stack.append(argument)
        elif name in PUSH_CONSTANT:
            stack.append(PUSH_CONSTANT[name])
        elif name in PUSH_NEW:
            stack.append(PUSH_NEW[name]())
        elif name == "MARK":
            stack.append(MARK)
        elif name in TUPLES:
            stack.append(tuple(reversed([self.pop() for _ in range(TUPLES[name])])))
        elif name == "TUPLE":
            stack.append(tuple(self.pop_to_mark()))
        elif name == "STACK_GLOBAL":
            stack.append(self.find())
        elif name in ("REDUCE", "NEWOBJ"):
            self.make()
        elif name == "BUILD":
            state = self.pop()
            self.record(stack[-1]).state = state
        elif name in ("SETITEM", "SETITEMS"):
            self.set_items([self.pop(), self.pop()][::-1] if name == "SETITEM" else self.pop_to_mark())
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            values = [self.pop()] if name == "APPEND" else self.pop_to_mark()
            target = stack[-1]
            (target if isinstance(target, list) else self.record(target).elements).extend(values)
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        else:
            raise self.refuse(f"uses the pickle instruction {name}, which model files do not need")

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is MARK:
            raise IndexError("an operand is missing")
        return value

    def pop_to_mark(self) -> list:
        values = []
        while (value := self.stack.pop()) is not MARK:
            values.append(value)
        return values[::-1]

    def record(self, value: Any) -> Record:
        if not isinstance(value, Record):
            raise TypeError(f"{type(value).__name__} cannot be filled")
        return value

    def find(self) -> Record:
        """The bare global whose module and name are on the stack."""
        name, module = self.pop(), self.pop()
        full = f"{module}.{name}"
        if full not in self.allowed:
            raise self.refuse(f"asks for the global {full[:200]}, which is not one that model files of this kind need")
        return Record(full)

    def make(self) -> None:
        args, function = self.pop(), self.record(self.pop())
        if function.args is not None or not isinstance(args, tuple):
            raise TypeError("a call of what is not a global")
        self.stack.append(Record(function.name, args))

    def set_items(self, values: list) -> None:
        target = self.stack[-1]
        items = target if isinstance(target, dict) else self.record(target).items
        for key, value in zip(values[::2], values[1::2], strict=True):
            if not isinstance(key, KEYS):
                raise TypeError(f"a dictionary key of type {type(key).__name__}")
            items[key] = value


def instructions(data: bytes | BinaryIO) -> Iterator[tuple[pickletools.OpcodeInfo, Any]]:
    """The instructions of a pickle with their arguments.

    Raises:
        ValueError: one that is not known, or more of them than any model has.
    """
    for number, (instruction, argument, _) in enumerate(pickletools.genops(data)):
        if number == MAX_INSTRUCTIONS:
            raise ValueError(f"it has more than {MAX_INSTRUCTIONS:,} instructions")
        yield instruction, argument


def check_tuples(data: bytes | BinaryIO) -> None:
    """Go through one pickle of any protocol without making anything, looking for tuples in tuples: hashing them takes other
    readers exponential time.

    Raises:
        ValueError: tuples more than ``MAX_TUPLES`` deep, or what is not a pickle; one sentence.
    """
    try:
        follow_tuples(data)
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"it is not a readable pickle (truncated or corrupt): {error}") from None


def follow_tuples(data: bytes | BinaryIO) -> None:
    stack: list = []  # of each value: how many tuples are inside each other
    memo: dict[int, int] = {}
    for instruction, argument in instructions(data):
        name, before = instruction.name, instruction.stack_before
        if name in ("MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
            continue
        operands = []
        if pickletools.markobject in before:
            while (top := stack.pop()) is not MARK:
                operands.append(top)
            before = before[: before.index(pickletools.markobject)]
        operands += [stack.pop() for _ in before]
        depth = 0
        if "TUPLE" in name:
            depth = 1 + max((operand for operand in operands if operand is not MARK), default=0)
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            depth = memo[argument]
        elif name == "DUP":
            depth = operands[0]
        if depth > MAX_TUPLES:
            raise ValueError(f"it has tuples that are more than {MAX_TUPLES} deep")
        stack += [MARK] if name == "MARK" else [depth] * len(instruction.stack_after)


def read(path: str | Path, allowed: Collection[str]) -> Any:
    """The object in a pickle file: numbers, strings, bytes, tuples, lists and dictionaries, the rest as records.

    Args:
        allowed: the globals, ``"module.name"``, that the file may ask for. None of them is imported.

    Raises:
        FileNotFoundError: no such file.
        PickleRefused: it is damaged, or asks for something else; one sentence that names it.
    """
    return Reader(allowed, str(path)).run(Path(path).read_bytes())
