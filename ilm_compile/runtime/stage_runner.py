"""One stage at work: forward and backward of single micro-batches.

A runner takes what the stage receives from its mailboxes, and puts what it sends into others; who
carries it is none of its business. Between the forward and the backward of a micro-batch it keeps
the received tensors and the autograd edges of the outputs, not the outputs themselves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ilm_compile.program.lowered import Stage
from ilm_compile.program.weight_parts import WeightParts
from ilm_compile.runtime.p2p import Mailbox


class StageRunner:
    """Runs `stage` on micro-batches. `sync` is its data-parallel gradient sync, if any.

    received, output_grads: what a forward and a backward need; sent, input_grads: their results.
    splits_backwards: a backward leaves to `weights` what it can of the weights' gradients.
    """

    def __init__(
        self, stage: Stage, num_microbatches: int, *, splits_backwards: bool = False
    ) -> None:
        self.stage = stage
        self.is_last = not stage.sent
        self.received = Mailbox(num_microbatches)
        self.sent = Mailbox(num_microbatches)
        self.input_grads = Mailbox(num_microbatches)
        self.output_grads = Mailbox(num_microbatches)
        self.losses: list[Tensor | None] = []
        self.outputs: list[tuple[Tensor, ...]] = []
        self._module = stage.module
        self._num_microbatches = num_microbatches
        self._splits_backwards = splits_backwards
        self._received_with_grad = [i for i, b in enumerate(stage.received) if b.requires_grad]
        self._sent_with_grad = [i for i, b in enumerate(stage.sent) if b.requires_grad]
        self._inputs: list[tuple[Tensor, ...]] = []
        self._leaves: list[list[Tensor]] = []
        self._edges: list[list[GradientEdge | None]] = []
        self._parts: list[WeightParts | None] = []

    def start(
        self,
        batch: Mapping[str, Sequence[Tensor]],
        *,
        loss_gradient: float,
        keep_outputs: bool,
    ) -> None:
        """Begin a step. batch: for each input the tensors of all micro-batches."""
        count = self._num_microbatches
        columns = [batch[name] for name in self.stage.batch_inputs]
        self._inputs = [tuple(column[m] for column in columns) for m in range(count)]
        self._leaves = [[] for _ in range(count)]
        self._edges = [[] for _ in range(count)]
        self._parts = [None] * count
        self._loss_gradient = loss_gradient
        self._keep_outputs = keep_outputs
        self.losses = [None] * count
        self.outputs = [() for _ in range(count)]
        for mailbox in (self.received, self.sent, self.input_grads, self.output_grads):
            mailbox.clear()

    def forward(self, microbatch: int) -> None:
        """Run the module, remembering what the backward needs."""
        received = self.received.take(microbatch)
        leaves = [received[i].requires_grad_() for i in self._received_with_grad]
        if self._splits_backwards:
            self._parts[microbatch] = parts = WeightParts()
            with parts.collect():
                outputs = self._run(microbatch, received)
        else:
            outputs = self._run(microbatch, received)
        self._leaves[microbatch] = leaves
        wanted = outputs[:1] if self.is_last else [outputs[i] for i in self._sent_with_grad]
        self._edges[microbatch] = [
            get_gradient_edge(output) if output.requires_grad else None for output in wanted
        ]

    def infer(self, microbatch: int) -> None:
        """Run the module without a backward to follow."""
        self._run(microbatch, self.received.take(microbatch))

    def backward(self, microbatch: int) -> None:
        """Find the gradients of the received tensors, and add to the parameters' gradients."""
        edges, self._edges[microbatch] = self._edges[microbatch], []
        leaves, self._leaves[microbatch] = self._leaves[microbatch], []
        if self.is_last:
            loss = self.losses[microbatch]
            assert loss is not None
            grads = [torch.full_like(loss, self._loss_gradient)]
        else:
            grads = self.output_grads.take(microbatch)
        pairs = [(edge, grad) for edge, grad in zip(edges, grads, strict=True) if edge is not None]
        if pairs:
            torch.autograd.backward([edge for edge, _ in pairs], [grad for _, grad in pairs])
        # The other side waits for a gradient even if the stage did not use the value.
        self.input_grads.tensors[microbatch] = [
            torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.contiguous()
            for leaf in leaves
        ]

    def weights(self, microbatch: int) -> None:
        """Add to the parameters' gradients what the backward has left for later, if anything."""
        parts, self._parts[microbatch] = self._parts[microbatch], None
        if parts is not None:
            parts.run()

    def _run(self, microbatch: int, received: list[Tensor]) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self._module(*self._inputs[microbatch], *received)
        self._inputs[microbatch] = ()
        if self.is_last:
            self.losses[microbatch] = outputs[0].detach()
            if self._keep_outputs:
                self.outputs[microbatch] = tuple(output.detach() for output in outputs[1:])
        else:
            self.sent.tensors[microbatch] = [output.detach().contiguous() for output in outputs]
        return outputs
