"""Finds the members of zip and tar archives, to be read in place: nothing is extracted.

An archive that two readers could understand differently is refused: names are unique, every member
lies uncompressed in bytes of its own, and what stands beside a zip member agrees with the
directory. Formats: PKWARE APPNOTE.TXT 6.3.10 (zip), POSIX.1-2001 pax (tar).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ...errors import ConversionError, printable
from ..checkpoint import SourceFile

_MAX_DIRECTORY = 64 << 20
# bits of a member's flags
_ENCRYPTED = 1 << 0
_SIZES_FOLLOW = 1 << 3
_UTF8 = 1 << 11
# the real value stands in a zip64 field
_MAX32 = 0xFFFFFFFF
_MAX16 = 0xFFFF
_BLOCK = 512  # of a tar


@dataclass(frozen=True)
class Member:
    """Where a member's bytes are; `crc32` is 0 where none was computed."""

    name: str
    offset: int
    size: int
    crc32: int = 0


def zip_members(file: SourceFile) -> dict[str, Member]:
    """Name -> member, in the order of the directory.

    Raises:
        ConversionError: the archive is damaged, ambiguous, compressed or encrypted, or a name leads
            out of it.
    """
    try:
        members, start = _read_directory(file)
    except struct.error:
        raise ConversionError(
            f"{file.path}: damaged zip archive (its directory is cut); is it truncated?"
        ) from None
    found: dict[str, Member] = {}
    end = 0
    for at, member in sorted(members, key=lambda entry: entry[0]):
        if at < end or (at and not found):
            problem = "overlaps another member" if found else "does not begin the file"
            raise _damaged(file, f"`{printable(member.name)}` {problem}")
        if member.name in found:
            raise ConversionError(
                f"{file.path}: the zip archive has `{printable(member.name)}` twice"
            )
        found[member.name] = member
        end = member.offset + member.size
    if end > start:
        raise _damaged(file, "a member reaches into the directory")
    return {member.name: member for _, member in members}


def _damaged(file: SourceFile, problem: str) -> ConversionError:
    return ConversionError(f"{file.path}: damaged zip archive ({problem}); is it truncated?")


def _read_directory(file: SourceFile) -> tuple[list[tuple[int, Member]], int]:
    """The members, each with where its local header begins; and where the directory begins."""
    count, start, size = _find_directory(file)
    if size > _MAX_DIRECTORY:
        raise ConversionError(
            f"{file.path}: the directory of the zip archive has {size} bytes, too many for one"
        )
    directory = file.read(start, size)
    at = 0
    members = []
    for _ in range(count):
        entry = struct.unpack_from("<4s6H3I5H2I", directory, at)
        name_length, extra_length, comment_length = entry[10:13]
        name_at = at + 46
        extra_at = name_at + name_length
        at = extra_at + extra_length + comment_length
        if entry[0] != b"PK\x01\x02":
            raise _damaged(file, "its directory is no directory")
        name = directory[name_at:extra_at]
        extra = directory[extra_at : extra_at + extra_length]
        members.append(_member(file, entry, name, extra))
    if at != size:
        raise _damaged(file, "its directory has more entries than it says")
    return members, start


def _find_directory(file: SourceFile) -> tuple[int, int, int]:
    """(number of members, offset, size) of the directory, which must end where its end record
    begins."""
    tail_at = max(0, file.size - 22 - _MAX16)
    tail = file.read(tail_at, file.size - tail_at)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0:
        raise _damaged(file, "its directory is missing")
    disk, start_disk, _, count, size, start, comment = struct.unpack_from("<4H2IH", tail, at + 4)
    record = tail_at + at
    if tail[max(0, at - 20) :][:4] == b"PK\x06\x07":
        _, record, disks = struct.unpack_from("<IQI", tail, at - 16)
        left = max(0, file.size - record)
        fields = struct.unpack_from("<4sQ2H2I4Q", file.read(record, min(56, left)))
        if fields[0] != b"PK\x06\x06" or disks > 1:
            raise _damaged(file, "its zip64 end record is missing")
        disk, start_disk, _, count, size, start = fields[4:]
    if disk or start_disk or at + 22 + comment != len(tail) or start + size != record:
        raise _damaged(file, "its directory is not where it should be")
    return count, start, size


def _member(
    file: SourceFile, entry: tuple[int, ...], raw: bytes, extra: bytes
) -> tuple[int, Member]:
    """Check one entry of the directory against the member itself."""
    flags = entry[3]
    method = entry[4]
    crc32 = entry[7]
    stored, size, offset = _sizes(entry, extra)
    try:
        name = raw.decode("utf-8" if flags & _UTF8 else "ascii")
    except UnicodeDecodeError:
        raise _damaged(file, f"a name {raw[:40]!r} that is no text") from None
    shown = printable(name)
    if not name.isprintable() or "\\" in name or {"..", ".", ""} & set(name.split("/")):
        raise ConversionError(
            f"{file.path}: the zip archive has a member `{shown}`, which is not a plain name"
        )
    if flags & _ENCRYPTED or method or stored != size:
        raise ConversionError(
            f"{file.path}: `{shown}` is compressed or encrypted, which PyTorch never does;"
            " unpack it"
        )
    header = file.read(offset, min(30 + len(raw), max(30, file.size - offset)))
    local = struct.unpack_from("<4s5H3I2H", header)
    if (
        local[0] != b"PK\x03\x04"
        or local[9] != len(raw)
        or header[30:] != raw
        or (local[2], local[3]) != (flags, method)
    ):
        raise ConversionError(f"{file.path}: the zip directory and the member `{shown}` disagree")
    if not flags & _SIZES_FOLLOW and not {local[7], local[8]} <= {size, _MAX32}:
        raise ConversionError(
            f"{file.path}: the zip directory and the member `{shown}` disagree about its size"
        )
    name_size = local[9]
    extra_size = local[10]
    begin = offset + 30 + name_size + extra_size
    return offset, Member(name, begin, size, crc32)


def _sizes(entry: tuple[int, ...], extra: bytes) -> tuple[int, int, int]:
    """(stored size, size, offset) of an entry.

    Each that does not fit into 32 bits stands in the zip64 field.
    """
    size = entry[9]
    stored = entry[8]
    offset = entry[16]
    wide = b""
    while len(extra) >= 4:
        tag, length = struct.unpack_from("<HH", extra)
        wide = extra[4 : 4 + length] if tag == 1 else wide
        extra = extra[4 + length :]
    values = []
    for value in (size, stored, offset):
        if value == _MAX32:
            value = struct.unpack_from("<Q", wide)[0]
            wide = wide[8:]
        values.append(value)
    return values[1], values[0], values[2]


def tar_members(file: SourceFile) -> dict[str, Member]:
    """Name -> member of a tar archive that holds plain files only.

    Raises:
        ConversionError: the archive is damaged or ambiguous, or has a link or another special
            member.
    """
    found: dict[str, Member] = {}
    at = 0
    while at + _BLOCK <= file.size and any(header := file.read(at, _BLOCK)):
        name, kind, size = _tar_header(file, header)
        if kind == b"x":
            _check_pax(file, file.read(at + _BLOCK, min(size, _BLOCK)))
        elif kind not in b"0\0":
            raise ConversionError(
                f"{file.path}: the tar archive has `{printable(name)}`, a link or a special file"
            )
        elif name in found:
            raise ConversionError(f"{file.path}: the tar archive has `{printable(name)}` twice")
        else:
            found[name] = Member(name, at + _BLOCK, size)
        blocks = -(-size // _BLOCK)
        at += _BLOCK + blocks * _BLOCK
    if at > file.size:
        raise ConversionError(f"{file.path}: the tar archive is truncated")
    return found


def _tar_header(file: SourceFile, header: bytes) -> tuple[str, bytes, int]:
    """(name, kind, size) of a member."""
    try:
        size = _octal(header[124:136])
        checksum = _octal(header[148:156])
    except ValueError:
        size = -1
        checksum = -1
    with_blank_checksum = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
    if size < 0 or checksum != with_blank_checksum:
        raise ConversionError(
            f"{file.path}: the tar archive is damaged (a header does not match its checksum)"
        )
    name = header[:100].partition(b"\0")[0].decode("latin-1")
    return name, header[156:157], size


def _octal(field: bytes) -> int:
    """A number of a tar header; an empty field is 0."""
    return int(field.strip(b"\0 ") or b"0", 8)


def _check_pax(file: SourceFile, records: bytes) -> None:
    """Extended records may hold times, as PyTorch wrote them.

    Another name, size or link for the next member they may not.
    """
    if (
        any(word in records for word in (b"path=", b"size=", b"GNU.sparse"))
        or len(records) == _BLOCK
    ):
        raise ConversionError(
            f"{file.path}: the tar archive renames or resizes a member, which PyTorch never does"
        )
