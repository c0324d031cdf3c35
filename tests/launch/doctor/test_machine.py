"""Every line about this machine against commands that know it independently; planted troubles; machines that are not here, made of files.
"""

import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from shoestring.conf.compose import load
from shoestring.launch.doctor import gpus, machine, network, software, storage
from shoestring.launch.doctor.line import Line

BIG = ["experiment=deepseek_v3", "data.sources.files.paths=[any]"]
UNLIMITED = resource.RLIM_INFINITY


@pytest.fixture
def config(tmp_path):
    return load(["experiment=tiny", f"run_dir={tmp_path / 'run'}", f"data.cache_dir={tmp_path / 'cache'}"])


def by_check(lines) -> dict[str, Line]:
    return {line.check: line for line in lines}


def shell(command: str) -> str:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def first_number(text: str) -> float:
    return float(text.replace(",", "").split()[0])


# ---------------------------------------------------------------- what the system gives


def test_limits_cores_and_kernel_are_what_commands_say(config):
    lines = by_check(machine.check(config, 4, []))
    assert lines["kernel"].value == f"Linux {shell('uname -r')}"
    assert first_number(lines["cores"].value) == int(shell("env -u OMP_NUM_THREADS nproc"))
    wanted = shell("ulimit -n")
    assert lines["open files"].value.replace(",", "").startswith(f"{wanted} (ulimit -n)")
    locked = shell("ulimit -l")
    assert f"(ulimit -l: {locked if locked == 'unlimited' else f'{int(locked):,} KiB'})" in lines["locked memory"].value
    assert lines["locked memory"].state == "skipped"


@pytest.mark.parametrize(
    ("soft", "hard", "locked", "states", "do"),
    [
        (UNLIMITED, UNLIMITED, UNLIMITED, ["ok", "ok"], ""),
        (1056, 1056, UNLIMITED, ["ok", "ok"], ""),  # exactly enough for 4 ranks
        (1024, 4096, 65536, ["warn", "fail"], "ulimit -n 1056"),
        (200, 512, UNLIMITED, ["fail", "ok"], "limits.conf"),
    ],
)
def test_limits_that_are_too_low(config, soft, hard, locked, states, do):
    limit = {resource.RLIMIT_NOFILE: (soft, hard), resource.RLIMIT_MEMLOCK: (locked, locked)}.__getitem__
    lines = by_check(machine.check(config, 4, ["mlx5_0"], limit=limit))
    assert [lines[name].state for name in ("open files", "locked memory")] == states
    assert do in lines["open files"].advice


# ---------------------------------------------------------------- storage


def test_free_space_and_inodes_are_what_df_says(config, tmp_path):
    lines = by_check(storage.check(config, 4))
    assert {line.state for line in lines.values()} <= {"ok", "warn"}
    space = lambda path: int(shell(f"df --output=avail -B1 {path} | tail -1")) / 1e9
    for check, path in (("room for run_dir", tmp_path), ("room for data cache", tmp_path), ("/dev/shm", "/dev/shm")):
        assert first_number(lines[check].value) == pytest.approx(space(path), rel=0.05, abs=0.05), check
    inodes = int(shell(f"df --output=iavail {tmp_path} | tail -1"))
    assert "no limit" in lines["inodes"].value or first_number(lines["inodes"].value) == pytest.approx(inodes, abs=5000)
    assert not list(tmp_path.iterdir()), "something was left behind"


def test_a_disk_without_room_for_the_checkpoints(tmp_path):
    """DeepSeek-V3's: 671 B parameters and those of multi-token prediction; of each 4 bytes of master, 4 of average, twice 2 of moments."""
    big = load([*BIG, f"run_dir={tmp_path}"])
    line = by_check(storage.check(big, 8))["room for run_dir"]
    assert "2 + 1 checkpoints of 8.19 TB" in line.value and 671e9 < 8.19e12 / 12 < 685e9
    assert shutil.disk_usage(tmp_path).free < 24e12, "a larger disk than this test has in mind"
    assert line.state == "fail" and "24.5 TB too few" in line.value and "keep_last=1" in line.advice


def test_checkpoints_that_are_there_count(config):
    """What is there already need not be written once more: room for one is enough then."""
    folder = Path(config.run_dir) / "checkpoints"
    folder.mkdir(parents=True)
    one = int(by_check(storage.check(config, 4))["room for run_dir"].value.split("checkpoints of 0.")[1][:3]) * 1_000_000
    stat = lambda path: os.statvfs_result((1, 1, 0, 0, one + (18 << 20) + 500_000, 0, 0, 0, 0, 255))
    assert by_check(storage.check(config, 1, stat=stat))["room for run_dir"].state == "fail"
    with open(folder / "a", "wb") as file:
        file.truncate(3 * one)
    assert by_check(storage.check(config, 1, stat=stat))["room for run_dir"].state == "ok"


def test_few_inodes_and_little_shared_memory(config):
    """In a container: 64 MB of shared memory."""
    stat = lambda path: os.statvfs_result((4096, 4096, 16384, 16384, 16384, 1000, 90, 90, 0, 255))
    lines = by_check(storage.check(config, 4, stat=stat))
    assert lines["inodes"].state == "fail" and lines["inodes"].value.startswith("90 free")
    assert lines["/dev/shm"].state == "warn" and "--shm-size" in lines["/dev/shm"].advice
    on_gpus = load(["cluster=h100", f"run_dir={config.run_dir}"])
    assert by_check(storage.check(on_gpus, 8, stat=stat))["/dev/shm"].state == "fail"


def test_a_folder_in_which_nothing_can_be_made():
    """Root ignores mode bits; /proc heeds nobody."""
    line = by_check(storage.check(load(["run_dir=/proc/shoestring"]), 1))["write run_dir"]
    assert line.state == "fail" and line.value.startswith("/proc ") and "run_dir=" in line.advice


def test_a_run_dir_that_is_a_file(tmp_path):
    (tmp_path / "run").touch()
    line = by_check(storage.check(load([f"run_dir={tmp_path}/run"]), 1))["write run_dir"]
    assert line.state == "fail" and "Not a directory" in line.value


def in_namespace(mount: str, words: str) -> subprocess.CompletedProcess:
    """`doctor --quick` where a file system is mounted that nobody else sees."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no user namespaces here")
    main = "import sys; from shoestring.launch.cli import main; sys.exit(main())"
    script = f'{mount} && exec "$0" -c "{main}" doctor --quick --json {words}'
    return subprocess.run(["unshare", "-rm", "bash", "-c", script, sys.executable], capture_output=True, text=True, timeout=60)


def test_a_full_disk(tmp_path):
    done = in_namespace(f"mount -t tmpfs -o size=1m none {tmp_path}", f"experiment=tiny run_dir={tmp_path}/run")
    assert done.returncode == 4, done.stderr
    assert '"0.001 GB free at' in done.stdout and '"state": "fail"' in done.stdout


def test_a_mount_that_can_only_be_read(tmp_path):
    done = in_namespace(f"mount -t tmpfs -o ro,size=1g none {tmp_path}", f"experiment=tiny run_dir={tmp_path}/run")
    assert done.returncode == 4, done.stderr
    assert "Read-only file system" in done.stdout


# ---------------------------------------------------------------- software


def test_versions_are_what_pip_says():
    told = shell(f"{sys.executable} -m pip --disable-pip-version-check list --format=freeze").splitlines()
    pip = {name: version for name, _, version in (line.partition("==") for line in told) if name in software.MAIN}
    lines = by_check(software.check(load()))
    assert {name: lines[name].value for name in pip} == pip and len(pip) == 3
    assert lines["Python"].value == shell(f"{sys.executable} -V").split()[1]
    assert {line.state for line in lines.values()} <= {"ok", "warn"}


def in_python(code: str, path: Path | None = None) -> dict[str, list[str]]:
    """Lines about software of a process that was made otherwise by `code`: check -> state, value."""
    tail = """
from shoestring.conf.compose import load
from shoestring.launch.doctor import software
print(repr({line.check: [line.state, line.value] for line in software.check(load())}))
"""
    environ = os.environ | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, timeout=60, env=environ)
    assert done.returncode == 0, done.stderr
    return eval(done.stdout)


HIDE = """
import sys
from importlib.machinery import PathFinder
class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name == {module!r} else PathFinder.find_spec(name, path, target)
    @classmethod
    def find_distributions(cls, *args, **kwargs):
        return (d for d in PathFinder.find_distributions(*args, **kwargs) if d.metadata["Name"] != {package!r})
sys.meta_path[sys.meta_path.index(PathFinder)] = Hiding
"""


def test_a_package_that_is_missing():
    lines = in_python(HIDE.format(module="plotly", package="plotly"))
    assert lines["plotly"][0] == "fail" and "not installed" in lines["plotly"][1] and "plotly>=6" in lines["plotly"][1]
    assert [check for check, (state, _) in lines.items() if state == "fail"] == ["plotly"]


def test_a_package_of_which_only_the_metadata_is_left():
    lines = in_python(HIDE.format(module="safetensors", package="nothing"))
    assert lines["safetensors"][0] == "fail" and "its module safetensors is not to be found" in lines["safetensors"][1]


def test_a_package_that_is_too_old_or_not_the_tested_one(tmp_path):
    for name, version in (("deepspeed", "0.1"), ("wandb", "99.0")):
        folder = tmp_path / f"{name}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = in_python("", tmp_path)
    assert lines["deepspeed"] == ["fail", "0.1, and >=0.19 is needed"]
    assert lines["constraints.txt"][0] == "warn" and "wandb 99.0" in lines["constraints.txt"][1]


def test_without_a_constraints_file(tmp_path):
    assert by_check(software.check(load(), tmp_path / "none"))["constraints.txt"].state == "skipped"


# ---------------------------------------------------------------- network


def test_interfaces_are_those_that_the_system_names():
    assert set(network.interfaces()) <= {name for _, name in socket.if_nameindex()} and "lo" in network.interfaces()


def test_a_port_that_somebody_holds():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        line = network.check_port(port)
        assert line.state == "fail" and "somebody listens" in line.value and "ss -ltnp" in line.advice
    assert network.check_port(port).state == "ok"
    with socket.create_server(("127.0.0.1", port)):
        pass  # nothing of the doctor's is in the way


def device(root: Path, name: str, *, state: str = "4: ACTIVE", rate: str = "400 Gb/sec (4X NDR)") -> None:
    folder = root / "infiniband" / name / "ports" / "1"
    folder.mkdir(parents=True)
    (folder / "state").write_text(state + "\n")
    (folder / "rate").write_text(rate + "\n")


def interface(root: Path, name: str, state: str, speed: str = "-1") -> None:
    folder = root / "net" / name
    folder.mkdir(parents=True)
    (folder / "operstate").write_text(state + "\n")
    (folder / "speed").write_text(speed + "\n")


H100 = [*BIG, "cluster=h100"]


def test_eight_sound_ports(tmp_path):
    for i in range(8):
        device(tmp_path, f"mlx5_{i}")
    interface(tmp_path, "lo", "unknown"), interface(tmp_path, "eth0", "up", "25000"), interface(tmp_path, "eth1", "down")
    lines = by_check(network.check_devices(load(H100), 256, tmp_path))
    assert {check: line.state for check, line in lines.items()} == {"network": "ok", "RDMA": "ok"}
    assert lines["network"].value == "eth0 up at 25 Gb/s; down: eth1" and "8 of 8 ports active, 400 Gb/sec" in lines["RDMA"].value
    assert network.rdma(tmp_path) == [f"mlx5_{i}" for i in range(8)]


def test_ports_that_are_down_slow_or_too_few(tmp_path):
    device(tmp_path, "mlx5_0"), device(tmp_path, "mlx5_1")
    device(tmp_path, "mlx5_2", rate="100 Gb/sec (4X EDR)"), device(tmp_path, "mlx5_3", state="1: DOWN")
    lines = by_check(network.check_devices(load(H100), 256, tmp_path))
    assert lines["RDMA"].state == "warn" and "mlx5_3:1 down" in lines["RDMA"].value and "mlx5_2:1 100 Gb/sec" in lines["RDMA"].value
    # 900 Gb/s are 112.5 GB/s for 8 GPUs
    assert lines["RDMA rate"].state == "warn" and lines["RDMA rate"].value.startswith("14.1 GB/s for each of 8")
    assert lines["network"].state == "skipped"


def test_no_port_and_no_interface_is_up(tmp_path):
    device(tmp_path, "mlx5_0", state="1: DOWN")
    interface(tmp_path, "lo", "unknown"), interface(tmp_path, "eth0", "down")
    lines = by_check(network.check_devices(load(H100), 256, tmp_path))
    assert lines["RDMA"].state == lines["network"].state == "fail"
    assert by_check(network.check_devices(load(), 1, tmp_path))["network"].state == "warn"


# ---------------------------------------------------------------- W&B


def wandb(environ: dict, mode: str = "online") -> dict[str, Line]:
    return by_check(network.check_wandb(load([f"launch.wandb={mode}"]), environ, timeout_s=0.5))


def test_wandb_that_answers(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        lines = wandb({"WANDB_BASE_URL": url, "WANDB_API_KEY": "s3cret", "HOME": str(tmp_path)})
        assert {line.state for line in lines.values()} == {"ok"} and "s3cret" not in str(lines)
        (tmp_path / ".netrc").write_text(f"machine {url[7:]} login user password s3cret\n")
        (tmp_path / ".netrc").chmod(0o600)
        assert wandb({"WANDB_BASE_URL": url, "HOME": str(tmp_path)})["W&B credentials"].state == "ok"
        (tmp_path / ".config" / "wandb").mkdir(parents=True)
        (tmp_path / ".config" / "wandb" / "settings").write_text(f"[default]\nbase_url = {url}/\n")
        assert wandb({"HOME": str(tmp_path)})["W&B"].value == f"{url} answers"
    lines = wandb({"HOME": str(tmp_path / "none"), "WANDB_BASE_URL": url})
    assert {line.state for line in lines.values()} == {"warn"} and "refused" in lines["W&B"].value
    assert "offline" in lines["W&B"].advice and "wandb login" in lines["W&B credentials"].advice


def test_wandb_through_a_proxy_and_of_no_known_name(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        proxy = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert "through the proxy 127.0.0.1" in wandb({"https_proxy": proxy, "HOME": str(tmp_path)})["W&B"].value
    line = wandb({"WANDB_BASE_URL": "https://wandb.invalid", "HOME": str(tmp_path)})["W&B"]
    assert line.state == "warn"


def test_wandb_is_not_asked_where_nothing_is_sent():
    assert [line.state for line in wandb({}, "offline").values()] == ["skipped"]


# ---------------------------------------------------------------- GPUs, of which there is none: an nvidia-smi that is made up


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """`answer(rows)`: what it says of its GPUs from now on. As the real one, it knows the new name of the reasons or the old one."""

    def answer(rows: list[str], *, knows: str = "clocks_event_reasons.active", code: int = 0) -> gpus.Seen:
        text = "\n".join(rows)
        body = f'case "$1" in *{knows}) cat <<E\n{text}\nE\nexit {code};; *) echo "Field is not a valid field to query."; exit 2;; esac'
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        return gpus.look()

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return answer


def gpu(index: int, *, errors: str = "0", clock: int = 345, reasons: int = 1, persistent: str = "Enabled") -> str:
    return f"{index}, NVIDIA H100 80GB HBM3, 550.54.15, {persistent}, {errors}, {clock}, 1980, 0x{reasons:016x}"


@pytest.mark.parametrize("knows", gpus._REASONS)
def test_eight_sound_gpus(nvidia_smi, knows):
    seen = nvidia_smi([gpu(i) for i in range(8)], knows=knows)
    lines = by_check(gpus.check(load(H100), seen))
    assert lines["GPUs"].value == "8 x NVIDIA H100 80GB HBM3" and lines["driver"].value == "550.54.15"
    assert {line.state for check, line in lines.items() if check != "CUDA build"} == {"ok"}
    assert "8 of 8 idle" in lines["GPU clocks"].value


@pytest.mark.parametrize(
    ("changed", "check", "state", "said"),
    [
        ({"errors": "3"}, "GPU memory (ECC)", "fail", "GPU 2: 3"),
        ({"errors": "[N/A]"}, "GPU memory (ECC)", "ok", ""),
        ({"reasons": 0x40}, "GPU slowdown", "fail", "GPU 2: too hot (hardware)"),
        ({"reasons": 0x80 | 0x4}, "GPU slowdown", "fail", "power brake"),
        ({"reasons": 0x2}, "GPU slowdown", "warn", "application clocks"),
        ({"reasons": 0, "clock": 1200}, "GPU clocks", "warn", "GPU 2 at 1200 of 1980 MHz"),
        ({"reasons": 0, "clock": 1980}, "GPU clocks", "ok", "345 of 1980"),
        ({"persistent": "Disabled"}, "persistence mode", "warn", "GPU 2"),
    ],
)
def test_one_gpu_that_is_not(nvidia_smi, changed, check, state, said):
    seen = nvidia_smi([gpu(i, **(changed if i == 2 else {})) for i in range(8)])
    line = by_check(gpus.check(load(H100), seen))[check]
    assert line.state == state and said in line.value and bool(line.advice) == (state != "ok")


def test_gpus_that_are_missing(nvidia_smi):
    seen = nvidia_smi([gpu(i) for i in range(7)])
    assert by_check(gpus.check(load(H100), seen))["GPUs"].state == "fail"
    assert by_check(gpus.check(load(), seen))["GPUs"].state == "ok"  # on CPU cores nobody counts them
    seen = nvidia_smi(["NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."], code=9)
    assert seen.broken and by_check(gpus.check(load(), seen))["GPUs"].state == "fail"
    assert by_check(gpus.check(load(["launch.device=cpu"]), seen))["GPUs"].state == "warn"


def test_a_machine_without_gpus(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    seen = gpus.look()
    assert [line.state for line in gpus.check(load(), seen)] == ["skipped"] and "not seen here" in seen.why
    assert [line.state for line in gpus.check(load(H100), seen)] == ["fail"]
