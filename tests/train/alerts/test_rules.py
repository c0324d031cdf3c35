"""What each rule says of a run whose numbers are made by hand, and when it is over."""

import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from shoestring.conf.compose import load
from shoestring.tests.train.sinks.made import record
from shoestring.train.alerts import rules

WORDS = ["model=micro", "data=synthetic", "data.seq_len=16", "train.global_batch_tokens=64"]


def told(rule, records) -> list[tuple[int, bool]]:
    """(step, begins) of each episode's begin and end."""
    firing, found = False, []
    for each in records:
        answer = rule.look(each, firing)
        if answer is not None and bool(answer) != firing:
            firing = not firing
            found.append((each.step, firing))
    return found


def rule_of(kind: str, *words: str, run_dir: Path = Path(".")):
    (found,) = [rule for rule in rules.rules(load([*WORDS, *words]), run_dir) if rule.kind == kind]
    return found


def noisy(seed: int, steps: int, loss: float = 3.0):
    """A loss that falls by half, with 1 % of noise, and gradient norms that scatter by a fifth."""
    draw = random.Random(seed)
    return [
        dict(step=step, loss=loss * (0.5 + 0.5 * math.exp(-step / 300)) * draw.gauss(1, 0.01), grad_norm=math.exp(draw.gauss(0, 0.2)))
        for step in range(1, steps + 1)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_a_sound_run_is_quiet(seed):
    draw = random.Random(seed)
    steps = [
        record(**fields, mfu=0.4 * draw.gauss(1, 0.05), max_vio=[abs(draw.gauss(1, 0.3)) for _ in range(4)], step_seconds=2.0)
        for fields in noisy(seed, 1000)
    ]
    for kind in ("loss", "speed", "balance"):
        assert told(rule_of(kind), steps) == [], kind


@pytest.mark.parametrize(
    "spike", [{"loss": 4.5}, {"loss": math.nan}, {"loss": math.inf}, {"grad_norm": 50.0}, {"grad_norm": math.nan}], ids=str
)
def test_a_spike_is_one_episode(spike):
    steps = noisy(1, 400)
    for at in (200, 201, 202):
        steps[at - 1] |= spike
    assert told(rule_of("loss"), [record(**fields) for fields in steps]) == [(200, True), (203, False)]


def test_what_lasts_becomes_usual():
    """A loss that stays higher is told once, and another spike on top of it again."""
    steps = noisy(1, 400)
    for fields in steps[199:]:
        fields["loss"] *= 2
    steps[349]["loss"] *= 2
    found = told(rule_of("loss"), [record(**fields) for fields in steps])
    assert found[0] == (200, True) and found[1][1] is False and 230 < found[1][0] < 240 and found[2:] == [(350, True), (351, False)]


def test_balance_hovers_and_is_told_once():
    """Limit 3; over below 2.4, median of 4."""
    levels = [1.0] * 8 + [3.2] * 8 + [2.9, 3.1] * 8 + [1.0] * 8
    steps = [record(i + 1, max_vio=[0.1, level]) for i, level in enumerate(levels)]
    assert told(rule_of("balance", "launch.alerts.window=4"), steps) == [(11, True), (34, False)]
    assert "MoE layer 1" in rule_of("balance", "launch.alerts.window=1").look(steps[10], False)


def test_a_drop_of_speed_must_last_a_minute():
    """At 10 s a step, half the speed from step 101 on: a minute's median is low after more than half of it."""
    words = ("launch.alerts.window=4",)
    slow = [record(i, mfu=0.2 if 100 < i <= 140 else 0.4, step_seconds=10.0) for i in range(1, 201)]
    (began, fired), (ended, again) = told(rule_of("speed", *words), slow)
    assert fired and not again and 103 <= began <= 106 and 143 <= ended <= 146
    short = [record(i, mfu=0.2 if 100 < i <= 102 else 0.4, step_seconds=10.0) for i in range(1, 201)]
    assert told(rule_of("speed", *words), short) == []
    quick = [record(i, mfu=0.2 if 100 < i <= 104 else 0.4, step_seconds=0.1) for i in range(1, 2000)]
    assert told(rule_of("speed", *words), quick) == [], "four quick steps are no minute"


def test_a_speed_that_hovers_is_told_once():
    """Limit 0.28 of 0.4; over above 0.304. What lasts never becomes usual."""
    low = [record(i, mfu=0.4 if i <= 100 else (0.27, 0.29)[i // 20 % 2], step_seconds=10.0) for i in range(1, 4000)]
    ((_, fired),) = told(rule_of("speed", "launch.alerts.window=4"), low)
    assert fired


def test_another_length_of_sequences_is_another_speed():
    steps = [record(i, mfu=0.4 if i <= 100 else 0.2, seq_len=4096 if i <= 100 else 32768, step_seconds=10.0) for i in range(1, 200)]
    assert told(rule_of("speed", "launch.alerts.window=4"), steps) == []


def test_shares_of_a_budget():
    """Each once, and of several that are passed at once, the highest."""
    found = rules.rules(load([*WORDS, "budget_usd=10", "launch.alerts.budget=[0.8,0.5]", "launch.alerts.disk_checkpoints=0"]), Path("."))
    half, most = (rule for rule in found if rule.kind.startswith("budget"))
    spent = [record(i, dollars=i - 0.5) for i in range(1, 11)]
    assert (half.kind, most.kind) == ("budget_usd 50%", "budget_usd 80%")
    assert told(half, spent) == [(6, True)] and told(most, spent) == [(9, True)]
    assert told(half, spent[8:]) == [] and most.look(spent[8], False) == "80 % of budget_usd is spent: $8.50 of $10.00"
    assert told(half, [*spent[:6], record(7, dollars=1.0)]) == [(6, True), (7, False)], "with a larger budget it is over"


@pytest.mark.parametrize(
    ("limit", "at", "said"),
    [("budget_gpu_hours=2", {"gpu_hours": 1.7}, "80 % of budget_gpu_hours is spent: 1.7 GPU-hours of 2"),
     ("max_tokens=1000000", {"tokens": 960_000}, "95 % of max_tokens is spent: 960 k tokens of 1.00 M")],
)  # fmt: skip
def test_other_limits(limit, at, said):
    made = rules.rules(load([*WORDS, limit, "launch.alerts.disk_checkpoints=0"]), Path("."))
    assert [text for rule in made if (text := rule.look(record(1, **at), False))] == [said]


def test_deadline():
    now = [0.0]
    used, amount = rules._deadline("2000-01-01", lambda: now[0])
    assert used(None) == 0.0 and amount(None) == "0:00 are left"
    now[0] = 1.0
    assert used(None) > 1


def test_room_for_checkpoints(tmp_path, monkeypatch):
    """Of the newest whole one: 3 MB. Fewer than two further ones are told, until there is room for 2.5."""
    clock, free = [0.0], [100e6]
    folder = tmp_path / "checkpoints" / "step_00000010"
    folder.mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(b"x" * 3_000_000)
    monkeypatch.setattr(rules, "find_latest", lambda where: folder if where == folder.parent else None)
    monkeypatch.setattr(rules.shutil, "disk_usage", lambda where: SimpleNamespace(free=free[0]))
    rule = rules.Disk(load(WORDS).launch.alerts, tmp_path, lambda: clock[0])
    found = []
    for free[0] in (100e6, 6.1e6, 5.9e6, 7e6, 7.6e6):
        clock[0] += 31
        found.append(rule.look(record(1), firing="room for" in (found or [""])[-1]))
    assert [bool(text) for text in found] == [False, False, True, True, False]
    assert rule.look(record(1), False) is None, "not at every step"
    assert "room for 2.0 checkpoints of 0.003 GB" in found[2]


def test_nothing_is_watched_that_is_not_asked_for():
    off = [f"launch.alerts.{name}=0" for name in ("loss_spike", "max_vio", "mfu_drop", "disk_checkpoints")]
    assert rules.rules(load([*WORDS, *off]), Path(".")) == []
