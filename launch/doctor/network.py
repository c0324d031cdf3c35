"""Network devices of this machine, whether the port that ranks meet at is free, and whether W&B can be reached."""

import configparser
import errno
import netrc
import os
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from ...conf.schema import Config
from .line import Line, fail, ok, skipped, warn

KIND, PORT = "machine", 29400
SYS = Path("/sys/class")


def interfaces(sys: Path = SYS) -> list[str]:
    """That are up, and `lo`."""
    return sorted(path.name for path in _entries(sys / "net") if path.name == "lo" or _read(path / "operstate") == "up")


def rdma(sys: Path = SYS) -> list[str]:
    return sorted(path.name for path in _entries(sys / "infiniband"))


def check_devices(config: Config, nodes: int, sys: Path = SYS) -> Iterator[Line]:
    """`nodes`: that the run has, by its layout or because they are here."""
    yield _interfaces(sys, nodes)
    yield from _rdma(config, nodes, sys)


def _interfaces(sys: Path, nodes: int) -> Line:
    there = [name for name in interfaces(sys) if name != "lo"]
    down = sorted(path.name for path in _entries(sys / "net") if path.name not in there and path.name != "lo")
    if not _entries(sys / "net"):
        return skipped(KIND, "network", f"{sys / 'net'} is not seen here")
    if not there:
        make, others = fail if nodes > 1 else warn, ", ".join(down) or "there is no other"
        return make(KIND, "network", f"no interface is up but lo ({others})", "ip link; ip link set NAME up")
    speeds = [f"{name} up{_speed(sys / 'net' / name)}" for name in there]
    return ok(KIND, "network", ", ".join(speeds) + (f"; down: {', '.join(down)}" if down else ""))


def _speed(path: Path) -> str:
    text = _read(path / "speed")  # Mbit/s; -1, or an error, where the device has none
    return f" at {int(text) / 1e3:g} Gb/s" if text.isdecimal() and int(text) else ""


def _rdma(config: Config, nodes: int, sys: Path) -> Iterator[Line]:
    ports = {f"{port.parents[1].name}:{port.name}": port for d in _entries(sys / "infiniband") for port in _entries(d / "ports")}
    if not ports:
        yield skipped(KIND, "RDMA", f"not seen here: {sys / 'infiniband'} has no device")
        return
    active = {name: _read(port / "rate") for name, port in ports.items() if _read(port / "state").endswith("ACTIVE")}
    others = {name: _read(port / "state").partition(": ")[2].lower() or "?" for name, port in ports.items() if name not in active}
    value = f"{len(active)} of {len(ports)} ports active" + ("" if not others else f"; {', '.join(f'{n} {s}' for n, s in others.items())}")
    if not active:
        yield fail(KIND, "RDMA", value, "ibstat; is the cable in, and does a subnet manager run (sminfo)?")
        return
    usual = Counter(active.values()).most_common(1)[0][0]
    slow = {name: rate for name, rate in active.items() if _gigabits(rate) < _gigabits(usual)}
    if slow:
        value += "; slower than the others, " + ", ".join(f"{name} {rate}" for name, rate in slow.items()) + f" (others {usual})"
    do = "ibstat; ibdiagnet; look at the cables of these ports"
    yield warn(KIND, "RDMA", value, do) if slow or others else ok(KIND, "RDMA", f"{value}, {usual}")
    c = config.cluster
    each = sum(map(_gigabits, active.values())) / 8 / c.gpus_per_node
    if nodes > 1 and each < 0.9 * c.inter_node_gb_s:
        said = f"{each:.3g} GB/s for each of {c.gpus_per_node} GPUs; cluster.inter_node_gb_s={c.inter_node_gb_s:g}"
        yield warn(KIND, "RDMA rate", said, f"mend the ports, or plan with cluster.inter_node_gb_s={each:.3g}")


def _gigabits(rate: str) -> float:
    """Of "400 Gb/sec (4X NDR)"."""
    word = rate.split()[0] if rate.split() else ""
    return float(word) if word.replace(".", "", 1).isdecimal() else 0.0


# ---------------------------------------------------------------- the port


def check_port(port: int) -> Line:
    """By binding it, and not listening: nobody could connect meanwhile."""
    family = socket.AF_INET6 if socket.has_ipv6 and Path("/proc/net/if_inet6").exists() else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does: what has just closed is not in the way
        if family == socket.AF_INET6:
            server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        try:
            server.bind(("", port))
        except OSError as error:
            why = "somebody listens there" if error.errno == errno.EADDRINUSE else error.strerror
            do = f"ss -ltnp 'sport = :{port}'; or another: --rdzv-endpoint HOST:{port + 1}"
            return fail("software", f"port {port}", f"cannot be bound: {why}", do)
    return ok("software", f"port {port}", "free, for ranks to meet at")


# ---------------------------------------------------------------- W&B


def check_wandb(config: Config, environ: Mapping[str, str], *, timeout_s: float) -> Iterator[Line]:
    """Can its server be connected to, and are there credentials? Neither is sent or shown."""
    if config.launch.wandb != "online":
        yield skipped(KIND, "W&B", f"launch.wandb={config.launch.wandb}: nothing is sent")
        return
    url = wandb_url(environ)
    proxy = environ.get("https_proxy") or environ.get("HTTPS_PROXY") if url.startswith("https") else None
    target = urlsplit(proxy if proxy and "//" in proxy else f"//{proxy}") if proxy else urlsplit(url)
    port = target.port or (443 if target.scheme in ("https", "") else 80)
    via = f" through the proxy {target.hostname}:{port}" if proxy else ""
    why = _connect(target.hostname or "", port, timeout_s)
    offline = "launch.wandb=offline, and `wandb sync` later"
    if why:
        yield warn(KIND, "W&B", f"{url}{via}: {why}; the run would keep its records here", f"curl -sI {url}; or {offline}")
    else:
        yield ok(KIND, "W&B", f"{url} answers{via}")
    if has_credentials(url, environ):
        yield ok(KIND, "W&B credentials", "there are some (not tried)")
    else:
        value = f"none for {urlsplit(url).hostname}; the run would keep its records here"
        yield warn(KIND, "W&B credentials", value, f"wandb login; or {offline}")


def wandb_url(environ: Mapping[str, str]) -> str:
    """From where W&B takes it: its variable, its settings file, or its own server."""
    if environ.get("WANDB_BASE_URL"):
        return environ["WANDB_BASE_URL"].rstrip("/")
    folder = environ.get("WANDB_CONFIG_DIR") or os.path.join(_home(environ), ".config", "wandb")
    settings = configparser.ConfigParser(interpolation=None)
    try:
        settings.read(os.path.join(folder, "settings"))
    except (configparser.Error, UnicodeDecodeError):
        return "https://api.wandb.ai"
    return settings.get("default", "base_url", fallback="https://api.wandb.ai").rstrip("/")


def has_credentials(url: str, environ: Mapping[str, str]) -> bool:
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    paths = [environ["NETRC"]] if environ.get("NETRC") else [os.path.join(_home(environ), name) for name in (".netrc", "_netrc")]
    for path in paths:
        try:
            found = netrc.netrc(path).authenticators(urlsplit(url).netloc)
        except (OSError, netrc.NetrcParseError):
            continue
        if found and found[2]:
            return True
    return False


def _home(environ: Mapping[str, str]) -> str:
    return environ.get("HOME") or os.path.expanduser("~")


def _connect(host: str, port: int, timeout_s: float) -> str:
    """Why not; "" where it can be. In a thread: the system's look-up of a name knows no timeout."""
    said: list[str] = []

    def attempt() -> None:
        try:
            socket.create_connection((host, port), timeout=timeout_s).close()
            said.append("")
        except OSError as error:
            name = isinstance(error, socket.gaierror)
            said.append(f"the name {host} is not known here" if name else str(error.strerror or error))

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(timeout_s + 0.2)
    return said[0] if said else f"no answer in {timeout_s:g} s"


# ---------------------------------------------------------------- files


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
