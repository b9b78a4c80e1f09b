"""The weights of an ONNX file, read as data: no package `onnx`, and nothing of the network is run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from zoo.errors import CheckpointFileError

if TYPE_CHECKING:
    from torch import Tensor

_FLOAT32 = 1


def read_onnx(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Weights of a model, and which matrix each product takes; exporters often keep a matrix without its name.

    Returns:
        float32 initialisers by name; and, by the name of each MatMul node, the name of its second factor.

    Raises:
        CheckpointFileError: no whole ONNX model.
    """
    try:
        return _read(memoryview(content))
    except (IndexError, KeyError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        raise CheckpointFileError(f"these {len(content):,} bytes are no whole ONNX model: {error!r}") from error


def _read(data: memoryview) -> tuple[dict[str, Tensor], dict[str, str]]:
    import torch

    graph = next(value for number, value in _fields(data) if number == 7)
    tensors: dict[str, Tensor] = {}
    factors: dict[str, str] = {}
    for number, part in _fields(_message(graph)):
        if number == 5:  # a tensor: 1 lengths (packed or one by one), 2 type, 8 name, 9 bytes
            held = list(_fields(_message(part)))
            last = dict(held)
            if last.get(2) == _FLOAT32 and 9 in last:
                shape = [length for n, value in held if n == 1 for length in _integers(value)]
                flat = torch.frombuffer(bytearray(_message(last[9])), dtype=torch.float32)
                tensors[_text(last[8])] = flat.reshape(shape)
        elif number == 1:  # a node: 1 inputs, 3 name, 4 kind
            held = list(_fields(_message(part)))
            last = dict(held)
            if 4 in last and _text(last[4]) == "MatMul":
                factors[_text(last[3])] = [_text(value) for n, value in held if n == 1][1]
    return tensors, factors


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of a protobuf message: integers, or the bytes of anything else."""
    place = 0
    while place < len(data):
        key, place = _integer(data, place)
        if key & 7 == 0:
            value, place = _integer(data, place)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            size, place = _integer(data, place)
        else:
            size = {1: 8, 5: 4}[key & 7]
        if place + size > len(data):
            raise ValueError(f"a field of {size} bytes at {place} goes beyond the end")
        yield key >> 3, data[place : place + size]
        place += size


def _integer(data: memoryview, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, lowest first, and the place behind it."""
    value = shift = 0
    while True:
        byte = data[place]
        place, value, shift = place + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, place


def _integers(value: int | memoryview) -> list[int]:
    if isinstance(value, int):
        return [value]
    found, place = [], 0
    while place < len(value):
        number, place = _integer(value, place)
        found.append(number)
    return found


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise TypeError("a number where a message should be")
    return value


def _text(value: int | memoryview) -> str:
    return str(_message(value), "utf-8")
