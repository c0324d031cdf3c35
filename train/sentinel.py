"""Watches what FP8 costs while a run goes on, and takes a block out of FP8 where that is too much.

Every `precision.sentinel_interval` steps each pipeline stage has one of its blocks looked at, the next one each time: all its linears, in
one micro-batch, against BF16 (`kernels/fp8_probe.py`). A block of which any error is above `precision.sentinel_max_error` is computed in
BF16 from the next step on, for good: checkpoints say so. What is dispatched to its experts stays in FP8.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from ..conf.schema import Config
from ..kernels.fp8_layers import Fp8Linears
from ..kernels.fp8_probe import MEASURES
from .model.decoder import Stage


@dataclass(frozen=True, kw_only=True)
class Look:
    """`worst`: measure -> block -> the largest of the block's linears on any rank. `left_out`: blocks that leave FP8 because of it."""

    worst: dict[str, dict[int, float]]
    left_out: list[int]

    def over_blocks(self) -> dict[str, float]:
        return {measure: max(blocks.values()) for measure, blocks in self.worst.items() if blocks}

    def sentence(self, block: int, limit: float) -> str:
        errors = {measure: blocks[block] for measure, blocks in self.worst.items() if measure.endswith(".error") and block in blocks}
        measure, error = max(errors.items(), key=lambda item: item[1])
        what = measure.removesuffix(".error")
        return f"block {block} is computed in bf16 from here on: relative error of its {what} in fp8 {error:.2g}, limit {limit:g}"


@dataclass(kw_only=True)
class Sentinel:
    """One rank's. `report` and `load_state` end with the same blocks left out on all ranks."""

    config: Config
    fp8: Fp8Linears
    stages: Mapping[int, Stage]
    device: torch.device
    left_out: list[int] = field(default_factory=list)

    def wake(self, step: int) -> None:
        """Before optimizer step `step` of the run (0 is the first): choose what is looked at in it, if anything is."""
        interval = self.config.precision.sentinel_interval
        self.fp8.probes.clear()
        if interval and step % interval == 0:
            for stage in self.stages.values():
                blocks = [int(layer) for layer in stage.layers if int(layer) not in self.left_out]
                if blocks:
                    turn = blocks[step // interval % len(blocks)]
                    self.fp8.probes.update(dict.fromkeys(stage.layers[str(turn)].parameters()))

    def report(self, step: int) -> Look | None:
        """After it: what was found. Collective; None where nothing was to be looked at."""
        interval = self.config.precision.sentinel_interval
        if not interval or step % interval:
            return None
        found = torch.full((self.config.model.num_blocks, len(MEASURES)), -1.0, dtype=torch.float64)
        for stage in self.stages.values():
            for layer, block in stage.layers.items():
                probes = [p for w in block.parameters() if (p := self.fp8.probes.get(w)) is not None and len(p.found) == len(MEASURES)]
                if probes:
                    rows = torch.stack([torch.stack([p.found[m] for m in MEASURES]) for p in probes])
                    found[int(layer)] = rows.nan_to_num(nan=math.inf).amax(0).cpu()
        self.fp8.probes.clear()
        found = found.to(self.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        worst = {m: {b: x for b, x in enumerate(column) if x >= 0} for m, column in zip(MEASURES, found.t().tolist())}
        limit = self.config.precision.sentinel_max_error
        over = {b for m, blocks in worst.items() if m.endswith(".error") for b, x in blocks.items() if x > limit}
        self._leave_out(sorted(over))
        return Look(worst=worst, left_out=sorted(over))

    def _leave_out(self, blocks: Sequence[int]) -> None:
        self.left_out.extend(blocks)
        for stage in self.stages.values():
            for block in blocks:
                if str(block) in stage.layers:
                    self.fp8.left_out.update(stage.layers[str(block)].parameters())

    # ------------------------------------------------------------ in a checkpoint

    def state(self) -> dict[str, Any]:
        return {"blocks_left_out_of_fp8": self.left_out}

    def load_state(self, extra: Mapping[str, Any]) -> None:
        self._leave_out(extra.get("blocks_left_out_of_fp8", []))
