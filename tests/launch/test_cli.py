"""The command line: every command's words, errors in one line with their exit code, and nothing heavy until it is needed."""

import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
from shoestring import __version__
from shoestring.conf.compose import load, to_yaml
from shoestring.launch import cli, environment, exit_codes

ROOT = Path(cli.__file__).resolve().parents[1]


NOBODY = {"trust": (), "signers": ""}  # of those who made somebody else's checkpoint


@pytest.fixture
def calls(monkeypatch):
    """What a command would have run: (target, positional, named)."""
    made = []

    def call(target, *args, **kwargs):
        made.append((target, args, kwargs))
        return 0

    monkeypatch.setattr("shoestring.launch.commands.command.call", call)
    return made


def test_every_target_exists():
    """The commands name what they run by strings, which no linter checks."""
    sources = [path.read_text() for path in (ROOT / "launch/commands").glob("*.py")]
    targets = re.findall(r'"(shoestring\.[\w.]+:\w+)"', "".join(sources))
    assert len(targets) >= 20
    for target in targets:
        assert callable(pkgutil.resolve_name(target)), target


def test_train_takes_settings_before_and_after_options(calls, tmp_path):
    later = ["optim.lr=0.5", "~data.sources.synthetic", "+data.sources.a.kind=stdlib"]
    assert cli.main(["train", "experiment=smoke", "--config-dir", str(tmp_path), *later]) == exit_codes.OK
    [(target, (config, command), _)] = calls
    assert target == "shoestring.launch.launcher:train"
    assert (config.name, config.optim.lr, set(config.data.sources)) == ("smoke", 0.5, {"a"})
    assert command[:3] == ["shoestring", "train", "experiment=smoke"] and load(command[2:-2], command[-1]) == config


def test_cfg_prints_the_resolved_configuration_and_runs_nothing(calls, capsys):
    assert cli.main(["train", "experiment=tiny", "--cfg", "job"]) == exit_codes.OK
    assert capsys.readouterr().out == to_yaml(load(["experiment=tiny"])) and calls == []


@pytest.mark.parametrize(
    ("words", "target", "args", "kwargs"),
    [
        (["export", "runs/a", "out"], "shoestring.train.interop.hf:export", (Path("runs/a"), Path("out")),
         {"dtype": "auto", "weights": "master", **NOBODY}),
        (["export", "runs/a", "out", "--dtype", "fp8", "--weights", "ema"], "shoestring.train.interop.hf:export",
         (Path("runs/a"), Path("out")), {"dtype": "fp8", "weights": "ema", **NOBODY}),
        (["import", "hf", "out"], "shoestring.train.interop.hf:import_", (Path("hf"), Path("out")), {"mtp": "check", "trust": ()}),
        (["import", "hf", "out", "--skip-mtp"], "shoestring.train.interop.hf:import_", (Path("hf"), Path("out")),
         {"mtp": "skip", "trust": ()}),
        (["upcycle", "runs/a", "out", "model=small", "model.top_k=2"], "shoestring.train.interop.upcycle:upcycle",
         (Path("runs/a"), Path("out"), load(["model=small", "model.top_k=2"]).model), {"seed": 0, **NOBODY}),
        (["report", "runs/a"], "shoestring.launch.report:write_report", (Path("runs/a"),), {}),
        (["sample", "runs/a", "def ", "--greedy", "--num", "2", "--weights", "ema"], "shoestring.launch.sample:show", (),
         {"source": Path("runs/a"), "prompt": "def ", "weights": "ema", "max_tokens": 200, "temperature": 0.0, "top_p": 0.95, "seed": 0,
          "num": 2, **NOBODY}),
        (["data", "build", "experiment=tiny", "--shard", "1", "--num-shards", "4", "data.workers=1"], "shoestring.train.data.corpus:build",
         (load(["experiment=tiny", "data.workers=1"]).data,), {"vocab_size": 512, "shard": 1, "num_shards": 4}),
    ],
)  # fmt: skip
def test_the_other_commands(calls, words, target, args, kwargs):
    assert cli.main(words) == exit_codes.OK
    assert calls == [(target, args, kwargs)]


@pytest.mark.parametrize("line", ["train --foo", "export a", "export a b c", "data", "nothing", "report a x=1", "train --cfg hydra"])
def test_wrong_usage_is_a_configuration_error(line, calls, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(line.split())
    assert caught.value.code == exit_codes.CONFIG and calls == []
    assert "usage: shoestring" in capsys.readouterr().err


def test_a_wrong_setting_is_one_line(calls, capsys):
    assert cli.main(["train", "optim.lrr=3"]) == exit_codes.CONFIG
    assert capsys.readouterr().err == "error: optim.lrr = 3: no such key; nearest known key: optim.lr\n"
    assert calls == []


def _raise(error):
    def call(*_, **__):
        raise error

    return call


def test_an_expected_error_of_a_command_is_one_line(monkeypatch, capsys, tmp_path):
    assert cli.main(["report", str(tmp_path / "none")]) == exit_codes.STORAGE
    monkeypatch.setattr("shoestring.launch.commands.command.call", _raise(KeyboardInterrupt()))
    assert cli.main(["report", "x"]) == exit_codes.INTERRUPTED
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") for line in lines) and "none" in lines[0]


def test_a_bug_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("shoestring.launch.commands.command.call", _raise(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        cli.main(["report", "x"])


def test_help_names_every_command_and_exit_code(capsys):
    assert cli.main([]) == exit_codes.CONFIG
    text = capsys.readouterr().out
    assert all(re.search(rf"^    {name}\s", text, re.MULTILINE) for name in cli.COMMANDS)
    assert all(meaning in text for meaning in exit_codes.MEANING.values())


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"shoestring {__version__}\n"


def _python(*words: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=120, **kwargs)


@pytest.mark.parametrize("line", ["--help", "train --help", "train experiment=tiny --cfg job", "train optim.lrr=3"])
def test_questions_are_answered_without_torch(line):
    code = "import atexit, sys; from shoestring.launch import cli; atexit.register(lambda: print('torch' in sys.modules)); cli.main()"
    out = _python("-c", code, *line.split())
    assert out.stdout.splitlines()[-1] == "False", out.stderr


def test_python_m_from_the_tree_hides_the_tree():
    """`python -m` puts the working directory first on the path; there, `train` and `kernels` would be importable bare."""
    code = "from importlib.util import find_spec; from shoestring.launch.cli import main; main([]); print(find_spec('kernels'))"
    out = _python("-c", code, cwd=ROOT, env={k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"})
    assert out.stdout.splitlines()[-1] == "None", out.stderr


def test_the_door_for_torchrun():
    out = _python("-m", "shoestring.train", "experiment=tiny", "--cfg", "job")
    assert out.stdout == to_yaml(load(["experiment=tiny"])), out.stderr


# ---------------------------------------------------------------- environment and exit codes


def test_a_place_is_read_from_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert environment.Place.from_environment() is None
    for name, value in (("RANK", "9"), ("WORLD_SIZE", "16"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert environment.Place.from_environment() == environment.Place(rank=9, local_rank=1, world_size=16, local_world_size=16)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert environment.Place.from_environment().local_world_size == 8


def test_the_command_to_repeat_is_the_one_that_was_used(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert environment.command(["a=1"]) == ["shoestring", "train", "a=1"]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert environment.command(["a=1"]) == ["torchrun", "--nproc-per-node", "8", "-m", "shoestring.train", "a=1"]


def test_a_program_off_the_path_is_named_by_its_path(monkeypatch, tmp_path):
    program = tmp_path / ".venv" / "bin" / "shoestring"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(program)])
    assert environment.command([])[0] == ".venv/bin/shoestring"
    monkeypatch.setenv("PATH", str(program.parent))
    assert environment.command([])[0] == "shoestring"


def test_what_the_user_has_set_in_the_environment_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    environment.prepare(threads=2)
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("before", "words", "threads"),
    [
        ({}, [], "1"),
        ({}, ["launch.threads=3"], "3"),
        ({}, ["launch.threads=3", "cluster.threads=4"], "4"),
        ({"OMP_NUM_THREADS": "7"}, ["cluster.threads=4"], "7"),
        ({"OMP_NUM_THREADS": "1"}, ["cluster.threads=4"], "1"),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, ["cluster.threads=4"], "4"),  # torchrun's own 1
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "none"}, ["launch.threads=4"], "1"),
    ],
)
def test_threads_of_a_rank(monkeypatch, before, words, threads):
    monkeypatch.setattr(os, "environ", dict(before))
    config = load(words)
    environment.prepare_ranks(config.cluster, config.launch.threads)
    assert os.environ["OMP_NUM_THREADS"] == threads


def test_variables_of_a_cluster_reach_ranks_where_the_user_has_none(monkeypatch):
    monkeypatch.setattr(os, "environ", {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "2"})
    words = ["cluster.env.NCCL_DEBUG=WARN", "cluster.env.NCCL_IB_TC=106", "cluster.env.TORCH_CPP_LOG_LEVEL=INFO", "cluster.threads=4"]
    cluster = load(words).cluster
    environment.prepare_ranks(cluster, 1)
    found = {name: os.environ[name] for name in ("NCCL_DEBUG", "NCCL_IB_TC", "TORCH_CPP_LOG_LEVEL")}
    assert found == {"NCCL_DEBUG": "INFO", "NCCL_IB_TC": "106", "TORCH_CPP_LOG_LEVEL": "INFO"}
    assert environment.told(cluster) == [
        "OMP_NUM_THREADS=2 (the environment's; the cluster's is 4)", "NCCL_DEBUG=INFO (the environment's; the cluster's is WARN)",
        "NCCL_IB_TC=106", "TORCH_CPP_LOG_LEVEL=INFO",
    ]  # fmt: skip
    assert environment.told(load([]).cluster) == []


class DataError(RuntimeError):
    """Named like the one of train.data: exit codes go by name."""


class Narrower(DataError):
    pass


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("x"), exit_codes.DATA),
        (Narrower("x"), exit_codes.DATA),
        (FileNotFoundError(2, "No such file", "a"), exit_codes.STORAGE),
        (OSError(28, "No space left on device"), exit_codes.STORAGE),
        (ConnectionResetError(104, "Connection reset by peer"), exit_codes.LOST),
        (RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer"), exit_codes.LOST),
        (RuntimeError("shapes do not match"), exit_codes.FAILED),
        (FloatingPointError("nan"), exit_codes.DIVERGED),
        (KeyError("x"), exit_codes.FAILED),
    ],
)
def test_exit_code_of_an_error(error, code):
    assert exit_codes.of(error) == code
    assert "\n" not in exit_codes.sentence(error)


def test_the_named_errors_are_those_that_the_code_raises():
    """An exception that is renamed would silently fall back to `FAILED`."""
    names = """shoestring.conf.errors:ConfigError shoestring.train.data.documents:DataError
        shoestring.train.checkpoint.manifest:CheckpointError shoestring.train.interop.hf_format:HFError
        shoestring.launch.local:RankFailed torch.distributed:DistBackendError"""
    for name in names.split():
        kind = pkgutil.resolve_name(name)
        assert exit_codes.of(kind.__new__(kind)) != exit_codes.FAILED, name
