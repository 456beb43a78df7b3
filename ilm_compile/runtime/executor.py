"""Runs a schedule: exactly this rank's list of actions, which was checked before the launch.

The list is turned once into a list of functions without arguments; a step calls them in order.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from ilm_compile.kernels.attention_order import attention_order
from ilm_compile.program.lowered import Stage
from ilm_compile.runtime.data_parallel import GradientSync
from ilm_compile.runtime.guard.activity import ACTIVITY
from ilm_compile.runtime.mesh import Mesh
from ilm_compile.runtime.p2p import MAX_TENSORS, Channel, Message, ProcessGroupChannel
from ilm_compile.runtime.stage_runner import StageRunner
from ilm_compile.schedule import Action, Kind, Schedule, forward_only

Step = tuple[str, Callable[[], None]]


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step left on this rank: empty unless it holds the last stage.

    losses: of each micro-batch. outputs: the others of the last stage, if they were asked for.
    """

    losses: list[Tensor]
    outputs: list[tuple[Tensor, ...]]


class Executor:
    """Runs the stages of this rank.

    stages: all of the program, of which those that the schedule puts on this rank are used.
    syncs: the gradient sync of each stage that is sharded over dp, by stage index.
    channel: carries the messages between stages, torch.distributed's unless given.
    timeline: after a step with `record_timeline`, (action, start, end) in seconds; waiting for a
    message is an action of its own, "wait 1F0". annotate: name every action in the trace of a
    torch.profiler that is on, as in "2F0 stage 2 forward micro-batch 0".
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        schedule: Schedule,
        mesh: Mesh,
        syncs: Mapping[int, GradientSync] | None = None,
        channel: Channel | None = None,
    ) -> None:
        rank = mesh.pp.rank
        self.record_timeline = False
        self.annotate = False
        self.timeline: list[tuple[str, float, float]] = []
        self.channel: Channel = channel or ProcessGroupChannel(mesh.pp.group, mesh.device)
        self._syncs = syncs or {}
        self._runners = {
            stage.index: StageRunner(
                stage, schedule.num_microbatches, splits_backwards=schedule.splits(stage.index)
            )
            for stage in stages
            if schedule.stage_to_rank[stage.index] == rank
        }
        self._train = self._compile(schedule, rank)
        self._infer = self._compile(forward_only(schedule), rank, training=False)

    def run(
        self,
        batch: Mapping[str, Sequence[Tensor]],
        *,
        loss_gradient: float,
        forward_only: bool = False,
        keep_outputs: bool = False,
    ) -> StepResult:
        """Run one step. batch: for each input of this rank's stages a tensor per micro-batch.

        loss_gradient: what the backward of each micro-batch starts from.
        """
        for runner in self._runners.values():
            runner.start(batch, loss_gradient=loss_gradient, keep_outputs=keep_outputs)
        steps = self._infer if forward_only else self._train
        order = attention_order(self.channel.device)
        with torch.set_grad_enabled(not forward_only), order:
            if self.annotate:
                steps = [(text, _named(text, step)) for text, step in steps]
            if self.record_timeline:
                self._run_timed(steps)
            else:
                for text, step in steps:
                    ACTIVITY.do(text)
                    step()
            ACTIVITY.do("wait for sends")
            self.channel.finish()
        last = [runner for runner in self._runners.values() if runner.is_last]
        return StepResult(
            losses=[loss for runner in last for loss in runner.losses if loss is not None],
            outputs=[output for runner in last for output in runner.outputs if output],
        )

    def _run_timed(self, steps: list[Step]) -> None:
        self.timeline = []
        for text, step in steps:
            ACTIVITY.do(text)
            start = time.perf_counter()
            step()
            if self.channel.device.type == "cuda":
                torch.cuda.synchronize(self.channel.device)
            self.timeline.append((text, start, time.perf_counter()))

    def _compile(self, schedule: Schedule, rank: int, *, training: bool = True) -> list[Step]:
        """The functions that run this rank's row of `schedule`."""
        row = schedule.actions[rank] if schedule.actions else ()
        # Of a stage, after which its gradients are complete, or during which they can be reduced.
        last = {a.stage: a for a in row if a.kind in (Kind.B, Kind.W)}
        steps: list[Step] = []
        if training:
            steps += [(f"defer {stage}", sync.defer) for stage, sync in self._syncs.items()]
        for is_compute, group in groupby(row, key=lambda action: action.is_compute):
            actions = list(group)
            if not is_compute:
                messages = [self._message(action, schedule) for action in actions]
                steps.append((" ".join(map(str, actions)), self.channel.transfer(messages)))
                continue
            for action in actions:
                computes = self._compute(action, schedule, training=training)
                sync = self._syncs.get(action.stage)
                if sync is None or action != last.get(action.stage):
                    steps += computes
                elif action.kind is Kind.B:
                    steps += [(f"sync {action.stage}", sync.resume), *computes]
                else:
                    steps += [*computes, (f"sync {action.stage}", sync.reduce)]
        # In training it is what no gradient flows through that is still whole.
        steps += [(f"release {stage}", sync.release) for stage, sync in self._syncs.items()]
        return steps

    def _compute(self, action: Action, schedule: Schedule, *, training: bool) -> list[Step]:
        """Wait for what `action` needs, run it, hand its result to a neighbour on this rank."""
        runner = self._runners[action.stage]
        functions = {
            Kind.F: runner.forward if training else runner.infer,
            Kind.B: runner.backward,
            Kind.W: runner.weights,
        }
        steps: list[Step] = []
        if schedule.receives(action):
            mailbox = runner.received if action.kind is Kind.F else runner.output_grads
            steps.append((f"wait {action}", partial(mailbox.wait, action.microbatch)))
        steps.append((str(action), partial(functions[action.kind], action.microbatch)))
        to = {Kind.F: +1, Kind.B: -1}
        neighbour = self._runners.get(action.stage + to[action.kind]) if action.kind in to else None
        if neighbour is not None and not schedule.sends(action):
            hand = partial(_hand_over, runner, neighbour, action)
            steps.append((f"hand over {action}", hand))
        return steps

    def _message(self, action: Action, schedule: Schedule) -> Message:
        runner = self._runners[action.stage]
        stage = runner.stage
        with_grad = tuple(b for b in stage.received if b.requires_grad)
        grads_back = tuple(b for b in stage.sent if b.requires_grad)
        mailbox, boundaries = {
            Kind.RECV_F: (runner.received, stage.received),
            Kind.SEND_F: (runner.sent, stage.sent),
            Kind.RECV_B: (runner.output_grads, grads_back),
            Kind.SEND_B: (runner.input_grads, with_grad),
        }[action.kind]
        return Message(
            mailbox=mailbox,
            microbatch=action.microbatch,
            peer=schedule.peer(action),
            tag=_tag(action, schedule.num_microbatches),
            boundaries=boundaries,
            is_send=action.is_send,
        )


def _named(text: str, step: Callable[[], None]) -> Callable[[], None]:
    """`step` under a name that a person can read in a profiler's trace."""
    name = re.sub(r"^(\d+)([FBW])(\d+)$", _spell_out, text)

    def run() -> None:
        with torch.profiler.record_function(name):
            step()

    return run


def _spell_out(action: re.Match[str]) -> str:
    stage, kind, microbatch = action.groups()
    word = {"F": "forward", "B": "backward", "W": "weights"}[kind]
    return f"{action[0]} stage {stage} {word} micro-batch {microbatch}"


def _hand_over(source: StageRunner, target: StageRunner, action: Action) -> None:
    m = action.microbatch
    if action.kind is Kind.F:
        target.received.tensors[m] = [tensor.detach() for tensor in source.sent.take(m)]
    else:
        target.output_grads.tensors[m] = source.input_grads.take(m)


def _tag(action: Action, num_microbatches: int) -> int:
    """The same number for a send and its receive, and for no other pair of the step.

    gloo matches messages by tag, so a schedule that went wrong stops instead of mixing tensors up.
    """
    send = action if action.is_send else action.partner
    slot = 2 * send.stage + (send.kind is Kind.SEND_B)
    return (slot * num_microbatches + send.microbatch) * MAX_TENSORS
