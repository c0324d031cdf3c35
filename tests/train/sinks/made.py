"""Records for the tests of sinks."""

from shoestring.train.metrics import StepRecord


def record(step: int, **changes) -> StepRecord:
    fields = dict(
        step=step, tokens=8192 * step, samples=32 * step, loss=5.25, lr=1.9e-3, grad_norm=0.845, clip_coef=1.0, step_seconds=0.8,
        tokens_per_second=10_312.0, tokens_per_second_per_gpu=2578.0, mfu=0.123, seconds=1.0 * step, dollars=0.0012,
        dollars_per_billion_tokens=10.81, eta_seconds=42.0, time_unix=1e9,
    )  # fmt: skip
    return StepRecord(**(fields | changes))
