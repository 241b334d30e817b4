"""Sources are hashed near those who read them where they come from the disk, and never wait for
ever."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import weightport
from weightport.converters import checkpoint, hashing
from weightport.converters.checkpoint import SourceFile
from weightport.io import behind

SIZE = 8 << 20
APART = 2 << 20
PIECE = 1 << 18


@pytest.fixture
def file(tmp_path: Path) -> SourceFile:
    path = tmp_path / "source"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return SourceFile(path)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where each piece that is hashed ends."""
    ends = []
    read_into = SourceFile.read_into

    def seen(self: SourceFile, offset: int, buffer: memoryview) -> None:
        read_into(self, offset, buffer)
        ends.append(offset + len(buffer))

    monkeypatch.setattr(SourceFile, "read_into", seen)
    monkeypatch.setattr(behind, "_APART", APART)
    return ends


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """No file is in the page cache, as far as anybody knows."""

    def whole(descriptor: int, size: int, piece: int) -> list[int]:
        return list(range(0, size, piece))

    monkeypatch.setattr(behind, "_not_cached", whole)


def reached(ends: list[int], least: int) -> int:
    """How far hashing came, once it came so far and had time to go on."""
    deadline = time.monotonic() + 20
    while max(ends, default=0) < least and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    return max(ends)


@pytest.mark.usefixtures("on_disk")
def test_hashing_stays_near_who_reads(file: SourceFile, hashed: list[int]) -> None:
    expected = hashlib.sha256(file.path.read_bytes()).hexdigest()
    file.pass_through(readers=2)
    hashing.hash_beside_readers([file])
    assert reached(hashed, APART) == APART + PIECE
    file.take(0, 2 * PIECE)
    further = APART + 2 * PIECE
    assert reached(hashed, further) == further + PIECE
    assert file.sha256() == expected
    assert sorted(hashed)[-1] == SIZE


@pytest.mark.usefixtures("on_disk")
def test_who_reads_stays_near_hashing(file: SourceFile, hashed: list[int]) -> None:
    file.pass_through(readers=2)
    hashing.hash_beside_readers([file])
    for offset in range(0, SIZE, PIECE):
        file.take(offset, PIECE)
        assert max(hashed, default=0) >= offset + PIECE - APART


@pytest.mark.usefixtures("on_disk")
def test_hashing_does_not_wait_for_nobody(
    file: SourceFile, hashed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behind, "_PATIENCE", 0.05)
    file.pass_through(readers=2)
    hashing.hash_beside_readers([file])
    assert reached(hashed, SIZE) == SIZE


def test_what_is_in_the_cache_is_hashed_at_once(file: SourceFile, hashed: list[int]) -> None:
    file.pass_through(readers=2)
    hashing.hash_beside_readers([file])
    assert reached(hashed, SIZE) == SIZE


@pytest.mark.parametrize(("hashes", "readers"), [(True, 2), (False, 1)])
def test_a_file_of_many_parts_is_followed_once(
    hashes: bool,
    readers: int,
    original_of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = original_of("sd1")
    followed = []
    monkeypatch.setattr(SourceFile, "pass_through", lambda self, readers: followed.append(readers))
    weightport.convert(source, tmp_path / "repo", hashes=hashes)
    assert followed == [readers]


def test_a_file_is_asked_for_before_it_is_hashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(checkpoint, "fetch", lambda _, *place: asked.append(place))
    (tmp_path / "file").write_bytes(bytes(9 << 20))
    SourceFile(tmp_path / "file").sha256()
    assert asked == [(place << 20, 4 << 20) for place in (4, 8, 12)]
