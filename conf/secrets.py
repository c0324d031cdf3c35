"""What is a secret: a value that somebody knows to be one, or text of a known shape (a password in a URL, a token's prefix, KEY=VALUE).

Settings that hold one are refused; anywhere else it is hidden where text leaves a process. Nothing is read here: `launch/secrets.py` knows
where secrets stand, and hands them in. Hashes, commit ids, run ids and paths have none of these shapes (`tests/conf/test_secrets.py`).
"""

import functools
import html
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from .errors import HIDDEN, ConfigError

SHORTEST = 8  # characters of a value that is hidden by itself: a shorter one stands in ordinary words, too
_NAME = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|JWT|WEBHOOK|(?<!_P)KEY)S?(_ID|_URL)?$|_PWD$", re.IGNORECASE
)  # NCCL_IB_PKEY is none


def names_one(name: str) -> bool:
    """Whether an environment variable of this name holds a secret, as far as a name tells."""
    return bool(_NAME.search(name))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """`pattern` has what stays, and the secret as its group "secret"."""

    what: str
    pattern: re.Pattern


def _shape(what: str, pattern: str, flags: int = 0) -> Shape:
    return Shape(what=what, pattern=re.compile(pattern, flags))


# Each begins with characters that few texts have, or is bounded: a page of megabytes is looked through, too.
_NOT_DIGITS = r"(?![\d.,]+(?![^\s'\",;)\]}]))"  # MAX_TOKENS=10000000 is no secret
SHAPES = (
    _shape("a password in a URL", r"://[^\s/:@'\"<>\\]*:(?P<secret>[^\s/@'\"<>\\]+)@"),
    _shape("a token in a URL", r"https?://(?P<secret>[^\s/:@'\"<>\\]+)@"),
    _shape("a token in a URL", r"[?&](?:amp;)?(?:[\w.-]{0,40}[_.-])?(?:token|key|apikey|secret|signature|sig|password|credential)="
           r"(?P<secret>[^=&\s'\"<>#\\;][^&\s'\"<>#\\;]{7,})", re.IGNORECASE),
    _shape("a webhook's address", r"(?:hooks\.slack\.com/(?:services|workflows|triggers)|discord(?:app)?\.com/api/webhooks)/"
           r"(?P<secret>[^\s'\"<>\\]+)"),
    _shape("an Authorization header", r"\bauthorization['\"]?\s{0,3}[:=]\s{0,3}['\"]?(?:(?:bearer|basic|token|bot)\s+)?"
           r"(?P<secret>(?!(?:bearer|basic|token|bot)\s)[^\s'\",]{8,})", re.IGNORECASE),
    _shape("a bearer token", r"\b[Bb]earer (?P<secret>(?=\S{0,200}\d)[\w.~+/=-]{16,})"),
    _shape("a token", r"(?<![\w-])(?P<secret>hf_[A-Za-z0-9]{30,}|gh[opsur]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"
           r"|xox[abeoprs]-(?=[\w-]{0,200}\d)[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])|sk-(?=[\w-]{0,200}\d)(?=[\w-]{0,200}[A-Z])[\w-]{20,})"),
    _shape("a W&B key", r"\bwandb login (?:--\S+ ){0,3}(?P<secret>[0-9a-f]{40}|\w{86})(?!\w)"),
    _shape("a secret variable", r"\b[A-Z0-9_]{0,60}(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|JWT|(?<!_P)KEY)S?=['\"]?"
           + _NOT_DIGITS + r"(?P<secret>[^\s'\"$/~.][^\s'\"]{7,})"),
    _shape("a key or password", r"(?:api[_-]?key|secret[_-]?(?:access[_-]?)?key|access[_-]?token|auth[_-]?token|password|passwd)"
           r"['\"]?(?:=|: ?| = )['\"]?(?P<secret>(?=[^\s'\",;}\]]{0,200}\d)[^\s'\",;}\]]{8,})", re.IGNORECASE),
    _shape("a token", r"--(?:[a-z-]{0,40}-)?(?:token|key|secret|password)[ =](?P<secret>(?=\S{0,200}\d)[^\s'\"$/~.][^\s'\"]{7,})"),
    _shape("a private key", r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----(?P<secret>[A-Za-z0-9+/=\s\\]+)"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """`values`: what is known to be secret, and where it is from, such as {"d3adb33f": "WANDB_API_KEY"}; shapes are always looked for."""

    values: Mapping[str, str] = field(default_factory=dict)

    def hide(self, text: str) -> str:
        """`text` with every secret in it replaced by "(hidden)". Twice is once."""
        if self._spelt:
            text = self._spelt.sub(HIDDEN, text)
        for shape in SHAPES:
            text = shape.pattern.sub(_without_secret, text)
        return text

    def found(self, text: str) -> str:
        """What secret is in `text`, in words that do not show it; "" for none."""
        if self._spelt and (match := self._spelt.search(text)):
            return f"what {self._sources[match[0]]} holds"
        return next((shape.what for shape in SHAPES if shape.pattern.search(text)), "")

    @functools.cached_property
    def _sources(self) -> dict[str, str]:
        return {spelling: source for value, source in self.values.items() if len(value) >= SHORTEST for spelling in _spellings(value)}

    @functools.cached_property
    def _spelt(self) -> re.Pattern | None:
        longest_first = sorted(self._sources, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _without_secret(match: re.Match) -> str:
    start, end = (at - match.start() for at in match.span("secret"))
    return f"{match[0][:start]}{HIDDEN}{match[0][end:]}"


def _spellings(value: str) -> set[str]:
    """As it stands in a text, a URL, JSON (also one that is safe in a page), a page and a Python message."""
    in_json = json.dumps(value)[1:-1]
    in_page = in_json.replace("<", "\\u003c").replace(">", "\\u003e")
    return {value, quote(value), quote(value, safe=""), in_json, in_page, html.escape(value), repr(value)[1:-1]}


SHAPED = Secrets()  # knows no values


# ---------------------------------------------------------------- settings


def refuse(tree: Any) -> None:
    """Raises ConfigError for the first text of nested settings that has a secret's shape, without showing it.

    It is not hidden in them: a run that goes on reads the settings that it has kept, and what stood in place of the secret would be wrong
    there.
    """
    for key, text in _texts(tree, ""):
        if what := SHAPED.found(text):
            raise refused(key, what)


def shown(key: str, value: Any) -> Any:
    """The value of an unknown key, which may be the name of a secret."""
    return HIDDEN if isinstance(value, str) and names_one(key) else value


def refused(key: str, what: str) -> ConfigError:
    rule = (
        f"is or has {what}, and every run keeps and shows its settings: leave it out, and give it where the program that needs it looks, "
        "in an environment variable or ~/.netrc"
    )
    return ConfigError(key, HIDDEN, rule)


def _texts(tree: Any, key: str) -> Iterator[tuple[str, str]]:
    """Of a list all items as one line, too: words of a command belong together."""
    if isinstance(tree, dict):
        for name, item in tree.items():
            yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, (list, tuple)):
        for i, item in enumerate(tree):
            yield from _texts(item, f"{key}[{i}]")
        yield key, " ".join(item for item in tree if isinstance(item, str))
    elif isinstance(tree, str):
        yield key, tree
