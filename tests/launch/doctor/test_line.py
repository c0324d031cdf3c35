"""Lines of several nodes become one table, and a table is readable: aligned, what to do under what is wrong, the sum last."""

import io
from contextlib import redirect_stdout

import pytest
from shoestring.launch import exit_codes
from shoestring.launch.doctor.line import exit_code, fail, gigabytes, merged, ok, show, skipped, some, warn

TORCH = ok("software", "torch", "2.13.0", alike=True)


def test_what_is_alike_is_said_once():
    free = {host: ok("storage", "room", f"{gb} GB free") for host, gb in (("a", 5), ("b", 6), ("c", 7))}
    lines = merged({host: [TORCH, free[host], skipped("machine", "GPUs", "none")] for host in "abc"})
    assert [(line.check, line.host) for line in lines] == [("torch", ""), ("room", ""), ("GPUs", "")]
    assert "5 GB free" in lines[1].value and "3 nodes" in lines[1].value


def test_outliers_are_named_by_host():
    full = fail("storage", "room", "0 GB free", "make room")
    lines = merged({"a": [ok("storage", "room", "5 GB free")], "b": [full], "c": [full]})
    assert [(line.state, line.host) for line in lines] == [("ok", ""), ("fail", "b, c")]
    lines = merged({"a": [full], "b": [full]})
    assert [(line.state, line.host) for line in lines] == [("fail", "")]


def test_a_node_with_another_version_is_a_failure_that_names_it():
    other = ok("software", "torch", "2.12.1", alike=True)
    [line] = merged({"a": [TORCH], "b": [other], "c": [TORCH]})
    assert (line.state, line.check) == ("fail", "torch mismatch")
    assert line.value == "2.13.0 on a, c; 2.12.1 on b" and "on b" in line.advice
    free = ok("software", "kernel", "6.1")
    assert [line.state for line in merged({"a": [free], "b": [ok("software", "kernel", "6.2")]})] == ["ok"]


@pytest.mark.parametrize(
    ("kinds", "code"),
    [
        ([], exit_codes.OK),
        (["software"], exit_codes.CONFIG),
        (["fabric", "variables", "storage"], exit_codes.CONFIG),
        (["fabric", "storage"], exit_codes.STORAGE),
        (["machine"], exit_codes.LOST),
        (["fabric"], exit_codes.LOST),
    ],
)
def test_the_exit_code_is_that_of_the_first_failure(kinds, code):
    fine = [TORCH, warn("storage", "b", "c", "d"), skipped("fabric", "e", "f")]
    assert exit_code([*fine, *(fail(kind, "a", "b", "c") for kind in kinds)]) == code


LINES = [
    TORCH,
    warn("variables", "NCCL_DEBUG=TRACE", "much", "unset it"),
    fail("storage", "room for run_dir", "[none]", "make room"),  # brackets are no markup
    skipped("machine", "RDMA", "not seen here"),
]


def test_a_table_is_aligned_and_ends_with_the_sum():
    said = []
    show(LINES, title="here", say=said.append)
    lines = said[0].splitlines()
    assert lines[0] == "here"
    starts = {next(text for text in lines if value in text).index(value) for value in ("2.13.0", "much", "[none]", "not seen")}
    assert len(starts) == 1
    assert lines[lines.index(next(text for text in lines if "[none]" in text)) + 1].strip() == "-> make room"
    assert lines[-1] == "1 failed, 1 warning, 1 ok, 1 not looked at (-): room for run_dir"


def test_no_colour_where_there_is_no_terminal():
    out = io.StringIO()
    with redirect_stdout(out):
        show(LINES)
    assert "\x1b" not in out.getvalue() and "[none]" in out.getvalue()


def test_words():
    assert some("abcdefgh") == "a, b, c, d, e, f, g, h" and some("abcdefghij").endswith("h and 2 more")
    assert [gigabytes(n) for n in (12e6, 1.5e9, 2.5e11, 8.19e12)] == ["0.012 GB", "1.5 GB", "250 GB", "8.19 TB"]
