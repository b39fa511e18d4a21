"""How many parameters a weight file holds, from its header alone: safetensors and GGUF.

Nothing heavy is imported and no tensor is read, so that the API can ask when a job is submitted.

References:
    [1] The safetensors format. https://huggingface.co/docs/safetensors
    [2] The GGUF format. https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import json
import math
import mmap
import struct
from pathlib import Path

_MAX_HEADER_BYTES = 100_000_000
"""The safetensors library's own bound on a header."""

_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a GGUF value by the number of its type; strings and arrays have a length of their own."""
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def safetensors_parameters(path: Path) -> int:
    """Return the number of parameters in one safetensors file.

    Bytes without a sign hold two 4-bit parameters each: bitsandbytes stores its packed weights so.

    Raises:
        ValueError: the file is not in this format.
    """
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > _MAX_HEADER_BYTES:
            raise ValueError(f"{path.name} is no safetensors file")
        text = file.read(length)
    if len(text) < length:
        raise ValueError(f"{path.name} is cut off")
    header = json.loads(text)
    try:
        return sum(
            math.prod(tensor["shape"]) * (2 if tensor["dtype"] == "U8" else 1)
            for name, tensor in header.items()
            if name != "__metadata__"
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path.name} is no safetensors file") from error


def gguf_parameters(path: Path) -> int:
    """Return the number of parameters in a GGUF file, whatever the precision of each.

    Raises:
        ValueError: the file is not in this format.
    """
    with path.open("rb") as file:
        try:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _gguf_parameters(data)
        except (ValueError, struct.error, IndexError, KeyError) as error:
            raise ValueError(f"{path.name} is no GGUF file of version 2 or 3") from error


def _gguf_parameters(data: mmap.mmap) -> int:
    magic, version, tensors, pairs = struct.unpack_from("<4sIQQ", data)
    if magic != b"GGUF" or version not in {2, 3}:
        raise ValueError
    offset = 24
    for _ in range(pairs):
        offset = _after_string(data, offset)
        (kind,) = struct.unpack_from("<I", data, offset)
        offset = _after_value(data, offset + 4, kind)
    total = 0
    for _ in range(tensors):
        offset = _after_string(data, offset)
        (dimensions,) = struct.unpack_from("<I", data, offset)
        total += math.prod(struct.unpack_from(f"<{dimensions}Q", data, offset + 4))
        offset += 4 + 8 * dimensions + 4 + 8  # their number, the sizes, the type, the place of the data
    return total


def _after_string(data: mmap.mmap, offset: int) -> int:
    (length,) = struct.unpack_from("<Q", data, offset)
    return offset + 8 + int(length)


def _after_value(data: mmap.mmap, offset: int, kind: int) -> int:
    if kind == _GGUF_STRING:
        return _after_string(data, offset)
    if kind != _GGUF_ARRAY:
        return offset + _GGUF_SIZES[kind]
    inner, count = struct.unpack_from("<IQ", data, offset)
    offset += 12
    if inner in _GGUF_SIZES:
        return offset + _GGUF_SIZES[inner] * int(count)
    for _ in range(count):
        offset = _after_value(data, offset, inner)
    return offset
