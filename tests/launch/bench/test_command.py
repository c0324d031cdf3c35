"""The command without a GPU, and with one that is made up: table, JSON, page, and what is refused."""

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from shoestring.conf.errors import ConfigError
from shoestring.launch import cli, exit_codes
from shoestring.launch.bench import command, page, results, run, table
from shoestring.launch.bench.case import SMALL, Case, Maker, Peer
from shoestring.launch.bench.results import Results, Row, Timed
from shoestring.launch.bench.run import Bench, every_case, run_case

from .test_timing import FakeClock


def lines(**options) -> tuple[int, str]:
    said = []
    code = command.kernels(**{"only": "cast by rows,row maps", **options}, say=said.append)
    return code, "\n".join(said)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def found() -> Results:
    """Made up: round numbers."""
    product = Row(
        op="fp8 fprop", shape="4096x4096x7168", passed=True, least_db=45.0, db=55.6, flops=10**12, bytes=10**8, ceiling="fp8",
        published=1000.0, seconds=2e-3, low=1.9e-3, high=2.1e-3,
        configs=[Timed(name="first", seconds=2e-3), Timed(name="second", seconds=1e-3), Timed(name="third", why="out of resource")],
        peers=[Timed(name="torch block-wise FP8", seconds=3e-3, db=55.0), Timed(name="torch row-wise FP8", why="not here: <no such>")],
    )  # fmt: skip
    cast = Row(op="cast by rows", shape="4096x7168", passed=True, least_db=28.0, db=31.8, bytes=10**9, seconds=1e-3, low=1e-3, high=1e-3)
    moved = Row(op="permute bf16", shape="1x1", passed=True, least_db=None, db=None, bytes=10**9)
    broken = Row(op="fp8 wgrad", shape="1x1x1", passed=False, least_db=45.0, db=12.0, error="", ceiling="fp8")
    return Results(
        device="NVIDIA H100", timed=True, command="shoestring bench kernels", date="2030-01-02T03:04:05+00:00", seconds=3.0,
        versions={"torch": "2.13"}, commit=None, ceilings={"fp8": 10**15, "copy": 2 * 10**12}, rows=[product, cast, moved, broken],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "target", "args", "options"),
    [
        (["kernels", "--only", "fp8", "--tune", "--json", "a.json"], "kernels", (),
         {"only": "fp8", "shapes": "", "tune": True, "check": False, "keep": False, "json_path": Path("a.json"), "page_path": None}),
        (["step", "model=micro", "--steps", "9"], "train_step", (["model=micro"],),
         {"steps": 9, "limit_s": 300.0, "out": Path("runs/bench"), "json_path": None, "page_path": None}),
    ],
)  # fmt: skip
def test_words(monkeypatch, words, target, args, options):
    """What the command line asks for, its functions take."""
    made = []
    monkeypatch.setattr("shoestring.launch.commands.command.call", lambda *args, **options: made.append((args, options)))
    assert cli.main(["bench", *words]) == exit_codes.OK
    assert made == [((f"shoestring.launch.bench.command:{target}", *args), options)]
    inspect.signature(getattr(command, target)).bind(*args, **options)


class TestWithoutAGpu:
    def test_it_says_so_and_checks_only(self, no_gpu, tmp_path):
        code, said = lines(json_path=tmp_path / "a" / "r.json", page_path=tmp_path / "p.html")
        assert code == exit_codes.OK
        assert said.startswith("torch sees no GPU here: correctness only") and said.count("no GPU") == 1
        assert re.search(r"^ok    row maps +160x8 to 16 +equal$", said, re.MULTILINE) and "3 of 3 right" in said
        assert "GB/s" not in said and " us" not in said and "ceiling" not in said
        kept = results.read(tmp_path / "a" / "r.json")
        assert not kept.timed and kept.ceilings == {} and all(row.seconds is None for row in kept.rows)
        assert {"torch", "triton", "python"} <= set(kept.versions) and kept.date.startswith("20")
        assert "There is no GPU here" in (tmp_path / "p.html").read_text()

    def test_what_is_wrong_is_a_failure(self, no_gpu, monkeypatch):
        monkeypatch.setattr(run, "sqnr", lambda found, exact: 3.0)
        code, said = lines()
        assert code == exit_codes.FAILED and "FAIL  cast by rows" in said and "0 of 3 right" in said

    @pytest.mark.parametrize(
        ("option", "word", "nearest"), [("only", "swigluu", "swiglu and cast"), ("shapes", "160x257", "160x256"), ("only", "", None)]
    )
    def test_unknown_names(self, no_gpu, option, word, nearest):
        cases, name = every_case(SMALL), lambda case: case.op if option == "only" else case.shape
        if nearest is None:
            assert command.chosen(cases, word, "--only", name) == cases
            return
        with pytest.raises(ConfigError, match=rf"--{option} = {word}.*nearest valid value: .*{nearest}"):
            command.kernels(**{option: word})

    def test_parts_of_names(self):
        cases = every_case(SMALL)
        ops = {case.op for case in command.chosen(cases, "wgrad, swiglu", "--only", lambda case: case.op)}
        assert ops == {"fp8 wgrad", "fp8 grouped wgrad", "swiglu and cast", "swiglu and cast from fp8", "swiglu backward"}

    def test_kept_only_in_a_checkout(self, no_gpu, monkeypatch, tmp_path):
        monkeypatch.setattr(command, "KEPT", tmp_path / "docs" / "results")
        with pytest.raises(ConfigError, match="folder of a checkout"):
            lines(keep=True)
        (tmp_path / "docs").mkdir()
        _, said = lines(keep=True)
        assert [path.suffix for path in sorted((tmp_path / "docs" / "results").iterdir())] == [".html", ".json"]
        assert said.count("wrote") == 2


class TestTimed:
    """On the CPU, with a clock that makes every call a millisecond long."""

    def case(self, run, peers=()):
        name = dict(op="an op", shape="4", least_db=40.0, bytes=10**6, ceiling="copy")
        return Case(**name, make=lambda maker: (torch.ones(4),), run=run, exact=lambda x: [x.double()], read=lambda x: [x], peers=peers)

    def bench(self, **fields):
        return Bench(device=torch.device("cpu"), clock=FakeClock(), **fields)

    def test_peers(self):
        bench = self.bench(cache_bytes=10**6)

        def ours(x):
            bench.clock.device += 1e-3
            return x

        def theirs(x):
            bench.clock.device += 2e-3
            return x

        def refused(x):
            raise NotImplementedError("scaled_mm: not on this device\nException raised from ...")

        peers = (
            Peer(name="slow", run=theirs, read=lambda x: [x * 1.001]),
            Peer(name="another", run=theirs, prepare=lambda x: (x + 1,)),
            Peer(name="gone", run=refused),
            Peer(name="older", run=theirs, prepare=lambda x: torch.nn.functional.no_such_thing),
        )
        row = run_case(self.case(ours, peers), bench)
        assert row.passed and row.seconds == pytest.approx(1e-3) and row.rate == pytest.approx(1e9)
        slow, another, gone, older = row.peers
        assert row.ratio("slow") == pytest.approx(2) and slow.db == pytest.approx(60, abs=0.1) and another.db is None
        assert gone.why == "not here: NotImplementedError: scaled_mm: not on this device" and row.ratio("gone") is None
        assert older.why.startswith("not here: AttributeError")

    def test_inputs_that_exceed_the_cache_rotate(self):
        bench, seen = self.bench(cache_bytes=10**6), set()
        case = self.case(lambda x: (seen.add(id(x)), x)[1])
        run_case(case, bench)
        assert len(seen) == 4  # of a megabyte each, four times the cache

    def test_every_configuration_is_timed_and_a_wrong_one_is_a_failure(self, monkeypatch):
        """The kernels cannot be launched here: the op is one that looks at which configuration it would be."""
        case = next(case for case in every_case(SMALL) if case.op == "cast by rows")
        [use], bench = case.uses, self.bench(tune=True, architecture=90)
        names = [config.name for config in use.configs(90)]
        speed = dict(zip(names, (3e-3, 1e-3, 2e-3)))
        wrong, args = [], case.make(Maker(bench.device))
        right, doubled = case.run(*args), case.run(*(2 * x for x in args))

        def cast(x):
            now = use.configs(90)[0].name
            bench.clock.device += speed[now]
            return doubled if now in wrong else right

        timed = Case(**{**vars(case), "run": cast})
        row = run_case(timed, bench)
        assert [(c.name, c.seconds) for c in row.configs] == [(name, pytest.approx(speed[name])) for name in names] and len(names) == 3
        assert row.best.name == names[1] and row.passed and row.seconds == pytest.approx(3e-3)
        wrong.append(names[1])
        row = run_case(timed, bench)
        assert not row.passed and row.best.name == names[2] and row.error.startswith(f"{names[1]}: wrong: ")


class TestShown:
    def test_table(self, found):
        first, *below = table.lines(found.rows[0], found)
        assert re.fullmatch(r"ok    fp8 fprop +4096x4096x7168 +55\.6 +2\.00 ms +500 TFLOP/s +50\.0 % +50\.0 %", first)
        assert [" ".join(line.split()) for line in below] == [
            "1.50 x torch block-wise FP8 (3.00 ms, 55.0 dB)", "torch row-wise FP8 (not here: <no such>)", "first (2.00 ms)",
            "fastest second (1.00 ms)", "third (out of resource)",
        ]  # fmt: skip
        assert "1000 GB/s" in next(table.lines(found.rows[1], found)) and "50.0 %" in next(table.lines(found.rows[1], found))
        assert next(table.lines(found.rows[3], found)).startswith("FAIL  fp8 wgrad")
        assert [" ".join(line.split()) for line in table.winners(found)] == ["fp8 fprop 4096x4096x7168 second (2.00 x the first)"]

    def test_aims(self, found):
        aims = {aim.what.split(":")[1].strip(): (aim.value, aim.met) for aim in results.aims(found)}
        assert aims["times torch's block-wise, worst"] == (1.5, True)
        assert aims["share of DeepGEMM's published rates on an H800, worst"] == (0.5, False)
        assert aims["share of DeepGEMM's published rates on an H800, geometric mean"] == (pytest.approx(0.5), False)
        assert aims["share of a large copy's rate, worst"] == (0.5, False)
        assert not any("row-wise" in what or "wgrad" in what or "MoE" in what for what in aims)  # not measured

    def test_json_and_back(self, found, tmp_path):
        path = results.write(tmp_path / "r.json", found)
        assert results.read(path) == found
        assert set(json.loads(path.read_text())) >= {"device", "versions", "date", "commit", "rows", "ceilings", "command", "timed"}
        path.write_text("{}")
        with pytest.raises(ValueError, match="no list of rows"):
            results.read(path)

    def test_page(self, found):
        html = page.page(found)
        data = json.loads(re.search(r"const FIGURES = (.*?);\n", html)[1])
        assert [figure["id"] for figure in data] == ["shares", "ratios"]
        assert [trace["x"] for trace in data[0]["data"]] == [[50.0], [50.0]]
        text = html.split("<script>")[0]
        assert "NaN" not in text and "&lt;no such&gt;" in text and "<no such>" not in html and "something is wrong" in text
        assert "not measured here" in text  # of DeepGEMM's rates
