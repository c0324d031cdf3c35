"""Runs one rank's list of actions over stages made of phases. There is no other way that anything is computed here: one process,
1F1B and every later schedule are the same code with different lists.

A stage's forward and backward are generators that yield after each collective they issue. An action with one op runs its generator
to the end; an action with two advances them in turn, backward first, so that one's collective flies under the other's compute:

    backward    combine |              | experts, dispatch, weights |                  | attention, combine of the block before ...
    forward             | attn, dispatch |                          | experts, combine |

A compute phase's weight gradients run right after the *next* collective of its backward was issued (B), or wait for their W action (I).
A collective of an action with one op has no other compute beside it: some of those that wait, the oldest, run there instead.

On a GPU a phase's compute is only enqueued when its forward or backward returns, and issuing a dispatch makes the host wait for counts that
the GPU has yet to make. So there a generator also yields between compute and the collective that follows: the other's compute is enqueued
before the host waits.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..kernels.weight_grad import WeightGradStore
from .groups import Mesh
from .phases import ComputePhase, MicroBatch, Pending
from .schedule import Action, Op, direction_of
from .trace import Tracer
from .transport import DIRECT, Transport, Work

Waiting = list[tuple[str, list[Callable[[], None]]]]  # weight gradients by phase


class Executor:
    """`stages[s]`: the phases of each stage held here; `actions(M)`: this rank's list for M micro-batches; `boundary(T)`: an empty (T, D)
    to receive into; `loss_weights`: of each loss in the last phase's output, for backward. `tracer` is told what runs: replace it for a
    step that is to be recorded."""

    def __init__(
        self,
        *,
        stages: dict[int, list],
        mesh: Mesh,
        actions: Callable[[int], Sequence[Action]],
        store: WeightGradStore,
        boundary: Callable[[int], Tensor],
        loss_weights: Tensor,
        transport: Transport = DIRECT,
        enqueues: bool = False,
        tick: Callable[[], None] = lambda: None,
    ):
        """`enqueues`: compute goes on after the call that starts it has returned, as on a GPU. `tick`: called before every action."""
        self.stages, self.mesh, self.actions, self.store = stages, mesh, actions, store
        self.boundary, self.loss_weights, self.transport = boundary, loss_weights, transport
        self.tracer, self.enqueues, self.tick = Tracer(), enqueues, tick
        self.losses: dict[int, Tensor] = {}  # of the last step's micro-batches that end here, weighted as they came

    @torch.no_grad()
    def step(self, batches: Sequence[MicroBatch], done: Callable[[int], None] = lambda stage: None) -> Tensor:
        """Every micro-batch forward and backward, into the weights' `main_grad`. Returns this rank's sums of the last phase's outputs
        (the scaled losses, unweighted; FP64, zero where this rank does not hold the last stage).

        `done(stage)`: called when a stage's gradients are complete, in the same order on all ranks with the same list.
        """
        return self._run(self.actions(len(batches)), batches, training=True, done=done)

    @torch.no_grad()
    def evaluate(self, batches: Sequence[MicroBatch]) -> Tensor:
        """The same sums, forward only."""
        forward = [kept for action in self.actions(len(batches)) if (kept := tuple(op for op in action if op.kind == "F"))]
        return self._run(forward, batches, training=False)

    def _run(
        self, actions: Sequence[Action], batches: Sequence[MicroBatch], training: bool, done: Callable[[int], None] = lambda stage: None
    ) -> Tensor:
        self.losses.clear()
        run = _Step(self, batches, training)
        last_of = {op.stage: i for i, action in enumerate([(), *actions]) for op in action}
        for i, (action, upcoming) in enumerate(zip([(), *actions], [*actions, ()])):
            self.tick()
            run.post_receives(upcoming)  # one action ahead, so that it arrives under this one
            run.alone = len(action) == 1
            with self.tracer.action(action):
                interleave([run.start(op) for op in reversed(action)])  # backward first
            run.release()
            for stage in sorted({op.stage for op in action if last_of[op.stage] == i}):
                with self.tracer.reduce(stage):
                    done(stage)
        return run.finish()


def interleave(running: list[Iterator[None]]) -> None:
    """Advance generators in turn until all are done."""
    done = object()
    while running:
        running = [g for g in running if next(g, done) is not done]


class _Step:
    """The state of one pass over the action list: what has arrived, what forward saved, what weight gradients wait."""

    def __init__(self, executor: Executor, batches: Sequence[MicroBatch], training: bool):
        self.executor, self.mesh, self.batches, self.training = executor, executor.mesh, batches, training
        self.tracer = executor.tracer
        self.direction = lambda op: direction_of(op.micro_batch, len(batches), len(executor.mesh.placements))
        self.alone = False  # the action that runs has one op
        self.losses = torch.zeros_like(executor.loss_weights, dtype=torch.float64)
        self.inbox: dict[Op, Pending] = {}  # F: a stage's input; B: the gradient of its output
        self.saved: dict[tuple[int, int], list] = {}
        self.deferred: dict[tuple[int, int], Waiting] = {}
        self.sent: dict[Op, tuple[Work, Tensor]] = {}  # tensors live until their sends are over

    def start(self, op: Op) -> Iterator[None]:
        if op.kind == "F":
            return self._forward(op)
        return self._weights(op) if op.kind == "W" else self._backward(op)

    def finish(self) -> Tensor:
        for work, _ in self.sent.values():
            work.wait()
        left = [name for name in ("inbox", "saved", "deferred") if getattr(self, name)]
        left += ["weight gradients"] * bool(len(self.executor.store))
        assert not left, f"the action list ended with work left over: {left}"
        return self.losses

    def _forward(self, op: Op) -> Iterator[None]:
        batch, key = self.batches[op.micro_batch], (op.stage, op.micro_batch)
        saved = self.saved.setdefault(key, []) if self.training else None
        values = self.inbox.pop(op).wait() if op.stage else (batch.tokens_BS,)
        for phase in self.executor.stages[op.stage]:
            if isinstance(phase, ComputePhase):
                with self.tracer.compute(op, phase.name):
                    values = phase.forward(saved, batch, *values)
                if self.executor.enqueues:
                    yield
            else:
                phase.settle(*values)
                values = yield from self._under_way(op, phase.name, partial(phase.forward, saved, batch, *values))
        (out,) = values
        if op.stage < self.mesh.num_stages - 1:
            self._hand_over("F", op, op.stage + 1, out)
        else:
            self.losses += out
            self.executor.losses[op.micro_batch] = out
            if self.training:
                weights = self.executor.loss_weights.to(out.dtype)
                self.inbox[Op("B", *key)] = Pending(work=None, finish=lambda: (weights,))

    def _backward(self, op: Op) -> Iterator[None]:
        key = (op.stage, op.micro_batch)
        self._confirm(Op("F", *key))
        grads, saved, store = self.inbox.pop(Op("B", *key)).wait(), self.saved.pop(key), self.executor.store
        waiting: Waiting = [] if op.kind == "B" else self.deferred.setdefault(key, [])
        for phase in reversed(self.executor.stages[op.stage]):
            if isinstance(phase, ComputePhase):
                with self.tracer.compute(op, phase.name):
                    if phase.recompute:
                        with self.tracer.recompute(op, phase.name):
                            phase.again(saved)
                    grads = phase.backward(saved, *grads)
                if len(store):  # no name for the closures here: it would keep what they hold after they have run
                    waiting.append((phase.name, store.take()))
                if self.executor.enqueues:
                    yield
            else:
                own = waiting if op.kind == "B" else ()
                grads = yield from self._under_way(op, phase.name, partial(phase.backward, saved, *grads), own)
        if op.stage:
            self._hand_over("B", op, op.stage - 1, grads[0])
        if op.kind == "B":
            self._run(op, waiting)

    def _under_way(self, op: Op, phase: str, send: Callable[[], Pending], own: Waiting = ()) -> Iterator[None]:
        """Yields after each leg of the exchange was issued, unless it is brief; returns what has arrived. `own`: weight gradients to run
        meanwhile."""
        while True:
            with self.tracer.pack(op, phase):
                arriving = send()
            arriving = self.tracer.issue(op, phase, arriving)
            if own:
                self._run(op, own)
            elif self.alone and arriving.work is not None:
                self._fill()
            if not arriving.brief:
                yield
            if arriving.onward is None:
                return arriving.wait()
            arriving.land()
            send = arriving.advance

    def _fill(self) -> None:
        """The oldest weight gradients that wait for their action run now: those of one phase."""
        for key, waiting in self.deferred.items():
            if waiting:
                return self._run(Op("W", *key), [waiting.pop(0)])

    def _weights(self, op: Op) -> Iterator[None]:
        self._run(op, self.deferred.pop((op.stage, op.micro_batch)))
        yield

    def _run(self, op: Op, waiting: Waiting) -> None:
        for phase, closures in waiting:
            with self.tracer.weights(op, phase):
                for closure in closures:
                    closure()
        waiting.clear()

    # ------------------------------------------------------------ between stages

    def _hand_over(self, kind: str, op: Op, stage: int, tensor: Tensor) -> None:
        direction = self.direction(op)
        if self.mesh.holder(stage, direction) == self.mesh.pp_rank:
            self.inbox[Op(kind, stage, op.micro_batch)] = Pending(work=None, finish=lambda: (tensor,))
        else:
            rank, group = self.mesh.flow(kind, op.stage, stage, direction)
            tensor = tensor.contiguous()
            work = self.tracer.link("send", op, self.executor.transport.isend(tensor, rank, group))
            self.sent[op] = work, tensor

    def _confirm(self, op: Op) -> None:
        """The other end has answered what `op` sent: that has been received."""
        if op in self.sent:
            self.sent.pop(op)[0].wait()

    def release(self) -> None:
        """Let go of what is known to have been sent; gloo tells only who waits."""
        self.sent = {op: sent for op, sent in self.sent.items() if not sent[0].is_completed()}

    def post_receives(self, action: Action) -> None:
        for op in action:
            kind, source = ("F", op.stage - 1) if op.kind == "F" else ("B", op.stage + 1)
            direction = self.direction(op)
            if op.kind == "W" or not 0 <= source < self.mesh.num_stages or self.mesh.holder(source, direction) == self.mesh.pp_rank:
                continue
            rank, group = self.mesh.flow(kind, op.stage, source, direction)
            buffer = self.executor.boundary(self.batches[op.micro_batch].num_tokens)
            work = self.tracer.link("recv", op, self.executor.transport.irecv(buffer, rank, group))
            self.inbox[Op(kind, op.stage, op.micro_batch)] = Pending(work=work, finish=lambda buffer=buffer: (buffer,))
