"""What a run says of itself where it begins: its model, and each phase."""

from ..conf.phases import num_steps
from ..conf.schema import Config
from . import cost, metrics, units
from .model.attention import kernel_of
from .phase_run import PhaseRun


def model(c: Config) -> str:
    p = cost.num_params(c.model)
    predictor = f" (and {(p.trained - p.total) / 1e6:,.1f} M that predict further tokens)" if p.trained > p.total else ""
    return (
        f"{c.model.name}: {p.total / 1e6:,.1f} M parameters, {p.active / 1e6:,.1f} M active{predictor}; "
        f"{c.parallel.world_size} x {c.cluster.device}, {c.precision.products}, optimizer {c.optim.engine}"
    )


def phase(run: Config, part: PhaseRun) -> list[str]:
    """`run`: of which `part` is the present phase: what it trains on, and with which attention."""
    now, c = part.phase, part.phase.config
    first, last = now.levels[0].batch_tokens // c.data.seq_len, c.sequences_per_step
    size = f"{last}" if first == last else f"{first} to {last}"
    named = f"phase {now.name}, steps {now.first_step + 1} to {now.end_step} of {num_steps(run)}: " if run.phases else ""
    return [
        f"{named}{size} sequences of {c.data.seq_len} a step, in micro-batches of {c.train.micro_batch_sequences}; "
        f"{units.count(now.num_tokens)} tokens in {now.num_steps} steps; {metrics.layout_name(c.parallel)}",
        str(kernel_of(c.model, c.data.seq_len, part.engine.dtype, part.device)),
    ]
