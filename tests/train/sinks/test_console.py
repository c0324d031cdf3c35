"""What reaches a terminal, and a log file."""

import io
import math
import re

import pytest
from rich.console import Console
from shoestring.tests.train.sinks.made import record
from shoestring.train.sinks.console import ConsoleSink


def console(terminal: bool, width: int = 80) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=width, color_system=None, legacy_windows=False)


def test_plain_lines_where_there_is_no_terminal():
    out = console(terminal=False)
    sink = ConsoleSink(10, log_interval=4, console=out)
    for step in range(1, 11):
        sink.write(record(step, eval_loss=5.4321 if step == 6 else None))
    sink.close()
    lines = out.file.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines] == ["step  1", "step  4", "step  6", "step  8", "step 10"]
    for part in ["step  6/10", "loss 5.2500", "eval 5.4321", "10.3 k tokens/s", "MFU 12.3 %", "$0.0012 ($10.81/B tokens)", "ETA 0:42"]:
        assert part in lines[2]
    assert "eval" not in lines[0]


def bar_of(out: Console) -> str:
    """The bar as it stands: the last line, without what moves the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.file.getvalue().replace("\r", "\n")).splitlines()[-1]


@pytest.mark.parametrize(
    ("width", "news"),
    [(44, "loss 5.250  ETA 1:03:00"), (60, "loss 5.250  $12,346  ETA 1:03:00"),
     (80, "loss 5.250  MFU 12.3 %  $12,346  ETA 1:03:00"),
     (90, "loss 5.250  10.3 k tokens/s  MFU 12.3 %  $12,346  ETA 1:03:00"),
     (130, "loss 5.250  held-out 5.432  10.3 k tokens/s  MFU 12.3 %  $12,346  $10.81/B tokens  ETA 1:03:00")],
)  # fmt: skip
def test_a_live_line_fits_its_terminal(width, news):
    """Where there is little room, what matters least is left out; the step, the loss and the time to go never are, nor are they cut."""
    out = console(terminal=True, width=width)
    sink = ConsoleSink(15000, console=out)
    sink.write(record(7431, dollars=12345.6, eta_seconds=3780.0, eval_loss=5.4321))
    sink._bar.refresh()
    bar = bar_of(out)
    sink.close()
    assert bar.startswith(" 7431/15000 ") and bar.rstrip().endswith(f" {news}") and len(bar) <= width


def test_what_stays_above_the_bar():
    out = console(terminal=True)
    sink = ConsoleSink(120, console=out)
    sink.write(record(40))
    sink.write(record(41, eval_loss=5.4321))
    sink.write(record(42, loss=math.nan))
    sink.say("alert: [bold] is no style here")
    sink.close()
    text = out.file.getvalue()
    assert "eval 5.4321" in text and "loss nan" in text and "alert: [bold] is no style here" in text


def test_the_time_to_go_does_not_jump_with_one_slow_step():
    out = console(terminal=False)
    sink = ConsoleSink(100, console=out)
    for step in range(1, 11):
        slow = 4 if step == 10 else 1
        sink.write(record(step, tokens_per_second=1000 / slow, eta_seconds=100.0 * slow))
    assert out.file.getvalue().count("ETA 1:40") == 10
