"""What is sent to a scheduler: nodes and ranks, the torchrun line, the sbatch file, the JobSet; and what a job that ended leads to."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.conf.rules import replaced
from shoestring.launch import cli, environment, exit_codes
from shoestring.launch.jobs import after, follow, kubernetes, slurm
from shoestring.launch.jobs.job import load_words, plan_job

from . import cluster

WORDS = ["data=synthetic", "cluster=h800", "parallel.pp=2", "parallel.ep=8", "train.global_batch_tokens=65536", "model.num_layers=4"]
PYTHON = sys.executable


def job_of(*words):
    return plan_job(load([*WORDS, *words]), [*WORDS, *words])


@pytest.mark.parametrize(
    ("words", "nodes", "ranks"),
    [
        ([], 2, 8),  # 16 ranks fill two nodes of eight
        (["parallel.pp=1"], 1, 8),
        (["parallel.pp=1", "parallel.ep=2"], 1, 2),  # less than a node
        (["parallel.pp=1", "parallel.ep=1"], 1, 1),
        (["cluster.gpus_per_node=4"], 4, 4),
    ],
)
def test_ranks_fill_nodes(words, nodes, ranks):
    job = job_of(*words)
    assert (job.nodes, job.ranks_per_node, job.min_nodes) == (nodes, ranks, nodes)
    assert job.words[-1] == "launch.device=cuda"  # a node whose GPUs are not seen must not train on its CPUs


def test_ranks_that_do_not_fill_nodes():
    with pytest.raises(ConfigError, match=r"cluster.gpus_per_node = 12.*16 ranks.*nearest valid value: 8"):
        job_of("cluster.gpus_per_node=12")


def test_how_few_nodes_will_do():
    words = ["parallel.pp=1", "parallel.ep=8", "parallel.edp=3", "train.global_batch_tokens=49152", "launch.elastic=true"]
    job = job_of(*words)
    assert (job.nodes, job.min_nodes) == (3, 1)
    assert "--nnodes=1:3" in job.torchrun(endpoint="a:1", name="x")
    text = script(job)
    assert "#SBATCH --no-kill" in text and re.search(r"srun .*--wait=0 --no-kill", text)


def test_a_layout_that_cannot_shrink_that_far():
    """pp x ep = 16 ranks, two nodes of eight, cannot be had with one node, nor with three."""
    job = job_of("parallel.edp=2", "train.global_batch_tokens=131072", "launch.elastic=true")
    assert (job.nodes, job.min_nodes) == (4, 2)


def script(*jobs, folder=Path("/shared/runs/a/slurm"), numbers=()):
    return slurm.script(jobs, folder, ["shoestring", "launch"], chdir=Path("/shared"), numbers=numbers)


# ---------------------------------------------------------------- the words are real ones


def flags_of(*command):
    """Long options in a program's help, with our Slurm's configuration if it wants one."""
    found = subprocess.run(command, capture_output=True, text=True)
    return set(re.findall(r"--[a-z][\w-]*", found.stdout + found.stderr))


def used(text, pattern):
    return {flag for line in re.findall(pattern, text, re.M) for flag in re.findall(r"(?<!\S)(--[a-z][\w-]*)", line)}


ALL_SET = [
    "launch.slurm.partition=p", "launch.slurm.account=a", "launch.slurm.qos=q", "launch.slurm.constraint=c", "launch.slurm.exclude=[n1,n2]",
    "launch.elastic=true", "parallel.edp=2", "train.global_batch_tokens=131072",
]  # fmt: skip


def test_torchrun_has_every_flag(monkeypatch):
    known = flags_of(Path(PYTHON).with_name("torchrun"), "--help")
    assert "--nnodes" in known
    monkeypatch.setenv("COLUMNS", "300")
    for words in ([], ALL_SET):
        line = job_of(*words).torchrun(endpoint="a:1", name="x")
        ours = line[line.index("shoestring.launch.elastic") + 1 : line.index("shoestring.train") - 1]
        assert {flag.partition("=")[0] for flag in ours} <= known


def test_sbatch_and_srun_have_every_directive(tmp_path, monkeypatch):
    """Debian's Slurm; the container's two flags are a plugin's, which it lacks."""
    lacking = cluster.missing()
    if lacking:
        assert not os.environ.get("CI"), lacking
        pytest.skip(f"needs {lacking}")
    (tmp_path / "slurm.conf").write_text("ClusterName=test\nSlurmctldHost=localhost\nTaskPlugin=task/affinity\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    sbatch, srun = flags_of("sbatch", "--help"), flags_of("srun", "--help")
    assert "--nodes" in sbatch and "--cpu-bind" in srun
    sweep = script(job_of(), job_of("optim.lr=1"), numbers=[0, 1])
    for text in (script(job_of()), script(job_of(*ALL_SET)), script(job_of("cluster=cpu")), sweep):
        assert used(text, r"^#SBATCH (.*)$") <= sbatch
        call = text[text.index("\nsrun ") : text.index(" -m shoestring")]
        assert used(call, r".*") <= srun


def test_the_file_is_shell_and_keeps_every_word(tmp_path):
    """Whatever a value is made of, the ranks get it as it was typed."""
    odd = ["name=a b", "data.sources.x.kind=files", """data.sources.x.paths=["/d/$HOME/*.txt","/it's",'/`id`; "x"']"""]
    job = job_of(*odd)
    text = script(job, folder=tmp_path / "a b")
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    line = next(line for line in text.splitlines() if line.startswith("words="))
    shown = subprocess.run(["bash", "-c", f'{line}; printf "%s\\n" "${{words[@]}}"'], capture_output=True, text=True).stdout.splitlines()
    assert shown == list(job.words) and load_words(shown).data == job.config.data


def test_an_array_has_the_words_of_each(tmp_path):
    jobs = [job_of(f"optim.lr={lr}") for lr in (0.1, 0.2, 0.3)]
    text = script(*jobs, numbers=[1, 2, 5])
    assert "#SBATCH --array=1-2,5\n" in text and "job_%A_%a.log" in text
    part = text[text.index("case ") : text.index("esac") + 4]
    for number, job in zip([1, 2, 5], jobs):
        asked = f'SLURM_ARRAY_TASK_ID={number}; {part}; printf "%s\\n" "${{words[@]}}"'
        shown = subprocess.run(["bash", "-c", asked], capture_output=True, text=True)
        assert shown.stdout.splitlines() == list(job.words)
    with pytest.raises(ConfigError, match=r"job 1.*8 ranks, and another 16"):
        script(jobs[0], job_of("parallel.pp=1"), numbers=[0, 1])


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("30", 30 * 60), ("10:30", 630), ("1:00:00", 3600), ("2-0", 172800), ("1-2:03", 86400 + 2 * 3600 + 180), ("0-0:0:9", 9),
        ("", None), ("1d", None), ("1:", None),
    ],
)  # fmt: skip
def test_times_are_slurms(time, seconds):
    """By sbatch(1): minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds."""
    assert slurm._seconds(time) == seconds


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("launch.slurm.time=tomorrow", "launch.slurm.time = tomorrow: is no time"),
        ("launch.slurm.time=90", "launch.slurm.time = 90: is a number.*nearest valid value: 1:30:00"),
        ("launch.slurm.time=0:02:00", "launch.slurm.signal_s = 300: must be less than the limit.*nearest valid value: 60"),
        ('launch.slurm.options=["mail-type=END"]', "launch.slurm.options = mail-type=END.*--mail-type=END"),
    ],
)
def test_settings_that_sbatch_would_not_take(word, said):
    with pytest.raises(ConfigError, match=said):
        slurm.check(load([*WORDS, word]))


def test_a_limit_in_yaml(tmp_path):
    """YAML 1.1 reads 12:00:00 as a number of seconds, which Slurm would take for minutes."""
    (tmp_path / "launch").mkdir()
    for name, text in (("bare", "12:00:00"), ("quoted", '"12:00:00"')):
        (tmp_path / f"launch/{name}.yaml").write_text(f"how: slurm\nslurm: {{time: {text}, exclude: [n17]}}\n")
    slurm.check(load([*WORDS, "launch=quoted"], tmp_path))
    with pytest.raises(ConfigError, match=r"launch.slurm.time = 43200: is a number"):
        slurm.check(load([*WORDS, "launch=bare"], tmp_path))


def test_no_value_adds_a_line_of_its_own():
    with pytest.raises(ConfigError, match=r"launch.slurm.partition.*one line"):
        slurm.check(replaced(load(WORDS), "launch.slurm.partition", "a\n#SBATCH --uid=0"))


# ---------------------------------------------------------------- the command


def test_dry_run_of_2048_gpus(capsys):
    assert cli.main(["launch", "launch=slurm", "experiment=deepseek_v3", "--dry-run"]) == exit_codes.OK
    out, err = capsys.readouterr()
    assert "#SBATCH --nodes=256\n" in out and "#SBATCH --gpus-per-node=8\n" in out and "not ready yet: data.sources.files.paths" in err
    assert "-m shoestring.launch.elastic --nnodes=256 --nproc-per-node=8 " in out and '-m shoestring.train "${words[@]}"' in out
    assert not Path("runs/deepseek_v3").exists()


def test_torchrun_wants_the_first_node(capsys):
    assert cli.main(["launch", "launch=torchrun", *WORDS]) == exit_codes.CONFIG
    assert "launch.endpoint" in capsys.readouterr().err
    assert cli.main(["launch", "launch=torchrun", *WORDS, "launch.endpoint=node0", "--dry-run"]) == exit_codes.OK
    line = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert "--rdzv-endpoint=node0:29400" in line and line[-1] == "launch.device=cuda"


def test_without_slurm_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["launch", "launch=slurm", *WORDS]) == exit_codes.CONFIG
    assert "no sbatch here" in capsys.readouterr().err and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- after a link of the chain


@pytest.mark.parametrize(
    ("code", "steps", "then"),
    [
        (0, [10], "done"),
        (75, [10], "again"),
        (75, [10, 20], "again"),
        (75, [0], "again"),  # before its first step: the limit came early, or the data took long
        (75, [0, 0, 0], "again"),
        (75, [0, 0, 0, 0], "stop"),
        (5, [10, 10, 10, 10], "again"),  # three without a new checkpoint
        (5, [10, 10, 10, 10, 10], "stop"),
        (5, [10, 10, 10, 20], "again"),
        (137, [0], "again"),
        (1, [0], "stop"),  # a bug at the start comes again
        (1, [10, 20], "again"),
        (1, [10, 10], "stop"),
        (76, [10], "other size"),
        *((code, [10], "stop") for code in (2, 3, 4, 6, 7, 130)),
    ],
)
def test_what_comes_next(code, steps, then):
    assert after.decide(code, steps=steps, most=3) == then


@given(st.lists(st.sampled_from([5, 75, 137]), max_size=30), st.data())
def test_money_is_not_spent_forever(codes, data):
    """However a chain goes, at most `most` links in a row bring nothing."""
    steps, idle, most = [], 0, 3
    for code in codes:
        before = steps[-1] if steps else 0
        steps.append(before + data.draw(st.sampled_from([0, 0, 5])))
        idle = 0 if steps[-1] > before else idle + 1
        assert (after.decide(code, steps=steps, most=most) == "again") == (idle <= most)
        if idle > most:
            return


def test_a_torn_line_of_links(tmp_path):
    (tmp_path / "links.jsonl").write_text('{"job": "7", "step": 5}\n{"job": "6", "step": 1}\n[]\n{"job": "7", "st')
    here = environment.SlurmJob(id="7", restart=1, task="", nodes="n0")
    assert [link["step"] for link in after._links(tmp_path, here)] == [5]


# ---------------------------------------------------------------- following

SHOWN = (
    "JobId=12 ArrayJobId=11 ArrayTaskId=0 JobName=a JobState=RUNNING Reason=None Restarts=1 ExitCode=0:0 NodeList=n[0-1]\n"
    "JobId=11 ArrayJobId=11 ArrayTaskId=1-3 JobName=a b=c JobState=PENDING Reason=Resources Restarts=0 ExitCode=0:0 NodeList=(null)\n"
    "JobId=13 JobName=a JobState=FAILED Reason=NonZeroExitCode Restarts=0 ExitCode=75:0 NodeList=n2\n"
    "JobId=14 JobName=a JobState=CANCELLED Reason=None Restarts=0 ExitCode=0:15 NodeList=n2\n"
)


def test_states_as_scontrol_has_them(monkeypatch):
    monkeypatch.setattr(follow.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, SHOWN, ""))
    running, waiting, failed, cancelled = follow.states("11")
    assert str(running) == "job 11_0: RUNNING on n[0-1], requeued 1 time" and str(waiting) == "job 11_1-3: PENDING (Resources)"
    assert (failed.code, cancelled.code, follow._code(cancelled)) == (75, 143, 143)


def test_followed_to_its_end(tmp_path, monkeypatch):
    """Through a moment that looks like an end, on to the job that it sends, until that one has run into its limit."""
    told = [("7", state) for state in ("RUNNING", "FAILED", "PENDING", "COMPLETED", "COMPLETED")]
    told += [("8", state) for state in ("RUNNING", "TIMEOUT", "TIMEOUT")]
    said, asked = [], []

    def states(job):
        asked.append(job)
        now = told.pop(0)
        if now == ("7", "COMPLETED"):
            (tmp_path / "sent.json").write_text('{"id": "8", "script": "x"}')
        return [follow.State(id=now[0], state=now[1], reason="", nodes="", restarts=0, code=0)]

    monkeypatch.setattr(follow, "states", states)
    code = follow.follow(slurm.Sent(id="7", script="x"), tmp_path, say=said.append, tick_s=0)
    assert asked == ["7"] * 5 + ["8"] * 3 and not told
    assert code == exit_codes.LOST and "launch.slurm.signal_s" in said[-1]


def test_logs_as_they_grow(tmp_path):
    tails = follow.Tails(tmp_path)
    one, two = tmp_path / "job_1.log", tmp_path / "job_1_node_0.log"
    one.write_text("a\nb")
    assert list(tails.lines()) == ["--- job_1.log", "a"]
    one.write_text("a\nbc\n")
    two.write_bytes(b"x\n\xff\n")
    assert list(tails.lines()) == ["bc", "--- job_1_node_0.log", "x", "�"]
    assert list(tails.lines()) == []
    two.write_bytes(b"y" * 80 + b"\n" + b"z\n" * (1 << 20))
    lines = list(tails.lines())
    assert "left out" in lines[0] and len(lines) == (1 << 19) + 1


# ---------------------------------------------------------------- Kubernetes


def test_the_job_set_is_what_its_schema_says():
    """Against the API's published types (kubeflow_trainer_api has JobSet's v1alpha2 and Kubernetes' own): nothing unknown or mistyped."""
    from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

    for words in ([], ["cluster=cpu"], ["name=Odd_Name of a run"]):
        job = job_of("launch.k8s.image=registry/image:1", "launch.k8s.claim=runs", *words)
        text = kubernetes.manifest(job)
        plain = yaml.safe_load(text)
        assert JobsetV1alpha2JobSet.from_dict(plain).to_dict() == plain
        pods = plain["spec"]["replicatedJobs"][0]["template"]["spec"]
        container = pods["template"]["spec"]["containers"][0]
        assert pods["parallelism"] == pods["completions"] == job.nodes
        assert container["resources"]["limits"].get("nvidia.com/gpu", "0") == ("8" if not words or "name" in words[0] else "0")
        name = plain["metadata"]["name"]
        assert re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", name)
        assert f"--rdzv-endpoint={name}-node-0-0.{name}:29400" in container["command"]
        final = pods["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
        assert exit_codes.CONFIG in final and exit_codes.PREEMPTED not in final and exit_codes.LOST not in final and 0 not in final


@pytest.mark.parametrize("field", ["image", "claim"])
def test_what_a_job_set_needs(field):
    words = {"image": "launch.k8s.claim=c", "claim": "launch.k8s.image=i"}
    with pytest.raises(ConfigError, match=f"launch.k8s.{field}"):
        kubernetes.manifest(job_of(words[field]))


def test_sent_again_it_is_known(tmp_path):
    (tmp_path / "sent.json").write_text(json.dumps({"id": "5", "script": "x"}))
    assert slurm.Sent.read(tmp_path).id == "5"
    (tmp_path / "sent.json").write_text('{"id": ')
    assert slurm.Sent.read(tmp_path) is None
