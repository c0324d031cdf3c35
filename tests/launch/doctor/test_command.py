"""The whole command: alone, quick, as ranks of two nodes; what it says, and its exit code for each kind of trouble."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch.distributed as dist
from shoestring.conf.compose import load
from shoestring.launch import cli, exit_codes
from shoestring.launch.doctor import command, world
from shoestring.launch.local import fork_ranks
from shoestring.parallel import world as ranks_world


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NCCL_DEBUG", "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTHONSAFEPATH", "1"), monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # as the launcher would set them for good


@pytest.fixture
def words(tmp_path) -> list[str]:
    return ["experiment=tiny", f"run_dir={tmp_path}/run", f"data.cache_dir={tmp_path}/cache"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def doctor(*words: str, **options) -> tuple[int, dict[str, dict]]:
    """Exit code, and lines by check."""
    said = []
    code = command.main([*words], as_json=True, port=options.pop("port", None) or free_port(), say=said.append, **options)
    record = json.loads(said[0])
    assert code == record["exit_code"] and record["hosts"] == [socket.gethostname()]
    return code, {line["check"]: line for line in record["lines"]}


def failed(lines: dict) -> list[str]:
    return [check for check, line in lines.items() if line["state"] == "fail"]


def test_this_machine_with_ranks_of_its_own(words, tmp_path):
    """Nothing is left behind, no process and no file."""
    code, lines = doctor(*words, "cluster.gpus_per_node=4")
    assert code == exit_codes.OK and failed(lines) == []
    assert {"configuration", "alike on all ranks", "clocks", "all-to-all inside nodes", "all-reduce", "links inside nodes"} <= set(lines)
    assert lines["links inside nodes"]["value"].startswith("6 tried") or "slow" in lines["links inside nodes"]["value"]
    assert list(tmp_path.iterdir()) == []
    assert subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, text=True).stdout.split() == []


def test_a_rank_that_dies_is_told(words):
    config = load(words)
    [line] = world.start(config, "cpu", 2, _dies)
    assert line.state == "fail" and line.kind == "fabric" and "ZeroDivisionError" in line.value and "rank 1" in line.value


def _dies(*_):
    if dist.get_rank() == 1:
        raise ZeroDivisionError("planted")
    dist.barrier()


def test_a_configuration_that_cannot_be_trained(words):
    code, lines = doctor(*words, "parallel.schedule=dualpipe", "parallel.pp=3", "parallel.ep=1", "parallel.edp=1")
    assert code == exit_codes.CONFIG and failed(lines) == ["configuration"] and lines["ranks"]["state"] == "skipped"


def test_quick_needs_no_torch_and_is_quick(words):
    code = "import atexit, sys; from shoestring.launch import cli; atexit.register(lambda: print('torch' in sys.modules)); "
    out = subprocess.run(
        [sys.executable, "-c", code + "sys.exit(cli.main())", "doctor", "--quick", "--port", str(free_port()), *words],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    lines = out.stdout.splitlines()
    assert out.returncode == 0 and lines[-1] == "False" and lines[-2].startswith("0 failed"), out.stdout + out.stderr
    assert lines[0].startswith(socket.gethostname()) and "\x1b" not in out.stdout and "fabric" not in lines


def test_for_launch(words, capsys):
    lines = command.quick(load(words))
    assert {line.kind for line in lines} == {"software", "variables", "storage", "machine"}
    command.show(lines)
    assert "room for run_dir" in capsys.readouterr().out


# ---------------------------------------------------------------- planted troubles


def test_a_busy_port(words):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code, lines = doctor(*words, only_quick=True, port=port)
    assert code == exit_codes.CONFIG and failed(lines) == [f"port {port}"]


def test_conflicting_variables(words, monkeypatch):
    monkeypatch.setenv("RANK", "3"), monkeypatch.setenv("NCCL_DEBUG", "TRACE")
    code, lines = doctor(*words, only_quick=True)
    assert code == exit_codes.CONFIG and failed(lines) == ["RANK=3"] and lines["NCCL_DEBUG=TRACE"]["state"] == "warn"


def test_no_room_and_no_permission(words):
    code, lines = doctor("experiment=deepseek_v3", "launch.device=cpu", "cluster=cpu", *words[1:], only_quick=True)
    assert code == exit_codes.STORAGE and failed(lines) == ["room for run_dir"]  # and it asks for no data
    code, lines = doctor(*words, "run_dir=/proc/run", only_quick=True)
    assert code == exit_codes.STORAGE and "write run_dir" in failed(lines)


def test_no_gpu_where_there_should_be(words, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    code, lines = doctor(*words, "cluster=h100", only_quick=True)
    assert code == exit_codes.LOST and failed(lines) == ["GPUs"]


def test_wrong_words(capsys):
    assert cli.main(["doctor", "optim.lrr=3"]) == exit_codes.CONFIG
    assert "nearest known key: optim.lr" in capsys.readouterr().err
    assert cli.main(["doctor", "data.sources.stdlib.weight=-1"]) == exit_codes.CONFIG


# ---------------------------------------------------------------- two nodes, as torchrun starts ranks on them


def as_torchrun(words: list[str], port: int, plant: str) -> tuple[int, list[str]]:
    """On one of four ranks, two on each node."""
    rank = dist.get_rank()
    ranks_world.leave()
    numbers = {"RANK": rank, "LOCAL_RANK": rank % 2, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    if plant and rank >= 2:
        sys.path.insert(0, plant)
        os.environ["NCCL_DEBUG"] = "TRACE"
    said = []
    return command.main(words, say=said.append), said


def test_two_nodes(words, tmp_path):
    (code, [table]), *others = fork_ranks(4, as_torchrun, words, free_port(), "")
    assert code == exit_codes.OK and others == [(0, []), (0, []), (0, [])]
    host = socket.gethostname()
    assert table.startswith("2 nodes") and table.count("\n  ok   torch ") == 1
    assert f"{host} (node 1)" not in table.partition("\nfabric\n")[0]
    assert "run_dir is shared" in table and "all-to-all between nodes" in table and list(tmp_path.iterdir()) == []


def test_a_node_with_another_version_and_another_environment(words, tmp_path):
    info = tmp_path / "other" / "torch-2.12.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.12.0\n")
    (code, [table]), *_ = fork_ranks(4, as_torchrun, words, free_port(), str(tmp_path / "other"))
    host = socket.gethostname()
    assert code == exit_codes.CONFIG
    mismatch = next(line for line in table.splitlines() if "torch mismatch" in line)
    assert "fail" in mismatch and f"2.12.0 on {host} (node 1)" in mismatch
    assert any("NCCL_DEBUG=TRACE" in line and f"{host} (node 1): " in line for line in table.splitlines())


def test_ranks_beside_the_first_say_nothing_of_a_quick_look(words, monkeypatch, capsys):
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert command.main(words, only_quick=True) == exit_codes.OK and capsys.readouterr().out == ""
