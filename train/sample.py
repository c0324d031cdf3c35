"""Text from a trained model: load it from a run or an exported folder, choose token after token, and give out text as it comes.

V vocabulary
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..conf.compose import load_saved
from ..conf.schema import ConfigError
from .checkpoint.trust import Trust, check_tokenizer
from .data.tokenizer import Tokenizer, load_tokenizer
from .interop.hf import filled, load_pretrained, read_rows, tell
from .interop.hf_checkpoint import CheckpointWeights, trusted_checkpoint, trusted_folder
from .interop.hf_files import read_json
from .interop.hf_format import pieces
from .model.decoder import CausalLM
from .model.latent_cache import Decoder

_UNFINISHED = "\ufffd"  # what a decoder makes of bytes that are no UTF-8, or not yet


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: temperature 0 takes the likeliest; `top_p` draws from the fewest tokens that have that probability."""

    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError("--temperature", self.temperature, "must be 0 (always the likeliest token) or more", 0.0)
        if not 0 < self.top_p <= 1:
            raise ConfigError("--top-p", self.top_p, "is a probability above 0", 1.0)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model without its modules for multi-token prediction, in FP32 on the CPU, and its tokenizer.

    `begin_id` stands before a document. Where a tokenizer has no token for that, it is the end of another document, as in our training.
    """

    model: CausalLM
    tokenizer: Tokenizer
    begin_id: int
    source: Path  # the checkpoint, or the exported folder


def load(
    source: str | Path, weights: str = "master", *, trust: Sequence[str] = (), signers: str = "", log: Callable[[str], None] = tell
) -> Loaded:
    """Of a run directory its newest checkpoint, or one checkpoint of a run, or a Hugging Face folder.

    `trust`, `signers`: of somebody else's, as `train/checkpoint/trust.py` has them.
    `weights` of a checkpoint: master, or ema, the average of them that the run kept. Raises HFError or CheckpointError where there is no
    such model, ConfigError where its tokenizer is missing or does not fit, and for an average that a Hugging Face folder cannot have.
    """
    source, said = Path(source), Trust(words=tuple(trust), signers=signers)
    if (source / "config.json").is_file():
        if weights != "master":
            rule = f"is of a run; {source} is a Hugging Face folder, with one kind of weights: leave the option out"
            raise ConfigError("--weights", weights, rule)
        trusted_folder(source, said, log)
        tokenizer, begin = _exported_tokenizer(source)  # before the weights: a missing one is told at once
        model = load_pretrained(source, mtp="skip")
    else:
        source, run_dir, verdict = trusted_checkpoint(source, said, log)
        saved = run_dir / "config.yaml"
        end = load_saved(saved).data.tokenizer.end_of_document if saved.is_file() else ""
        tokenizer, begin = load_tokenizer(run_dir / "tokenizer.json", end), None
        held = CheckpointWeights(source, weights)
        check_tokenizer(source, held.tokenizer, tokenizer.fingerprint, verdict)
        model = _load_checkpoint(held)
    if tokenizer.vocab_size > model.m.vocab_size:
        rule = f"its {tokenizer.vocab_size} ids do not fit the model's {model.m.vocab_size}: it is that of another model"
        raise ConfigError("tokenizer.json", str(source), rule)
    return Loaded(model=model, tokenizer=tokenizer, begin_id=tokenizer.eod_id if begin is None else begin, source=source)


def _exported_tokenizer(folder: Path) -> tuple[Tokenizer, int | None]:
    """And the id that its tokenizer_config.json gives to the begin of a text, if any."""
    path = folder / "tokenizer_config.json"
    described = read_json(path) if path.is_file() else {}
    spelling = {key: token["content"] if isinstance(token, dict) else token for key, token in described.items() if key.endswith("_token")}
    tokenizer = load_tokenizer(folder / "tokenizer.json", spelling.get("eos_token") or "")
    return tokenizer, tokenizer.id_of(spelling.get("bos_token") or "")


def _load_checkpoint(weights: CheckpointWeights) -> CausalLM:
    m = dataclasses.replace(weights.m, mtp_depth=0).freeze()
    return filled(m, [p for p in pieces(m) if p.numel and not p.implied], partial(read_rows, weights))


class Generator:
    """Continues one prompt, as often as asked: the prompt is read once."""

    def __init__(self, loaded: Loaded, prompt: str, max_tokens: int):
        """Raises ConfigError where the model has no room for the prompt and one token more."""
        tokenizer, room = loaded.tokenizer, loaded.model.m.max_seq_len
        ids = [loaded.begin_id, *tokenizer.encode(prompt)]
        if len(ids) >= room:
            raise ConfigError("prompt", f"{len(ids)} tokens", f"must be fewer than model.max_seq_len = {room}; shorten it")
        self._tokenizer, self._prompt = tokenizer, len(ids)
        self.max_tokens = min(max_tokens, room - len(ids))
        self._decoder = Decoder(loaded.model, len(ids) + self.max_tokens)
        self._first_V = self._decoder(torch.tensor(ids))[-1, : tokenizer.vocab_size]

    def tokens(self, sampling: Sampling) -> Iterator[int]:
        """The ids that follow the prompt, up to `max_tokens` or before the end of the document. One iteration at a time."""
        random = torch.Generator().manual_seed(sampling.seed)
        self._decoder.rewind(self._prompt)
        logits_V = self._first_V
        for count in range(1, self.max_tokens + 1):
            token = choose(logits_V, sampling, random)
            if token == self._tokenizer.eod_id:
                return
            yield token
            if count < self.max_tokens:  # ids that no text has are never chosen, though the model may have room for them
                logits_V = self._decoder(torch.tensor([token]))[0, : self._tokenizer.vocab_size]


def choose(logits_V: Tensor, sampling: Sampling, random: torch.Generator) -> int:
    """A token by its logits. Of equally likely ones at the edge of `top_p`, the smaller id is taken first."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    sorted_V, order_V = (logits_V.double() / sampling.temperature).softmax(0).sort(descending=True, stable=True)
    before_V = sorted_V.cumsum(0) - sorted_V
    nucleus_V = sorted_V.where(before_V < sampling.top_p, 0.0)
    return int(order_V[nucleus_V.multinomial(1, generator=random)])


class TextStream:
    """Ids to text, one by one: bytes wait until their character is complete. All that is given out, joined, is the text of all ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._decode = tokenizer.decode
        self._ids: list[int] = []  # the last one whose text is out, for some tokenizers drop a blank at the begin; then those that wait
        self._out = ""  # what is out of their text

    def add(self, token: int) -> str:
        """The text that can be given out now; may be empty."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if text.endswith(_UNFINISHED):
            return ""
        new, self._ids = text[len(self._out) :], [token]
        self._out = self._decode(self._ids)
        return new

    def finish(self) -> str:
        """What still waits, when no more ids come."""
        return self._decode(self._ids)[len(self._out) :]
