"""No secret leaves: canaries are planted wherever one can enter, real commands are run, and every byte of what they leave is searched.

A run here fails and hangs on purpose, with secrets in messages, local variables and all that ranks print; pages are of a run that has kept
secrets, as one of another program might have. Offline W&B, TensorBoard, Prometheus, a webhook that answers 500 and a command for
alerts are all in use. Each canary is looked for in halves, and in base64, hexadecimal and the spelling of URLs.
"""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import shoestring
from shoestring.tests.launch.dash.test_serve import ask, update
from shoestring.tests.secrets.planted import Planted, spellings, unpacked, word

DRIVER = Path(__file__).with_name("driver.py")
TINY = [
    "data=synthetic", "data.seq_len=16", "data.sources.synthetic.num_documents=100", "model.vocab_size=300", "model.dim=16",
    "model.num_layers=2", "model.num_experts=4", "model.num_groups=1", "model.num_limited_groups=1", "model.top_k=2",
    "model.dense_hidden_dim=16", "model.expert_hidden_dim=16", "train.global_batch_tokens=64", "train.micro_batch_sequences=1",
    "train.steps=3", "train.eval_sequences=4", "optim.warmup_steps=1", "checkpoint.interval=1", "checkpoint.async_save=false",
    "guard.replay_interval=0",
]  # fmt: skip
LARGE = ["model=moonlight", "model.num_layers=4", "cluster=h100", "precision=bf16", "data.seq_len=4096",
         "train.global_batch_tokens=1048576"]  # fmt: skip
K8S = ["launch.k8s.image=registry.example/shoestring:1", "launch.k8s.claim=shared"]
COMMAND = "import os, sys; sys.stderr.write('sent with ' + os.environ['MY_SERVICE_TOKEN'] + ' ' + 'y' * 186); sys.exit(3)"


class Server(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(500)
        self.end_headers()

    def do_GET(self):
        """As the Hub: what it says to a request that it refuses, libraries show with the address."""
        self.send_response(418)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def webhook():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.bodies = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


class Job:
    """What was planted, and what each command said."""

    def __init__(self, root: Path, port: int):
        self.planted, self.said = Planted(root), {}
        self.work = root / "work"
        self.work.mkdir()
        self._home()
        self.environ = self._environment(port)
        self._git()
        p = self.planted
        p.make("a local variable"), p.make("a password in a URL"), p.make("a token in a URL")
        told = {name: p.canaries[name] for name in ("a local variable", "a password in a URL", "a token in a URL")}
        variables = [name for name in self.environ if any(c in self.environ[name] for c in p.canaries.values())]
        files = [str(path) for path in p.inputs if root / "home" in path.parents]
        self.canaries = p.file("canaries.json", json.dumps(told | {"variables": variables, "files": files}))

    def _home(self) -> None:
        p = self.planted
        p.file("home/.netrc", f"machine api.wandb.ai login user password {p.make('.netrc')}\nmachine 127.0.0.1 login me password "
               f"{p.make('.netrc of another machine')}\n").chmod(0o600)  # fmt: skip
        p.file("home/.cache/huggingface/token", p.make("the Hub's file", f"hf_{word(34)}"))
        p.file("home/.cache/huggingface/stored_tokens", f"[me]\nhf_token = {p.make('stored tokens', f'hf_{word(34)}')}\n")
        p.file("home/.config/wandb/credentials.json", json.dumps({"credentials": {"x": {"access_token": p.make("W&B's file")}}}))
        p.file("home/.aws/credentials", f"[default]\naws_secret_access_key = {p.make('the file of AWS', word(20) + '/+' + word(18))}\n")
        p.file("home/.git-credentials", f"https://me:{p.make('the file of git')}@example.org\n")

    def _environment(self, port: int) -> dict[str, str]:
        p, kept = self.planted, ("PATH", "LANG", "OMP_NUM_THREADS", "SYSTEMROOT")
        named = {
            "WANDB_API_KEY": p.make("WANDB_API_KEY", "7d" + word(38, "0123456789abcdef")[2:] + "07"),
            "HF_TOKEN": p.make("HF_TOKEN", f"hf_{word(34)}"),
            "AWS_SECRET_ACCESS_KEY": p.make("AWS_SECRET_ACCESS_KEY", f"{word(18)}/+{word(20)}"),
            "MY_SERVICE_TOKEN": p.make("MY_SERVICE_TOKEN"),
            "DB_PASSWORD": p.make("DB_PASSWORD", f'{word(12)}&<"{word(12)}'),
            "https_proxy": f"http://someone:{p.make('https_proxy')}@127.0.0.1:9",
            "WANDB_BASE_URL": f"https://me:{p.make('WANDB_BASE_URL')}@127.0.0.1:9",
            "HF_ENDPOINT": f"http://me:{p.make('HF_ENDPOINT')}@127.0.0.1:{port}",
            "MY_CHAT": f"http://127.0.0.1:{port}/services/T0/{p.make('the webhook')}?auth={p.make('the webhook, too')}",
        }
        tree = str(Path(shoestring.__file__).resolve().parents[1])
        found = {name: os.environ[name] for name in kept if name in os.environ}
        return found | {"HOME": str(p.root / "home"), "PYTHONPATH": tree, "TMPDIR": str(p.root / "tmp"), "PYTHONUNBUFFERED": "1"} | named

    def _git(self) -> None:
        p = self.planted
        (p.root / "tmp").mkdir()
        remote = f"https://{p.make('a git remote')}:x-oauth@127.0.0.1/x.git"
        for words in (["init", "-q"], ["remote", "add", "origin", remote],
                      ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", "--allow-empty"]):  # fmt: skip
            subprocess.run(["git", *words], cwd=self.work, check=True, env=self.environ)
        p.inputs.add(self.work / ".git/config")

    def run(self, name: str, jobs: list[list[str]]) -> list[int]:
        """The exit codes of commands in one process, in whose arguments there is one more canary."""
        p = self.planted
        codes = p.root / f"{name}.codes"
        given = p.file(f"{name}.json", json.dumps(jobs))
        argv = [sys.executable, str(DRIVER), str(self.canaries), str(given), str(codes), p.make(f"arguments of {name}")]
        done = subprocess.run(argv, cwd=self.work, env=self.environ, capture_output=True, timeout=240, stdin=subprocess.DEVNULL)
        self.said |= {f"stdout of {name}": done.stdout, f"stderr of {name}": done.stderr}
        return json.loads(codes.read_text()) if codes.exists() else [done.returncode]

    def text(self) -> str:
        return b"".join(self.said.values()).decode(errors="replace")


@pytest.fixture(scope="module")
def job(tmp_path_factory, webhook) -> Job:
    """A run that has failed, hung and been killed."""
    job = Job(tmp_path_factory.mktemp("planted"), webhook.server_port)
    words = [
        "train", *TINY, "name=leaky", "parallel.edp=2", "data.cache_dir=cache", "launch.wandb=offline", "launch.tensorboard=true",
        "launch.prometheus_file=metrics.prom", "launch.alerts.webhook=env:MY_CHAT", "launch.max_restarts=1", "launch.hang_s=5",
        f"launch.alerts.command={json.dumps([sys.executable, '-c', COMMAND])}",
    ]  # fmt: skip
    job.codes = job.run("train", [words])
    job.run_dir = job.work / "runs/leaky"
    return job


def none(job: Job, **more: bytes) -> None:
    found = job.planted.search(**job.said, **more)
    assert not found, "\n".join(found)


def test_training(job, webhook):
    """Ranks fail with secrets, start again, hang and are killed, start again and find bad data. All of these exits were in fact used."""
    assert job.codes == [3], job.text()[-3000:]
    tried = [*job.run_dir.glob("logs/*")]
    assert len(tried) == 3 and {p.name for p in job.run_dir.glob("logs/*/failure-*.json")} == {"failure-0.json", "failure-1.json"}
    assert any("time.sleep" in p.read_text() or "driver.py" in p.read_text() for p in job.run_dir.glob("flight/*/rank_1.txt"))
    assert any("closed by peer" in p.read_text() for p in job.run_dir.glob("flight/*/rank_0.json"))
    for name in ("restarts.jsonl", "ending.json", "alerts.jsonl", "config.yaml", "metrics.jsonl"):
        assert (job.run_dir / name).stat().st_size, name
    assert webhook.bodies and b"(hidden)" in webhook.bodies[0]
    assert "exit status 3" in job.text() and "the webhook of MY_CHAT: it answers 500" in job.text()
    assert "RuntimeError: 500 for https://someone:(hidden)@127.0.0.1/x?access_token=(hidden) (hidden)" in job.text()
    none(job, webhook=b"".join(webhook.bodies))


def test_wandb_is_sent_no_arguments_and_no_machine(job):
    """Of itself it keeps the command line and the git remote, in which somebody may have written anything."""
    kept = b"".join(text for path in job.run_dir.glob("wandb/*/*.wandb") for _, text in unpacked(path.name, path.read_bytes()))
    assert b"leaky" in kept and b"optim" in kept, "a session that was recorded to its end"
    assert not [word for word in (DRIVER.name, str(DRIVER.parent), "x.git") if word.encode() in kept]


@pytest.fixture(scope="module")
def older(job) -> Path:
    """A run that has kept secrets, as before they were refused, or as another program wrote it."""
    p, folder = job.planted, job.work / "older/run"
    shutil.copytree(job.run_dir, folder, ignore=shutil.ignore_patterns("wandb", "checkpoints", "tensorboard", "*.html", "logs", "flight"))
    secret = f"https://me:{p.make('a configuration that was kept')}@example.org/"
    text = re.sub(r"setup: \[\]", f"setup:\n    - curl {secret}", (folder / "config.yaml").read_text())
    kept = {"config.yaml": text}
    for name, place in (("ending.json", "how a run ended"), ("restarts.jsonl", "a restart"), ("alerts.jsonl", "an alert")):
        told = p.make(place)
        line = json.loads((folder / name).read_text().splitlines()[0])
        line |= {key: f"no answer from https://me:{told}@example.org/" for key in ("what", "text") if key in line}
        kept[name] = json.dumps(line) + "\n"
    assert secret in text
    for name, text in kept.items():
        p.file(str((folder / name).relative_to(p.root)), text)
    return folder


def test_pages_and_commands(job, older):
    run, old = "runs/leaky", "older/run"
    slurm = ["launch=slurm", "experiment=ladder_8", "--dry-run"]
    doctor = ["doctor", *TINY, "data.cache_dir=cache", "--json", "--quick"]
    jobs = {
        "plan": ["plan", *LARGE, "tokens=1e9", "search=false", "output=plan.json", "page=plan.html"],
        "slurm": ["launch", *slurm], "k8s": ["launch", "launch=k8s", "experiment=ladder_8", *K8S, "--dry-run"],
        "torchrun": ["launch", "launch=torchrun", *TINY, "data.cache_dir=cache", "--dry-run"],
        "settings": ["train", *TINY, "--cfg", "job"],
        "report": ["report", run], "report of another": ["report", old], "runs": ["runs", ".", "--json"],
        "runs as CSV": ["runs", ".", "--csv", "runs.csv"], "compare": ["runs", "compare", run, old, "--html", "compare.html"],
        "dollars": ["dollars", run], "list": ["checkpoint", "list", run], "export": ["export", run, "exported"],
    }  # fmt: skip
    codes = dict(zip(jobs, job.run("commands", [*jobs.values()])))
    assert codes == dict.fromkeys(jobs, 0), job.text()[-3000:]
    assert job.run("doctor", [doctor])[0] in (0, 2, 4)
    none(job)
    assert all("(hidden)" in path.read_text() for path in (older / "report.html", job.work / "compare.html", job.work / "runs.csv"))


def test_what_is_refused_or_fails_shows_no_secret(job):
    """Settings and words that hold a secret, sources that cannot be read, documents that are none."""
    p, e = job.planted, job.environ
    p.file("work/configs/experiment/keeps.yaml", f"# @package _global_\nname: x{e['MY_SERVICE_TOKEN']}\n")
    p.file("work/shaped/experiment/keeps.yaml",
           f"# @package _global_\nlaunch: {{slurm: {{setup: ['export MY_API_KEY={p.make('a configuration file')}']}}}}\n")  # fmt: skip
    p.file("work/bad.jsonl", f'{{"text": "{p.make("a broken document")}\n{{"told to nobody, {p.make("a key of a document")}": 1}}\n'
           f'{{"text": ["{p.make("a document of another type")}"]}}\n')  # fmt: skip
    source = lambda more: [*TINY, "data.sources.x.kind=files", f"data.sources.x.paths=[{more}]", "data.cache_dir=cache"]
    hub = [*TINY, "~data.sources.synthetic", "data.sources.x.kind=hf", "data.sources.x.dataset=nobody/nothing", "data.cache_dir=cache"]
    refused = [
        ["train", f"--password={p.make('an option')}"],
        ["train", f"launch.wandb_api_key={p.make('an unknown key')}"],
        ["train", *source(f"'https://me:{p.make('a URL of data')}@example.org/x.txt'")],
        ["train", *source(f"'https://example.org/x.txt?token={p.make('a signed URL')}'")],
        ["train", *TINY, "data.cache_dir=cache", f"name=x{e['MY_SERVICE_TOKEN']}"],
        ["train", *TINY, f"+launch.slurm.setup=['export MY_API_KEY={p.make('a line of shell')}']"],
        ["train", *TINY, f"launch.alerts.command=[curl,-H,'Authorization: Bearer {p.make('a header')}']"],
        ["train", f"launch.alerts.webhook=https://hooks.slack.com/services/{p.make('a webhook in settings')}"],
        ["train", f"cluster.env={{MY_TOKEN: {p.make('cluster.env')}}}"],
        ["train", *TINY, f"cluster.env={{HTTPS_PROXY: 'http://me:{p.make('a proxy in cluster.env')}@proxy'}}"],
        *(["train", *TINY, "data.cache_dir=cache", "experiment=keeps", "--config-dir", folder] for folder in ("configs", "shaped")),
        ["plan", *LARGE, "gpus=16", f"name={e['MY_SERVICE_TOKEN']}", "output=no.json"],
        ["launch", "launch=slurm", "experiment=ladder_8", "--dry-run",
         f"launch.slurm.options=['--export=ALL,MY_TOKEN={p.make('sbatch')}']"],
        ["launch", "launch=k8s", "experiment=ladder_8", *K8S, f"launch.k8s.mount=/x/{e['HF_TOKEN']}", "--dry-run"],
    ]  # fmt: skip
    assert job.run("refused", refused) == [2] * len(refused), job.text()[-3000:]
    assert job.run("data", [["data", "build", *source("bad.jsonl")], ["data", "build", *hub]]) == [3, 3], job.text()[-3000:]
    assert "3 of 3 documents are unusable" in job.text() and "for url 'http://me:(hidden)@127.0.0.1" in job.text()
    none(job)


def test_the_live_page(job, older):
    argv = [sys.executable, "-c", "import sys; from shoestring.launch.cli import main; sys.exit(main())", "dash", ".", "--port", "0"]
    with subprocess.Popen(argv, cwd=job.work, env=job.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as server:
        try:
            line = server.stdout.readline()
            port = int(re.search(rb"127\.0\.0\.1:(\d+)/", line)[1])
            answers = {path: ask(port, path)[2] for path in ("/", "/_dash-layout", "/_dash-dependencies", "/records.csv?run=older/run")}
            until = time.monotonic() + 20
            while "example.org" not in (news := update(port, runs=["older/run", "runs/leaky"])[1]):
                assert time.monotonic() < until, news[:2000]
                time.sleep(0.1)
        finally:
            server.terminate()
            out, err = server.communicate(timeout=20)
    answers["update"] = news
    job.said |= {f"dash: {path}": text.encode() for path, text in answers.items()} | {"dash: stdout": line + out, "dash: stderr": err}
    none(job)
    assert "(hidden)@example.org" in news


def test_the_search_finds_what_it_looks_for(tmp_path):
    """In every spelling, in archives, and where only half of it is left."""
    planted = Planted(tmp_path)
    canary = planted.make("here", f"{word(12)}/{word(12)}")
    for i, spelling in enumerate(sorted(spellings(canary))):
        (tmp_path / f"{i}.bin").write_bytes(b"x" * i + spelling + b"y")
    found = planted.search(out=f"cut {canary[:12]}".encode())
    assert len(found) == len(spellings(canary)) + 1 and all(line.startswith("here: ") for line in found)
    shutil.make_archive(str(tmp_path / "all"), "zip", tmp_path)
    assert any("all.zip/0.bin, offset 0" in line for line in planted.search())
