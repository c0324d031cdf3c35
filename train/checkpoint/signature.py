"""An optional signature of a checkpoint: of its manifest, which has the hash of every file. OpenSSH's own (`ssh-keygen -Y`), beside it.

    manifest.json.sig    made with a person's SSH key; who may sign is a file in the form that ssh-keygen calls ALLOWED SIGNERS
"""

import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...conf import files
from ...conf.errors import ConfigError
from .manifest import MANIFEST, CheckpointError, verify_all

NAME = MANIFEST + ".sig"
NAMESPACE = "shoestring-checkpoint"  # a signature that was made for something else is none
_LIMIT_S = 60
_LONGEST = 1 << 16  # bytes of a signature


def sign(checkpoint: Path, key: str | Path) -> Path:
    """Sign a checkpoint whose files are all as they were written; the signature's file. `key`: private, or public with the private one in
    an agent. Raises CheckpointError for a damaged one, and where ssh-keygen refuses."""
    verify_all(checkpoint)
    key = _of_user("--key", key)
    made = _keygen(["sign", "-q", "-f", str(key), "-n", NAMESPACE], files.read(checkpoint / MANIFEST), patience_s=None)
    if made.returncode or not made.stdout.startswith(b"-----BEGIN SSH SIGNATURE-----"):
        raise CheckpointError(f"{checkpoint} was not signed with {key}: {_said(made)}")
    with files.fresh(checkpoint / NAME) as file:
        file.write(made.stdout)
    return checkpoint / NAME


def signer(checkpoint: Path, signers: str | Path, manifest: bytes) -> str:
    """Who has signed the manifest, of those in the file `signers`. CheckpointError where nobody has, or it is not what was signed."""
    allowed = _of_user("checkpoint.signers", signers)
    try:
        signature = files.read(checkpoint / NAME, _LONGEST)
    except FileNotFoundError:
        raise CheckpointError(f"{checkpoint} is not signed, and checkpoint.signers asks for a signature: `shoestring checkpoint sign` "
                              "makes one, on the machine of who vouches for it") from None  # fmt: skip
    except OSError as error:
        raise CheckpointError(f"{checkpoint / NAME} cannot be read: {error}") from None
    with tempfile.TemporaryDirectory(prefix="shoestring-") as folder:  # a name of our own, which no option or pattern is in
        copy = Path(folder) / "signature"
        copy.write_bytes(signature)
        found = _keygen(["find-principals", "-s", str(copy), "-f", str(allowed)])
        for name in found.stdout.decode(errors="replace").splitlines() if not found.returncode else ():
            words = ["verify", "-f", str(allowed), "-I", name, "-n", NAMESPACE, "-s", str(copy)]
            if not _keygen(words, manifest).returncode:
                return name
    why = "its manifest is not what was signed" if not found.returncode else "by nobody who is in it"
    raise CheckpointError(f"{checkpoint} is not validly signed for {allowed}: {why}")


def _of_user(field: str, path: str | Path) -> Path:
    path = Path(path).expanduser().absolute()
    if not path.is_file():
        raise ConfigError(field, str(path), "no such file")
    return path


def _keygen(words: Sequence[str], given: bytes = b"", patience_s: float | None = _LIMIT_S) -> subprocess.CompletedProcess:
    """No shell; what is signed comes in by standard input, and every path is absolute: none is taken for an option."""
    try:
        return subprocess.run(["ssh-keygen", "-Y", *words], input=given, capture_output=True, timeout=patience_s)
    except FileNotFoundError:
        raise CheckpointError("ssh-keygen is not here, which signs and checks checkpoints: install openssh-client") from None
    except subprocess.TimeoutExpired:
        raise CheckpointError(f"ssh-keygen has not answered in {_LIMIT_S} s") from None


def _said(process: subprocess.CompletedProcess) -> str:
    text = " ".join(process.stderr.decode(errors="replace").split())
    return "".join(c if c.isprintable() else "?" for c in text)[:300] or f"ssh-keygen ended with {process.returncode}"
