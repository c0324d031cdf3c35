"""What hiding communication costs, and hides, on one GPU: `python tests/benchmarks/gpu_overlap.py OUT [words]`, a part of `gpu.py`.

    plain      the executor against a loop of the same phases, where nothing is exchanged (aim: at most 1.02 of its time)
    loopback   exchanges of the rank with itself, on a link on which they take as long as compute: how much lies under compute (aim: at
               least 90 % in pairs), and how much longer compute takes for the SMs that exchanges hold
    gaps       of a profiled step: when the GPU had nothing to do because the host had not asked yet (aim: none above 20 us)

Prints them; OUT/overlap.json has every number. Without a GPU it runs at a small size, to see that it would.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from overlap import NoOverlap, numbers
from shoestring.conf.compose import load
from shoestring.launch import environment
from shoestring.launch.bench import step
from shoestring.parallel.fabric import Link
from shoestring.parallel.loopback import Loopback
from shoestring.parallel.phases import MicroBatch, Pending
from shoestring.parallel.trace import Recorder, Span
from shoestring.parallel.trace_measure import length, union
from shoestring.train.engine import Engine
from torch.profiler import ProfilerActivity

RUNS = 5
GAP_US = 20.0
SMALL = ("experiment=smoke", "parallel.ep=1")
COUNTS = 64 * 1024  # bytes: an exchange of no more is one of counts, and waits for no rows
PAIRED = ("parallel.dispatcher=alltoall", "parallel.schedule=dualpipev", "parallel.chunks=2")


def batches(engine: Engine, num: int) -> list[MicroBatch]:
    c, generator = engine.config, torch.Generator().manual_seed(0)
    size = c.train.micro_batch_sequences, c.data.seq_len + 1
    rows = torch.randint(c.model.vocab_size, size, generator=generator).to(engine.device)
    return [MicroBatch(tokens_BS=rows[:, :-1], targets_BN=rows[:, 1:], counted=False)] * num


def seconds(work: Callable[[], object]) -> float:
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


# ---------------------------------------------------------------- against a plain loop


@torch.no_grad()
def plain_step(engine: Engine, mine: Sequence[MicroBatch]) -> None:
    """What the executor does with one stage after another, without it."""
    phases = [phase for index in sorted(engine.stages) for phase in engine.stages[index].phases]
    arrived = lambda result: result.wait() if isinstance(result, Pending) else result
    for batch in mine:
        saved, values = [], (batch.tokens_BS,)
        for phase in phases:
            values = arrived(phase.forward(saved, batch, *values))
        grads = (engine.executor.loss_weights.to(values[0].dtype),)
        for phase in reversed(phases):
            grads = arrived(phase.backward(saved, *grads))
            for closure in engine.ops.store.take():
                closure()


def plain(words: Sequence[str], device: str, num: int) -> dict:
    """Medians of interleaved steps, in seconds."""
    engine = Engine(load([*words, "parallel.dispatcher=local"]), device)
    mine, times = batches(engine, num), {"executor": [], "plain": []}
    for i in range(RUNS + 2):  # the first two compile and allocate
        for name, work in (("executor", lambda: engine.executor.step(mine)), ("plain", lambda: plain_step(engine, mine))):
            taken = seconds(work)
            times[name] += [taken] if i > 1 else []
    middle = {name: median(runs) for name, runs in times.items()}
    return middle | {"ratio": middle["executor"] / middle["plain"], "gaps": gaps(lambda: engine.executor.step(mine))}


# ---------------------------------------------------------------- loopback


def busy(spans: Sequence[Span]) -> float:
    """Seconds of compute."""
    return length(union((s.start, s.end) for s in spans if s.what == "compute"))


def loopback(words: Sequence[str], device: str, num: int) -> dict:
    """{mode: runs}, and the link that was chosen."""
    transport = Loopback(Link(packet=COUNTS))
    engine = Engine(load([*words, *PAIRED]), device, transport=transport)
    mine, tracer, hosts = batches(engine, num), Recorder(0, device), dist.new_group(backend="gloo")

    def traced(seen_by) -> list[Span]:
        engine.executor.tracer = seen_by
        tracer.begin(hosts)
        engine.executor.step(mine)
        return tracer.finish(hosts)

    for _ in range(3):
        before, spans = transport.sent_bytes, traced(tracer)
    link = Link(packet=COUNTS, bandwidth=(transport.sent_bytes - before) / busy(spans))
    modes = {"no link": (Link(packet=COUNTS), tracer), "overlap": (link, tracer), "no overlap": (link, NoOverlap(tracer, {}))}
    runs: dict[str, list] = {mode: [] for mode in modes}
    for mode in list(modes) * RUNS:
        transport.link, seen_by = modes[mode]
        spans = traced(seen_by)
        runs[mode].append(numbers(spans) | {"compute": busy(spans)})
    return {"gb_per_s": link.bandwidth / 1e9, "programs": transport.programs, "runs": runs}


# ---------------------------------------------------------------- gaps


def gaps(work: Callable[[], object]) -> list[dict]:
    """Of a profile of `work`; see `host_gaps`."""
    gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(activities=activities) as seen:
        seconds(work)
    found = [
        {
            "name": e.name(),
            "start": e.start_ns() / 1e3,
            "end": e.end_ns() / 1e3,
            "id": e.correlation_id(),
            "gpu": e.device_type().name == "CUDA",
        }
        for e in seen.profiler.kineto_results.events()
    ]
    return host_gaps(found)


def host_gaps(events: Sequence[dict], at_least: float = GAP_US) -> list[dict]:
    """Longest first: when nothing ran on the GPU (`gpu`), and what ran next was asked for (the host's event of the same `id`) only after
    what ran before had ended. Waiting for an exchange is none: that was asked for long before. Times in microseconds."""
    asked: dict[int, float] = {}
    for e in events:
        if not e["gpu"] and e["id"]:
            asked[e["id"]] = max(asked.get(e["id"], 0.0), e["start"])
    found, free, last = [], None, ""
    for e in sorted((e for e in events if e["gpu"]), key=lambda e: e["start"]):
        if free is not None and e["start"] - free > at_least and asked.get(e["id"], 0.0) > free:
            found.append({"us": e["start"] - free, "after": last, "before": e["name"]})
        if free is None or e["end"] > free:
            free, last = e["end"], e["name"]
    return sorted(found, key=lambda gap: -gap["us"])


# ---------------------------------------------------------------- report


def told(results: dict) -> str:
    p, link = results["plain"], results["loopback"]
    middle = {mode: {key: median(run[key] or 0.0 for run in runs) for key in runs[0]} for mode, runs in link["runs"].items()}
    lines = [
        f"executor {p['executor']:.4f} s, plain loop {p['plain']:.4f} s: x {p['ratio']:.3f} (aim: at most 1.02)",
        f"loopback at {link['gb_per_s']:.3g} GB/s, {link['programs']} programs",
        f"{'':<12}{'step s':>9} {'compute s':>10} {'exchanging s':>13} {'hidden in pairs, %':>19} {'hidden in step, %':>18}",
    ]
    for mode, m in middle.items():
        shares = f"{100 * m['hidden_in_pairs']:>19.1f} {100 * m['hidden']:>18.1f}"
        lines.append(f"{mode:<12}{m['seconds']:>9.4f} {m['compute']:>10.4f} {m['comm']:>13.4f} {shares}")
    lines.append(f"{len(p['gaps'])} gaps above {GAP_US:g} us that the host made (aim: none)")
    return "\n".join([*lines, *(f"{gap['us']:>9.1f} us  {gap['after'][:60]} -> {gap['before'][:60]}" for gap in p["gaps"][:40])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("words", nargs="*", help="of the configuration")
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    environment.tell_deepspeed("cuda" if gpu else "cpu")
    # Two micro-batches are under way at a time: a smaller model than a step of one would have room for.
    chosen = options.words or ([*step.fit(0.6 * torch.cuda.get_device_properties(0).total_memory), "precision=fp8"] if gpu else list(SMALL))
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    device, num = "cuda:0" if gpu else "cpu", 8
    results = {"words": chosen, "plain": plain(chosen, device, num), "loopback": loopback(chosen, device, num)}
    print(told(results))
    (options.out / "overlap.json").write_text(json.dumps(results, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
