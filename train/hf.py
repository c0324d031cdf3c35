"""To and from Hugging Face: runs become DeepSeek-V3 checkpoints that `transformers` loads, and such checkpoints become models.

Everything is streamed: in memory are one weight of ours and one shard of theirs.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..conf.schema import ModelConfig
from .hf_files import HFFolder, matched, write_json, write_shards
from .hf_format import STORED_DTYPES, HFError, Piece, model_config_from_hf, pieces, stored_dtype, to_hf_config, weight_shapes
from .model import DTYPES, CausalLM
from .tokenizer import load_tokenizer

__all__ = ["HFError", "ModelWeights", "WeightSource", "load_pretrained", "write"]


class WeightSource(Protocol):
    """Where weights to export come from."""

    def names(self) -> list[str]:
        """Global names of all weights and selection biases."""
        ...

    def read(self, name: str) -> Tensor:
        """The whole weight, all experts, flattened or not."""
        ...


class ModelWeights:
    """The weights of a model in memory."""

    def __init__(self, model: CausalLM):
        self._tensors = {**dict(model.stage.named_parameters()), **dict(model.stage.named_buffers())}

    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str) -> Tensor:
        return self._tensors[name].detach()


# ---------------------------------------------------------------- out


def write(
    source: WeightSource,
    m: ModelConfig,
    out: Path,
    *,
    dtype: str,
    max_shard_bytes: float = 5e9,
    tokenizer: Path | None = None,
    end_of_document: str = "",
) -> None:
    """Write a checkpoint folder `out`, its weights stored as `dtype` (fp32, bf16, fp64), the selection bias always in float32.

    `tokenizer`: a tokenizer.json to ship. The folder has its name only once it is whole. Raises HFError where `out` exists and is not
    empty, and where the source does not hold exactly the model's weights; nothing is left behind then.
    """
    if dtype not in STORED_DTYPES:
        raise HFError(f"dtype = {dtype}: must be auto or one of {', '.join(STORED_DTYPES)}")
    wanted = list(pieces(m))
    _check_source(source, m)
    with _NewFolder(out) as folder:
        eod_id = None
        if tokenizer is not None:
            eod_id = _write_tokenizer(tokenizer, end_of_document, folder, m.max_seq_len)
        write_json(folder / "config.json", to_hf_config(m, dtype, end_of_document=eod_id))
        write_json(folder / "generation_config.json", {"_from_model_config": True, "bos_token_id": None, "eos_token_id": eod_id})
        dtype_of = lambda piece: torch.float32 if piece.is_selection_bias else DTYPES[dtype]
        sizes = [p.numel * dtype_of(p).itemsize for p in wanted]
        write_shards(folder, _cut(source, m, wanted, dtype_of), sizes, max_shard_bytes)


def _cut(source: WeightSource, m: ModelConfig, wanted: list[Piece], dtype_of: Callable) -> Iterator[tuple[Piece, Tensor]]:
    """Each piece with its tensor; each weight is read once, and dropped before the next."""
    shapes = weight_shapes(m)
    for weight, parts in groupby(wanted, key=lambda p: p.weight):
        flat = source.read(weight).flatten() if weight in shapes else torch.empty(0)
        for p in parts:
            yield p, flat[p.offset : p.offset + p.numel].view(p.shape).to(dtype_of(p), copy=True)
        del flat


def _check_source(source: WeightSource, m: ModelConfig) -> None:
    wanted, held = weight_shapes(m).keys(), set(source.names())
    if missing := sorted(wanted - held):
        raise HFError(f"the run's weights lack {', '.join(missing[:4])} (of {len(missing)}): is its config.yaml that of another model?")
    if extra := sorted(held - wanted):
        raise HFError(f"the run has weights that its model does not: {', '.join(extra[:4])} (of {len(extra)})")


def _write_tokenizer(path: Path, end_of_document: str, folder: Path, max_seq_len: int) -> int:
    """Copy tokenizer.json, describe it for `transformers`; the id of the end of a document."""
    tokenizer = load_tokenizer(path, end_of_document)
    shutil.copyfile(path, folder / "tokenizer.json")
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.decode([tokenizer.eod_id]),
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", described)
    return tokenizer.eod_id


class _NewFolder:
    """A folder under a temporary name beside `out`, renamed to it when all went well and removed when not."""

    def __init__(self, out: Path):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise HFError(f"{out}: exists and is not an empty folder; remove it, or choose another place")
        self.out, self.temporary = out, out.with_name(f".{out.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.temporary.rename(self.out)  # POSIX: also onto an empty folder
        else:
            shutil.rmtree(self.temporary, ignore_errors=True)


# ---------------------------------------------------------------- in


def load_pretrained(path: str | Path, *, dtype: str = "fp32", skip_mtp: bool = False) -> CausalLM:
    """The model of a Hugging Face DeepSeek-V3 checkpoint, on the CPU: called with tokens (B, S) it returns logits (B, S, V).

    `dtype` of its weights: fp32, bf16, fp64, or auto (as stored; fp32 where that is float16). Reads model.safetensors or the files of
    model.safetensors.index.json, tensor by tensor. Raises HFError for any tensor that is missing, unexpected or mis-shaped, and for a
    config.json that asks for what this model does not compute.
    """
    folder = HFFolder(Path(path))
    m = model_config_from_hf(folder.config)
    dtype = stored_dtype(folder.config) if dtype == "auto" else dtype
    if dtype not in DTYPES:
        raise HFError(f"dtype = {dtype}: must be auto or one of {', '.join(DTYPES)}")
    parts = matched(folder, m, skip_mtp=skip_mtp)
    with torch.device("meta"):
        model = CausalLM(m, DTYPES[dtype])
    model.to_empty(device="cpu")
    tensors = {**dict(model.stage.named_parameters()), **dict(model.stage.named_buffers())}
    for p in parts:
        tensors[p.weight].detach().view(-1)[p.offset : p.offset + p.numel].copy_(folder.read(p.name).view(-1))
    return model
