"""The planner beside training runs that others published: `python tests/benchmarks/published.py [--only TEXT] [--docs docs/published.md]`.

published.yaml has the runs with their sources; each is priced in the layout that its source says, and the speeds are put side by side,
beside a guess of one MFU for all. Where a layout has what this software has not (tensor or context parallelism, sharded weights), the
plan's `stack` says so: it is priced, and could not be run.
"""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path

import yaml
from shoestring.conf.compose import load
from shoestring.launch.simulate import project_step
from shoestring.train import cost

RUNS = Path(__file__).with_name("published.yaml")
RECOMPUTE = {
    "none": "[]",
    "selective": "[norm,swiglu]",
    "attention": "[attention]",
    "full": "[attention,experts]",
    "deepseek": "[norm,mla_up,swiglu]",
}
MARKS = "<!-- made by tests/benchmarks/published.py -->", "<!-- end -->"
ROPE = 32  # of a head's width, in the stand-in for attention without latents


def model_words(spec: dict) -> list[str]:
    """A model that costs the same. Keys and values of full rank, or of a few heads, are a latent of the rank at which the matrices of a
    block have as many parameters; two matrices of a plain feed-forward are three of two thirds of their width."""
    if "config" in spec:
        return [f"model={spec['config']}", *(f"model.{key}={value}" for key, value in spec.get("set", {}).items())]
    dim, heads = spec["dim"], spec["heads"]
    width, kv = spec.get("head_dim", dim // heads), spec.get("kv_heads", heads)
    rope = min(ROPE, width // 2)
    rank = (2 * dim * kv * width - dim * rope) / (dim + heads * (2 * width - rope))
    moe = "experts" in spec
    hidden = spec.get("ffn", 0) if spec.get("gated") else 2 * spec.get("ffn", 0) / 3
    fields = {
        "name": "published", "num_layers": spec["layers"], "dim": dim, "vocab_size": spec["vocab"], "max_seq_len": 1 << 20,
        "num_heads": heads, "q_lora_rank": 0, "kv_lora_rank": _round(rank), "qk_nope_head_dim": width - rope, "qk_rope_head_dim": rope,
        "v_head_dim": width, "num_dense_layers": spec.get("dense_layers", 0) if moe else spec["layers"],
        "dense_hidden_dim": _round(hidden) or dim, "num_experts": spec.get("experts", 1), "num_shared_experts": spec.get("shared", 0),
        "top_k": spec.get("top_k", 1), "expert_hidden_dim": spec.get("expert_ffn", dim), "num_groups": 1, "num_limited_groups": 1,
        "tie_embeddings": str(spec.get("tied", False)).lower(),
    }  # fmt: skip
    return ["model=deepseek_v3", *(f"model.{key}={value}" for key, value in fields.items())]


def _round(width: float) -> int:
    return round(width / 16) * 16


def layout_words(run: dict) -> list[str]:
    """Tensor and context parallelism make teams of GPUs, each of which is one rank of the layout; experts' ranks count teams, too."""
    team = run.get("tp", 1) * run.get("cp", 1)
    pp, vp, ep = run.get("pp", 1), run.get("vp", 1), max(1, run.get("ep", 1) // team)
    ranks = run["gpus"] // team // pp
    sequences = run.get("mbs", 1)
    micro_batches = run["batch"] // (ranks * sequences)
    interleaved = vp > 1 and pp > 1 and micro_batches % pp == 0
    hides = run.get("overlap") and ep > 1 and pp > 1
    words = {
        "parallel.pp": pp, "parallel.ep": ep, "parallel.edp": ranks // ep, "train.micro_batch_sequences": sequences,
        "parallel.schedule": "dualpipe" if hides else "interleaved_1f1b" if interleaved else "1f1b",
        "parallel.chunks": vp if interleaved and not hides else 1,
        "parallel.dispatcher": "deepep" if ep > 1 else "auto",
        "train.recompute": RECOMPUTE[run.get("recompute", "none")],
    }  # fmt: skip
    stack = {
        "stack.tensor": run.get("tp", 1), "stack.context": run.get("cp", 1), "stack.sharded_weights": run.get("sharded", False),
        "stack.block_scales": run.get("blocks", False), "stack.overlap_reduce": not run.get("bare_reduce", False),
    }  # fmt: skip
    return [f"{key}={value}" for key, value in {**words, **stack}.items()]


def words_of(run: dict, spec: dict) -> list[str]:
    return [
        *model_words(spec), f"cluster={run['gpu']}", f"precision={run.get('precision', 'bf16')}", "data=synthetic",
        f"data.seq_len={run['seq']}", f"train.global_batch_tokens={run['seq'] * run['batch']}", "train.tokens=1_000_000_000_000",
        *layout_words(run), *run.get("set", []),
    ]  # fmt: skip


def published_speed(run: dict, spec: dict) -> float:
    """Tokens per second and GPU."""
    if "speed" in run:
        return run["speed"]
    if "seconds" in run:
        return run["batch"] * run["seq"] / run["seconds"] / run["gpus"]
    return run["tflops"] * 1e12 / counted_flops(run, spec)


def counted_flops(run: dict, spec: dict) -> float:
    """FLOPs of a token as the source counts them: all of S x S; `hardware`: with the second forward of full recomputation."""
    layers, dim, seq, vocab = spec["layers"], spec["dim"], run["seq"], spec["vocab"]
    if spec.get("gated"):
        kv = spec.get("kv_heads", spec["heads"]) / spec["heads"]
        return 6 * (layers * (dim * dim * (2 + 2 * kv) + 3 * dim * spec["ffn"]) + dim * vocab) + 12 * layers * dim * seq
    times = 96 if run["counts"] == "hardware" else 72
    return times * layers * dim**2 * (1 + seq / (6 * dim) + vocab / (16 if times == 96 else 12) / layers / dim)


@dataclass(frozen=True, kw_only=True)
class Row:
    run: dict
    dense: bool
    published: float
    projected: float
    mfu: float  # at the published speed

    @property
    def error(self) -> float:
        return self.projected / self.published - 1


def priced(run: dict, spec: dict) -> Row:
    c, published = load(words_of(run, spec)), published_speed(run, spec)
    step = project_step(c)
    return Row(
        run=run, dense=not c.model.num_moe_layers, published=published, mfu=cost.mfu(published, c),
        projected=step.tokens / step.expected.likely / run["gpus"],
    )  # fmt: skip


def medians(rows: list[Row]) -> dict[str, tuple[int, float, float, float]]:
    """By kind: how many, the median of the errors' sizes, of the errors, and of the errors' sizes of one MFU for all runs."""
    kinds = {"all": rows, "dense": [r for r in rows if r.dense], "mixtures of experts": [r for r in rows if not r.dense]}
    for key in ("gpu", "precision"):
        for value in dict.fromkeys(r.run.get(key, "bf16") for r in rows):
            kinds[value] = [r for r in rows if r.run.get(key, "bf16") == value]
    median, guess = statistics.median, statistics.median(r.mfu for r in rows)
    others = lambda found: median(abs(guess / r.mfu - 1) for r in found)
    sizes = lambda found: (median(abs(r.error) for r in found), median(r.error for r in found), others(found))
    return {kind: (len(found), *sizes(found)) for kind, found in kinds.items() if found}


# ---------------------------------------------------------------- shown


def layout_of(run: dict) -> str:
    names = {"tp": "tp", "cp": "cp", "pp": "pp", "vp": "chunks", "ep": "ep", "mbs": "micro-batch"}
    parts = [f"{names[key]} {run[key]}" for key in names if run.get(key, 1) > 1]
    recompute = run.get("recompute", "none")
    return ", ".join([*parts, *["sharded"] * run.get("sharded", False), *["overlap"] * run.get("overlap", False),
                      *[f"recompute {recompute}"] * (recompute != "none")]) or "-"  # fmt: skip


def cells(row: Row) -> list[str]:
    run = row.run
    precision = run.get("precision", "bf16") + " blocks" * run.get("blocks", False)
    return [
        run["model"], f"{run['gpus']:,} {run['gpu']}", f"{run['batch']:,} x {run['seq']:,}", precision, layout_of(run),
        f"{row.published:,.0f}", f"{row.projected:,.0f}", f"{row.error:+.0%}", run["source"] + "*" * ("made" in run),
    ]  # fmt: skip


def page(rows: list[Row]) -> str:
    """Two tables, as docs/published.md has them."""
    line = lambda values: "| " + " | ".join(values) + " |"
    kinds = [[kind, f"{num}", f"{size:.1%}", f"{bias:+.1%}", f"{one:.1%}"] for kind, (num, size, bias, one) in medians(rows).items()]
    first = ["", "runs", "median error", "median, signed", "one MFU for all"], *kinds
    heads = ["model", "GPUs", "sequences", "precision", "layout", "published", "projected", "apart", "source"]
    second = [heads, *map(cells, rows)]
    tables = [[line(table[0]), line(["---"] * len(table[0])), *map(line, table[1:])] for table in (first, second)]
    return "\n\n".join("\n".join(table) for table in tables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="runs whose line has this text")
    parser.add_argument("--docs", type=Path, help="a page whose tables are replaced")
    options = parser.parse_args()
    content = yaml.safe_load(RUNS.read_text())
    rows = []
    for run in content["runs"]:
        if options.only in str(run):
            rows.append(priced(run, content["models"][run["model"]]))
            print("  ".join(cells(rows[-1])), flush=True)
    print(page(rows).split("\n\n")[0])
    if options.docs:
        before, _, rest = options.docs.read_text().partition(MARKS[0])
        options.docs.write_text(f"{before}{MARKS[0]}\n{page(rows)}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


if __name__ == "__main__":
    main()
