"""What passes through the page cache leaves it, and nothing that was in it before."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from weightport.converters.readers.safetensors import read_safetensors
from weightport.converters.writers.safetensors import Output, write_safetensors
from weightport.io import behind
from weightport.io.behind import ReadBehind, Together, WriteBehind

MB = 1 << 20
_fdatasync = os.fdatasync
Advice = list[tuple[int, int]]


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> Advice:
    """The ranges that were told to leave: the first time they begin their way to the disk."""
    ranges: Advice = []
    monkeypatch.setattr(behind, "_send_or_leave", lambda _, *place: ranges.append(place))
    return ranges


@pytest.fixture
def absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of 10 MB that is not in the page cache."""
    monkeypatch.setattr(os, "fdatasync", _fdatasync)  # tests do without it, as a rule
    path = tmp_path / "absent"
    with path.open("wb") as file:
        file.write(bytes(10 * MB))
        file.flush()
        os.fdatasync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not missing(path):
        pytest.skip("files of this file system cannot leave the memory")
    return path


def missing(path: Path) -> list[int]:
    """Which pieces of a file are not in memory."""
    descriptor = os.open(path, os.O_RDONLY)
    starts = behind._not_cached(descriptor, path.stat().st_size, 2 * MB)
    os.close(descriptor)
    return [start // (2 * MB) for start in starts]


def test_what_is_written_is_sent_once_and_leaves_later(tmp_path: Path, advised: Advice) -> None:
    with (tmp_path / "file").open("wb") as file:
        follower = WriteBehind(file.fileno())
        for end in range(0, 200 * MB, 3 * MB):
            follower.follow(end)
        follower.finish()
    *steps, last = advised
    sent = [place for number, place in enumerate(steps) if place not in steps[:number]]
    assert sent == [(start * MB, 8 * MB) for start in range(0, 192, 8)]
    left = [place for number, place in enumerate(steps) if place in steps[:number]]
    assert left == sent[: len(left)]
    assert len(sent) - len(left) == 64 // 8
    assert last == (0, 0)


@pytest.mark.parametrize(("waits", "sends"), [(False, 4), (True, 12)])
def test_who_does_not_wait_leaves_a_slow_disk_to_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool, sends: int
) -> None:
    now = 0.0
    sent = []

    def send(_: int, start: int, nbytes: int) -> None:
        nonlocal now
        now += nbytes / (60 * MB)
        sent.append(start)

    monkeypatch.setattr(behind, "_send_or_leave", send)
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    with (tmp_path / "file").open("wb") as file:
        WriteBehind(file.fileno(), waits=waits).follow(64 * MB + 8 * 4 * MB)
    assert len(set(sent)) == sends


@pytest.mark.parametrize("waits", [False, True])
def test_a_fast_disk_is_used_by_everybody(tmp_path: Path, advised: Advice, waits: bool) -> None:
    with (tmp_path / "file").open("wb") as file:
        WriteBehind(file.fileno(), waits=waits).follow(800 * MB)
    assert len(set(advised)) == 100


def test_an_output_that_is_on_the_disk_leaves_the_cache(absent: Path) -> None:
    path = absent.with_name("source.safetensors")
    save_file({"x": np.zeros((4, MB), "f4")}, path)
    source = read_safetensors(path).tensors["x"]
    outputs = [Output("x", "F32", source.shape, (source,))]
    for name, sync in (("kept", False), ("left", True)):
        write_safetensors(absent.parent, name, outputs, max_shard_size=1 << 40, sync=sync)
    assert missing(absent.with_name("kept")) == []
    assert len(missing(absent.with_name("left"))) == 9


def test_a_piece_leaves_when_both_have_read_it(absent: Path, advised: Advice) -> None:
    descriptor = os.open(absent, os.O_RDONLY)
    follower = ReadBehind(descriptor, 10 * MB, readers=2)
    assert follower.expects
    follower.passed(0, 3 * MB)  # one reader
    assert advised == []
    follower.passed(0, MB)
    assert advised == []
    follower.passed(MB, 9 * MB)  # the other
    assert advised == [(0, 2 * MB)]
    follower.passed(3 * MB, 7 * MB)
    assert advised == [(start * MB, 2 * MB) for start in (0, 2, 4, 6, 8)]
    assert not follower.expects
    os.close(descriptor)


def test_what_was_in_the_cache_stays_in_it(absent: Path) -> None:
    with absent.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
        os.pread(file.fileno(), 1, 5 * MB)
        there = sorted(set(range(5)) - set(missing(absent)))
        assert 2 in there
        follower = ReadBehind(file.fileno(), 10 * MB, readers=1)
        file.read()
        follower.passed(0, 10 * MB)
    assert missing(absent) == sorted(set(range(5)) - set(there))


@pytest.mark.parametrize(("pieces", "expects"), [(0, False), (1, False), (6, False), (7, True)])
def test_a_few_pieces_that_are_gone_are_not_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int, expects: bool
) -> None:
    monkeypatch.setattr(behind, "_not_cached", lambda *_: [i * 2 * MB for i in range(pieces)])
    with (tmp_path / "file").open("wb+") as file:
        assert ReadBehind(file.fileno(), 192 * MB, readers=2).expects == expects


def test_an_empty_file_has_nothing_to_leave(tmp_path: Path) -> None:
    with (tmp_path / "empty").open("wb+") as file:
        assert not ReadBehind(file.fileno(), 0, readers=2).expects


def waits(call: Callable[[], None]) -> threading.Thread:
    """A call in a thread, which has not come back after a moment."""
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(0.1)
    assert thread.is_alive()
    return thread


def ends(thread: threading.Thread) -> None:
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("first", [0, 1])
def test_who_is_ahead_waits_for_the_other(first: int) -> None:
    together = Together()
    together.advance(first, 32 * MB)
    thread = waits(lambda: together.advance(first, MB))
    together.advance(1 - first, MB)
    ends(thread)
    ends_at_last = waits(lambda: together.advance(first, MB))
    together.part()
    ends(ends_at_last)
    together.advance(first, 100 * MB)


def test_nobody_waits_for_who_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind, "_PATIENCE", 0.05)
    together = Together()
    together.advance(0, 100 * MB)
    together.advance(0, 100 * MB)
