"""The runs that a page may show, followed by one thread: those that somebody has looked at lately."""

import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ..figures import planned
from ..figures.planned import Planned
from ..figures.run import Run
from ..overview.read import MARKS, find

SEARCH_S = 5.0  # between two searches for new runs
LOOK_S = 0.5  # between two looks at the files of a run that somebody looks at
FORGET_S = 120.0  # without anybody looking, after which a run is not followed


class Watch:
    """Of the runs in and below some folders. Names are paths below the folder they have in common: what is not among them is not opened."""

    def __init__(self, roots: Sequence[Path]):
        self.roots = [Path(root) for root in roots]
        self._paths: dict[str, Path] = {}
        self._runs: dict[str, Run] = {}
        self._wanted: dict[str, float] = defaultdict(float)
        self._plans: dict[str, tuple] = {}
        self._searched = -SEARCH_S
        self._lock, self._news, self._ended = threading.Lock(), threading.Event(), threading.Event()
        self._search()

    def start(self) -> "Watch":
        threading.Thread(target=self._follow, name="dash: runs", daemon=True).start()
        return self

    def stop(self) -> None:
        """Soon: what is being read is read to its end."""
        self._ended.set()
        self._news.set()

    # ------------------------------------------------------------ asked by pages

    def names(self) -> list[str]:
        """Of all runs, in the order of their paths."""
        with self._lock:
            if time.monotonic() - self._searched >= SEARCH_S:
                self._search()
            return list(self._paths)

    def newest(self) -> str | None:
        """The run that was written to last."""
        with self._lock:
            return max(self._paths, key=lambda name: _touched(self._paths[name]), default=None)

    def runs(self, names: Sequence[str]) -> list[Run]:
        """Those of them that there are. Each has been looked at once before this returns."""
        found = []
        for name in names:
            with self._lock:
                if name not in self._paths:
                    continue
                self._wanted[name] = time.monotonic()
                run = self._runs.get(name)
                if run is None:
                    run = self._runs[name] = Run(self._paths[name], label=name, share=1 / len(names))
                    run.look(0.0)
            found.append(run)
        self._news.set()
        return found

    def plan(self, run: Run) -> Planned | None:
        """None until it is made, and where there is none; it is made beside whoever asks."""
        with self._lock:
            text, plan = self._plans.get(run.label, (None, None))
            if text != run.config_text:
                self._plans[run.label] = (run.config_text, None)
                if run.config:
                    threading.Thread(target=self._make_plan, args=(run.label, run.config_text, run.config), daemon=True).start()
                return None
            return plan

    def _make_plan(self, name: str, text: str, config) -> None:
        plan = planned.plan(config)
        with self._lock:
            if self._plans.get(name, ("",))[0] == text:
                self._plans[name] = (text, plan)

    # ------------------------------------------------------------ the thread

    def _follow(self) -> None:
        while not self._ended.is_set():
            self._news.clear()
            with self._lock:
                now = time.monotonic()
                for name in [name for name in self._runs if now - self._wanted[name] > FORGET_S]:
                    del self._runs[name]
                runs = list(self._runs.values())
            more = [run.look(0.1) for run in runs]  # list: each has its turn
            if any(more):
                time.sleep(0.01)  # for those that draw
            else:
                (self._ended if runs else self._news).wait(LOOK_S)

    def _search(self) -> None:
        self._searched = time.monotonic()
        there = [root for root in self.roots if root.is_dir()]
        # A folder that was named and holds nothing yet is where runs will be, not one itself.
        paths = [path for path in find(there) if path not in there or any((path / mark).exists() for mark in MARKS)] if there else []
        self._paths = dict(zip(_names(paths), paths))


def _names(paths: Sequence[Path]) -> list[str]:
    """Short and different: without the folders that all have in common."""
    whole = [path.resolve() for path in paths]
    if len(whole) < 2:
        return [path.name for path in whole]
    common = 0
    while all(len(path.parts) > common + 1 for path in whole) and len({path.parts[common] for path in whole}) == 1:
        common += 1
    names = ["/".join(path.parts[common:]) for path in whole]
    return names if len(set(names)) == len(names) else [str(path) for path in whole]


def _touched(path: Path) -> float:
    times = [0.0]
    for name in ("metrics.jsonl", "config.yaml", "."):
        try:
            times.append((path / name).stat().st_mtime)
            break
        except OSError:
            continue
    return max(times)
