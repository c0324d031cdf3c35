"""What reaches a terminal, and a log file."""

import io
import math

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


def test_a_live_line_fits_a_narrow_terminal():
    out = console(terminal=True)
    sink = ConsoleSink(120, console=out)
    sink.write(record(40))
    sink._bar.refresh()
    sink.write(record(41, eval_loss=5.4321))
    sink.write(record(42, loss=math.nan))
    sink.close()
    text = out.file.getvalue()
    assert "loss 5.250  10.3 k tokens/s  MFU 12.3 %  $0.0012  ETA 0:42" in text
    assert "eval 5.4321" in text and "loss nan" in text  # these stay above the bar
