"""Several runs from one command line: which jobs, in which order, in which directories; held against Hydra's own sweeper."""

import itertools

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.conf.sweep import MOST, expand, sweep


def own(*words, config_dir=None):
    return [tuple(mine) for mine, _ in expand(words, config_dir)]


@pytest.mark.parametrize(
    "line",
    [
        "experiment=smoke optim.lr=1e-3,3e-4 parallel.ep=1,2",  # two choices
        "train.steps=range(10,30,10) model.norm_topk=choice(true,false)",  # the longer words for them
        "data.sources.a.kind=files data.sources.a.paths=[x,y],[z]",  # values that are lists
        "optim.lr=1e-3 optim.lr=1e-2,1e-1",  # the last word for a key counts
        "name=sort(b,a) train.seed=int(choice(1,'2'))",  # functions of the grammar
    ],
)
def test_jobs_and_their_order_are_those_of_hydra(line):
    words = line.split()
    [batch] = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(words), None)
    several = [i for i, column in enumerate(zip(*batch)) if len(set(column)) > 1]
    assert own(*words) == [tuple(job[i] for i in several) for job in batch]


def test_each_job_is_what_its_words_say():
    jobs = sweep(["experiment=smoke", "optim.lr=0.1,0.2", "parallel.ep=1,2"])
    assert [job.number for job in jobs] == [0, 1, 2, 3]
    assert [(job.config.optim.lr, job.config.parallel.ep) for job in jobs] == list(itertools.product([0.1, 0.2], [1, 2]))
    for job in jobs:
        assert job.config == load(job.words) and job.error is None
        with pytest.raises(Exception, match="fixed"):
            job.config.name = "x"
    assert str(jobs[1]) == "job 1 (optim.lr=0.1 parallel.ep=2)"
    assert jobs[1].config.run_dir == "runs/" + jobs[1].config.name == "runs/smoke/1_optim.lr=0.1_parallel.ep=2"


def test_files_of_a_group_by_a_pattern(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "twin.yaml").write_text("# @package model\ndefaults: [tiny]\n")
    assert own("model=glob(t*)", config_dir=tmp_path) == [("model=tiny",), ("model=twin",)]
    assert own("precision=glob(*,exclude=[b*,fp8])") == [("precision=fp32",), ("precision=fp64",)]


@pytest.mark.parametrize(
    ("line", "dirs"),
    [
        ("experiment=smoke", ["runs/smoke/0"]),  # nothing differs: one job
        ("run_dir=out optim.lr=1,2", ["out/0_optim.lr=1", "out/1_optim.lr=2"]),  # the same for all is where they all go
        ("run_dir=out name=a,b", ["out/0_name=a", "out/1_name=b"]),  # a name that does not matter
        ("name=a,b", ["runs/a", "runs/b"]),  # as the words say
        ("run_dir='out/${optim.lr}' optim.lr=1,2", ["out/1", "out/2"]),  # likewise, by interpolation
        ("experiment=smoke,tiny", ["runs/smoke/0_experiment=smoke", "runs/tiny/1_experiment=tiny"]),  # not asked for: runs of their own
        ("cluster.device='a/b','../c'", ["runs/run/0_cluster.device=_a_b", "runs/run/1_cluster.device=_.._c"]),  # never another folder
        (r"run_dir='it\'s' optim.lr=1,2", ["it's/0_optim.lr=1", "it's/1_optim.lr=2"]),  # quotes of its own
    ],
)
def test_where_jobs_go(line, dirs):
    jobs = sweep(line.split())
    assert [job.config.run_dir for job in jobs] == dirs
    assert load(jobs[-1].words) == jobs[-1].config
    assert len({job.config.name for job in jobs}) == len(jobs)


def test_a_long_name_is_cut_and_stays_its_own():
    jobs = sweep(["cluster.device=" + ",".join("x" * 200 + end for end in "ab")])
    leaves = [job.config.run_dir.split("/")[2] for job in jobs]
    assert len(set(leaves)) == 2 and all(len(leaf) == 120 for leaf in leaves)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["name=a,b", "optim.lr=1,2"], "run_dir = runs/a: is that of job 0 and of job 1: "),
        (["run_dir=a,./a"], "run_dir = ./a: is that of job 0 and of job 1: "),
        (["optim.lr=interval(0,1)"], "optim.lr = interval(0,1): has no values to go through"),
        (["optim.lr=shuffle(1,2)"], "optim.lr = shuffle(1,2): would be in another order each time"),
        (["train.steps=range(1,9,shuffle=true)"], "command line = train.steps=range(1,9,shuffle=true): is not KEY=VALUE"),
        (["train.steps=range(9,1)"], "train.steps = range(9,1): is no value at all"),
        (["train.steps=range(0,1000000000000)"], f"--multirun = {MOST + 1:,} jobs: must be at most {MOST:,}"),
        (["model=glob(z*)"], "model = glob(z*): is no value at all; there are deepseek_v3, "),
        (["foo"], "command line = foo: is not KEY=VALUE"),
    ],
)
def test_refuses(words, says):
    with pytest.raises(ConfigError) as caught:
        sweep(words)
    assert str(caught.value).startswith(says)


@pytest.mark.parametrize(
    ("word", "errors"),
    [
        ("optim.lr=1,-1", ["", "optim.lr = -1.0: must be positive and finite; nearest valid value: 0.001"]),  # a rule
        ("model=tiny,tny", ["", "model = tny: no such choice; there are "]),  # Hydra's complaint
        ("optim.lrr=1,2", ["optim.lrr = 1: no such key; ", "optim.lrr = 2: no such key; "]),  # every job's
        ("run_dir=a,''", ["", "run_dir = '': must not be empty"]),  # a place of its own that is none
    ],
)
def test_what_is_wrong_with_a_job_is_in_the_job(word, errors):
    jobs = sweep([word])
    assert [str(job.error or "")[: len(said)] for job, said in zip(jobs, errors, strict=True)] == errors
    assert all((job.config is None) == bool(said) for job, said in zip(jobs, errors))


def test_without_multirun_several_values_are_refused_and_it_is_named():
    with pytest.raises(ConfigError, match=r"^optim.lr = 1,2: is several values; a list is written \[a,b\], and --multirun "):
        load(["optim.lr=1,2"])
