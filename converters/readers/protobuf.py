"""The protobuf wire format, as much as TensorFlow's checkpoints use: a message becomes its fields,
by number.

Encoding: https://protobuf.dev/programming-guides/encoding. Every length is checked against the
bytes present, and a singular field given twice is refused, since readers disagree on which one
counts.
"""

from __future__ import annotations

from collections.abc import Iterator

Message = dict[int, list[int | bytes]]
_FIXED = {1: 8, 5: 4}  # wire types -> bytes


def varint(data: bytes, at: int) -> tuple[int, int]:
    """The unsigned LEB128 number of at most 64 bits that starts at `at`, and the position after it.

    Raises:
        ValueError: the number is longer than 64 bits, or than the data.
    """
    if at < len(data) and data[at] < 0x80:  # nearly always
        return data[at], at + 1
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(data):
            raise ValueError("a number is cut short")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >> 64:
                break
            return value, at
    raise ValueError("a number is longer than 64 bits")


def parse(data: bytes) -> Message:
    """The fields of one message: number -> values in order (an int, or the bytes of a string or a
    submessage).

    Raises:
        ValueError: the data is not a message, or uses groups (deprecated wire types 3 and 4).
    """
    message: Message = {}
    at = 0
    while at < len(data):
        tag, at = varint(data, at)
        number = tag >> 3
        wire = tag & 7
        value: int | bytes
        if wire == 0:
            value, at = varint(data, at)
        elif wire in (1, 2, 5):
            if wire == 2:
                size, at = varint(data, at)
            else:
                size = _FIXED[wire]
            if size > len(data) - at:
                raise ValueError("a field is longer than its message")
            content = data[at : at + size]
            value = content if wire == 2 else int.from_bytes(content, "little")
            at += size
        else:
            raise ValueError(f"field {number} has wire type {wire}")
        message.setdefault(number, []).append(value)
    return message


def integer(message: Message, number: int) -> int:
    """The singular int64 field `number`; 0 where absent."""
    values = message.get(number)
    if values is None:
        return 0
    value = values[0]
    if len(values) != 1 or not isinstance(value, int):
        raise ValueError(f"field {number} is not one number")
    return value - (1 << 64) if value >> 63 else value


def text(message: Message, number: int) -> str:
    """The singular string field `number`; empty where absent."""
    values = message.get(number, [b""])
    if len(values) != 1 or not isinstance(values[0], bytes):
        raise ValueError(f"field {number} is not one string")
    return values[0].decode()


def submessages(message: Message, number: int) -> Iterator[Message]:
    """The repeated message field `number`, one at a time."""
    for value in message.get(number, []):
        if not isinstance(value, bytes):
            raise ValueError(f"field {number} is not a message")
        yield parse(value)
