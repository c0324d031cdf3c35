"""`shoestring dash`: serves the live page until it is interrupted."""

from collections.abc import Sequence
from pathlib import Path

from ...conf.errors import ConfigError
from .serve import HOST, make
from .watch import Watch


def main(folders: Sequence[Path], port: int) -> None:
    """Raises ConfigError for a folder that is not there, and for a port that is taken."""
    roots = list(folders) or [Path("runs")]
    for root in folders:
        if not root.is_dir():
            raise ConfigError("DIR", str(root), "no such folder", "runs" if Path("runs").is_dir() else None)
    watch = Watch(roots).start()
    server = make(watch, port)
    names, where = watch.names(), ", ".join(str(root) for root in roots)
    print(f"http://{HOST}:{server.port}/ shows {len(names)} run{'s' * (len(names) != 1)} in {where}; Ctrl-C ends it", flush=True)
    print(f"From another machine: ssh -L {server.port}:{HOST}:{server.port} THIS_MACHINE", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
