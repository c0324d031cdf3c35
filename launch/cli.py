"""The command line: `shoestring COMMAND ...`. One small function per command; its help is in one table.

Nothing heavy is imported here: `shoestring --help` and `--cfg job` answer in half a second, where torch alone takes two. What a command
runs is therefore named by a string and resolved when it is needed, in `_call` only; a test resolves every one of them.
"""

import argparse
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..conf.compose import load, to_yaml
from ..conf.errors import ConfigError, closest
from ..conf.schema import Config
from ..conf.sweep import sweep
from . import environment, exit_codes

_OVERRIDES = "settings such as model=small, optim.lr=3e-4 or experiment=tiny"


@dataclass(frozen=True, kw_only=True)
class Command:
    """`arguments` fills the command's parser; `run` gets what was parsed and returns an exit code, or None for 0."""

    help: str
    arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int | None]
    examples: tuple[str, ...] = ()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. Errors that a person can mend are one line on stderr, others a traceback."""
    _leave_the_tree()
    parser, parsers = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        return exit_codes.CONFIG
    # Overrides may stand before and after options; argparse takes only the first run of them.
    if rest and (any(word.startswith("-") for word in rest) or not hasattr(args, "overrides")):
        parsers[args.command].error(f"what is {' '.join(rest)}?")
    if rest:
        args.overrides = [*args.overrides, *rest]
    try:
        return COMMANDS[args.command].run(args) or exit_codes.OK
    except (Exception, KeyboardInterrupt) as error:
        code = exit_codes.of(error)
        if code == exit_codes.FAILED:
            raise
        print(f"error: {exit_codes.sentence(error)}", file=sys.stderr)
        return code


def _leave_the_tree() -> None:
    """`python -m shoestring...` in the repository puts it on the path, where `train` and `kernels` would be found as top-level packages
    (transformers looks for a `kernels`)."""
    tree = Path(__file__).resolve().parents[1]
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != tree]


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    codes = "\n".join(f"  {code:>3}  {meaning}" for code, meaning in exit_codes.MEANING.items())
    parser = argparse.ArgumentParser(
        prog="shoestring",
        description="Trains DeepSeek-V3-class mixture-of-experts language models on a small budget.",
        epilog=f"exit codes:\n{codes}\n\n`shoestring COMMAND --help` has each command's arguments and examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"shoestring {__version__}")
    choices = parser.add_subparsers(dest="command", metavar="COMMAND")
    parsers = {}
    for name, command in COMMANDS.items():
        parsers[name] = choices.add_parser(
            name,
            help=command.help,
            description=command.help[0].upper() + command.help[1:] + ".",
            epilog="examples:\n" + "\n".join(f"  {line}" for line in command.examples) if command.examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.arguments(parsers[name])
    return parser, parsers


def _call(target: str, *args: Any, **kwargs: Any) -> Any:
    """`target` is "module:function"."""
    return pkgutil.resolve_name(target)(*args, **kwargs)


# ---------------------------------------------------------------- commands


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=_OVERRIDES)
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with groups or experiments of your own")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
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
    return _call("shoestring.launch.launcher:train", config, environment.command([*words, *_config_dir(args)]))


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
    return _call("shoestring.launch.sweep:run", jobs, _config_dir(args))


def _config_dir(args: argparse.Namespace) -> list[str]:
    return ["--config-dir", args.config_dir] if args.config_dir else []


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run directory (its newest checkpoint) or one checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="a new folder for config.json, safetensors and the tokenizer")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp64", "fp8"], default="auto",
                        help="of the weights there; fp8 as DeepSeek-V3 was released (default: the run's)")  # fmt: skip
    parser.add_argument("--weights", choices=["master", "ema"], default="master", help="those trained, or their moving average")


def _export(args: argparse.Namespace) -> None:
    environment.prepare(threads=1)
    print(_call("shoestring.train.interop.hf:export", args.source, args.out, dtype=args.dtype, weights=args.weights))


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="a Hugging Face DeepSeek checkpoint on this machine; FP8 too")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="a new folder for the checkpoint")
    parser.add_argument("--mtp", choices=["check", "shared-from-main", "skip"], default="check",
                        help="layers for multi-token prediction, whose embedding and head must equal the model's (check), "
                             "are taken to (shared-from-main), or which are left out (skip)")  # fmt: skip
    parser.add_argument("--skip-mtp", dest="mtp", action="store_const", const="skip", help="the same as --mtp skip")


def _import(args: argparse.Namespace) -> None:
    environment.prepare(threads=1)
    print(_call("shoestring.train.interop.hf:import_", args.hf_dir, args.out, mtp=args.mtp))


def _upcycle_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a dense run, checkpoint, or Hugging Face folder: no block has routing")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="a new folder for the checkpoint")
    _config_arguments(parser)


def _upcycle(args: argparse.Namespace) -> None:
    config = load(args.overrides, args.config_dir)
    environment.prepare(threads=1)
    print(_call("shoestring.train.interop.upcycle:upcycle", args.source, args.out, config.model, seed=config.train.seed))


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser("build", help="tokenise and pack into the cache")
    _config_arguments(build)
    build.add_argument("--shard", type=int, default=0, metavar="I", help="this process's share of the work, from 0")
    build.add_argument("--num-shards", type=int, default=1, metavar="N", help="how many processes share it")


def _data(args: argparse.Namespace) -> None:
    config = load(args.overrides, args.config_dir)
    environment.prepare(threads=1)
    _call(
        "shoestring.train.data.corpus:build", config.data, vocab_size=config.model.vocab_size, shard=args.shard, num_shards=args.num_shards
    )


def _checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    kinds = {
        "list": "each with its step, date, size, layout, precision and state",
        "verify": "read and hash every file of the newest one",
        "prune": "remove old ones; never the newest that is whole",
    }
    for name, help in kinds.items():
        kinds[name] = actions.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        kinds[name].add_argument("source", type=Path, metavar="RUN_OR_FOLDER", help="a run directory, its checkpoints/, or one checkpoint")
    kinds["verify"].add_argument("--all", dest="every", action="store_true", help="not only the newest")
    kinds["verify"].add_argument("--quarantine", action="store_true", help="give damaged ones a name that says so: step_N.damaged")
    kinds["prune"].add_argument("words", nargs=1, metavar="keep=N", help="how many to keep")
    kinds["prune"].add_argument("--dry-run", action="store_true", help="only say which would go")


def _checkpoint(args: argparse.Namespace) -> int | None:
    targets = {
        "list": "shoestring.launch.checkpoint:show",
        "verify": "shoestring.launch.checkpoint:verify",
        "prune": "shoestring.launch.checkpoint:prune",
    }
    options = {key: value for key, value in vars(args).items() if key not in ("command", "action", "source")}
    return _call(targets[args.action], args.source, **options)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="such as runs/tiny")


def _report(args: argparse.Namespace) -> None:
    print(_call("shoestring.launch.report:write_report", args.run_dir))


def _runs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("words", nargs="*", metavar="DIR", help="folders with runs in and below them (default: runs); or: compare A B")
    parser.add_argument("--sort", metavar="FIELD", help="such as loss, dollars, updated or state (default: path)")
    parser.add_argument("--reverse", action="store_true", help="the other way round")
    parser.add_argument("--csv", dest="csv_path", type=Path, metavar="FILE", help="write everything as CSV; - is the console")
    parser.add_argument("--json", dest="json_out", action="store_true", help="print everything as JSON")
    parser.add_argument("--html", dest="html_path", type=Path, metavar="FILE", help="of a comparison: write both curves as a page")


def _runs(args: argparse.Namespace) -> None:
    _call("shoestring.launch.overview.command:main", **{key: value for key, value in vars(args).items() if key != "command"})


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="RUN_OR_EXPORT", help="a run directory, a checkpoint, or a Hugging Face folder")
    parser.add_argument("prompt", nargs="?", default="", help="the text to go on from (default: the begin of a document)")
    parser.add_argument("--weights", choices=["master", "ema"], default="master", help="of a run: those trained, or their moving average")
    parser.add_argument("--max-tokens", type=int, default=200, metavar="N", help="tokens to add at most (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="T", help="0: always the likeliest token (default: 0.8)")
    parser.add_argument("--greedy", dest="temperature", action="store_const", const=0.0, help="the same as --temperature 0")
    parser.add_argument("--top-p", type=float, default=0.95, metavar="P",
                        help="draw from the fewest tokens that have this probability (default: 0.95)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the first continuation; the next has S + 1 (default: 0)")
    parser.add_argument("--num", type=int, default=1, metavar="N", help="continuations (default: 1)")


def _sample(args: argparse.Namespace) -> None:
    environment.prepare(threads=min(8, os.cpu_count() or 1))
    _call("shoestring.launch.sample:show", **{key: value for key, value in vars(args).items() if key != "command"})


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=(
        "layouts=smoke (default), all, exhaustive or such as pp2ep2,ep4/alltoall; world=8 processes; steps=3; seed=0; "
        "routing=natural, one_expert, idle_rank, alternating, ties or trace:FILE; target=shoestring or deepspeed; out=runs/verify; "
        "and " + _OVERRIDES))  # fmt: skip
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with groups or experiments of your own")


def _verify(args: argparse.Namespace) -> int:
    environment.prepare(threads=1)
    environment.tell_deepspeed("cpu")
    return _call("shoestring.launch.verify.command:main", args.overrides, args.config_dir)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=(
        "gpus=N or auto; tokens=N of the run; budget_usd=N; deadline_days=N; search=false prices the layout given; top=5 plans; "
        "output=plan.json; page=plan.html; and " + _OVERRIDES))  # fmt: skip
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with groups or experiments of your own")


def _plan(args: argparse.Namespace) -> int:
    environment.prepare(threads=1)
    return _call("shoestring.launch.plan.command:main", args.overrides, args.config_dir)


def _launch_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=(
        "launch=local (default), torchrun, slurm, k8s; plan=FILE as `shoestring plan` wrote it, number=1; and " + _OVERRIDES))  # fmt: skip
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with groups or experiments of your own")
    parser.add_argument("-m", "--multirun", action="store_true", help="words may have several values: a run for each combination of them")
    parser.add_argument("--dry-run", action="store_true", help="only show what would be sent or run")
    parser.add_argument("--detach", action="store_true", help="under Slurm: do not follow the job")
    parser.add_argument("--no-doctor", dest="doctor", action="store_false", help="start even where `doctor --quick` finds a failure")


def _launch(args: argparse.Namespace) -> int | None:
    options = {"multirun": args.multirun, "dry_run": args.dry_run, "detach": args.detach, "examined": args.doctor}
    return _call("shoestring.launch.jobs.command:main", args.overrides, args.config_dir, **options)


def _rehearse_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=(
        "ranks=all-distinct (default: one of each kind) or such as 0,17; imbalance=1.0, what the busiest rank's experts get over the mean; "
        "out=FILE, everything as JSON; and " + _OVERRIDES))  # fmt: skip
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with groups or experiments of your own")


def _rehearse(args: argparse.Namespace) -> None:
    environment.prepare(threads=1)
    _call("shoestring.launch.rehearse.command:main", args.overrides, args.config_dir)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    kernels = actions.add_parser("kernels", help="every op: right, how fast, and beside what torch has")
    kernels.add_argument("--only", default="", metavar="OPS", help="comma-separated parts of ops' names, such as 'fp8 wgrad,swiglu'")
    kernels.add_argument("--shapes", default="", metavar="SHAPES", help="comma-separated parts of shapes, such as x7168x2048")
    kernels.add_argument("--tune", action="store_true", help="time every configuration of kernels that have several")
    kernels.add_argument("--check", action="store_true", help="no times: only whether results are right")
    kernels.add_argument("--keep", action="store_true", help="as the last result of this device, in the checkout's docs/results")
    step = actions.add_parser("step", help="train a cut-down DeepSeek-V3 in bf16 and fp8: tokens/s, MFU, memory, loss")
    step.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="another model: " + _OVERRIDES)
    step.add_argument("--steps", type=int, default=30, metavar="N", help="in each precision (default: 30)")
    step.add_argument("--limit", dest="limit_s", type=float, default=300.0, metavar="SECONDS", help="for each precision (default: 300)")
    step.add_argument("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="for the runs' records (default: runs/bench)")
    fabric = actions.add_parser("fabric", help="kernels, memory and links of this machine or cluster, as a file for plans")
    fabric.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=(
        "name=NAME of the cluster; out=PATH of the file (default: conf/cluster/NAME.yaml); processes=N on CPU (default: one per core); "
        "and what is not measured, such as cluster=h100 cluster.price_per_gpu_hour=2"))  # fmt: skip
    for action in (kernels, step):
        action.add_argument("--json", dest="json_path", type=Path, metavar="PATH", help="write everything as JSON")
        action.add_argument("--page", dest="page_path", type=Path, metavar="PATH", help="write a page of charts and tables")


def _bench(args: argparse.Namespace) -> int:
    environment.prepare(threads=1)
    if args.action == "fabric":
        return _call("shoestring.launch.bench.fabric:main", args.overrides)
    options = {key: value for key, value in vars(args).items() if key not in ("command", "action", "overrides")}
    if args.action == "step":
        return _call("shoestring.launch.bench.command:train_step", args.overrides, **options)
    return _call("shoestring.launch.bench.command:kernels", **options)


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument("--json", dest="as_json", action="store_true", help="every line as JSON")
    parser.add_argument("--quick", dest="only_quick", action="store_true", help="only what takes a second or two and needs no other rank")
    parser.add_argument("--port", type=int, metavar="N", help="that ranks will meet at (default: 29400)")


def _doctor(args: argparse.Namespace) -> int:
    environment.prepare(threads=1)
    options = {key: getattr(args, key) for key in ("as_json", "only_quick", "port")}
    return _call("shoestring.launch.doctor.command:main", args.overrides, args.config_dir, **options)


COMMANDS = {
    "train": Command(
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
    "export": Command(
        help="write a checkpoint as a Hugging Face DeepSeek model",
        arguments=_export_arguments,
        run=_export,
        examples=("shoestring export runs/tiny out/tiny-hf", "shoestring export runs/tiny out/tiny-fp8 --dtype fp8 --weights ema"),
    ),
    "import": Command(
        help="read a Hugging Face DeepSeek model into a checkpoint",
        arguments=_import_arguments,
        run=_import,
        examples=(
            "shoestring import path/to/model out/start",
            "shoestring train --config-dir out/start model=imported checkpoint.resume=out/start",
        ),
    ),
    "upcycle": Command(
        help="make a dense model a mixture of experts to train on",
        arguments=_upcycle_arguments,
        run=_upcycle,
        examples=("shoestring upcycle runs/dense out/moe model=small model.top_k=8",),
    ),
    "data": Command(
        help="prepare data ahead of a run",
        arguments=_data_arguments,
        run=_data,
        examples=(
            "shoestring data build experiment=tiny",
            "shoestring data build data=files 'data.sources.files.paths=[corpus/*.jsonl]' --shard 0 --num-shards 4",
        ),
    ),
    "verify": Command(
        help="prove that every layout computes what one process computes",
        arguments=_verify_arguments,
        run=_verify,
        examples=(
            "shoestring verify                                             six layouts, a minute",
            "shoestring verify layouts=all world=8                         every layout of eight processes, every pair of options",
            "shoestring verify model=tiny layouts=pp2ep2,ep4 steps=2       two layouts of another model",
            "shoestring verify target=deepspeed                            DeepSpeed's expert parallelism under the same certificate",
        ),
    ),
    "plan": Command(
        help="price a training run before it is paid for: the cheapest layouts of a cluster, projected",
        arguments=_plan_arguments,
        run=_plan,
        examples=(
            "shoestring plan model=deepseek_v3 cluster=h800 precision=fp8 gpus=2048 tokens=14.8e12",
            "shoestring plan experiment=deepseek_v3 precision=fp8 gpus=auto deadline_days=90",
            "shoestring plan experiment=deepseek_v3 parallel.schedule=1f1b search=false         this layout, whatever there is beside it",
        ),
    ),
    "doctor": Command(
        help="what is wrong with this node or fabric, before money is spent",
        arguments=_doctor_arguments,
        run=_doctor,
        examples=(
            "shoestring doctor experiment=deepseek_v3                      this machine, and a few ranks on it",
            "shoestring doctor experiment=tiny --quick                     a second",
            "torchrun --nnodes 4 --nproc-per-node 8 ... --no-python shoestring doctor experiment=deepseek_v3    on every node: the fabric",
        ),
    ),
    "launch": Command(
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
    "rehearse": Command(
        help="run the step of any rank of a job of thousands here, without GPUs: memory, FLOPs and bytes sent",
        arguments=_rehearse_arguments,
        run=_rehearse,
        examples=(
            "shoestring rehearse experiment=deepseek_v3                    every kind of rank of 2,048",
            "shoestring rehearse experiment=deepseek_v3 precision=fp8 ranks=0,1024 imbalance=1.5 out=rehearsal.json",
        ),
    ),
    "bench": Command(
        help="time the kernels and a training step on this machine's GPU, beside what torch and others have; or a cluster, for plans",
        arguments=_bench_arguments,
        run=_bench,
        examples=(
            "shoestring bench kernels --tune --page bench.html             every op, every configuration; without a GPU only correctness",
            "shoestring bench kernels --only 'fp8 fprop' --shapes x7168x   some ops, some shapes",
            "shoestring bench step --json step.json                        a cut-down DeepSeek-V3 in bf16 and in fp8",
            "shoestring bench fabric name=mine                             what plans need to know of this machine: cluster=mine",
            "torchrun --nproc-per-node 8 --no-python shoestring bench fabric name=mine        and of a cluster: on every node",
        ),
    ),
    "checkpoint": Command(
        help="list, verify or prune what a run has saved",
        arguments=_checkpoint_arguments,
        run=_checkpoint,
        examples=(
            "shoestring checkpoint list runs/tiny",
            "shoestring checkpoint verify runs/tiny --all                  exit code 4 if a file is not as it was written",
            "shoestring checkpoint prune runs/tiny keep=1 --dry-run",
        ),
    ),
    "report": Command(
        help="write a run's report.html again from its records",
        arguments=_report_arguments,
        run=_report,
        examples=("shoestring report runs/tiny",),
    ),
    "runs": Command(
        help="list the runs on this disk with their state, loss, speed and cost; or compare two",
        arguments=_runs_arguments,
        run=_runs,
        examples=(
            "shoestring runs --sort loss",
            "shoestring runs runs/sweep --csv runs.csv",
            "shoestring runs compare runs/a runs/b --html compare.html",
        ),
    ),
    "sample": Command(
        help="let a trained model write text",
        arguments=_sample_arguments,
        run=_sample,
        examples=(
            'shoestring sample runs/tiny "def main("                       from the newest checkpoint of a run',
            "shoestring sample out/tiny-hf --num 3 --max-tokens 100        from an exported model, three times",
        ),
    ),
}
