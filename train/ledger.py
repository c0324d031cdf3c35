"""What a run cost, and what for: every second that its devices were held, in one place, and every token once.

Made of what is on disk, so that no kill can make it wrong: records kept (metrics.jsonl) and lost (metrics_lost.jsonl), and begins and ends
of sessions (`train/sessions.py`). `train/waterfall.py` divides the steps' own part further.
"""

from dataclasses import dataclass
from pathlib import Path

from .account import DIVIDED, Account

# Where seconds go: to steps that were kept, and to those that a restart did again; to evaluation; to the loop that stood still for a save;
# to a session's begin, up to its first step; to waiting for a restart; and what is left.
PARTS = ("steps", "lost steps", "evaluation", "checkpoints", "starts", "restarts", "other")
_OF = dict.fromkeys(DIVIDED, "steps") | {
    "lost": "lost steps", "evaluation": "evaluation", "checkpoint": "checkpoints", "start": "starts", "restart": "restarts",
    "rest": "other",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """`seconds`, `dollars`: by `PARTS`, none negative."""

    tokens: int  # trained, each once
    lost_tokens: int  # trained, and done again
    seconds: dict[str, float]
    dollars: dict[str, float]
    gpu_hours: float

    @property
    def total_dollars(self) -> float:
        return sum(self.dollars.values())


def account(run_dir: Path) -> Ledger:
    """Of a run directory, as it is now."""
    found = Account.of(run_dir)
    seconds, dollars, gpu_seconds = dict.fromkeys(PARTS, 0.0), dict.fromkeys(PARTS, 0.0), 0.0
    for held in found.held()[0]:
        for name, value in held.seconds.items():
            seconds[_OF[name]] += value
            dollars[_OF[name]] += value * held.dollars
            gpu_seconds += value * held.devices
    return Ledger(tokens=found.tokens, lost_tokens=found.lost_tokens, seconds=seconds, dollars=dollars, gpu_hours=gpu_seconds / 3600)
