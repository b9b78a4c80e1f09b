"""Weights out of ONNX files, checked on messages encoded here by the format's own rules."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
import torch

from zoo.errors import CheckpointFileError
from zoo.hub.onnx_reader import read_onnx


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value)


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def tensor(name: str, values: Sequence[float], shape: Sequence[int], *, packed: bool = False, kind: int = 1) -> bytes:
    lengths = message(1, b"".join(map(varint, shape))) if packed else b"".join(number(1, length) for length in shape)
    raw = struct.pack(f"<{len(values)}f", *values)
    return message(5, lengths + number(2, kind) + message(8, name.encode()) + message(9, raw))


def node(name: str, kind: str, inputs: Sequence[str]) -> bytes:
    given = b"".join(message(1, one.encode()) for one in inputs)
    return message(1, given + message(2, b"out") + message(3, name.encode()) + message(4, kind.encode()))


VALUES = [0.5 * i for i in range(300)]
GRAPH = b"".join(
    [
        node("/layer/MatMul", "MatMul", ["x", "onnx::MatMul_1"]),
        node("/layer/Add", "Add", ["y", "bias"]),
        message(2, b"graph name"),
        tensor("onnx::MatMul_1", VALUES, (150, 2)),
        tensor("bias", VALUES[:4], (4,), packed=True),
        tensor("whole numbers", VALUES[:2], (1,), kind=7),
    ]
)
MODEL = number(1, 8) + message(2, b"exporter") + varint(9 << 3 | 1) + bytes(8) + message(7, GRAPH)


def test_tensors_and_factors() -> None:
    tensors, factors = read_onnx(MODEL)
    assert factors == {"/layer/MatMul": "onnx::MatMul_1"}
    assert set(tensors) == {"onnx::MatMul_1", "bias"}  # float32 alone
    assert torch.equal(tensors["onnx::MatMul_1"], torch.tensor(VALUES).reshape(150, 2))
    assert torch.equal(tensors["bias"], torch.tensor(VALUES[:4]))


@pytest.mark.parametrize("content", [b"", MODEL[:-1], MODEL[: len(MODEL) // 2], b"PK\x03\x04 a zip file", MODEL[:1]])
def test_anything_else_is_refused(content: bytes) -> None:
    with pytest.raises(CheckpointFileError, match="no whole ONNX model"):
        read_onnx(content)


def test_a_shape_that_does_not_fit_the_bytes_is_refused() -> None:
    with pytest.raises(CheckpointFileError):
        read_onnx(message(7, tensor("w", VALUES[:3], (2, 2))))
