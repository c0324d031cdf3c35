"""Canaries: a random word in every place where a secret can enter, and the search for them in whatever a command has left."""

import base64
import gzip
import html
import io
import json
import secrets
import string
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

HALF = 12  # characters: a canary that was cut is found, too


def word(length: int = 2 * HALF, alphabet: str = string.ascii_letters + string.digits) -> str:
    """With a digit and capitals, as keys have."""
    return "7Q" + "".join(secrets.choice(alphabet) for _ in range(length - 2))


@dataclass
class Planted:
    """`canaries`: place -> word. `inputs`: files that hold them because they were planted there."""

    root: Path
    canaries: dict[str, str] = field(default_factory=dict)
    inputs: set[Path] = field(default_factory=set)

    def make(self, place: str, canary: str = "") -> str:
        self.canaries[place] = canary or word()
        return self.canaries[place]

    def file(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        self.inputs.add(path)
        return path

    def search(self, **outputs: bytes) -> list[str]:
        """A line for each canary in a file below the root, or in `outputs`: its place, the file and the offset."""
        found = []
        for name, data in [*((str(p.relative_to(self.root)), p.read_bytes()) for p in self._files()), *outputs.items()]:
            for inside, text in unpacked(name, data):
                for place, canary in self.canaries.items():
                    at = min((at for spelling in spellings(canary) if (at := text.find(spelling)) >= 0), default=-1)
                    if at >= 0:
                        found.append(f"{place}: {inside}, offset {at}: ...{text[max(0, at - 60) : at]!r}")
        return found

    def _files(self) -> Iterator[Path]:
        yield from (p for p in sorted(self.root.rglob("*")) if p.is_file() and not p.is_symlink() and p not in self.inputs)


def spellings(canary: str) -> set[bytes]:
    """Of each half: as it is, as in URLs, JSON and HTML, in base64 at any offset, in hexadecimal."""
    found = set()
    for half in (canary[:HALF], canary[-HALF:]):
        raw = half.encode()
        found |= {raw, quote(half, safe="").encode(), html.escape(half).encode(), json.dumps(half)[1:-1].encode(), raw.hex().encode()}
        for shift in range(3):  # what of it stands in whole groups of three bytes
            inner = raw[-shift % 3 :]
            found.add(base64.b64encode(inner[: len(inner) // 3 * 3]))
    return found


def unpacked(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """The file, and what is in it: members of archives, and records of W&B's log in one piece."""
    yield name, data
    if data[:2] == b"\x1f\x8b":
        yield f"{name} (unpacked)", gzip.decompress(data)
    elif name.endswith(".wandb"):
        yield f"{name} (records)", b"".join(_log(data))
    elif zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.namelist():
                yield from unpacked(f"{name}/{member}", archive.read(member))


def _log(data: bytes) -> Iterator[bytes]:
    """Of LevelDB's format: blocks of 32 KiB, each with pieces after 7 bytes of checksum, length and kind."""
    at = 7  # W&B's own header
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        length = int.from_bytes(data[at + 4 : at + 6], "little")
        if left < 7 or not (length or data[at + 6]):
            at += left
            continue
        yield data[at + 7 : at + 7 + length]
        at += 7 + length
