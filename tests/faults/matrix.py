"""Every kind of fault under every layout, twice in a run each, and whether what came of it is what should.

    python -m shoestring.tests.faults.matrix [--kinds A,B] [--layouts 0,2] [--seed N] [--clean STEPS] [--output docs/faults.md]

`judging.py` has the rules.
"""

import argparse
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from shoestring.launch import exit_codes

from .judging import LAYOUTS, STOP_S, Kind, Place, Row, left_out, lost_node, nothing_left, repaired, server_away, starved, struck
from .runs import launch

SHORT = ("launch.timeout_s=5", "launch.hang_s=60")  # where it is this time-out that finds the fault
KINDS = [
    Kind(name="SIGKILL", fault="sigkill", told=r"rank {rank} was killed by SIGKILL.* in step {step}, "),
    Kind(name="SIGTERM", fault="sigterm", told=r"stopped at step \d+ of", code=exit_codes.PREEMPTED),
    Kind(name="SIGSTOP", fault="sigstop", told=r"rank {rank} does not answer .*in step {step}, ", words=SHORT),
    Kind(name="exception in forward", fault="exception", told=r"rank {rank}: RuntimeError: injected into .* step {step}"),
    Kind(name="collective left out", fault="skipped_collective", told=r"rank {rank} did not come to .*in step {step}, ", words=SHORT),
    Kind(
        name="slow rank", fault="slow", told=r"step {step} took .*rank {rank} ", first=14, steps=24, words=("checkpoint.interval=6",),
        seconds=(3.0, 3.0),
    ),
    Kind(name="rank without tokens", fault="zero_tokens", told="", judge=starved, outcome="as one process, to 1e-6"),
    Kind(name="NaN in a gradient", fault="nan", told=r"step {step}: .*nan.*; computed again, it is sound"),
    Kind(
        name="NaN that comes again", fault="nan", times=2, told=r"samples \d+ to \d+ are left out", judge=left_out,
        outcome="the curve without these samples",
    ),
    Kind(name="bit of a gradient", fault="flip_gradient", told=r"step {step}: .*gradients", words=("guard.replay_interval=1",)),
    Kind(name="bit of a weight", fault="flip_weight", told=r"step {step}: memory of rank {rank} changed"),
    Kind(name="bit of a moment", fault="flip_state", told=r"step {step}: memory of rank {rank} changed"),
    Kind(name="bit of a checkpoint", fault="flip_checkpoint", told=r"is damaged.*It is now \S*\.damaged", first=5),
    Kind(name="checkpoint cut short", fault="truncate", told=r"is damaged.*It is now \S*\.damaged", first=5),
    Kind(
        name="no checkpoint whole", fault="lose_checkpoints", told=r"error: .*no checkpoint is left to go on from", first=5,
        judge=nothing_left, code=exit_codes.STORAGE, outcome="stopped; nothing begun anew",
    ),
    Kind(name="killed in a save", fault="kill_save", told=r"rank {rank} was killed by SIGKILL.* in step {step}, checkpoint", every=2),
    Kind(name="disk full", fault="disk_full", told=r"checkpoint of step {step} failed: .*rank {rank}: .*No space left", every=2),
    Kind(
        name="corrupt samples", fault="corrupt_samples", times=2, told=r"samples \d+ to \d+ are left out", judge=left_out,
        outcome="the curve without these samples",
    ),
    Kind(name="data away for a moment", fault="data_away", told=r"Input/output error: .*again in"),
    Kind(
        name="data gone", fault="data_gone", told=r"error: rank {rank}: .* cannot be read", judge=repaired, code=exit_codes.DATA,
        outcome="stopped; the same curve when it is back",
    ),
    Kind(
        name="W&B away", fault="wandb_away", told="W&B does not answer", words=("launch.wandb=online", "launch.timeout_s=16"),
        judge=server_away,
    ),
    Kind(name="clock +1 h, -1 h", fault="clock", told="", seconds=(3600.0, -3600.0)),
    Kind(name="second job", fault="second_job", told="another job trains there"),
    Kind(
        name="node lost", fault="sigkill", told="", judge=lost_node, first=5,
        outcome="fewer ranks, within 1e-6",
    ),
]  # fmt: skip


def cell(place: Place, kind: Kind, layout: str) -> Row:
    began = time.monotonic()
    config = place.config(
        f"{kind.name}-{layout}".replace(" ", "_").replace(",", "").replace("&", ""),
        *LAYOUTS[layout],
        f"train.steps={kind.steps}",
        *kind.words,
    )
    faults = kind.faults(config.parallel.world_size, place.seed)
    try:
        row = (kind.judge or struck)(place, kind, layout, config, faults)
    except (AssertionError, TimeoutError, OSError) as error:
        row = Row(kind=kind.name, layout=layout, faults=faults, detected=(), again=(), outcome="", wrong=[str(error)])
    return replace(row, seconds=time.monotonic() - began)


# ---------------------------------------------------------------- nothing at all

EXPECTED = re.compile(
    r"(step +\d+/|data source |tiny: |\d+ sequences of |attention by |trained |loss |speed |on |cost |report |complete|  shoestring |$)"
)  # fmt: skip


def alarms(place: Place, steps: int) -> tuple[list[str], float]:
    """What a run says that nothing happens to, beside its steps; and how many seconds it took. Every detector looks, often."""
    words = (*LAYOUTS["ep 2 x edp 2"], f"train.steps={steps}", "guard.replay_interval=50", "checkpoint.interval=100")
    ran = launch(place.config("long", *words, "checkpoint.async_save=true", "launch.timeout_s=600"), timeout_s=3600)
    assert ran.code == exit_codes.OK and len(ran.lines) > steps, ran.text
    return [line for _, line in ran.lines if not EXPECTED.match(line)], ran.ended - ran.began


# ---------------------------------------------------------------- all of them


def document(rows: list[Row], seed: int, seconds: float, clean: str) -> str:
    wrong = [row for row in rows if row.wrong]
    lines = [
        "# Faults, and what came of them",
        "",
        "Made by `make faults` (`python -m shoestring.tests.faults.matrix`), which runs small models on gloo and injects each kind of",
        "fault twice in a run, at ranks and steps that a seed chooses. What is right:",
        "",
        "- same layout, same data: the curve (loss, gradient norm, loads of every step) is the uninterrupted run's, bit for bit;",
        "- samples left out: that of a run that was told to leave out the same ones (`data.skip`), bit for bit;",
        "- another layout: every loss within 1e-6, relative, and every token counted once;",
        f"- nothing to go on from: stopped within {STOP_S:g} s, with cause, rank and remedy.",
        "",
        f"{len({r.kind for r in rows})} kinds x {len({r.layout for r in rows})} layouts, seed {seed}: {len(rows) - len(wrong)} of "
        f"{len(rows)} as they should be, in {seconds / 60:.0f} minutes on {os.cpu_count()} cores; {time.strftime('%Y-%m-%d')}, "
        f"torch {torch.__version__.split('+')[0]}, Python {platform.python_version()}. Times are seconds after the injection, of the first "
        "fault and the second: until it was told of; until that rank trained again.",
    ]
    for layout in dict.fromkeys(row.layout for row in rows):
        lines += [
            "",
            f"## {layout}",
            "",
            "| fault | injected | detected after | training again after | outcome |",
            "| --- | --- | ---: | ---: | --- |",
        ]
        lines += [f"| {row.kind} | {row} |" for row in rows if row.layout == layout]
    lines += [
        "",
        "A fault that is not detected (-) is one that training bears: there is nothing to tell. Where a session ended, the next one was",
        "started at once. Collectives wait 5 s in the runs of SIGSTOP and of the collective left out.",
        *(["", f"{clean}, with weights' checksums in every step and gradients computed twice in every 50th."] if clean else []),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="matrix")
    parser.add_argument("--kinds", help="names or injector's kinds, with commas; all")
    parser.add_argument("--layouts", help=f"of {'; '.join(LAYOUTS)}: numbers from 0, with commas; all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clean", type=int, default=0, help="steps of a run that nothing happens to")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args(argv)
    wanted = asked.kinds.split(",") if asked.kinds else None
    kinds = [k for k in KINDS if wanted is None or k.name in wanted or k.fault in wanted]
    layouts = [list(LAYOUTS)[int(i)] for i in asked.layouts.split(",")] if asked.layouts else list(LAYOUTS)
    rows, said, clean, began = [], [], "", time.monotonic()
    with tempfile.TemporaryDirectory(prefix="shoestring-faults-") as folder:
        place = Place(Path(folder), asked.seed)
        for layout in layouts:
            for kind in kinds:
                rows.append(row := cell(place, kind, layout))
                print(f"{layout:22} {kind.name:24} {row.seconds:5.1f} s | {row}", flush=True)
        if asked.clean:
            said, took = alarms(place, asked.clean)
            what = f"A run of {asked.clean:,} steps, {list(LAYOUTS)[-1]}, that nothing happened to"
            clean = f"{what}: {len(said)} alarms in {took / 60:.1f} minutes"
            print("\n".join([clean, *said]), flush=True)
    seconds = time.monotonic() - began
    wrong = [row for row in rows if row.wrong]
    print(f"{len(rows) - len(wrong)} of {len(rows)} as they should be, in {seconds / 60:.1f} minutes")
    if asked.output:
        asked.output.write_text(document(rows, asked.seed, seconds, clean))
    return bool(wrong or said)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
