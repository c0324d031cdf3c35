"""Tables, page and picture of `overlap.py`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from shoestring.parallel.trace import Span

# Okabe and Ito's, which everyone tells apart.
COLOURS = {"F": "#0072B2", "B": "#E69F00", "I": "#E69F00", "W": "#009E73", "exchange": "#CC79A7"}


def middle(runs: Sequence[dict], name: str) -> float:
    return median(run[name] for run in runs)


def spread(runs: Sequence[dict], value: Callable[[dict], float], form: str) -> str:
    """Median, and from the lowest to the highest."""
    values = sorted(map(value, runs))
    return f"{median(values):{form}} ({values[0]:{form}} to {values[-1]:{form}})"


def tables(results: dict) -> dict[str, str]:
    """By part; those that were measured."""
    made = {}
    if "paced" in results:
        made["paced"] = overlap_table({f"{pace}, {mode}": (modes, mode) for pace, modes in results["paced"].items() for mode in modes})
    if "real" in results:
        made["real"] = overlap_table({mode: (results["real"], mode) for mode in results["real"]})
    if "bubbles" in results:
        made["bubbles"] = bubble_table(results["bubbles"])
    if "nodes" in results:
        made["nodes"] = node_table(results["nodes"]["exchanges"])
        if pairs := results["nodes"]["pairs"]:
            made["pairs"] = overlap_table({f"{name}, {mode}": (modes, mode) for name, modes in pairs.items() for mode in modes})
    return made


def overlap_table(rows: dict[str, tuple[dict[str, list[dict]], str]]) -> str:
    """`rows`: by name, the runs of each mode, and which of them is meant."""
    lines = [f"{'':<29}{'step s':>26} {'x no latency':>13} {'hidden in pairs, %':>22} {'hidden in step, %':>22} {'in pairs, %':>12}"]
    for name, (modes, mode) in rows.items():
        runs = modes[mode]
        line = f"{name:<29}{spread(runs, lambda r: r['seconds'], '.3f'):>26} "
        line += f"{middle(runs, 'seconds') / middle(modes['no latency'], 'seconds'):>13.2f}"
        if mode != "no latency":
            line += "".join(f" {spread(runs, lambda r, k=key: 100 * (r[k] or 0), '.1f'):>22}" for key in ("hidden_in_pairs", "hidden"))
            line += f" {100 * middle(runs, 'in_pairs'):>12.1f}"
        lines.append(line)
    return "\n".join(lines)


def bubble_table(rows: list[dict]) -> str:
    lines = [f"{'schedule':<17}{'pp':>2}{'M':>4} {'simulated s':>12} {'step s':>24} {'simulated %':>12} {'bubble %':>21} {'apart':>6}"]
    for row in rows:
        runs, simulated = row["runs"], row["simulated"]
        apart = 100 * (middle(runs, "bubble") - simulated["bubble"])
        lines.append(
            f"{row['schedule']:<17}{row['pp']:>2}{row['micro_batches']:>4} {simulated['seconds']:>12.3f} "
            f"{spread(runs, lambda r: r['seconds'], '.3f'):>24} {100 * simulated['bubble']:>12.1f} "
            f"{spread(runs, lambda r: 100 * r['bubble'], '.1f'):>21} {apart:>+6.1f}"
        )
    return "\n".join(lines)


def node_table(rows: list[dict]) -> str:
    """Of each layout and payload, every dispatcher beside the first."""
    head = f"{'nodes':<7}{'payload':<9}{'dispatcher':<14}{'between nodes, MB':>18} {'inside, MB':>11}"
    lines = [f"{head} {'exchanging s':>23} {'x':>5} {'step s':>23} {'x':>5}"]
    for row in rows:
        runs = row["runs"]
        first = next(r["runs"] for r in rows if (r["nodes"], r["payload"]) == (row["nodes"], row["payload"]))
        line = f"{row['nodes']} x 2  {row['payload']:<9}{row['dispatcher']:<14}{middle(runs, 'inter') / 1e6:>18.3f} "
        line += f"{middle(runs, 'intra') / 1e6:>11.3f}"
        for name in ("comm", "seconds"):
            line += f" {spread(runs, lambda r, k=name: r[k], '.3f'):>23} {middle(first, name) / middle(runs, name):>5.2f}"
        lines.append(line)
    return "\n".join(lines)


def shown(results: dict) -> str:
    """A sentence about the table of nodes."""
    if "nodes" not in results:
        return ""
    rows = results["nodes"]["exchanges"]
    pairs = [(a["runs"], b["runs"]) for a, b in zip(rows[::2], rows[1::2])]
    bytes_of, times = ([middle(a, name) / middle(b, name) for a, b in pairs] for name in ("inter", "comm"))
    return (
        f"\n`hierarchical` sends {min(bytes_of):.1f} to {max(bytes_of):.1f} times fewer bytes between nodes, and its exchanges are "
        f"{min(times):.2f} to {max(times):.2f} times as fast."
    )


# ---------------------------------------------------------------- picture


def draw_step(spans: Sequence[Span], path: Path) -> None:
    """Above, the whole step, a row per rank; below, a few pairs of rank 0. Exchanges are under their rank's compute."""
    import matplotlib  # only here: the tables need no extra
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = sorted({s.rank for s in spans})
    first, last = min(s.start for s in spans), max(s.end for s in spans)
    pairs = sorted((s for s in spans if s.what == "pair" and s.rank == ranks[0]), key=lambda s: s.start)
    middle = pairs[len(pairs) // 2 : len(pairs) // 2 + 4]
    style = {"svg.fonttype": "none", "svg.hashsalt": "overlap", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(11, 5.4), layout="constrained", facecolor="white", dpi=150)
        whole, part = figure.subplots(2, 1, height_ratios=[len(ranks), 2.2])
        bars(whole, spans, ranks, first, rasterized=True)
        whole.set_xlim(0, (last - first) * 1e3)
        whole.set_title("one step; under each rank's compute its exchanges, forward above backward", loc="left", fontsize=10)
        if middle:
            begin, end = middle[0].start, middle[-1].end
            shown = [s for s in spans if s.rank == ranks[0] and s.end > begin and s.start < end]
            bars(part, shown, ranks[:1], begin, rasterized=False)
            label(part, shown, begin, end)
            part.set_xlim(0, (end - begin) * 1e3)
            part.set_title(f"four overlapped actions of rank {ranks[0]}, from {(begin - first) * 1e3:.0f} ms on", loc="left", fontsize=10)
        part.set_xlabel("ms")
        named = {"forward": "F", "backward": "B", "weight gradients": "W", "exchange": "exchange"}
        legend = [Patch(color=COLOURS[key], label=name) for name, key in named.items()]
        figure.legend(handles=legend, ncols=4, loc="outside upper right", frameon=False)
        figure.savefig(path, metadata={"Date": None})


def lane(s: Span) -> tuple[float, float]:
    """Bottom and height within a rank's row, which is one high and points down."""
    return (0.05, 0.52) if s.what == "compute" else (0.6 if s.kind == "F" else 0.77, 0.14)


def bars(axes, spans: Sequence[Span], ranks: Sequence[int], origin: float, *, rasterized: bool) -> None:
    groups: dict[tuple, list] = {}
    for s in spans:
        if s.what in ("compute", "exchange"):
            colour = COLOURS[s.kind if s.what == "compute" else "exchange"]
            groups.setdefault((ranks.index(s.rank), lane(s), colour), []).append(((s.start - origin) * 1e3, (s.end - s.start) * 1e3))
    for (row, (bottom, height), colour), times in groups.items():
        axes.broken_barh(times, (row + bottom, height), facecolor=colour, edgecolor="none" if rasterized else "white",
                         linewidth=0.6, rasterized=rasterized)  # fmt: skip
    axes.set_ylim(len(ranks), 0)
    axes.set_yticks([row + 0.5 for row in range(len(ranks))], [f"rank {r}" for r in ranks])
    axes.tick_params(axis="y", length=0)


def label(axes, spans: Sequence[Span], begin: float, end: float) -> None:
    """Phases by name where there is room."""
    for s in spans:
        shown = min(s.end, end) - max(s.start, begin)
        if s.what in ("compute", "exchange") and shown > 0.0052 * len(s.phase) * (end - begin):
            (bottom, height), colour = lane(s), "white" if s.what == "compute" and s.kind == "F" else "black"
            at = (max(s.start, begin) - begin + shown / 2) * 1e3
            axes.text(at, bottom + height / 2, s.phase, ha="center", va="center", fontsize=6.5, color=colour)


# ---------------------------------------------------------------- page


def page(results: dict, command: str, picture: str) -> str:
    """docs/overlap.md, whole."""
    of = dict.fromkeys(("paced", "real", "bubbles", "nodes", "pairs"), "not measured yet") | tables(results)
    shown_step = f"\n![A traced step, and four overlapped actions]({picture})\n" if "paced" in results else ""
    return f"""\
# Communication under compute

While one micro-batch's tokens are on their way to their experts, another micro-batch computes. How much of the exchange time that hides,
and how long pipeline ranks idle, is measured here from traces: every compute phase and every exchange of every rank, with start and end.

```sh
pip install --constraint constraints.txt --editable '.[bench]'    # for the picture
python tests/benchmarks/overlap.py {command}
```

```text
{results["setting"]}
```

A rank is *exchanging* while at least one of its all-to-alls is under way: from when it was issued until its work was over, waiting for
peers and for the link included. What of that time lies under compute spans of the same rank is *hidden*; the rest is *exposed*. In the
tables, *in pairs* is the share of exchanges in actions that overlap a forward with a backward. It caps what a step can hide, but for the
weight gradients that the other exchanges have beside them. `x no latency` is against the same steps with exchanges that take only the time
their bytes really need. With no overlap, every exchange is waited for as soon as it is issued. A number is the median over runs; in
brackets, the lowest and the highest.

## Paced

Four processes, pp 2 x ep 2, DualPipeV, one block a stage or, as in the trace, four. Compute phases and exchanges last a given time around
tiny real ones, which sleep for the rest of it, so that ranks do not take each other's cores. That proves order and overhead, not hardware:
real kernels slow each other down. In one step communication takes as long as compute. `even`: every slot of a pair balances; `trace`: the
shares of DeepSeek's published trace, whose slots do not: combine of the backward takes 0.81 slots, and only the forward's attention, 0.56,
is beside it where a pair begins. With one block a stage that leaves 7.4 % of a pair's exchanges bare, whatever runs them. With four it is
so for the first; beside the others run the weight gradients of the block before.

```text
{of["paced"]}
```
{shown_step}
## Real compute

Two processes with a core each, ep 2, DualPipeV on one pipeline rank. The links have the bandwidth at which a step's exchanges take as long
as its compute. Packing and unpacking messages is a rank's own work, and so compute; what the host does between phases is not, and an
exchange that is under way meanwhile counts as exposed.

```text
{of["real"]}
```

## Bubbles

Four processes, every schedule, chunks of equal length (forward 1, backward 2, half of it weight gradients), no exchange. Simulated:
`parallel/timeline.py` on the same lists, a pair taking as long as its two ops.

```text
{of["bubbles"]}
```

## Nodes

Nodes of two processes, two nodes and four; all of them share the experts. Links inside a node carry 2 MB/s with 0.2 ms of latency, links
between nodes 0.25 MB/s with 1 ms: so slow that an exchange takes many times what processes need to hand a message on. Each token goes to
four experts on at most two nodes, as the router chooses them by random scores, the same under both dispatchers. One block, one
micro-batch, nothing overlapped. Bytes are of all ranks in a step, counted; `x` is how many times as fast as `alltoall`.{shown(results)}

```text
{of["nodes"]}
```

Under compute: two nodes, BF16, DualPipeV on one pipeline rank, paced compute in even slots, links on which an exchange takes one, both legs
of `hierarchical` together. Its leg between nodes lies under the other op's compute. Its leg inside a node, a small part of the exchange, is
waited for as soon as it is sent: with a turn of the other op between the legs, both ops would wait for one, and compute for neither.

```text
{of["pairs"]}
```

## On one GPU

`python tests/benchmarks/gpu.py OUT --only overlap` lets a GPU exchange with itself (`parallel/loopback.py`): a kernel of at most 20 thread
blocks copies the bytes at the speed of a link, on a stream for each direction. It prints what the executor costs against a plain loop, how
much is hidden where exchanges take as long as compute, how much longer compute takes beside them, and gaps that the host left. Of NCCL's
own thread blocks, `parallel.comm_sms` is the most that each communicator of an exchange may take.

## In a run

A run writes such traces itself: `launch.trace_interval=100` makes `traces/step_N.json` in its directory every 100 steps, which
[ui.perfetto.dev](https://ui.perfetto.dev) and `chrome://tracing` open; the last one is drawn in the run's report, and each traced step's
`bubble`, `comm_seconds`, `exposed_seconds` and `hidden_share` stand in its metrics.
"""
