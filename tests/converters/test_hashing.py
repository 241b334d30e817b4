"""Sources are hashed near those who read them, and never wait for ever."""

import hashlib
import time
from pathlib import Path

import pytest

from weightport.converters import checkpoint, hashing
from weightport.converters.checkpoint import SourceFile

SIZE = 8 << 20
WINDOW = 2 << 20


@pytest.fixture
def file(tmp_path: Path) -> SourceFile:
    path = tmp_path / "source"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return SourceFile(path)


@pytest.fixture
def hashed(file: SourceFile, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where each piece that is hashed ends."""
    ends = []
    fill = SourceFile._fill

    def seen(self: SourceFile, offset: int, buffer: memoryview) -> None:
        fill(self, offset, buffer)
        ends.append(offset + len(buffer))

    monkeypatch.setattr(SourceFile, "_fill", seen)
    monkeypatch.setattr(hashing, "_WINDOW", WINDOW)
    return ends


def reached(ends: list[int], least: int) -> int:
    """How far hashing came, once it came so far and had time to go on."""
    deadline = time.monotonic() + 20
    while max(ends, default=0) < least and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    return max(ends)


def test_hashing_stays_near_who_reads(file: SourceFile, hashed: list[int]) -> None:
    expected = hashlib.sha256(file.path.read_bytes()).hexdigest()
    hashing.hash_beside_readers([file])
    piece = 1 << 18
    assert WINDOW <= reached(hashed, WINDOW) <= WINDOW + piece
    file.read_into(0, memoryview(bytearray(2 * piece)))
    further = WINDOW + 2 * piece
    assert further <= reached(hashed, further) <= further + piece
    assert file.sha256() == expected
    assert sorted(hashed)[-1] == SIZE


def test_hashing_does_not_wait_for_nobody(
    file: SourceFile, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "_PATIENCE", 0.05)
    hashing.hash_beside_readers([file])
    assert reached(hashed, SIZE) == SIZE


def test_a_file_is_asked_for_before_it_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(checkpoint, "fetch", lambda _, *place: asked.append(place))
    (tmp_path / "file").write_bytes(bytes(9 << 20))
    SourceFile(tmp_path / "file").sha256()
    assert asked == [(place << 20, 4 << 20) for place in (4, 8, 12)]
