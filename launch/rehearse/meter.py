"""Counts what a step does while it runs, on tensors without values or with them: FLOPs, bytes that collectives send, live storage.

It sees each operator as torch dispatches it, and nothing that one of ours allocates and frees inside. A stretch of a step is an action of
the schedule, with what lies between it and the next; the last is the optimizer's. Storage that was made for the step is

    activations    alive when its stretch ends: operands of weight gradients are among them
    exchange       sent by a token exchange, or received
    working        the rest
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...parallel._torch import TorchDispatchMode
from ...parallel.schedule.ops import Action, Op, text
from ...parallel.trace import Tracer
from .collectives import Collectives
from .flops import Used, flops_of

ACTIVATIONS, EXCHANGE, WORKING = "activations", "exchange", "working"
Owned = Iterable[tuple[str, Iterable[Tensor]]]  # category, what belongs to it


@dataclass(kw_only=True)
class Counts:
    flops: int = 0
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)  # (collective, link) -> bytes


@dataclass(kw_only=True)
class Peak:
    """The most bytes at once, by category, and the stretch in which they were."""

    bytes: int = 0
    by_category: dict[str, int] = field(default_factory=dict)
    at: str = ""


@dataclass(eq=False)
class _Block:
    """One storage."""

    bytes: int
    category: str
    storage: weakref.ref | None = None  # None: gone


class Memory:
    """Live storage of one device, by category."""

    def __init__(self, device: torch.device, owned: Callable[[], Owned], host: Iterable[Tensor] = ()):
        """`host`: tensors that stand for the host's, on a device that has no other; what is made of them is the host's, too."""
        self.device, self.owned = device, owned
        self.host = {id(tensor.untyped_storage()): tensor for tensor in host}
        self.live: dict[int, _Block] = {}
        self.settled: Counter[str] = Counter()  # when the stretch began
        self.log: list[tuple[int, _Block]] = []  # since then: bytes that came or went
        self.now = self.top = self.top_at = 0  # `top_at`: length of the log then
        self.at, self.peak = "begin", Peak()
        for category, tensors in owned():
            for tensor in tensors:
                self.see(tensor, category)

    def see(self, tensor: Tensor, category: str = WORKING) -> None:
        if tensor.device.type != self.device.type:
            return
        storage = tensor.untyped_storage()
        if (key := id(storage)) not in self.live and key not in self.host and (size := storage.nbytes()):
            block = _Block(size, category)
            block.storage = weakref.ref(storage, lambda _: self._gone(key))
            self.live[key] = block
            self._changed(size, block)

    def keep_apart(self, args: tuple, out: Any) -> None:
        """What an operator makes of the host's tensors alone."""
        given = [id(t.untyped_storage()) for t in args if isinstance(t, Tensor)]
        if given and all(key in self.host for key in given):
            for tensor in [out] if isinstance(out, Tensor) else out or ():
                self.host.setdefault(id(tensor.untyped_storage()), tensor)

    def mark(self, tensor: Tensor, category: str) -> None:
        block = self.live.get(id(tensor.untyped_storage()))
        if block and block.category == WORKING:
            block.category = category

    def _gone(self, key: int) -> None:
        block = self.live.pop(key)
        block.storage = None
        self._changed(-block.bytes, block)

    def _changed(self, change: int, block: _Block) -> None:
        self.now += change
        self.log.append((change, block))
        if self.now > self.top:
            self.top, self.top_at = self.now, len(self.log)

    def look_for_discarded(self) -> None:
        """Storage that was freed under its tensor (`kernels/recompute.py`), of this stretch."""
        for block in [block for change, block in self.log if change > 0]:
            storage = block.storage and block.storage()
            if storage is not None and storage.nbytes() < block.bytes:
                self._changed(storage.nbytes() - block.bytes, block)
                block.bytes = storage.nbytes()

    def begin(self, stretch: str) -> None:
        """What was kept of the stretch that ends is known now, and so is what the peak was made of."""
        own = {id(tensor.untyped_storage()): category for category, tensors in self.owned() for tensor in tensors}
        for key, category in own.items():
            if key in self.live and self.live[key].category == WORKING:
                self.live[key].category = category
        for _, block in self.log:
            if block.storage is not None and block.category == WORKING:
                block.category = ACTIVATIONS
        if self.top > self.peak.bytes:
            made_of = self.settled.copy()
            for change, block in self.log[: self.top_at]:
                made_of[block.category] += change
            self.peak = Peak(bytes=self.top, by_category={name: n for name, n in made_of.items() if n}, at=self.at)
        for change, block in self.log:
            self.settled[block.category] += change
        self.at, self.log, self.top, self.top_at = stretch, [], self.now, 0


class Meter(TorchDispatchMode):
    """Counts while it is entered. `tracer` is for the executor; what its actions do is in `in_actions`, everything else in `beside`.

    `call(name, function, args, kwargs)`: runs an operator.
    """

    def __init__(self, memory: Memory, collectives: Collectives, *, call: Callable[..., Any], used: Used, discards: bool):
        super().__init__()
        self.memory, self.collectives, self.call, self.used = memory, collectives, call, used
        self.in_actions, self.beside, self.tracer = Counts(), Counts(), _Told(self)
        self.acting, self.discards = False, discards
        self.packing: tuple[str, str] | None = None  # (phase, kind) of an exchange that is about to be sent
        self.names: dict[Any, tuple[str, object, bool]] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = self.names.get(function)
        if known is None:
            packet = function.overloadpacket
            known = self.names[function] = str(packet), packet, function.namespace == "c10d"
        name, packet, is_collective = known
        counts = self.in_actions if self.acting else self.beside
        if is_collective:
            for tensor in self.collectives.count(name, args, self.packing, counts.sent):
                self.memory.mark(tensor, EXCHANGE)
        out = self.call(name, function, args, kwargs)
        if self.memory.host and "device" not in kwargs:
            self.memory.keep_apart(args, out)
        counts.flops += flops_of(name, packet, args, kwargs, out, self.used)
        self._see(out)
        return out

    def _see(self, out: Any) -> None:
        if isinstance(out, Tensor):
            self.memory.see(out)
        elif isinstance(out, (tuple, list)):
            for one in out:
                self._see(one)


class _Told(Tracer):
    """What the executor says of its work, to a meter."""

    def __init__(self, meter: Meter):
        self.meter = meter

    @contextmanager
    def action(self, action: Action) -> Iterator[None]:
        self.meter.memory.begin(text(action))
        self.meter.acting = True
        yield
        self.meter.acting = False

    @contextmanager
    def compute(self, op: Op, phase: str) -> Iterator[None]:
        yield
        if self.meter.discards:
            self.meter.memory.look_for_discarded()

    @contextmanager
    def pack(self, op: Op, phase: str) -> Iterator[None]:
        self.meter.packing = phase, "F" if op.kind == "F" else "B"
        yield
        self.meter.packing = None
