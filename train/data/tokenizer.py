"""Text to token ids and back: raw bytes, a byte-level BPE trained on the corpus, or any tokenizer.json.

All three are a `tokenizers.Tokenizer` with an end-of-document id, so every run can save the tokenizer.json that its export needs.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ...conf import files
from ...conf.schema import ConfigError

END_OF_DOCUMENT = "<|endoftext|>"
_KNOWN_ENDS = (END_OF_DOCUMENT, "<｜end▁of▁sentence｜>", "<|end_of_text|>", "</s>", "<eos>")
FIM_TOKENS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")  # what follows each: fill in the middle
_KNOWN_FIM = (("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), FIM_TOKENS, ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"))
MIN_BPE_VOCAB = 257  # every byte, and the end of a document; FIM_TOKENS come on top


class Tokenizer:
    """Ids of text. `vocab_size` is one more than the largest id it can give; `eod_id` follows each document of the corpus.

    `fim_ids`: the ids that stand before the prefix, the suffix and the middle of a document to be filled in; None where it has none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, end_of_document: str = END_OF_DOCUMENT):
        eod_id = backend.token_to_id(end_of_document)
        assert eod_id is not None, f"{end_of_document} is not in the vocabulary"
        backend.no_padding(), backend.no_truncation()  # a document is never cut or filled up
        self._saved = backend.to_str()
        # Text that happens to spell a special token must not become one: a document could otherwise forge its own end.
        backend.encode_special_tokens = True
        self._backend = backend
        self.eod_id: int = eod_id
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        found = (tuple(backend.token_to_id(token) for token in spelling) for spelling in _KNOWN_FIM)
        self.fim_ids: tuple[int, int, int] | None = next((ids for ids in found if None not in ids), None)

    @property
    def fingerprint(self) -> str:
        """sha256 of all that decides its ids."""
        return hashlib.sha256(f"{self.eod_id}\n{self._saved}".encode()).hexdigest()

    def id_of(self, token: str) -> int | None:
        """Of a token by its exact spelling, special ones too."""
        return self._backend.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without any special token."""
        return self.encode_documents([text])[0].tolist()

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text, int64. Safe and parallel across threads: the work is outside the interpreter lock."""
        # One text per call: a longer batch would spread over every core of the machine, whatever number of threads was asked for.
        return [np.array(self._backend.encode_batch_fast([text], add_special_tokens=False)[0].ids, dtype=np.int64) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, special tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def bytes_of_id(self) -> np.ndarray | None:
        """UTF-8 bytes of text behind each id, (vocab_size,) int64, 0 for special tokens: a document's ids add up to its length in bytes.

        None for a tokenizer whose ids are not bytes of the text (one that drops blanks, say). Where a tokenizer normalises text, the
        bytes are those of the normalised text.
        """
        if not _is_byte_level(json.loads(self._saved)["decoder"]):
            return None
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for spelling, i in self._backend.get_vocab(with_added_tokens=True).items():
            sizes[i] = len(spelling)  # in the byte-level alphabet, a character is a byte
        for i, token in self._backend.get_added_tokens_decoder().items():
            sizes[i] = 0 if token.special else len(token.content.encode())
        return sizes

    def save(self, path: str | Path) -> None:
        """Write a tokenizer.json that `tokenizers` and `transformers` load."""
        write_atomically(Path(path), self._saved)


class ByteTokenizer(Tokenizer):
    """Ids 0-255 are the bytes of the text's UTF-8, 256 is the end of a document; with `fim`, 257-259 are FIM_TOKENS."""

    def __init__(self, *, fim: bool = False):
        spelling = _byte_spelling()
        backend = tokenizers.Tokenizer(models.BPE(vocab={spelling[b]: b for b in range(256)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(_special_tokens(fim))
        super().__init__(backend)

    def encode_documents(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]


def train_bpe(texts: Iterable[str], vocab_size: int, *, fim: bool = False) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids, with `fim` FIM_TOKENS among them; the same texts, in order, give the same tokenizer."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=_special_tokens(fim), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def load_tokenizer(path: str | Path, end_of_document: str = "", *, fim: bool = False) -> Tokenizer:
    """The tokenizer of a tokenizer.json; `end_of_document` names its token, the usual spellings are tried if it is empty.

    Raises ConfigError where the file cannot be read or has no such token or, with `fim`, no tokens for filling in the middle.
    """
    path = Path(path).expanduser()
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the Rust side raises bare Exception
        raise ConfigError("data.tokenizer.path", str(path), f"no readable tokenizer.json at {path} ({_first_line(error)})") from None
    candidates = (end_of_document,) if end_of_document else _KNOWN_ENDS
    for token in candidates:
        if backend.token_to_id(token) is not None:
            tokenizer = Tokenizer(backend, token)
            if fim and tokenizer.fim_ids is None:
                spellings = "; ".join(" ".join(spelling) for spelling in _KNOWN_FIM)
                raise ConfigError("data.tokenizer.path", str(path), f"data.fim_rate needs three tokens that it lacks, in one of these "
                                  f"spellings: {spellings}; add them, or set data.fim_rate=0")  # fmt: skip
            return tokenizer
    special = ", ".join(t.content for t in list(backend.get_added_tokens_decoder().values())[:8])
    raise ConfigError("data.tokenizer.end_of_document", end_of_document or "(empty)",
                      f"none of {', '.join(candidates)} is a token of {path}; its special tokens: {special or 'none'}")  # fmt: skip


def write_atomically(path: Path, text: str) -> None:
    """Write `text` so that a reader sees the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    files.replace(path, text, temporary)


def canonical_hash(value) -> str:
    """sha256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def _special_tokens(fim: bool) -> list[str]:
    return [END_OF_DOCUMENT, *FIM_TOKENS] if fim else [END_OF_DOCUMENT]


def _is_byte_level(decoder: dict | None) -> bool:
    steps = (decoder or {}).get("decoders", [decoder or {}])
    return any(step.get("type") == "ByteLevel" for step in steps)


def _byte_spelling() -> dict[int, str]:
    """GPT-2's printable character for every byte: itself where it prints, else the next free one from U+0100."""
    prints = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [b for b in range(256) if b not in prints]
    return {b: chr(b) if b in prints else chr(256 + hidden.index(b)) for b in range(256)}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
