"""Compile every kernel and configuration ahead of time, without a GPU, and read in the machine code what would make it wrong or slow.

    python tests/kernels/gate.py        prints the table of docs/kernels.md

Everything needed (ptxas, nvdisasm, cuobjdump) is inside the triton wheel. Held for triton 3.6 and 3.7.
"""

import contextlib
import importlib
import io
import math
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass

import shoestring.kernels
import triton
from shoestring.kernels.configs import KernelConfig
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

SHARED_MEMORY = {
    80: 163 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
}  # bytes that one program can have (CUDA programming guide, table of capabilities)
MMA = {  # tensor-core instructions of the machine code, by architecture and operands
    (80, "bf16"): r"HMMA\..*BF16",
    (90, "bf16"): r"HGMMA",
    (90, "fp8"): r"QGMMA",
    (100, "bf16"): r"UTCHMMA",
    (100, "fp8"): r"UTCQMMA",
}
ANY_MMA = r"(HMMA|IMMA|QMMA|HGMMA|QGMMA|UTC\w*MMA)"


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the machine code of one configuration for one architecture is like."""

    config: KernelConfig
    architecture: int
    registers: int  # per thread
    spilled: int  # bytes per thread, stored and loaded
    local: int  # instructions that use a thread's local memory, for spills or for arrays
    shared: int  # bytes per program
    matrix: Counter  # tensor-core instruction -> how many
    serialised: bool
    macs: int  # multiply-adds of the main loop per step and tile; 0 on Blackwell, whose code does not show them
    promotions: int  # FP32 multiply-adds and adds in the main loop, of all threads
    warp_specialised: bool


def kernel_modules() -> list:
    names = [info.name for info in pkgutil.iter_modules(shoestring.kernels.__path__)]
    return [importlib.import_module(f"shoestring.kernels.{name}") for name in names]


def every_config() -> list[KernelConfig]:
    return [config for module in kernel_modules() for config in getattr(module, "CONFIGS", ())]


def unlisted() -> list[str]:
    """Kernels that no configuration names, and so nothing compiles."""
    listed = {config.kernel for config in every_config()}
    found = {(m.__name__, name, obj) for m in kernel_modules() for name, obj in vars(m).items() if isinstance(obj, JITFunction)}
    return sorted(f"{module}.{name}" for module, name, kernel in found if name.endswith("_kernel") and kernel not in listed)


def build(config: KernelConfig, architecture: int):
    """Triton's compiled kernel, whose `asm` has the forms on the way ("ttgir", "ptx", "cubin"), and what the assembler said about it."""
    names = config.kernel.arg_names
    if wrong := set(names) ^ {*config.signature, *config.meta}:
        raise ValueError(f"{config.name}: {sorted(wrong)} in the kernel's arguments or in signature and meta, not in both")
    types = {name: config.signature.get(name, "constexpr") for name in names}
    aligned = [names.index(name) for name, kind in types.items() if kind.startswith("*") or kind.endswith(":16")]
    source = ASTSource(
        fn=config.kernel,
        signature={name: kind.removesuffix(":16") for name, kind in types.items()},
        constexprs=config.meta,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    log = io.StringIO()
    with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        triton.knobs.compilation.always_compile = True  # out of the cache nothing is said
        triton.knobs.nvidia.dump_ptxas_log = True
        kernel = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return kernel, log.getvalue()


def compile_ahead(config: KernelConfig, architecture: int) -> Compiled:
    kernel, log = build(config, architecture)
    code = _machine_code(kernel.asm["cubin"])
    loop = _main_loop(code)
    specialised = "ttg.warp_specialize" in kernel.asm["ttgir"]
    # under warp specialisation every consumer warpgroup has its own code
    threads = 128 if specialised else 32 * config.num_warps
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", log)]
    if not spills:
        raise RuntimeError(f"{config.name}: ptxas no longer says what it spilled, and the gate would be blind:\n{log}")
    return Compiled(
        config=config,
        architecture=architecture,
        registers=int(re.search(r"Used (\d+) registers", log)[1]),
        spilled=sum(spills),
        local=sum(op[:3] in ("LDL", "STL") for _, op, _ in code),
        shared=kernel.metadata.shared,
        matrix=Counter(op for _, op, _ in code if re.match(ANY_MMA, op)),
        serialised="serializ" in log.lower(),
        macs=int(sum(map(_macs, loop)) * threads),
        promotions=sum(map(_sums, loop)) * threads,
        warp_specialised=specialised,
    )


def _machine_code(cubin: bytes) -> list[tuple[str, str, str]]:
    """(label before it or "", operation with its suffixes, operands) of every instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([triton.knobs.nvidia.nvdisasm.path, "-c", file.name], capture_output=True, text=True, check=True).stdout
    code, label = [], ""  # an instruction: /*00a0*/  @!P0 FFMA.RN R1, R2, R3, R4 ;
    for line in text.splitlines():
        if mark := re.match(r"(\.L_x_\d+):", line.strip()):
            label = mark[1]
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.a-z]+)(.*)", line):
            code.append((label, found[1], found[2]))
            label = ""
    if not code:
        raise RuntimeError("nvdisasm printed no instruction that this gate can read")
    return code


def _main_loop(code) -> list[str]:
    """Operations inside the innermost loops that multiply matrices (or, where the tensor core has memory of its own, read it).

    A loop is from a label to a jump back to it. Waiting is kept out of line, behind everything, and jumps back into the middle of a loop:
    that is none.
    """
    at = {label: i for i, (label, _, _) in enumerate(code) if label}
    branches = [(i, re.search(r"(\.L_x_\d+)", args)) for i, (_, op, args) in enumerate(code) if op.startswith("BRA")]
    jumps = [(i, at.get(target[1], i + 1)) for i, target in branches if target]
    loops = [(to, i) for i, to in jumps if to <= i and any(re.match(ANY_MMA + "|LDTM", op) for _, op, _ in code[to:i])]
    loops = [a for a in loops if not any(b[0] < a[0] <= b[1] < a[1] for b in loops)]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return [code[i][1] for i in sorted({i for first, last in inner for i in range(first, last)})]


def _sums(operation: str) -> int:
    """FP32 numbers that one thread adds in this instruction."""
    found = re.match(r"F(?:FMA|ADD)(2?)(?:\.|$)", operation)
    return 0 if not found else 2 if found[1] else 1


def _macs(operation: str) -> float:
    """Multiply-adds of this instruction, for each thread that takes part; 0 for Blackwell's, whose shape is in a register."""
    if found := re.match(r"[QH]GMMA\.(\d+)x(\d+)x(\d+)", operation):
        return math.prod(map(int, found.groups())) / 128
    return 16 * 8 * 16 / 32 if operation.startswith("HMMA.16816") else 0


def faults(found: Compiled) -> list[str]:
    """Why this configuration must not be shipped; empty where all is well."""
    config, bad = found.config, []
    if found.spilled or found.local:
        bad.append(f"spills {found.spilled} bytes a thread; {found.local} instructions use local memory")
    if found.shared > SHARED_MEMORY[found.architecture]:
        bad.append(f"{found.shared} bytes of shared memory, of {SHARED_MEMORY[found.architecture]}")
    if found.serialised:
        bad.append("ptxas serialised its matrix instructions")
    if config.warp_specialised and found.architecture == 90 and not found.warp_specialised:
        bad.append("the compiler dropped the warp specialisation")
    if config.operands:
        bad += _matrix_faults(found)
    return bad


def _matrix_faults(found: Compiled) -> list[str]:
    config, bad = found.config, []
    wanted = MMA[found.architecture, config.operands]
    if not any(re.match(wanted, op) for op in found.matrix):
        return [f"no {config.operands} tensor-core instruction, but {dict(found.matrix) or 'none at all'}"]
    if others := [op for op in found.matrix if not re.match(wanted, op)]:
        bad.append(f"other tensor-core instructions: {others}")
    if found.architecture < 100 and found.macs != config.macs_per_step:
        bad.append(f"{found.macs / config.macs_per_step:g} x the multiply-adds that a step needs")
    needed = config.macs_per_step // config.promote_every
    if config.operands == "fp8" and found.promotions < needed:
        bad.append(f"{found.promotions} FP32 additions in the main loop; promotion every {config.promote_every} of depth needs {needed}")
    return bad


def table(results: list[Compiled]) -> str:
    """Markdown."""
    lines = [
        "| kernel | GPU | warps, stages | registers | shared KiB | tensor-core instructions | FP32 promotions a step | |",
        "|" + " --- |" * 8,
    ]
    for r in results:
        matrix = ", ".join(f"{n} {op.split('.')[0]}" for op, n in r.matrix.items()) or "–"
        promotions = r.promotions if r.config.operands == "fp8" else "–"
        launch = f"{r.config.num_warps}, {r.config.num_stages} | {r.registers} | {r.shared / 1024:.3g}"
        lines.append(f"| {r.config.name} | sm_{r.architecture} | {launch} | {matrix} | {promotions} | {'; '.join(faults(r)) or 'ok'} |")
    return "\n".join(lines)


if __name__ == "__main__":
    results = [compile_ahead(config, arch) for config in every_config() for arch in config.architectures]
    print(f"triton {triton.__version__}\n\n{table(results)}")
    sys.exit(any(map(faults, results)))
