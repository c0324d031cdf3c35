"""How fast one process reads shuffled samples: `python tests/benchmarks/loader.py [--cache-dir FOLDER] [words as for shoestring train]`.

Prints samples and tokens per second of `Corpus.train` in training order, and how that compares with what a CPU rank trains
(about 10,000 tokens/s for the `tiny` model) and what one H800 of DeepSeek-V3's run trained (about 1,500 tokens/s).
"""

import argparse
import statistics
import time

import numpy as np
from shoestring.conf.compose import load
from shoestring.train.data.corpus import open_corpus

CPU_TOKENS_PER_S = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache-dir", default="~/.cache/shoestring")
    parser.add_argument("--batch", type=int, default=32, help="samples per call")
    parser.add_argument("--seconds", type=float, default=2.0, help="per sequence length")
    parser.add_argument("overrides", nargs="*", default=["data=stdlib"])
    arguments = parser.parse_args()
    print(f"{'seq_len':>8} {'samples/s':>12} {'tokens/s':>14} {'x a CPU rank':>14}")
    for seq_len in (256, 1024, 4096):
        shape = [f"data.seq_len={seq_len}", "model.max_seq_len=4096", "train.micro_batch_sequences=1"]
        shape.append(f"train.global_batch_tokens={seq_len}")
        config = load([*arguments.overrides, *shape, f"data.cache_dir={arguments.cache_dir}"])
        corpus = open_corpus(config.data, vocab_size=config.model.vocab_size, seed=0)
        samples = throughput(lambda first, c=corpus: c.train(np.arange(first, first + arguments.batch)), arguments.batch, arguments.seconds)
        tokens = samples * seq_len
        print(f"{seq_len:>8} {samples:>12,.0f} {tokens:>14,.0f} {tokens / CPU_TOKENS_PER_S:>13,.0f}x")


def throughput(read, batch: int, seconds: float) -> float:
    """Samples per second: the median of twenty intervals, after one to warm up."""
    first, rates = 0, []
    for _ in range(21):
        start = now = time.perf_counter()
        begin = first
        while now - start < seconds / 21:
            read(first)
            first += batch
            now = time.perf_counter()
        rates.append((first - begin) / (now - start))
    return statistics.median(rates[1:])


if __name__ == "__main__":
    main()
