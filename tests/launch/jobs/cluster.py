"""A Slurm of our own: munge, the controller and three nodes, on this machine and in one folder. Nothing of the system is touched."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
NODES = ("n0", "n1", "n2")
CREDENTIAL_S = 2


def missing() -> list[str]:
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return [tool for tool in TOOLS if not shutil.which(tool, path=path)]


class Cluster:
    """From `with` on it runs. `env`: what a command needs to talk to it."""

    def __init__(self, folder: Path):
        self.folder, self._processes = folder, []
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
        self.env.pop("CI", None)

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        if (self.folder / "slurm.conf").exists():
            for more in (["--signal=KILL", "--full"], []):
                subprocess.run(["scancel", *more, f"--user={getpass.getuser()}"], env=self.env, capture_output=True)
            self._until(lambda: not self.ask("squeue", "--noheader").strip(), seconds=15, must=False)
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ask(self, *words: str) -> str:
        found = subprocess.run(words, env=self.env, capture_output=True, text=True)
        assert found.returncode == 0, f"{words}: {found.stderr}"
        return found.stdout

    def job(self, job: str) -> dict[str, str]:
        """What Slurm knows of it, by the names that scontrol has."""
        return dict(word.partition("=")[::2] for word in self.ask("scontrol", "show", "--oneliner", "job", job).split())

    def hurry(self, job: str) -> None:
        """Once it waits for its turn after a requeue, which Slurm makes two minutes: seconds will do, until nodes forget its credential."""
        self._until(lambda: self.job(job)["JobState"] == "PENDING", seconds=60)
        time.sleep(2 * CREDENTIAL_S)
        self._until(lambda: self.job(job)["JobState"] != "PENDING" or self._now(job), seconds=60)

    def _now(self, job: str) -> bool:
        found = subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=self.env, capture_output=True)
        return found.returncode == 0

    def _start(self) -> None:
        folder, socket_path = self.folder, self.folder / "munge.socket"
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        ports = _free_ports(len(NODES) + 1)
        (folder / "slurm.conf").write_text(_conf(folder, socket_path, ports))
        for name in ("state", *(f"spool_{node}" for node in NODES)):
            (folder / name).mkdir()
        self._run("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket_path}", f"--pid-file={folder}/munged.pid",
                  f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed")  # fmt: skip
        self._until(socket_path.exists)
        self._run("slurmctld", "-D", "-f", str(folder / "slurm.conf"))
        for node in NODES:
            self._run("slurmd", "-D", "-N", node, "-f", str(folder / "slurm.conf"), name=node)
        self._until(lambda: self._idle() == len(NODES))

    def _idle(self) -> int:
        found = subprocess.run(["sinfo", "--noheader", "--format=%T %D"], env=self.env, capture_output=True, text=True)
        return sum(int(line.split()[1]) for line in found.stdout.splitlines() if line.startswith("idle "))

    def _run(self, *words: str, name: str = "") -> None:
        with open(self.folder / f"{name or words[0]}.out", "wb") as out:
            self._processes.append(subprocess.Popen(words, env=self.env, stdout=out, stderr=subprocess.STDOUT))

    def _until(self, happened, *, seconds: float = 30, must: bool = True) -> None:
        until = time.monotonic() + seconds
        while not happened():
            if time.monotonic() > until:
                assert not must, f"not within {seconds} s; see {self.folder}"
                return
            time.sleep(0.1)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _conf(folder: Path, socket_path: Path, ports: list[int]) -> str:
    host, user = os.uname().nodename, getpass.getuser()
    first = 1 + 100 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])  # ports follow from it: no other worker's cluster has them
    nodes = [f"NodeName={n} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000" for n, port in zip(NODES, ports)]
    return "\n".join([
        "ClusterName=test", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={ports[-1]}", f"SlurmUser={user}", f"SlurmdUser={user}",
        "AuthType=auth/munge", "CredType=cred/munge", f"AuthInfo=socket={socket_path},cred_expire={CREDENTIAL_S}",
        f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool_%n",
        f"SlurmctldPidFile={folder}/slurmctld.pid", f"SlurmdPidFile={folder}/slurmd_%n.pid",
        "ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SwitchType=switch/none", "MpiDefault=none",
        "SchedulerType=sched/backfill", "SchedulerParameters=sched_interval=1,bf_interval=1",
        "SelectType=select/cons_tres", "SelectTypeParameters=CR_Core",
        f"FirstJobId={first}",
        "ReturnToService=0", "KillWait=10", "SlurmctldTimeout=30", "SlurmdTimeout=30", "MinJobAge=300", "MailProg=/bin/true",
        "AccountingStorageType=accounting_storage/none", "JobCompType=jobcomp/none", "JobAcctGatherType=jobacct_gather/none",
        *nodes, "PartitionName=main Nodes=n[0-2] Default=YES MaxTime=INFINITE State=UP",
    ]) + "\n"  # fmt: skip
