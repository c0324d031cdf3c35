"""What ranks without the console write: their last words are there, their files stay small, and thousands do not fill the console."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.launch import exit_codes, launcher, rank_log
from shoestring.launch.environment import Place
from shoestring.launch.rank_log import Bounded, fold

# ---------------------------------------------------------------- folding


def _lines(text: str) -> list[bytes]:
    return text.encode().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("lines", "folded"),
    [
        (["same line"] * 1235, ["same line", "[repeated 1234 times]"]),
        (["a.py:3: UserWarning: x", "  warnings.warn(x)"] * 100,
         ["a.py:3: UserWarning: x", "  warnings.warn(x)", "[the last 2 lines repeated 99 times]"]),
        (["before", *["0123456789"] * 4, "after"], ["before", "0123456789", "[repeated 3 times]", "after"]),
        (["a", "a", "a"], ["a", "a", "a"]),  # the note would be longer
        ([f"step {n}" for n in range(50)], [f"step {n}" for n in range(50)]),
        (["x" * 30, "y" * 30] * 2 + ["y" * 30] * 3,
         ["x" * 30, "y" * 30, "[the last 2 lines repeated 1 times]", "y" * 30, "[repeated 2 times]"]),
        ([], []),
    ],
)  # fmt: skip
def test_lines_that_repeat(lines, folded):
    assert b"".join(fold(_lines("".join(f"{line}\n" for line in lines)))).decode().splitlines() == folded


@given(st.lists(st.sampled_from([b"first warning line\n", b"second, of another length\n", b"c\n"]), max_size=60), st.booleans())
def test_what_is_folded_can_be_unfolded(lines, torn):
    lines = [*lines, b"the last one has no end yet"] if torn else lines
    out: list[bytes] = []
    for line in fold(lines):
        words = line.split()
        if words[0] == b"[repeated":
            out += [out[-1]] * int(words[1])
        elif words[0] == b"[the":
            out += out[-int(words[2]) :] * int(words[5])
        else:
            out.append(line)
    assert out == lines and len(b"".join(fold(lines))) <= len(b"".join(lines))


# ---------------------------------------------------------------- a file's size


def _file(tmp_path, **kwargs):
    path = tmp_path / "log"
    path.touch()
    return path, Bounded(path, **kwargs), os.open(path, os.O_WRONLY | os.O_APPEND)


def test_a_file_keeps_its_head_and_its_latest_words(tmp_path):
    path, bounded, writer = _file(tmp_path, cap=10_000, batch=1_000)
    written = [f"{n:06d} {random.Random(n).random()}\n" for n in range(5_000)]
    for n, line in enumerate(written):
        os.write(writer, line.encode())
        if n % 7 == 0:
            bounded.tend()
            assert path.stat().st_size <= 10_000
    text = path.read_text()
    head, told, tail = text.partition("[")
    count, _, tail = tail.partition(" bytes left out]\n")
    assert "".join(written).startswith(head) and len(head) > 4_900 and "".join(written).endswith(tail) and len(tail) > 2_000
    assert told and "[" not in tail
    lost = len("".join(written)) - len(head) - len(tail)
    assert lost <= int(count) < lost + 40 * 200  # and the notes of earlier cuts


def test_a_flood_is_folded_by_its_ends(tmp_path):
    path, bounded, writer = _file(tmp_path, cap=10_000, batch=1_000)
    os.write(writer, b"begin\n" + b"the same again\n" * 100_000 + b"end\n")
    bounded.tend()
    text = path.read_text()
    assert len(text) < 200 and text.startswith("begin\nthe same again\n[repeated ") and text.endswith("end\n")
    assert " bytes left out]\n" in text


def test_small_files_and_files_without_repeats_are_as_they_were_written(tmp_path):
    path, bounded, writer = _file(tmp_path, cap=10_000, batch=1_000)
    os.write(writer, b"the same again\n" * 20)
    bounded.tend()
    assert path.read_bytes() == b"the same again\n" * 20
    text = "".join(f"line {n}\n" for n in range(200)).encode()
    os.ftruncate(writer, 0), os.write(writer, text)
    bounded.tend()
    assert path.read_bytes() == text


def test_what_is_written_meanwhile_stays(tmp_path, monkeypatch):
    """A line comes while what was read is being folded, and another while that one is being copied."""
    path, bounded, writer = _file(tmp_path, cap=100_000, batch=10_000)
    os.write(writer, b"again and again\n" * 1_000)
    late, pwrite = [b"late\n", b"later\n"], os.pwrite

    def slow(fd, data, at):
        if late:
            os.write(writer, late.pop(0))
        return pwrite(fd, data, at)

    monkeypatch.setattr(os, "pwrite", slow)
    bounded.tend()
    assert path.read_bytes() == b"again and again\n[repeated 999 times]\nlate\nlater\n"


# ---------------------------------------------------------------- real ranks


def _chatty(config, logs):
    """Rank 1 prints in a loop until its file has been cut, then from C, and is killed."""
    if Place.from_environment().rank == 1:
        path, until = logs / "rank_1.stderr", time.monotonic() + 20
        print("first words", file=sys.stderr)
        n = 0
        while " bytes left out]" not in path.read_text() and time.monotonic() < until:
            for _ in range(2_000):
                print(f"line {n} of a loop", file=sys.stderr)
                n += 1
        subprocess.run(["sh", "-c", "echo from another program >&2"], check=True)
        sys.stderr.write("last words")  # no end of line, and nobody flushes
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(30)


def test_a_rank_that_prints_in_a_loop_leaves_a_small_file_with_its_last_words(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(rank_log, "_LOOK_S", 0.02)
    monkeypatch.setattr(Bounded.__init__, "__kwdefaults__", {"cap": 200_000, "batch": 20_000})
    config = load(["experiment=tiny", f"run_dir={tmp_path}"])
    assert launcher.start(config, "cpu", _chatty, world_size=2) == exit_codes.LOST
    (path,) = tmp_path.glob("logs/*/rank_1.stderr")
    text = path.read_text()
    assert text.startswith("first words\nline 0 of") and text.endswith("from another program\nlast words") and " bytes left out]\n" in text
    assert path.stat().st_size < 1_000_000
    assert "  rank 1 | last words\n" in capfd.readouterr().err


RANK = """
import sys
from pathlib import Path
from shoestring.launch import rank_log
from shoestring.launch.environment import Place

with rank_log.heard(Path(sys.argv[1]), Place.from_environment()) as tell:
    print("to out")
    print("to err", file=sys.stderr)
    if tell:
        tell(f"rank {Place.from_environment().rank}: lost a peer", 5)
    {then}
"""


def _ranks(tmp_path, count: int, then: str = "", *, run_id: str = "my/run", restart: int = 0) -> list[subprocess.CompletedProcess]:
    """Ranks as torchrun would start them, of one node, one after another."""
    here = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    env = {"TORCHELASTIC_RUN_ID": run_id, "TORCHELASTIC_RESTART_COUNT": str(restart), "WORLD_SIZE": str(count)}
    return [
        subprocess.run(
            [sys.executable, "-c", RANK.replace("{then}", then), str(tmp_path)], capture_output=True, text=True, timeout=60,
            env=here | env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(count)
    ]  # fmt: skip


def test_under_torchrun_a_node_says_one_line_of_what_it_lost(tmp_path):
    ranks = _ranks(tmp_path, 4)
    assert (ranks[0].stdout, ranks[0].stderr) == ("to out\n", "to err\n")
    folder = tmp_path / "logs" / "my_run"
    assert [rank.stderr for rank in ranks[1:]] == [f"error: rank 1: lost a peer (this rank's log: {folder / 'rank_1.log'})\n", "", ""]
    assert not any(rank.stdout for rank in ranks[1:]) and sorted(path.name for path in folder.glob("*.log")) == [
        "rank_1.log", "rank_2.log", "rank_3.log"
    ]  # fmt: skip
    assert (folder / "rank_2.log").read_text().partition("\n")[2] == "to out\nto err\n"
    again = _ranks(tmp_path, 2, restart=1)
    assert "rank 1: lost a peer" in again[1].stderr, "another try is told of again"
    assert (folder / "rank_1.log").read_text().count("to err\n") == 2, "all tries are in the file"


def test_an_error_of_its_own_is_told_beside_a_loss_and_its_traceback_is_in_the_file(tmp_path):
    ranks = _ranks(tmp_path, 4, "raise KeyError('of all')")
    assert "Traceback" in ranks[0].stderr
    lost, own = ranks[1].stderr.splitlines()
    assert "lost a peer" in lost and own.startswith("error: rank 1: KeyError: 'of all' (this rank's log: ")
    assert ranks[2].stderr == ranks[3].stderr == ""
    assert all("Traceback" in (tmp_path / "logs" / "my_run" / f"rank_{n}.log").read_text() for n in (1, 2, 3))


def test_a_rank_that_is_killed_has_said_what_it_printed(tmp_path):
    _ranks(tmp_path, 2, "import os; os.kill(os.getpid(), 9)")
    assert (tmp_path / "logs" / "my_run" / "rank_1.log").read_text().endswith("to out\nto err\n")


def test_jobs_without_a_name_are_told_apart_by_who_started_them(tmp_path):
    _ranks(tmp_path, 2, run_id="none")
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith(f"torchrun-{os.getpid()}-") and (folder / "rank_1.log").exists()


def test_a_run_directory_that_cannot_be_written_leaves_the_console(tmp_path):
    blocked = Path(tmp_path / "file")
    blocked.touch()
    ranks = _ranks(blocked, 3)
    assert all(rank.stdout == "to out\n" for rank in ranks)
    assert "cannot be written" not in ranks[2].stderr and ranks[2].stderr.startswith("to err\n")
