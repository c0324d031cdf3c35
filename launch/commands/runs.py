"""Commands that start runs and look at them: train, launch, doctor, runs, dollars, report."""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from ...conf.compose import load, to_yaml
from ...conf.errors import ConfigError, closest
from ...conf.schema import Config
from ...conf.sweep import sweep
from .. import environment, exit_codes
from . import command


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    command.config_arguments(parser)
    parser.add_argument("--cfg", choices=["job"], help="print the resolved configuration instead of training")
    parser.add_argument("-m", "--multirun", action="store_true", help="words may have several values: a run for each combination of them")
    parser.add_argument("--job", type=int, metavar="I", help="of --multirun, only this one, from 0 on: for arrays of jobs")


def _train(args: argparse.Namespace) -> int | None:
    if args.multirun:
        return _multirun(args)
    if args.job is not None:
        raise ConfigError("--job", args.job, "is one of several: give --multirun")
    return _train_one(load(args.overrides, args.config_dir), args.overrides, args)


def _train_one(config: Config, words: Sequence[str], args: argparse.Namespace) -> int | None:
    if args.cfg:
        print(to_yaml(config), end="")
        return None
    environment.prepare_ranks(config.cluster, config.launch.threads)
    return command.call("shoestring.launch.launcher:train", config, environment.command([*words, *_config_dir(args)]))


def _multirun(args: argparse.Namespace) -> int | None:
    jobs = sweep(args.overrides, args.config_dir)
    if args.job is not None:
        if not 0 <= args.job < len(jobs):
            raise ConfigError("--job", args.job, f"there are jobs 0 to {len(jobs) - 1}", closest(args.job, range(len(jobs))))
        job = jobs[args.job]
        if job.error:
            raise job.error
        return _train_one(job.config, job.words, args)
    if args.cfg:
        for job in jobs:
            print(f"# {job}\n{to_yaml(job.config) if job.config else f'# error: {job.error}'}\n---")
        return exit_codes.CONFIG if any(job.error for job in jobs) else None
    if environment.Place.from_environment():
        raise ConfigError("--multirun", True, "starts the ranks of one job after the other itself: under torchrun, choose one with --job I")
    environment.prepare(threads=1)
    return command.call("shoestring.launch.sweep:run", jobs, _config_dir(args))


def _config_dir(args: argparse.Namespace) -> list[str]:
    return ["--config-dir", args.config_dir] if args.config_dir else []


def _launch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=(
        "launch=local (default), torchrun, slurm, k8s; plan=FILE of `shoestring plan`, number=1; and " + command.OVERRIDES))  # fmt: skip
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with groups or experiments of your own")
    parser.add_argument("-m", "--multirun", action="store_true", help="words may have several values: a run for each combination of them")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be sent or run")
    parser.add_argument("--detach", action="store_true", help="under Slurm: do not follow the job")
    parser.add_argument("--no-doctor", dest="doctor", action="store_false", help="start even where `doctor --quick` finds a failure")


def _launch(args: argparse.Namespace) -> int | None:
    options = {"multirun": args.multirun, "dry_run": args.dry_run, "detach": args.detach, "examined": args.doctor}
    return command.call("shoestring.launch.jobs.command:main", args.overrides, args.config_dir, **options)


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    command.config_arguments(parser)
    parser.add_argument("--json", dest="as_json", action="store_true", help="every line as JSON")
    parser.add_argument("--quick", dest="only_quick", action="store_true", help="only what takes a second or two and needs no other rank")
    parser.add_argument("--port", type=int, metavar="N", help="that ranks will meet at (default: 29400)")


def _doctor(args: argparse.Namespace) -> int:
    environment.prepare(threads=1)
    options = {key: getattr(args, key) for key in ("as_json", "only_quick", "port")}
    return command.call("shoestring.launch.doctor.command:main", args.overrides, args.config_dir, **options)


def _runs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="DIR", help="folders with runs in and below them (default: runs); or: compare A B")
    parser.add_argument("--sort", metavar="FIELD", help="such as loss, dollars, updated or state (default: path)")
    parser.add_argument("--reverse", action="store_true", help="the other way round")
    parser.add_argument("--csv", dest="csv_path", type=Path, metavar="FILE", help="write everything as CSV; - is the console")
    parser.add_argument("--json", dest="json_out", action="store_true", help="print everything as JSON")
    parser.add_argument("--html", dest="html_path", type=Path, metavar="FILE", help="of a comparison: write both curves as a page")


def _runs(args: argparse.Namespace) -> None:
    command.call("shoestring.launch.overview.command:main", **{key: value for key, value in vars(args).items() if key != "command"})


def _dollars_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="such as runs/tiny; it may be running")
    parser.add_argument("--json", dest="as_json", action="store_true", help="print everything as JSON")


def _dollars(args: argparse.Namespace) -> None:
    environment.prepare(threads=1)
    print(command.call("shoestring.launch.dollars:show", args.run_dir, as_json=args.as_json))


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="such as runs/tiny")


def _report(args: argparse.Namespace) -> None:
    print(command.call("shoestring.launch.report:write_report", args.run_dir))


def _dash_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="*", type=Path, metavar="DIR", help="run directories, or folders with runs below them (default: runs)"
    )
    parser.add_argument("--port", type=int, default=8050, metavar="N", help="on 127.0.0.1; 0: any that is free (default: 8050)")


def _dash(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("dash") is None:
        raise ConfigError("dash", "", "needs packages that are not installed: pip install 'shoestring[dash]'")
    if not 0 <= args.port < 65536:
        raise ConfigError("--port", args.port, "is a number from 0 to 65535", 8050)
    command.call("shoestring.launch.dash.command:main", args.folders, args.port)


def _grafana_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="write it there instead of printing it")


def _grafana(args: argparse.Namespace) -> None:
    if args.output:
        print(command.call("shoestring.launch.grafana:write", args.output))
    else:
        print(command.call("shoestring.launch.grafana:text"), end="")


def _workspace_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("project", metavar="ENTITY/PROJECT", help="as in the address of its page")


def _workspace(args: argparse.Namespace) -> None:
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise ConfigError("workspace", "", "needs a package that is not installed: pip install 'shoestring[workspace]'")
    print(command.call("shoestring.launch.workspace:save", args.project))


COMMANDS = {
    "train": command.Command(
        help="train a model, or go on with a run that was stopped",
        arguments=_train_arguments,
        run=_train,
        examples=(
            "shoestring train experiment=tiny                              four processes on this machine, a minute",
            "shoestring train experiment=tiny model=small parallel.ep=4    the same with another model and layout",
            "shoestring train experiment=tiny --cfg job                    print every setting, train nothing",
            "shoestring train --multirun experiment=tiny optim.lr=1e-3,3e-4 parallel.ep=1,2          four runs, one after the other",
            "torchrun --nproc-per-node 8 -m shoestring.train ...           as ranks that torchrun starts",
        ),
    ),
    "launch": command.Command(
        help="start a run here, under torchrun, under Slurm or on Kubernetes, and follow it",
        arguments=_launch_arguments,
        run=_launch,
        examples=(
            "shoestring launch plan=plan.json                              what was planned, on this machine",
            "shoestring launch launch=slurm plan=plan.json --dry-run       the sbatch file and the torchrun line of each node",
            "shoestring launch launch=slurm plan=plan.json launch.slurm.partition=gpu launch.slurm.time=12:00:00",
            "shoestring launch launch=torchrun launch.endpoint=node0 experiment=ladder_64     on each node",
            "shoestring launch launch=k8s launch.k8s.image=IMAGE launch.k8s.claim=CLAIM experiment=ladder_8 | kubectl apply -f -",
        ),
    ),
    "doctor": command.Command(
        help="what is wrong with this node or fabric, before money is spent",
        arguments=_doctor_arguments,
        run=_doctor,
        examples=(
            "shoestring doctor experiment=deepseek_v3                      this machine, and a few ranks on it",
            "shoestring doctor experiment=tiny --quick                     a second",
            "torchrun --nnodes 4 --nproc-per-node 8 ... --no-python shoestring doctor experiment=deepseek_v3    on every node: the fabric",
        ),
    ),
    "runs": command.Command(
        help="list the runs on this disk with their state, loss, speed and cost; or compare two",
        arguments=_runs_arguments,
        run=_runs,
        examples=(
            "shoestring runs --sort loss",
            "shoestring runs runs/sweep --csv runs.csv",
            "shoestring runs compare runs/a runs/b --html compare.html",
        ),
    ),
    "dash": command.Command(
        help="a local page that follows runs: health, speed, cost, and when they will be done",
        arguments=_dash_arguments,
        run=_dash,
        examples=(
            "shoestring dash                                               the runs in runs/, at http://127.0.0.1:8050/",
            "shoestring dash runs/a runs/b --port 0                        these two, side by side, on any free port",
        ),
    ),
    "dollars": command.Command(
        help="where each dollar of a run went, and what is still to come",
        arguments=_dollars_arguments,
        run=_dollars,
        examples=("shoestring dollars runs/tiny", "shoestring dollars runs/tiny --json"),
    ),
    "grafana": command.Command(
        help="the Grafana dashboard of what launch.prometheus_port exports, as JSON to import",
        arguments=_grafana_arguments,
        run=_grafana,
        examples=("shoestring grafana --output grafana.json",),
    ),
    "workspace": command.Command(
        help="save a view of a W&B project, with the charts arranged",
        arguments=_workspace_arguments,
        run=_workspace,
        examples=("shoestring workspace my-team/shoestring",),
    ),
    "report": command.Command(
        help="write a run's report.html again from its records",
        arguments=_report_arguments,
        run=_report,
        examples=("shoestring report runs/tiny",),
    ),
}
