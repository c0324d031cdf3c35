"""`shoestring workspace`: saves a view of a W&B project in which the charts of runs are arranged as on Shoestring's own page."""

import re

import wandb_workspaces.reports.v2 as charts
import wandb_workspaces.workspaces as views

from ..conf.errors import ConfigError

NAME = "Shoestring"
LOSS = ("loss/train", "loss/eval")
# Of each section its charts: title, what is drawn, over what.
SECTIONS: dict[str, tuple[tuple[str, tuple[str, ...], str], ...]] = {
    "Learning": (
        ("Loss", LOSS, "tokens"), ("Loss by time", LOSS, "cost/seconds"), ("Loss by dollars", LOSS, "cost/dollars"),
        ("Held-out bits per byte", ("loss/eval_bits_per_byte",), "tokens"), ("Multi-token prediction", ("loss/mtp_1",), "tokens"),
        ("Gradient norm, before clipping", ("optim/grad_norm",), "tokens"), ("Learning rate", ("optim/lr",), "tokens"),
    ),
    "Speed": (
        ("Tokens/s/GPU", ("speed/tokens_per_second_per_gpu",), "tokens"), ("MFU", ("speed/mfu",), "tokens"),
        ("Seconds of a step", ("speed/step_seconds", "speed/data_seconds"), "tokens"),
        ("Bubble and hidden exchanges, of traced steps", ("pipeline/bubble", "pipeline/hidden_share"), "tokens"),
        ("Peak memory, GB", ("memory/peak_gb",), "tokens"), ("Seconds to go", ("speed/eta_seconds",), "tokens"),
    ),
    "Money": (
        ("Dollars", ("cost/dollars",), "tokens"), ("Dollars per billion tokens", ("cost/dollars_per_billion_tokens",), "tokens"),
        ("GPU-hours", ("cost/gpu_hours",), "tokens"),
    ),
    "Experts": (
        ("MaxVio", ("router/max_vio_worst", "router/max_vio_mean"), "tokens"),
        ("Busiest rank", ("router/rank_overload_worst",), "tokens"), ("Dead experts", ("router/dead_experts",), "tokens"),
        ("Router entropy", ("router/entropy",), "tokens"), ("Selection biases", ("router/bias_norm",), "tokens"),
    ),
}  # fmt: skip


def save(project: str) -> str:
    """Into `project`, ENTITY/PROJECT, as a new view; its address. Raises ConfigError where W&B does not take it."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", project):
        raise ConfigError("project", project, "must be ENTITY/PROJECT, as in the address of its page", f"{project.strip('/')}/shoestring")
    entity, _, name = project.partition("/")
    sections = [
        views.Section(name=section, is_open=True, panels=[charts.LinePlot(title=title, x=x, y=list(y)) for title, y, x in drawn])
        for section, drawn in SECTIONS.items()
    ]
    try:
        return views.Workspace(entity=entity, project=name, name=NAME, sections=sections).save().url
    except Exception as error:
        words = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError("project", project, f"W&B does not take a view there: {words}") from error
