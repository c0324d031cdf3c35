"""What a person reads when training ends: the summary, where the report is, and how to go on."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from ..conf.phases import num_steps, phase_at
from ..conf.schema import Config
from ..train import units
from ..train.ledger import Ledger, account
from ..train.metrics import Summary
from ..train.trainer import Outcome
from .report import write_report


def _report(run_dir: str) -> str:
    """A run that has been trained does not fail for want of a page."""
    try:
        return f"report    {write_report(run_dir)}"
    except Exception as error:
        again = shlex.join(["shoestring", "report", str(run_dir)])
        return f"report    not written ({type(error).__name__}: {error}); to try again: {again}"


def conclude(config: Config, outcome: Outcome, command: Sequence[str]) -> str:
    """Write the report; the closing lines. `command`: the words that started this run, to be given again."""
    again = shlex.join(command)
    total = num_steps(config)
    if outcome.wants:
        upcoming = phase_at(config, outcome.step).name
        return f"\nphase {upcoming} goes on from step {outcome.step} of {total} with {outcome.wants} process{'es' * (outcome.wants > 1)}"
    if outcome.summary is None:
        return f"nothing was trained yet. To begin:\n  {again}"
    lines = [*_facts(outcome.summary, total), *_cost(account(Path(config.run_dir))), _report(config.run_dir)]
    if outcome.spent:
        lines.append(f"stopped at step {outcome.step} of {total}, {outcome.spent}. With more of it, to go on:\n  {again}")
    elif outcome.step < total:
        lines.append(f"{'stopped' if outcome.stopped else 'paused'} at step {outcome.step} of {total}. To go on:\n  {again}")
    elif config.phases or config.train.tokens:
        lines.append("complete")
    else:
        longer = [word for word in command if not word.startswith("train.steps=")] + [f"train.steps={2 * config.train.steps}"]
        lines.append(f"complete. To go on for as long again:\n  {shlex.join(longer)}")
    return "\n" + "\n".join(lines)


def _facts(s: Summary, total: int) -> list[str]:
    evaluated = f", held-out {s.eval_loss:.3f}" if s.eval_loss is not None else ""
    return [
        f"trained   {s.name}: {s.steps} of {total} steps, {units.count(s.tokens)} tokens in {units.duration(s.seconds)}",
        f"loss      {s.loss_first:.3f} -> {s.loss_last:.3f}{evaluated}",
        f"speed     {units.count(s.tokens_per_second)} tokens/s, MFU {units.percent(s.mfu)}",
        f"on        {s.world_size} x {s.device}: {s.layout}",
    ]


def _cost(ledger: Ledger) -> list[str]:
    """Of all sessions."""
    total = ledger.total_dollars
    shares = [f"{name} {units.percent(value / total)}" for name, value in ledger.dollars.items() if total and value > 0.005 * total]
    lost = f"; {units.count(ledger.lost_tokens)} tokens trained twice" if ledger.lost_tokens else ""
    return [f"cost      {units.money(total)}: {', '.join(shares)}{lost}"]
