"""To and from Hugging Face: runs become DeepSeek-V3 checkpoints that `transformers` loads, and such checkpoints become models.

Everything is streamed: in memory are one weight of ours and one shard of theirs.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch
import yaml
from torch import Tensor

from ..conf.compose import load_saved
from ..conf.schema import ModelConfig
from .hf_checkpoint import CheckpointWeights, find_checkpoint, write_first
from .hf_files import HFFolder, NewFolder, matched, write_json, write_shards
from .hf_format import STORED_DTYPES, HFError, Piece, model_config_from_hf, pieces, stored_dtype, to_hf_config, weight_shapes
from .model import DTYPES, CausalLM
from .tokenizer import load_tokenizer

__all__ = ["HFError", "ModelWeights", "WeightSource", "export", "import_", "load_pretrained", "write"]


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


def export(source: str | Path, out: str | Path, *, dtype: str = "auto", max_shard_bytes: float = 5e9) -> Path:
    """Write the newest checkpoint of the run directory `source` (or one checkpoint folder) as a Hugging Face checkpoint `out`.

    `dtype`: fp32, bf16, fp64, or auto, the one that the run computed in. The run's tokenizer goes along. Returns the checkpoint that was
    exported. Raises HFError as `write` does, and CheckpointError where the checkpoint is damaged.
    """
    checkpoint, run_dir = find_checkpoint(Path(source))
    weights = CheckpointWeights(checkpoint)
    tokenizer, saved = run_dir / "tokenizer.json", run_dir / "config.yaml"
    write(
        weights,
        weights.m,
        Path(out),
        dtype=weights.precision if dtype == "auto" else dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        end_of_document=load_saved(saved).data.tokenizer.end_of_document if saved.is_file() else "",
    )
    return checkpoint


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
    with NewFolder(out) as folder:
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


# ---------------------------------------------------------------- in


def import_(hf_dir: str | Path, out: str | Path, *, name: str = "imported", skip_mtp: bool = False) -> Path:
    """Make a Hugging Face checkpoint one that training starts from; returns that checkpoint.

    out/checkpoints/step_00000000   FP32 masters, zero moments: for checkpoint.resume=
    out/model/NAME.yaml             the model: for --config-dir out model=NAME
    out/tokenizer.json              where the checkpoint has one: for data.tokenizer.path=

    The folder has its name only once it is whole. Raises HFError as `load_pretrained` does, and where `out` is not empty.
    """
    out, folder = Path(out), HFFolder(Path(hf_dir))
    m = model_config_from_hf(folder.config, name=name)
    parts = matched(folder, m, skip_mtp=skip_mtp)
    with NewFolder(out) as new:
        (new / "model").mkdir()
        (new / "model" / f"{name}.yaml").write_text(yaml.safe_dump(asdict(m), sort_keys=False), encoding="utf-8")
        if (folder.path / "tokenizer.json").is_file():
            shutil.copyfile(folder.path / "tokenizer.json", new / "tokenizer.json")
        made = write_first(new / "checkpoints", m, parts, folder.read, precision=stored_dtype(folder.config))
    return out / made.relative_to(new)


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
