"""Text of a trained model in a terminal: continuations on stdout as they are written, everything about them on stderr."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..conf.errors import ConfigError
from ..train import units
from ..train.sample import Generator, Sampling, TextStream, load

_FAINT, _PLAIN = "\033[2m", "\033[0m"


def show(
    source: Path, prompt: str, *, weights: str, max_tokens: int, temperature: float, top_p: float, seed: int, num: int,
    trust: Sequence[str] = (), signers: str = "",
) -> None:  # fmt: skip
    """Write `num` continuations of `prompt`, seeded `seed`, `seed + 1` and so on. Raises what `load` and `Generator` do."""
    for name, value in (("--max-tokens", max_tokens), ("--num", num)):
        if value < 1:
            raise ConfigError(name, value, "must be at least 1", 1)
    samplings = [Sampling(temperature=temperature, top_p=top_p, seed=seed + i) for i in range(num)]
    loaded = load(source, weights, trust=trust, signers=signers, log=_tell)
    generator = Generator(loaded, prompt, max_tokens)
    if generator.max_tokens < max_tokens:
        _tell(f"at most {generator.max_tokens} tokens: prompt and text must fit model.max_seq_len = {loaded.model.m.max_seq_len}")
    start, num_tokens = time.monotonic(), 0
    for i, sampling in enumerate(samplings):
        if num > 1:
            _tell(f"{i + 1} of {num}")
        stream = TextStream(loaded.tokenizer)
        _write(f"{_FAINT}{prompt}{_PLAIN}" if sys.stdout.isatty() else prompt)
        for token in generator.tokens(sampling):
            _write(stream.add(token))
            num_tokens += 1
        _write(stream.finish() + "\n")
    seconds = time.monotonic() - start
    _tell(f"{num_tokens} tokens in {seconds:.1f} s ({units.count(num_tokens / seconds)} tokens/s), from {loaded.source}")


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
