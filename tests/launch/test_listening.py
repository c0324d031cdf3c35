"""What listens on the network while a job of one machine runs: nothing that another machine could reach."""

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from shoestring.conf.compose import load
from shoestring.launch import exit_codes, launcher, worker
from shoestring.train.trainer import Outcome

_LISTENS = "0A"
_HERE = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")  # 127.0.0.1, ::1, as the kernel writes them


def listening(pid: int) -> list[str]:
    """Addresses that a process listens on, from the kernel's own tables."""
    sockets = set()
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        try:
            sockets.add(os.readlink(fd))
        except OSError:
            continue
    found = []
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if f"socket:[{fields[9]}]" in sockets and (fields[3] == _LISTENS or table.startswith("udp")):
                found.append(f"{table} {fields[1]}")
    return found


def _look(config, device, *, log, **_):
    group = dist.new_group(backend="gloo")
    dist.all_reduce(torch.ones(1), group=group)
    here = {name: listening(pid) for name, pid in (("rank", os.getpid()), ("launcher", os.getppid()))}
    Path(config.run_dir, f"listens_{dist.get_rank()}.json").write_text(json.dumps(here))
    dist.barrier()
    return Outcome(summary=None, step=1, stopped=False)


def test_a_job_of_one_machine_listens_on_loopback_only(tmp_path):
    config = load(["experiment=tiny", f"run_dir={tmp_path}", "launch.timeout_s=60"])
    assert launcher.start(config, "cpu", worker.run_launched, [], _look, world_size=2) == exit_codes.OK
    told = [json.loads(path.read_text()) for path in tmp_path.glob("listens_*.json")]
    assert len(told) == 2 and all(one["rank"] and one["launcher"] for one in told), "both are there, and both wait for connections"
    addresses = {address for one in told for found in one.values() for address in found}
    assert all(address.split()[1].partition(":")[0] in _HERE for address in addresses), addresses
