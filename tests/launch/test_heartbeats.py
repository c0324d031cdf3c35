"""Signs of life: what a reader sees of a writer, and from when on silence is a hang."""

import time

from shoestring.launch import heartbeats
from shoestring.launch.heartbeats import Heartbeat, Watcher, behind, forget, read


def test_what_a_rank_says_is_what_is_read(tmp_path):
    assert read(tmp_path, 3) is None
    beat = Heartbeat(tmp_path, 3)
    assert str(read(tmp_path, 3)) == "start"
    beat("data", 12)
    beat("forward and backward")
    beat("")
    found = read(tmp_path, 3)
    assert (found.rank, found.step, found.phase, found.count, str(found)) == (
        3,
        12,
        "forward and backward",
        4,
        "step 12, forward and backward",
    )
    (tmp_path / heartbeats.FOLDER / "rank_3").write_bytes(b"half")
    assert read(tmp_path, 3) is None
    forget(tmp_path)
    assert not list((tmp_path / heartbeats.FOLDER).iterdir())


def test_silence_counts_from_the_last_change_on_the_readers_clock(tmp_path, monkeypatch):
    now = [100.0]
    watcher, first, second = Watcher(tmp_path, 3, clock=lambda: now[0]), Heartbeat(tmp_path, 0), Heartbeat(tmp_path, 1)

    def after(seconds):
        now[0] += seconds
        watcher.look()
        return watcher.hanging(10)

    assert after(0) == [] and after(500) == [], "a start takes as long as it takes, and rank 2 has not begun at all"
    first("data", 1), second("data", 1)
    assert after(0) == []
    monkeypatch.setattr(time, "time", lambda: 1e12)  # a wall clock that jumps
    first("reduce")
    assert after(9) == [] and after(9) == [1]
    second("data")  # the same phase once more is a sign of life
    assert after(5) == [0]
    first("checkpoint"), second("end")
    assert after(0) == [] and after(1700) == [], "a checkpoint may take long"
    assert after(200) == [0]


def test_who_is_behind(tmp_path):
    watcher, beats = Watcher(tmp_path, 3), [Heartbeat(tmp_path, rank) for rank in range(3)]

    def seen(*places):
        for beat, (step, phase) in zip(beats, places):
            beat(phase, step)
        watcher.look()
        return behind(watcher.beats)

    assert seen((4, "reduce"), (4, "data"), (4, "reduce")) == [1]
    assert seen((4, "update"), (5, "data"), (5, "reduce")) == [0]
    assert seen((5, "reduce"), (5, "reduce"), (5, "reduce")) == [] and behind({}) == []


def test_a_full_disk_does_not_end_a_rank(tmp_path, monkeypatch):
    beat = Heartbeat(tmp_path, 0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(heartbeats.os, "pwrite", full)
    beat("data", 1)
