"""Commands that prove, price and measure: verify, plan, rehearse, bench."""

import argparse
from pathlib import Path

from .. import environment
from . import command


def _verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=(
        "layouts=smoke (default), all, exhaustive or such as pp2ep2,ep4/alltoall; world=8 processes; steps=3; seed=0; "
        "routing=natural, one_expert, idle_rank, alternating, ties or trace:FILE; target=shoestring or deepspeed; out=runs/verify; "
        "and " + command.OVERRIDES))  # fmt: skip
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with groups or experiments of your own")


def _verify(args: argparse.Namespace) -> int:
    environment.prepare(threads=1)
    environment.tell_deepspeed("cpu")
    return command.call("shoestring.launch.verify.command:main", args.overrides, args.config_dir)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=(
        "gpus=N or auto; tokens=N of the run; budget_usd=N; deadline_days=N; search=false prices the layout given; top=5 plans; "
        "output=plan.json; page=plan.html; and " + command.OVERRIDES))  # fmt: skip
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with groups or experiments of your own")


def _plan(args: argparse.Namespace) -> int:
    environment.prepare(threads=1)
    return command.call("shoestring.launch.plan.command:main", args.overrides, args.config_dir)


def _rehearse_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=(
        "ranks=all-distinct (default: one of each kind) or such as 0,17; imbalance=1.0, what the busiest rank's experts get over the mean; "
        "out=FILE, everything as JSON; and " + command.OVERRIDES))  # fmt: skip
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with groups or experiments of your own")


def _rehearse(args: argparse.Namespace) -> None:
    environment.prepare(threads=1)
    command.call("shoestring.launch.rehearse.command:main", args.overrides, args.config_dir)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    kernels = actions.add_parser("kernels", help="every op: right, how fast, and beside what torch has")
    kernels.add_argument("--only", default="", metavar="OPS", help="comma-separated parts of ops' names, such as 'fp8 wgrad,swiglu'")
    kernels.add_argument("--shapes", default="", metavar="SHAPES", help="comma-separated parts of shapes, such as x7168x2048")
    kernels.add_argument("--tune", action="store_true", help="time every configuration of kernels that have several")
    kernels.add_argument("--check", action="store_true", help="no times: only whether results are right")
    kernels.add_argument("--keep", action="store_true", help="as the last result of this device, in the checkout's docs/results")
    step = actions.add_parser("step", help="train a cut-down DeepSeek-V3 in bf16 and fp8: tokens/s, MFU, memory, loss")
    step.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="another model: " + command.OVERRIDES)
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
        return command.call("shoestring.launch.bench.fabric:main", args.overrides)
    options = {key: value for key, value in vars(args).items() if key not in ("command", "action", "overrides")}
    if args.action == "step":
        return command.call("shoestring.launch.bench.command:train_step", args.overrides, **options)
    return command.call("shoestring.launch.bench.command:kernels", **options)


COMMANDS = {
    "verify": command.Command(
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
    "plan": command.Command(
        help="price a training run before it is paid for: the cheapest layouts of a cluster, projected",
        arguments=_plan_arguments,
        run=_plan,
        examples=(
            "shoestring plan model=deepseek_v3 cluster=h800 precision=fp8 gpus=2048 tokens=14.8e12",
            "shoestring plan experiment=deepseek_v3 precision=fp8 gpus=auto deadline_days=90",
            "shoestring plan experiment=deepseek_v3 parallel.schedule=1f1b search=false         this layout, whatever there is beside it",
        ),
    ),
    "rehearse": command.Command(
        help="run the step of any rank of a job of thousands here, without GPUs: memory, FLOPs and bytes sent",
        arguments=_rehearse_arguments,
        run=_rehearse,
        examples=(
            "shoestring rehearse experiment=deepseek_v3                    every kind of rank of 2,048",
            "shoestring rehearse experiment=deepseek_v3 precision=fp8 ranks=0,1024 imbalance=1.5 out=rehearsal.json",
        ),
    ),
    "bench": command.Command(
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
}
