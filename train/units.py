"""Numbers as people read them, on the console and in reports: 10.3 k, $0.0012, 1:02:03."""

import math

PREFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def count(value: float | None) -> str:
    """Three significant digits with a prefix: 671 B, 10.3 k, 512."""
    if value is None or not math.isfinite(value):
        return plain(value)
    for scale, prefix in PREFIXES:
        if abs(value) >= 0.9995 * scale:
            return f"{significant(value / scale)} {prefix}"
    return significant(value)


def si(value: float | None) -> str:
    """Three significant digits with an SI prefix, for FLOPs and the like: 9.43 M, 250 G, 989 T."""
    return count(value).replace("B", "G")


def money(value: float | None) -> str:
    """US dollars: $0.0012, $3.61, $1,234, $5.33 M."""
    if value is None or not math.isfinite(value):
        return plain(value)
    if value >= 999_500:
        return "$" + count(value)
    if value >= 100:
        return f"${value:,.0f}"
    return f"${value:.2f}" if value >= 1 or value == 0 else f"${value:.{1 - math.floor(math.log10(abs(value)))}f}"


def duration(seconds: float | None) -> str:
    """0:42, 1:02:03, 3 d 04:05."""
    if seconds is None or not math.isfinite(seconds):
        return plain(seconds)
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02}:{m:02}"
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"


def percent(value: float | None) -> str:
    """A share of 1: 38.9 %."""
    return plain(value) if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def significant(value: float, digits: int = 3) -> str:
    """Plain notation where it is readable, no exponent for ordinary sizes."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    value = float(f"{value:.{digits - 1}e}")  # before the exponent is asked for: 0.9999 has that of 1.00
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits - 1}e}" if decimals > 6 else f"{value:.{decimals}f}"


def plain(value: float | None) -> str:
    """What is no number is said as it is."""
    return "–" if value is None else {"inf": "∞", "-inf": "-∞"}.get(str(value), str(value))
