"""Following a metrics.jsonl: everything once, in order, through appends, replacements, torn and endless lines; long files at once."""

import json
import os

import pytest
from shoestring.launch.figures import reading
from shoestring.launch.figures.reading import Follower, without_loads


def line(step: int, **fields) -> str:
    record = {"step": step, "tokens": 10 * step, "loss": 1.0 / step, "seconds": 1.0 * step, "dollars": 0.1 * step, "session": 0}
    return json.dumps(record | fields, separators=(",", ":")) + "\n"


def steps(follower: Follower) -> list[float]:
    return follower.history.curve("loss").at["step"].tolist()


def test_what_is_appended_is_read_once(tmp_path):
    path = tmp_path / "m.jsonl"
    follower = Follower(path)
    assert not follower.read_on() and follower.history.count == 0 and follower.progress == 1
    seen = []
    follower.on_record = lambda record: seen.append(record["step"])
    with open(path, "w") as file:
        for step in range(1, 8):
            whole = line(step)
            file.write(whole[:20])
            file.flush()
            follower.read_on()
            file.write(whole[20:])
            file.flush()
            before = follower.version
            follower.read_on()
            assert follower.version != before and steps(follower)[-1] == step
            assert not follower.read_on() and follower.version == follower.version
    assert seen == list(range(1, 8)) and follower.num_bad == 0


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(line(s) for s in range(1, 10)))
    follower = Follower(path)
    follower.read_all()
    other = tmp_path / "n.jsonl"
    other.write_text("".join(line(s, session=1) for s in range(1, 6)))
    os.replace(other, path)
    follower.read_all()
    assert steps(follower) == [1, 2, 3, 4, 5] and follower.history.last["session"] == 1
    path.write_text(line(1))  # the same file, shorter
    follower.read_all()
    assert steps(follower) == [1]
    path.unlink()
    follower.read_all()
    assert follower.history.count == 0
    path.write_text(line(4))
    follower.read_all()
    assert steps(follower) == [4]


def test_lines_that_are_no_records_are_counted_and_passed_over(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(line(1).encode() + b"rubbish\n\n{}\n\xff\xfe\x00\n" + line(2).encode() + line(3)[:30].encode())
    follower = Follower(path)
    follower.read_all()
    assert steps(follower) == [1, 2] and (follower.num_bad, follower.first_bad) == (3, 2), "the torn last line is none of them"


def test_an_endless_line_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "CHUNK", 64)
    monkeypatch.setattr(reading, "LONGEST", 512)
    path = tmp_path / "m.jsonl"
    path.write_text(line(1) + "x" * 5000 + "\n" + line(2))
    follower = Follower(path)
    follower.read_all()
    assert steps(follower) == [1, 2] and follower.num_bad == 1


@pytest.mark.parametrize("what", ["directory", "pipe", "device", "nothing"])
def test_what_is_no_file(tmp_path, what):
    if what == "directory":
        (tmp_path / "m.jsonl").mkdir()
    elif what == "pipe":
        os.mkfifo(tmp_path / "m.jsonl")
    elif what == "device":
        (tmp_path / "m.jsonl").symlink_to("/dev/zero")
    follower = Follower(tmp_path / "m.jsonl")
    follower.read_all()
    assert follower.history.count == 0 and follower.expert_load() is None


def test_a_long_file_is_sampled_and_then_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "SAMPLED_FROM", 10_000)
    monkeypatch.setattr(reading, "TAIL", 2_000)
    monkeypatch.setattr(reading, "CHUNK", 4_096)
    monkeypatch.setattr(reading, "SCANNED", 4_096)
    path = tmp_path / "m.jsonl"
    path.write_text("".join(line(s, loss=99.0 if s == 1234 else 1.0, expert_load=[[s, 1]]) for s in range(1, 5001)))
    follower = Follower(path)
    assert follower.read_on(0.0) and follower.progress < 0.1
    shown = steps(follower)
    assert len(shown) > 500 and shown[0] == 1 and shown[-1] == 5000 and shown == sorted(shown), "the whole of it, at once"
    assert follower.expert_load() == (5000, [[5000, 1]])
    follower.read_all()
    assert follower.progress == 1 and follower.history.count == 5000
    curve = follower.history.curve("loss")
    assert curve.values.max() == 99.0 and curve.at["step"][curve.values.argmax()] == 1234


def test_expert_loads_are_read_again_where_they_are_shown(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(line(s, **({"expert_load": [[s], [2]]} if s % 2 else {"expert_load": None})) for s in range(1, 11)))
    follower = Follower(path)
    follower.read_all()
    assert follower.expert_load() == (9, [[9], [2]]) and follower.expert_load(5) == (5, [[5], [2]])
    assert follower.expert_load(4) is None, "nearest before it in the same stretch, here of one record"


def test_a_line_without_its_loads_is_the_same_record():
    whole = line(3, expert_load=[[1, 2], [3, 4]], max_vio=[0.5])
    short = json.loads(without_loads(whole.encode()))
    assert short == {key: value for key, value in json.loads(whole).items() if key != "expert_load"}
    for other in (line(3), line(3, expert_load=None), line(3, expert_load=[])):
        assert json.loads(without_loads(other.encode())) == json.loads(other)
