"""What is said when a configuration is wrong: one sentence with the field, its value, the rule and the nearest valid value."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

HIDDEN = "(hidden)"  # stands for a secret
_LONGEST = 80  # characters of a list or a dictionary that are shown; text, which may be a path, is shown whole


class ConfigError(ValueError):
    """One thing wrong in a configuration: `field`, its value, the rule, and (where there is one) the nearest valid value."""

    hint = "nearest valid value"

    def __init__(self, field: str, value: Any, rule: str, nearest: Any = None):
        self.field, self.value, self.rule, self.nearest = field, value, rule, nearest
        super().__init__(f"{field} = {_show(value)}: {rule}" + (f"; {self.hint}: {_show(nearest)}" if nearest is not None else ""))

    def __reduce__(self):
        return type(self), (self.field, self.value, self.rule, self.nearest)


class UnknownKey(ConfigError):
    """A key that the schema does not have; `nearest` is the known key most like it."""

    hint = "nearest known key"


def closest(value: float, candidates: Iterable) -> Any:
    """The candidate nearest to `value`, the smaller one of two that are equally near."""
    return min(candidates, key=lambda n: (abs(n - value), n))


def divisors(n: int) -> list[int]:
    """Ascending."""
    return [d for d in range(1, n + 1) if n % d == 0]


def choose(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(name, value, f"must be one of {', '.join(allowed)}", most_like(str(value), allowed))


def most_like(word: str, words: Iterable[str]) -> str | None:
    """The word spelt most like `word`; None only if there are no words."""
    return max(words, key=lambda w: difflib.SequenceMatcher(None, w.lower(), word.lower()).ratio(), default=None)


def _show(value: Any) -> str:
    if isinstance(value, str) and value and value.isprintable() and value.strip() == value:
        return value
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3].rpartition(" ")[0] + " ..."
