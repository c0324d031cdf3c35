"""The certificate as a file, and the table on the console: whole, for every kind of verdict, at every width."""

import dataclasses
import io
import json
import math
import re

import pytest
from shoestring.launch.verify import certificate, table
from shoestring.launch.verify.cases import USUAL, Case, composed
from shoestring.launch.verify.certificate import Invalid
from shoestring.launch.verify.compare import LIMITS, Deviation
from shoestring.launch.verify.prove import MOST, Verdict

CONFIG = composed(USUAL)
BASE = (*USUAL, "train.steps=3")
GRADIENT = Deviation(quantity="gradient", where="layers.2.attn.q_norm, step 2, rank 1", value=5.4e-15, limit=1e-10)
NORM = Deviation(quantity="grad_norm", where="step 1", value=3.1e-2, limit=1e-11)
FAULT = Deviation(quantity="fault", where="loss in step 2 is 1.0 on rank 0 and 2.0 on rank 1", value=math.inf, limit=0.0)
NAN = Deviation(quantity="resumed gradient", where="embed, step 3, on pp4", value=math.nan, limit=1e-10)


def verdict(layout="pp2ep2", options=(), routing="natural", **fields) -> Verdict:
    fields = {"seconds": 12.34, "worst": GRADIENT, "resumed_on": "pp4"} | fields
    return Verdict(case=Case(layout=layout, options=options, routing=routing, base=BASE), **fields)


VERDICTS = {
    "pass": verdict(),
    "options": verdict(options=("model.mtp_depth=1", "precision=fp32"), routing="ties", notes=["near-tie: a<b"]),
    "fail": verdict(worst=FAULT, broken=[NORM, FAULT], layout="pp2edp2ep2/interleaved_1f1b/alltoall"),
    "nan": verdict(worst=NAN, broken=[NAN]),
    "error": verdict(worst=None, error="rank 1 raised:\nTraceback ...\nRuntimeError: shapes differ\n"),
    "nothing": verdict(worst=Deviation(quantity="loads", where="MoE layer 0", value=0.0, limit=0.0), resumed_on=""),
}
INVALID = [Invalid(name=name, why=why) for name, why in (("ep3", "no divisor"), ("ep8/local", "out of reach"), ("ep5", "no divisor"))]


def made(*verdicts, limits=LIMITS):
    results = [v.result("shoestring verify layouts=ep2" if not v.passed else "") for v in verdicts]
    return certificate.certificate(CONFIG, results, INVALID, limits, command="shoestring verify", seconds=61.26)


def test_a_certificate_is_whole_and_comes_back_as_it_was(tmp_path):
    content = made(*VERDICTS.values())
    path = certificate.write(tmp_path / "new" / "folder", content)
    assert certificate.read(path) == content
    plain = json.loads(path.read_text(), parse_constant=pytest.fail)  # neither NaN nor Infinity, which JSON does not have
    assert (plain["passed"], plain["target"], plain["seconds"], plain["steps"]) == (False, "shoestring", 61.3, CONFIG.train.steps)
    assert {"shoestring", "python", "torch", "deepspeed"} <= plain["versions"].keys()
    assert plain["commit"] is None or re.fullmatch(r"[0-9a-f]{40}\+?", plain["commit"])
    assert plain["model"] == json.loads(json.dumps(dataclasses.asdict(CONFIG.model)))
    assert plain["limits"] == {name: dataclasses.asdict(limits) for name, limits in LIMITS.items()}
    assert plain["invalid"][0] == {"name": "ep3", "why": "no divisor"}
    for case, v in zip(plain["cases"], VERDICTS.values()):
        assert (case["layout"], case["passed"], case["error"], case["command"]) == (v.case.layout, v.passed, v.error, v.case.command)
        assert bool(case["smallest"]) != v.passed
    fail, nan = plain["cases"][2:4]
    assert [d["value"] for d in fail["broken"]] == [3.1e-2, None] and nan["worst"]["value"] is None


def test_what_has_passed():
    assert made(VERDICTS["pass"], VERDICTS["options"]).passed
    assert not made(VERDICTS["pass"], VERDICTS["error"]).passed and not made().passed
    many = verdict(broken=[NORM] * (MOST + 5)).result()
    assert len(many.broken) == MOST and not many.passed


@pytest.mark.parametrize(
    "damage", ["", "[]", "{}", '{"cases": [], "invalid": []}', '{"cases": [3], "invalid": []}', "half", "mistyped", "\xff"]
)
def test_a_damaged_file_is_told(damage, tmp_path):
    path = certificate.write(tmp_path, made(VERDICTS["pass"]))
    text = path.read_text()
    damaged = {"half": text[: len(text) // 2], "mistyped": text.replace('"seconds": 12.34', '"seconds": "long"')}.get(damage, damage)
    assert damaged != text
    path.write_bytes(damaged.encode("latin-1"))
    with pytest.raises(ValueError):
        certificate.read(path)


# ---------------------------------------------------------------- on the console


def rows(width, colour=False, names=tuple(VERDICTS)):
    results = [VERDICTS[name].result() for name in names]
    shown = table.Table([r.layout for r in results], ["pp4", "pp2ep2/interleaved_1f1b"], width, colour)
    return shown.header(), {name: shown.row(r) for name, r in zip(names, results)}


@pytest.mark.parametrize("width", [80, 100, 140, 160])
def test_nothing_is_wider_than_the_screen_and_nothing_is_lost(width):
    header, found = rows(width)
    for text in [header, *found.values()]:
        assert max(map(len, text.splitlines())) <= width
    words = {name: " ".join(text.split()) for name, text in found.items()}
    for name, parts in {
        "pass": ["pass pp2ep2 pp4 5.4e-15 of 1e-10", "gradient of layers.2.attn.q_norm, step 2, rank 1", "0:12"],
        "options": ["mtp_depth=1 precision=fp32 routing=ties", "near-tie: a<b"],
        "fail": ["FAIL pp2edp2ep2/interleaved_1f1b/alltoall", "3.1e-02 of 1e-11", "grad_norm of step 1"],
        "nan": ["no number", "resumed gradient of embed, step 3"],
        "error": ["FAIL pp2ep2", "error", "RuntimeError: shapes differ"],
        "nothing": ["equal", "loads of MoE layer 0"],
    }.items():
        assert all(part in words[name] for part in parts), words[name]
    assert "on pp4" not in words["nan"]  # said in its own column


@pytest.mark.parametrize("width", [80, 140])
def test_columns_stand_under_one_another(width):
    header, found = rows(width)
    at = header.index("largest")
    for name, number in {"pass": "5.4e-15", "fail": "3.1e-02", "error": "error ", "nothing": "equal"}.items():
        assert any(line.startswith(number.strip(), at) for line in found[name].splitlines()), found[name]
    ends = {line.rstrip().index("0:12") + 4 for text in found.values() for line in text.splitlines() if "0:12" in line}
    assert ends == {len(header)}


def test_a_long_place_goes_on_in_its_column():
    long = verdict(worst=dataclasses.replace(GRADIENT, where="layers.10.mlp.experts.gate_up of expert 101, step 2, rank 1, " * 2)).result()
    shown = table.Table([long.layout], ["pp2ep2/interleaved_1f1b"], 140)
    first, second, *_ = shown.row(long).splitlines()
    assert len(second) - len(second.lstrip()) == shown.header().index("where") == first.index("gradient")


def test_colour_changes_no_letter():
    plain, coloured = rows(100)[1], rows(100, colour=True)[1]
    assert all(re.sub(r"\x1b\[[0-9;]*m", "", coloured[name]) == plain[name] != coloured[name] for name in plain)


def test_all_that_failed():
    text = table.details(VERDICTS["fail"].result(), 140)
    assert "grad_norm of step 1" in text and "not equal" in text and "2.0 on rank 1" in text
    assert table.details(verdict(broken=[NORM] * 11).result(), 140).endswith("... and 3 more")
    assert "Traceback" in table.details(VERDICTS["error"].result(), 140)


def test_a_rule_is_told_once():
    assert list(table.invalid_lines(INVALID, 80)) == ["  ep3, ep5\n      no divisor", "  ep8/local\n      out of reach"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_for_terminals_only(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    for stream in (Terminal(), io.StringIO()):
        with table.Screen(stream=stream) as screen:
            screen.status("1 of 2 done")
            screen.say("a row")
        text = stream.getvalue()
        assert text == ("\r\x1b[K1 of 2 done\r\x1b[Ka row\n\r\x1b[K" if stream.isatty() else "a row\n")
    lines = []
    with table.Screen(lines.append, Terminal()) as screen:
        screen.status("1 of 2 done")
        screen.say("a row")
    assert lines == ["a row"]


def test_how_far_it_is():
    assert table.progress(0, 6, 2, 0.0) == "0 of 6 done, 2 running, 0:00 gone"
    assert table.progress(4, 6, 2, 60.0) == "4 of 6 done, 2 running, 1:00 gone, about 0:30 left"
    assert table.progress(6, 6, 2, 90.0) == "6 of 6 done, 0 running, 1:30 gone"
