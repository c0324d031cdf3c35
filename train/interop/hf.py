"""To and from Hugging Face: runs become DeepSeek checkpoints that `transformers` loads, and such checkpoints become models.

Everything is streamed, a few million elements at a time. Whatever the size of tensors and shards, a conversion (`export`, `import_`)
holds less than `CONVERSION_BYTES` of memory for data beyond what the process had before. Lists come on top, measured on
small models and extrapolated, about

    export     2 KB for each tensor there (92 thousand for DeepSeek-V3 in FP8: 0.2 GB), 2 KB for each piece in the checkpoint read
    import_    9 KB for each `BLOCK` of elements, which is three pieces of a checkpoint (186 thousand for DeepSeek-V3: 1.7 GB)
"""

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import yaml
from torch import Tensor

from ...conf.compose import load_saved
from ...conf.schema import ModelConfig
from ..checkpoint.trust import Trust, check_tokenizer
from ..data.tokenizer import load_tokenizer
from ..model.decoder import DTYPES, CausalLM
from .hf_checkpoint import CheckpointWeights, Rows, trusted_checkpoint, trusted_folder, write_first
from .hf_files import SCALE, HFFolder, NewFolder, Stored, matched, write_json, write_shards
from .hf_format import STORED_DTYPES, HFError, Piece, model_config_from_hf, pieces, stored_dtype, to_hf_config, weight_shapes
from .hf_fp8 import grid, quantise, scales

__all__ = ["CONVERSION_BYTES", "HFError", "ModelWeights", "WeightSource", "export", "filled", "import_", "load_pretrained", "write"]

CONVERSION_BYTES = 128 * 2**20
MTP = ("check", "shared-from-main", "skip")


def tell(line: str) -> None:
    """On standard error: what a command prints is for others to read."""
    print(line, file=sys.stderr, flush=True)


class WeightSource(Protocol):
    """Where weights to export come from."""

    def names(self) -> list[str]:
        """Global names of all weights and selection biases."""
        ...

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the weight, all experts, flattened."""
        ...


class ModelWeights:
    """The weights of a model in memory."""

    def __init__(self, model: CausalLM):
        self._tensors = {**dict(model.stage.named_parameters()), **dict(model.stage.named_buffers())}

    def names(self) -> list[str]:
        return list(self._tensors)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self._tensors[name].detach().view(-1)[start:stop]


# ---------------------------------------------------------------- out


def export(
    source: str | Path, out: str | Path, *, dtype: str = "auto", weights: str = "master", max_shard_bytes: float = 5e9,
    trust: Sequence[str] = (), signers: str = "", log: Callable[[str], None] = tell,
) -> Path:  # fmt: skip
    """Write the newest checkpoint of the run directory `source` (or one checkpoint folder) as a Hugging Face checkpoint `out`.

    `dtype`: fp32, bf16, fp64, fp8, or auto, the one that the run computed in. `weights`: master, or ema, the average of them that the
    run kept. The run's tokenizer goes along. Returns the checkpoint that was exported. `trust`, `signers`: as
    `train/checkpoint/trust.py` has them. Raises HFError as `write` does, and CheckpointError where the checkpoint is damaged, or not ours.
    """
    checkpoint, run_dir, verdict = trusted_checkpoint(Path(source), Trust(words=tuple(trust), signers=signers), log)
    held = CheckpointWeights(checkpoint, weights)
    tokenizer, saved = run_dir / "tokenizer.json", run_dir / "config.yaml"
    end = load_saved(saved).data.tokenizer.end_of_document if saved.is_file() else ""
    if tokenizer.is_file() and not verdict.ours:
        check_tokenizer(checkpoint, held.tokenizer, load_tokenizer(tokenizer, end).fingerprint, verdict)
    write(
        held,
        held.m,
        Path(out),
        dtype=held.precision if dtype == "auto" else dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        end_of_document=end,
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
    """Write a checkpoint folder `out`, its weights stored as `dtype`, the selection bias always in float32.

    `dtype`: fp32, bf16, fp64, or fp8: the linear layers of attention, dense blocks and experts in E4M3 with a scale per 128 x 128, as
    DeepSeek-V3 was released, and the rest in BF16. `tokenizer`: a tokenizer.json to ship. The folder has its name only once it is whole.
    Raises HFError where `out` exists and is not empty, where the source does not hold exactly the model's weights, and for a model that
    no released architecture computes; nothing is left behind then.
    """
    if dtype not in STORED_DTYPES:
        raise HFError(f"dtype = {dtype}: must be auto or one of {', '.join(STORED_DTYPES)}")
    config = to_hf_config(m, dtype)
    _check_source(source, m)
    with NewFolder(out) as folder:
        eod_id = None
        if tokenizer is not None:
            eod_id = _write_tokenizer(tokenizer, end_of_document, folder, m.max_seq_len)
        write_json(folder / "config.json", config | {"eos_token_id": eod_id})
        write_json(folder / "generation_config.json", {"_from_model_config": True, "bos_token_id": None, "eos_token_id": eod_id})
        tensors = [stored for p in pieces(m) if not p.implied for stored in _stored(p, dtype, partial(read_rows, source))]
        write_shards(folder, tensors, max_shard_bytes)


def read_rows(source: WeightSource, piece: Piece, first: int, last: int) -> Tensor:
    """Rows of a piece, as (rows, columns); of a vector, its elements."""
    start, stop = (piece.offset + row * piece.row_numel for row in (first, last))
    return source.read(piece.weight, start, stop).view(last - first, *piece.shape[1:])


def _stored(piece: Piece, dtype: str, read: Rows) -> Iterator[Stored]:
    blocks = lambda convert: lambda: (convert(read(piece, *rows)) for rows in piece.blocks())
    if dtype == "fp8" and piece.quantised:
        yield Stored(name=piece.name, shape=piece.shape, dtype=torch.float8_e4m3fn, blocks=blocks(quantise))
        if piece.numel:
            yield Stored(name=piece.name + SCALE, shape=grid(piece.shape), dtype=torch.float32, blocks=blocks(scales))
        return
    kept = torch.float32 if piece.is_selection_bias else DTYPES["bf16" if dtype == "fp8" else dtype]
    yield Stored(name=piece.name, shape=piece.shape, dtype=kept, blocks=blocks(lambda rows: rows.to(kept)))


def _check_source(source: WeightSource, m: ModelConfig) -> None:
    wanted, held = weight_shapes(m).keys(), set(source.names())
    if missing := sorted(wanted - held):
        raise HFError(f"the run's weights lack {', '.join(missing[:4])} (of {len(missing)}): is its config.yaml that of another model?")
    if extra := sorted(held - wanted):
        raise HFError(f"the run has weights that its model does not: {', '.join(extra[:4])} (of {len(extra)})")
    for p in pieces(m):
        if p.implied and read_rows(source, p, 0, p.shape[0]).any():
            raise HFError(f"{p.weight} is not zero, and a softmax router has no selection bias in a released checkpoint: "
                          "train with optim.bias_update_speed=0")  # fmt: skip


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


def import_(
    hf_dir: str | Path, out: str | Path, *, name: str = "imported", mtp: str = "check", trust: Sequence[str] = (),
    log: Callable[[str], None] = tell,
) -> Path:  # fmt: skip
    """Make a Hugging Face checkpoint one that training starts from; returns that checkpoint.

    out/checkpoints/step_00000000   FP32 masters (FP8 is de-quantised), zero moments: for checkpoint.resume=
    out/model/NAME.yaml             the model: for --config-dir out model=NAME
    out/tokenizer.json              where the checkpoint has one: for data.tokenizer.path=

    `mtp`, of modules of multi-token prediction, which hold embedding and head once more: check (they must equal the model's),
    shared-from-main (take the model's), skip (leave the modules out). The folder has its name only once it is whole. Raises HFError as
    `load_pretrained` does, and where `out` is not empty.
    """
    out, folder = Path(out), HFFolder(trusted_folder(Path(hf_dir), Trust(words=tuple(trust)), log))
    m = _model_of(folder, mtp, name=name)
    parts = matched(folder, m, mtp=mtp)
    with NewFolder(out) as new:
        write_model(new, m)
        if (folder.path / "tokenizer.json").is_file():
            shutil.copyfile(folder.path / "tokenizer.json", new / "tokenizer.json")
        made = write_first(new / "checkpoints", m, parts, folder.read, precision=stored_dtype(folder.config))
    return out / made.relative_to(new)


def write_model(folder: Path, m: ModelConfig) -> None:
    """folder/model/NAME.yaml: for --config-dir folder model=NAME."""
    (folder / "model").mkdir()
    (folder / "model" / f"{m.name}.yaml").write_text(yaml.safe_dump(asdict(m), sort_keys=False), encoding="utf-8")


def load_pretrained(path: str | Path, *, dtype: str = "fp32", mtp: str = "check") -> CausalLM:
    """The model of a Hugging Face DeepSeek checkpoint, on the CPU: called with tokens (B, S) it returns logits (B, S, V).

    `dtype` of its weights: fp32, bf16, fp64, or auto (as stored; fp32 where that is float16, bf16 where it is fp8). `mtp` as in `import_`.
    Reads model.safetensors or the files of model.safetensors.index.json. Raises HFError for any tensor that is missing, unexpected or
    mis-shaped, and for a config.json that asks for what this model does not compute.
    """
    folder = HFFolder(Path(path))
    m = _model_of(folder, mtp)
    dtype = stored_dtype(folder.config) if dtype == "auto" else dtype
    if dtype not in DTYPES:
        raise HFError(f"dtype = {dtype}: must be auto or one of {', '.join(DTYPES)}")
    parts = matched(folder, m, mtp=mtp)
    return filled(m, parts, folder.read, dtype)


def filled(m: ModelConfig, parts: list[Piece], read: Rows, dtype: str = "fp32") -> CausalLM:
    """A model on the CPU with weights from `read`. `parts`: all its pieces but for copies, what is implied, and what has no elements."""
    with torch.device("meta"):
        model = CausalLM(m, DTYPES[dtype])
    model.to_empty(device="cpu")
    tensors = {**dict(model.stage.named_parameters()), **dict(model.stage.named_buffers())}
    for buffer in model.stage.buffers():
        buffer.zero_()  # a softmax router's bias is not stored
    for p in parts:
        flat = tensors[p.weight].detach().view(-1)
        for first, last in p.blocks():
            start, stop = (p.offset + row * p.row_numel for row in (first, last))
            flat[start:stop].copy_(read(p, first, last).view(-1))
    return model


def _model_of(folder: HFFolder, mtp: str, name: str = "imported") -> ModelConfig:
    if mtp not in MTP:
        raise HFError(f"mtp = {mtp}: must be one of {', '.join(MTP)}")
    config = folder.config | ({"num_nextn_predict_layers": 0} if mtp == "skip" else {})
    return model_config_from_hf(config, name=name)
