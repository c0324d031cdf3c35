"""The bench on a terminal: a line for each op and shape, and below it what it is compared with."""

from collections.abc import Iterator

from ...train import units
from .results import Aim, Results, Row, Timed

_OP, _SHAPE = 29, 37
HEADER = f"      {'op':<{_OP}}{'shape':<{_SHAPE}}{'dB':>6}{'time':>10}{'rate':>14}{'of ceiling':>12}{'of DeepGEMM':>13}"


def lines(row: Row, results: Results) -> Iterator[str]:
    mark = "ok  " if row.passed else "FAIL"
    db = "equal" if row.db is None and row.passed and not row.error else "" if row.db is None else f"{row.db:.1f}"
    share, published = results.share(row), row.rate / 1e12 / row.published if row.rate and row.published else None
    cells = f"{time(row.seconds):>10}{rate(row):>14}{percent(share):>12}{percent(published):>13}" if row.seconds else ""
    shape = row.shape if len(row.shape) < _SHAPE else row.shape + " "
    yield f"{mark}  {row.op:<{_OP}}{shape:<{_SHAPE}}{db:>6}{cells}".rstrip()
    if row.error:
        yield f"        {row.error}"
    for peer in row.peers:
        yield f"        {_times(row.ratio(peer.name))}  {peer.name}{_further(peer)}"
    for config in row.configs:
        mark = "fastest" if config is row.best else ""
        yield f"        {mark:>9}  {config.name}{_further(config)}"


def ceilings(results: Results) -> str:
    found = [f"{name} {_quantity(value, name)}" for name, value in results.ceilings.items()]
    return "ceilings measured in this run: " + (", ".join(found) or "none")


def aims(found: list[Aim]) -> Iterator[str]:
    for aim in found:
        yield f"  {'met' if aim.met else 'not met':<8}{units.significant(aim.value):>8} of {units.significant(aim.least):<6} {aim.what}"


def winners(results: Results) -> Iterator[str]:
    """Per op and shape, where there was a choice: what won, and how much over the one that a launch takes."""
    for row in results.rows:
        first = row.configs[0] if row.configs else None
        if row.best and first and first.seconds:
            yield f"  {row.op:<{_OP}}{row.shape:<{_SHAPE}}{row.best.name}  ({first.seconds / row.best.seconds:.2f} x the first)"


def time(seconds: float | None) -> str:
    return (
        "" if seconds is None else f"{units.significant(seconds * 1e6)} us" if seconds < 1e-3 else f"{units.significant(seconds * 1e3)} ms"
    )


def rate(row: Row) -> str:
    return "" if row.rate is None else _quantity(row.rate, row.ceiling)


def _quantity(value: float, ceiling: str) -> str:
    return f"{value / 1e9:.0f} GB/s" if ceiling == "copy" else f"{value / 1e12:.0f} TFLOP/s"


def percent(share: float | None) -> str:
    return "" if share is None else units.percent(share)


def _times(ratio: float | None) -> str:
    return " " * 9 if ratio is None else f"{ratio:>7.2f} x"


def _further(timed: Timed) -> str:
    told = [time(timed.seconds), "" if timed.db is None else f"{timed.db:.1f} dB", timed.why]
    text = ", ".join(word for word in told if word)
    return f"  ({text})" if text else ""
