"""Commands for what goes into runs and comes out of them: data, checkpoint, export, import, upcycle, sample."""

import argparse
import os
from pathlib import Path
from typing import Any

from ...conf.compose import load
from .. import environment
from . import command


def _data_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser("build", help="tokenise and pack into the cache")
    command.config_arguments(build)
    build.add_argument("--shard", type=int, default=0, metavar="I", help="this process's share of the work, from 0")
    build.add_argument("--num-shards", type=int, default=1, metavar="N", help="how many processes share it")


def _data(args: argparse.Namespace) -> None:
    config = load(args.overrides, args.config_dir)
    environment.prepare(threads=1)
    command.call(
        "shoestring.train.data.corpus:build", config.data, vocab_size=config.model.vocab_size, shard=args.shard, num_shards=args.num_shards
    )


def _checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    kinds = {
        "list": "each with its step, date, size, layout, precision and state",
        "verify": "read and hash every file of the newest one",
        "sign": "with an SSH key, so that others can tell whose it is: of the newest one, beside its manifest",
        "prune": "remove old ones; never the newest that is whole",
    }
    for name, help in kinds.items():
        kinds[name] = actions.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        kinds[name].add_argument("source", type=Path, metavar="RUN_OR_FOLDER", help="a run directory, its checkpoints/, or one checkpoint")
    kinds["verify"].add_argument("--all", dest="every", action="store_true", help="not only the newest")
    kinds["verify"].add_argument("--signers", default="", metavar="FILE", help="and by whom of these allowed signers it is signed")
    kinds["sign"].add_argument("--key", required=True, metavar="FILE", help="a private SSH key, or the public one of an agent's")
    kinds["verify"].add_argument("--quarantine", action="store_true", help="give damaged ones a name that says so: step_N.damaged")
    kinds["prune"].add_argument("words", nargs=1, metavar="keep=N", help="how many to keep")
    kinds["prune"].add_argument("--dry-run", action="store_true", help="only say which would go")


def _checkpoint(args: argparse.Namespace) -> int | None:
    targets = {
        "list": "shoestring.launch.checkpoint:show",
        "verify": "shoestring.launch.checkpoint:verify",
        "sign": "shoestring.launch.checkpoint:sign",
        "prune": "shoestring.launch.checkpoint:prune",
    }
    options = {key: value for key, value in vars(args).items() if key not in ("command", "action", "source")}
    return command.call(targets[args.action], args.source, **options)


def _trust_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trust", action="append", default=[], metavar="HASH", help=(
        "of somebody else's checkpoint: the word that its refusal names"))  # fmt: skip
    parser.add_argument("--signers", default="", metavar="FILE", help="take only a checkpoint that one of these allowed signers has signed")


def _trust(args: argparse.Namespace) -> dict[str, Any]:
    return {"trust": tuple(args.trust), "signers": args.signers}


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="RUN_OR_CHECKPOINT", help="a run directory (its newest checkpoint) or one checkpoint")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="a new folder for config.json, safetensors and the tokenizer")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16", "fp64", "fp8"], default="auto",
                        help="of the weights there; fp8 as DeepSeek-V3 was released (default: the run's)")  # fmt: skip
    parser.add_argument("--weights", choices=["master", "ema"], default="master", help="those trained, or their moving average")
    _trust_arguments(parser)


def _export(args: argparse.Namespace) -> None:
    environment.prepare(threads=1)
    options = {"dtype": args.dtype, "weights": args.weights, **_trust(args)}
    print(command.call("shoestring.train.interop.hf:export", args.source, args.out, **options))


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR", help="a Hugging Face DeepSeek checkpoint on this machine; FP8 too")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="a new folder for the checkpoint")
    parser.add_argument("--mtp", choices=["check", "shared-from-main", "skip"], default="check",
                        help="layers for multi-token prediction, whose embedding and head must equal the model's (check), "
                             "are taken to (shared-from-main), or which are left out (skip)")  # fmt: skip
    parser.add_argument("--skip-mtp", dest="mtp", action="store_const", const="skip", help="the same as --mtp skip")
    parser.add_argument("--trust", action="append", default=[], metavar="HASH", help="of somebody else's: the word that its refusal names")


def _import(args: argparse.Namespace) -> None:
    environment.prepare(threads=1)
    print(command.call("shoestring.train.interop.hf:import_", args.hf_dir, args.out, mtp=args.mtp, trust=tuple(args.trust)))


def _upcycle_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a dense run, checkpoint, or Hugging Face folder: no block has routing")
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="a new folder for the checkpoint")
    _trust_arguments(parser)
    command.config_arguments(parser)


def _upcycle(args: argparse.Namespace) -> None:
    config = load(args.overrides, args.config_dir)
    environment.prepare(threads=1)
    options = {"seed": config.train.seed, **_trust(args)}
    print(command.call("shoestring.train.interop.upcycle:upcycle", args.source, args.out, config.model, **options))


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
    _trust_arguments(parser)


def _sample(args: argparse.Namespace) -> None:
    environment.prepare(threads=min(8, os.cpu_count() or 1))
    options = {key: value for key, value in vars(args).items() if key != "command"}
    command.call("shoestring.launch.sample:show", **options | _trust(args))


COMMANDS = {
    "data": command.Command(
        help="prepare data ahead of a run",
        arguments=_data_arguments,
        run=_data,
        examples=(
            "shoestring data build experiment=tiny",
            "shoestring data build data=files 'data.sources.files.paths=[corpus/*.jsonl]' --shard 0 --num-shards 4",
        ),
    ),
    "checkpoint": command.Command(
        help="list, verify, sign or prune what a run has saved",
        arguments=_checkpoint_arguments,
        run=_checkpoint,
        examples=(
            "shoestring checkpoint list runs/tiny",
            "shoestring checkpoint verify runs/tiny --all                  exit code 4 if a file is not as it was written",
            "shoestring checkpoint sign runs/tiny --key ~/.ssh/id_ed25519",
            "shoestring checkpoint prune runs/tiny keep=1 --dry-run",
        ),
    ),
    "export": command.Command(
        help="write a checkpoint as a Hugging Face DeepSeek model",
        arguments=_export_arguments,
        run=_export,
        examples=("shoestring export runs/tiny out/tiny-hf", "shoestring export runs/tiny out/tiny-fp8 --dtype fp8 --weights ema"),
    ),
    "import": command.Command(
        help="read a Hugging Face DeepSeek model into a checkpoint",
        arguments=_import_arguments,
        run=_import,
        examples=(
            "shoestring import path/to/model out/start",
            "shoestring train --config-dir out/start model=imported checkpoint.resume=out/start",
        ),
    ),
    "upcycle": command.Command(
        help="make a dense model a mixture of experts to train on",
        arguments=_upcycle_arguments,
        run=_upcycle,
        examples=("shoestring upcycle runs/dense out/moe model=small model.top_k=8",),
    ),
    "sample": command.Command(
        help="let a trained model write text",
        arguments=_sample_arguments,
        run=_sample,
        examples=(
            'shoestring sample runs/tiny "def main("                       from the newest checkpoint of a run',
            "shoestring sample out/tiny-hf --num 3 --max-tokens 100        from an exported model, three times",
        ),
    ),
}
