"""What is fuzzed: each kind of file or text that a user hands over, and what reads it.

A target is given a folder with a good set of files, of which one is the mutated input, and reads it as a command would. It may raise only
what a command says in one sentence (`launch/exit_codes.py`), naming the file; where `quiet`, nothing.
"""

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from shoestring.conf import compose
from shoestring.conf.schema import SourceConfig
from shoestring.conf.sweep import expand
from shoestring.launch import checkpoint as checkpoint_command
from shoestring.launch import report
from shoestring.launch.last_try import read as read_ending
from shoestring.launch.overview import read as overview
from shoestring.launch.overview import table
from shoestring.launch.plan.plans import launch_words
from shoestring.launch.simulate.recorded import read as read_routing
from shoestring.parallel.optimizer.zero import Chunk
from shoestring.train import left_out, metrics, resume, sessions
from shoestring.train.checkpoint import folder as folders
from shoestring.train.checkpoint import manifest
from shoestring.train.checkpoint.checkpointer import Archive, Checkpointer
from shoestring.train.checkpoint.files import digest
from shoestring.train.data.documents import Bad
from shoestring.train.data.sources import FilesSource
from shoestring.train.data.token_cache import SourceCache
from shoestring.train.data.tokenizer import load_tokenizer
from shoestring.train.interop.hf_checkpoint import CheckpointWeights
from shoestring.train.interop.hf_files import HFFolder, matched, read_json
from shoestring.train.interop.hf_format import model_config_from_hf

from . import seeds

STEP = "checkpoints/step_00000001"


@dataclass(frozen=True, kw_only=True)
class Target:
    """`file`: where the input goes, in the folder; `beside`: good files that are there, too. `guided`: by coverage of our own lines."""

    name: str
    file: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[Path], object]
    beside: Callable[[], seeds.Files] = field(default=dict)
    quiet: bool = False
    named: bool = True
    guided: bool = True


# ---------------------------------------------------------------- configuration


def _words(folder: Path) -> None:
    words = (folder / "words").read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    compose.finish(compose.compose([word for word in words if word]))


def _sweep(folder: Path) -> None:
    words = (folder / "words").read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    expand([word for word in words if word], None)


def _experiment(folder: Path) -> None:
    compose.finish(compose.compose(["experiment=mine"], folder))


def _saved(folder: Path) -> None:
    compose.to_yaml(compose.load_saved(folder / "config.yaml"))


# ---------------------------------------------------------------- a run's directory


def _shown(folder: Path) -> None:
    """As `shoestring report`, `runs`, `dollars` and `checkpoint list` show it."""
    rows = [overview.read(folder)]
    table.as_text(rows), table.as_json(rows), table.rows_as_csv(rows)
    report.write_report(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        read_ending(folder), sessions.waited(folder, "j", 1.0, "b")


def _rewound(folder: Path) -> None:
    """As a restart does: no record of a kept step may be lost."""
    metrics.rewind(folder / "metrics.jsonl", 5)
    metrics.rewind(folder / "metrics.jsonl", 5)


# ---------------------------------------------------------------- checkpoints


def _resealed(folder: Path) -> None:
    """The attacker who can write the folder makes the manifest fit."""
    step = folder / STEP
    names = [p.name for p in step.iterdir() if p.name != manifest.MANIFEST]
    extra = json.loads(seeds.checkpoint()[f"{STEP}/manifest.json"])["extra"]
    manifest.write_manifest(step, {n: digest(step / n) for n in names}, extra, {n: (step / n).stat().st_size for n in names})


def _whole_checkpoint(folder: Path) -> None:
    step = folder / STEP
    manifest.verify_all(step)
    archive = Archive(step)
    for name in archive.names():
        archive.read(name)
        archive.read(name, 1, 2)
    chunks = {"embed.master": Chunk(32, 0, torch.zeros(32)), "layers.1.router.bias": Chunk(4, 0, torch.zeros(4))}
    Checkpointer(folder / "checkpoints", keep_last=1, async_save=False).load(step, chunks)


def _resealed_checkpoint(folder: Path) -> None:
    _resealed(folder)
    _whole_checkpoint(folder)


def _extra(folder: Path) -> None:
    """What a manifest says of its run, whole and sealed, and hostile."""
    step = folder / STEP
    was = manifest.read_manifest(step)
    try:
        extra = json.loads((folder / "extra.json").read_bytes())
    except (ValueError, RecursionError):
        return
    manifest.write_manifest(step, was.sha256, extra, was.num_bytes)
    with contextlib.redirect_stdout(io.StringIO()):
        checkpoint_command.show(folder)
    weights = CheckpointWeights(step)
    for name in weights.names():
        weights.read(name, 0, 1)
    resume.progress_of(step, manifest.read_manifest(step).extra)


def _extra_seed() -> list[bytes]:
    return [json.dumps(json.loads(seeds.checkpoint()[f"{STEP}/manifest.json"])["extra"]).encode()]


def _pointer(folder: Path) -> None:
    found = folders.find_latest(folder / "checkpoints")
    assert found is None or found.parent == folder / "checkpoints"
    folders.mend(folder / "checkpoints")
    folders.newest_valid(folder / "checkpoints")


# ---------------------------------------------------------------- models


def _hf_config(folder: Path) -> None:
    model_config_from_hf(read_json(folder / "config.json"))


def _hf_folder(folder: Path) -> None:
    source = HFFolder(folder)
    m = model_config_from_hf(source.config)
    for piece in matched(source, m):
        for rows in piece.blocks():
            source.read(piece, *rows)


def _tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    tokenizer.encode("a few words ☕"), tokenizer.decode(list(range(9))), tokenizer.bytes_of_id()
    tokenizer.save(folder / "saved.json")


# ---------------------------------------------------------------- data


def _data(sample_by: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        source = FilesSource("s", SourceConfig(kind="files", paths=[str(folder)], sample_by=sample_by))
        for piece in source.pieces():
            for document in source.read(piece):
                assert len(document.why) < 2000 if isinstance(document, Bad) else document.text.encode()

    return read


def _piece_record(folder: Path) -> None:
    cache = object.__new__(SourceCache)
    cache.folder, cache.dtype = folder, np.dtype("<u2")
    (folder / "00000.train.bin").write_bytes(b"\0" * 20), (folder / "00000.eval.bin").write_bytes(b"\0" * 4)
    found = cache.record(0)
    assert found is None or all(isinstance(n, int) for n in (found.documents, found.bad))


def _routing(folder: Path) -> None:
    (path,) = folder.iterdir()
    read_routing(path, seeds.config().model)


# ---------------------------------------------------------------- all

_MODEL = seeds.hf_folder
_of = lambda files, name: lambda: [files()[name]]
_others = lambda files, name: lambda: {n: c for n, c in files().items() if n != name}


def _in_run(file: str) -> Target:
    name = "run: " + file.rpartition("/")[2]
    return Target(name=name, file=file, seeds=_of(seeds.run_directory, file), beside=_others(seeds.run_directory, file), read=_shown,
                  quiet=True, guided=False)  # fmt: skip


def _in_checkpoint(name: str, file: str, read: Callable[[Path], object]) -> Target:
    return Target(name=name, file=file, seeds=_of(seeds.checkpoint, file), beside=_others(seeds.checkpoint, file), read=read, named=False)


def _in_model(name: str, file: str, files: Callable[[], seeds.Files]) -> Target:
    return Target(name=name, file=file, seeds=_of(files, file), beside=_others(files, file), read=_hf_folder, named=False)


_sharded = lambda: seeds.hf_folder(sharded=True)
_shard = "model-00001-of-00005.safetensors"

TARGETS = [
    Target(name="words of a command line", file="words", seeds=seeds.words, read=_words, named=False, guided=False),
    Target(name="words of a sweep", file="words", seeds=seeds.words, read=_sweep, named=False, guided=False),
    Target(name="experiment", file="experiment/mine.yaml", seeds=seeds.experiment, read=_experiment, named=False, guided=False),
    Target(name="saved configuration", file="config.yaml", seeds=seeds.saved_config, read=_saved, named=False),
    *[_in_run(name) for name in seeds.run_directory() if name != "left_out.json"],
    Target(name="records of a restart", file="metrics.jsonl", seeds=_of(seeds.run_directory, "metrics.jsonl"), read=_rewound, quiet=True),
    Target(name="samples left out", file="left_out.json", seeds=_of(seeds.run_directory, "left_out.json"), read=left_out.read),
    _in_checkpoint("manifest", f"{STEP}/manifest.json", _whole_checkpoint),
    _in_checkpoint("metadata", f"{STEP}/.metadata", _whole_checkpoint),
    _in_checkpoint("metadata, resealed", f"{STEP}/.metadata", _resealed_checkpoint),
    _in_checkpoint("tensors, resealed", f"{STEP}/__0_0.distcp", _resealed_checkpoint),
    _in_checkpoint("latest", "checkpoints/latest", _pointer),
    Target(name="what a manifest says", file="extra.json", seeds=_extra_seed, beside=seeds.checkpoint, read=_extra, named=False),
    Target(name="Hugging Face config", file="config.json", seeds=_of(_MODEL, "config.json"), read=_hf_config),
    _in_model("Hugging Face model's config", "config.json", _MODEL),
    _in_model("safetensors", "model.safetensors", _MODEL),
    _in_model("safetensors index", "model.safetensors.index.json", _sharded),
    _in_model("safetensors shard", _shard, _sharded),
    Target(name="tokenizer", file="tokenizer.json", seeds=seeds.tokenizers, read=_tokenizer, named=False),
    Target(name="data: .txt", file="a.txt", seeds=seeds.text, read=_data("paragraph")),
    Target(name="data: .txt.gz", file="a.txt.gz", seeds=seeds.packed(seeds.text), read=_data("document")),
    Target(name="data: .jsonl", file="a.jsonl", seeds=seeds.lines, read=_data("document")),
    Target(name="data: .jsonl.gz", file="a.jsonl.gz", seeds=seeds.packed(seeds.lines), read=_data("document")),
    Target(name="data: .parquet", file="a.parquet", seeds=seeds.parquet, read=_data("document")),
    Target(name="record of a token cache", file="00000.json", seeds=seeds.piece_record, read=_piece_record, quiet=True),
    Target(name="plan", file="plan.json", seeds=seeds.plans, read=lambda folder: launch_words([f"plan={folder}/plan.json", "number=2"])),
    Target(name="routing, recorded loads", file="r.jsonl", seeds=seeds.loads, read=_routing),
    Target(name="routing, choices", file="r.safetensors", seeds=seeds.routing, read=_routing),
]  # fmt: skip
BY_NAME = {target.name: target for target in TARGETS}
