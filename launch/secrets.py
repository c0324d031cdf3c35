"""Where this process finds secrets, so that it can keep them to itself: environment variables, ~/.netrc, and the files of W&B, the Hub, AWS
and git. What is written to the console and to logs goes through `Hiding`; what is written to a file goes through `hide`.

Hidden: what Python writes. Not hidden: what a library of C++ writes to a descriptor itself, and other processes' views of this one's
arguments and environment.
"""

import contextlib
import netrc
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..conf.secrets import SHORTEST, Secrets, names_one, refused

_LARGEST = 1 << 20  # bytes of a file with secrets
_STREAMS = ("stdout", "stderr")
# Of W&B, the Hub, AWS and git, beside the environment's own places: in the home directory.
_FILES = (
    ".config/wandb/settings", ".config/wandb/credentials.json", ".cache/huggingface/token", ".cache/huggingface/stored_tokens",
    ".aws/credentials", ".git-credentials", ".config/git/credentials",
)  # fmt: skip
_ENTRY = re.compile(r"(?i)(?:token|key|secret|password)[\"']?\s*[=:]\s*[\"']?([^\s\"',]+)")
_PASSWORD = re.compile(r"password\s+(\S+)")


def known(*more: str, environ: Mapping[str, str] | None = None) -> Secrets:
    """All that is found now, and `more`. A file that is not there, or cannot be read, holds none."""
    environ = os.environ if environ is None else environ
    found = {value: "the configuration's variable" for text in more for value in _parts(text)}
    for name, text in environ.items():
        if names_one(name) and _may_be_one(text):
            found |= {value: name for value in (text, *_parts(text))}
        elif "://" in text:  # a proxy's password, say
            found |= {password: name for password in _passwords(text)}
    for path in _files(environ):
        found |= {value: str(path) for value in _in_file(path)}
    return Secrets(values={value: source for value, source in found.items() if len(value) >= SHORTEST})


def hide(text: str) -> str:
    """`text` as it may be written anywhere."""
    return (sys.stderr.secrets if isinstance(sys.stderr, Hiding) else known()).hide(text)


def refuse(words: Sequence[str], config_dir: str | Path | None = None) -> None:
    """Raises ConfigError where a word of the command line, or a file of the folder of configurations, holds a known secret.

    Words are seen by everyone on the machine, and kept with jobs and runs. Shapes of secrets in settings are `conf`'s to find.
    """
    secrets = known()
    for word in words:
        if source := _source(secrets, word):
            raise refused(f"command line: {word.partition('=')[0] if '=' in word else 'a word'}", source)
    folder = Path(config_dir) if config_dir else None
    for path in [*folder.glob("*.yaml"), *folder.glob("*/*.yaml")] if folder and folder.is_dir() else ():
        if source := _source(secrets, _text(path)):
            raise refused(str(path), source)


def _source(secrets: Secrets, text: str) -> str:
    """Where the known value is from that stands in `text`; "" for none."""
    return next((f"what {source} holds" for value, source in secrets.values.items() if value in text), "")


# ---------------------------------------------------------------- streams


class Hiding:
    """A text stream in front of another, through which no secret passes. All else is the other's."""

    def __init__(self, stream: Any, secrets: Secrets):
        self.stream, self.secrets = stream, secrets

    def write(self, text: str) -> int:
        self.stream.write(self.secrets.hide(text))
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def install(*more: str) -> None:
    """From now on this process's console, or its log, is written to through `Hiding`; `more`: further secrets."""
    secrets = known(*more)
    for name in _STREAMS:
        stream = getattr(sys, name)
        if isinstance(stream, Hiding):
            stream.secrets = secrets
        elif stream is not None:
            setattr(sys, name, Hiding(stream, secrets))


# ---------------------------------------------------------------- places


def _may_be_one(text: str) -> bool:
    """A number, a word for yes or no, or the path of a file is none."""
    if text.isdigit() or text.lower() in ("disabled", "required"):
        return False
    with contextlib.suppress(OSError, ValueError):
        return not (text[:1] in "/~." and Path(text).expanduser().exists())
    return True


def _parts(text: str) -> list[str]:
    """Of an address that is a secret: all of it, and its path, which libraries name by itself."""
    with contextlib.suppress(ValueError):
        path = urlsplit(text).path if "://" in text else ""
        return [text, *([path] if len(path) >= 2 * SHORTEST else []), *_passwords(text)]
    return [text]


def _passwords(text: str) -> list[str]:
    with contextlib.suppress(ValueError):
        return [password] if (password := urlsplit(text.strip()).password) else []
    return []


def _files(environ: Mapping[str, str]) -> Iterator[Path]:
    home = Path(environ.get("HOME") or "/")
    yield Path(environ.get("NETRC") or home / ".netrc")
    yield from (home / name for name in _FILES)
    if folder := environ.get("HF_HOME"):
        yield from (Path(folder) / name for name in ("token", "stored_tokens"))
    if folder := environ.get("WANDB_CONFIG_DIR"):
        yield from (Path(folder) / name for name in ("settings", "credentials.json"))
    named = ("HF_TOKEN_PATH", "AWS_SHARED_CREDENTIALS_FILE", "WANDB_CREDENTIALS_FILE", "WANDB_IDENTITY_TOKEN_FILE")
    yield from (Path(environ[name]) for name in named if environ.get(name))


def _in_file(path: Path) -> list[str]:
    text = _text(path)
    if not text:
        return []
    if path.name.endswith("netrc") or re.search(r"^\s*machine\s", text, re.MULTILINE):
        return _of_netrc(path, text)
    lines = [line.strip() for line in text.splitlines()]
    alone = [line for line in lines if len(line) >= 2 * SHORTEST and re.fullmatch(r"[\w.~+/-]+=*", line)]
    return alone + _ENTRY.findall(text) + [password for line in lines if "://" in line for password in _passwords(line)]


def _of_netrc(path: Path, text: str) -> list[str]:
    try:
        entries = netrc.netrc(path).hosts.values()
    except (OSError, netrc.NetrcParseError):  # who reads it otherwise takes what is there
        return _PASSWORD.findall(text)
    return [password for _, _, password in entries if password]


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        if path.is_file() and path.stat().st_size <= _LARGEST:
            return path.read_text(encoding="utf-8", errors="replace")
    return ""
