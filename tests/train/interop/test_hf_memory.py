"""Memory of conversions stays under `CONVERSION_BYTES`, for a checkpoint of several times as much.

Each conversion is a process of its own; the kernel tells the most memory that it ever had (VmHWM), mapped files included.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from shoestring.train.interop.hf import CONVERSION_BYTES

# 55 M parameters: 0.2 GB in FP32, 0.66 GB as a checkpoint with moments. One matrix of the dense block has 139 MB in FP32.
MODEL = """
m = ModelConfig(name="wide", num_layers=2, dim=1024, vocab_size=1000, max_seq_len=64, num_heads=2, kv_lora_rank=64,
    qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, num_dense_layers=1, dense_hidden_dim=17000, num_experts=8,
    num_shared_experts=1, top_k=2, expert_hidden_dim=64)
"""
# What every child begins with; `peak` is the memory that `convert` took above what the process had.
BEGIN = f"""
import sys
from pathlib import Path
import torch
import torch.distributed.checkpoint
from shoestring.conf.schema import ModelConfig
from shoestring.train.checkpoint.checkpointer import Checkpointer
from shoestring.train.interop import hf
from shoestring.train.interop.hf_format import weight_shapes
{MODEL}
def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

class Synthetic:  # weights that nobody ever held
    def names(self):
        return list(weight_shapes(m))
    def read(self, name, start, stop):
        return torch.arange(start, stop, dtype=torch.float32).remainder_(251).sub_(125).mul_(1e-3)

def peak(convert):
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    convert()
    print(status("VmHWM") - before)
"""
WRITE = 'peak(lambda: hf.write(Synthetic(), m, Path("hf"), dtype="{dtype}", max_shard_bytes=3e8))'
IMPORT = 'peak(lambda: hf.import_("hf", "start"))'
# As one rank would have written it: one piece per weight, all experts in one.
LARGE_PIECES = """
from shoestring.parallel.optimizer.zero import Chunk
chunks = {}
for name, shape in weight_shapes(m).items():
    numel = torch.Size(shape).numel()
    key = name if name.endswith(".bias") else name + ".master"
    chunks[key] = Chunk(numel, 0, Synthetic().read(name, 0, numel))
import dataclasses
extra = {"progress": {"step": 0}, "model": dataclasses.asdict(m), "precision": "bf16"}
Checkpointer(Path("run/checkpoints"), keep_last=1, async_save=False).save(0, chunks, extra)
print(0)
"""
EXPORT = 'peak(lambda: hf.export("{source}", "{out}", dtype="{dtype}", max_shard_bytes=3e8))'


def run(code: str, folder: Path) -> int:
    """Bytes that the child prints."""
    done = subprocess.run([sys.executable, "-c", BEGIN + code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for a process's peak")
def test_no_conversion_takes_more_than_the_cap(tmp_path):
    peaks = {
        "write bf16": run(WRITE.format(dtype="bf16"), tmp_path),
        "import": run(IMPORT, tmp_path),
        "export fp8": run(EXPORT.format(source="start", out="again", dtype="fp8"), tmp_path),
        "import fp8": run('peak(lambda: hf.import_("again", "from_fp8"))', tmp_path),
    }
    held = sum(file.stat().st_size for file in (tmp_path / "start" / "checkpoints" / "step_00000000").iterdir())
    assert held > 4 * CONVERSION_BYTES
    assert max(peaks.values()) < CONVERSION_BYTES, peaks


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for a process's peak")
def test_a_piece_that_is_larger_than_the_cap(tmp_path):
    run(LARGE_PIECES, tmp_path)
    assert run(EXPORT.format(source="run", out="out", dtype="bf16"), tmp_path) < CONVERSION_BYTES
