"""Whole replicas in fp32: one process (`single`), or one per rank with averaged gradients (`ddp`)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lejepa_scale.config import BatchPlan, Config
from lejepa_scale.engine.base import Factory
from lejepa_scale.engine.torch_engine import TorchEngine
from lejepa_scale.engine.wrap import materialize, prepare_blocks, without_weights
from lejepa_scale.model import Replay
from lejepa_scale.parallel.process_group import world_size


class ReplicaEngine(TorchEngine):
    """fp32 throughout. In bf16 replicas are FSDP's, which has the casts, sums and masters that DDP lacks."""

    def __init__(self, factory: Factory, config: Config, plan: BatchPlan, device: torch.device) -> None:
        module = without_weights(factory)
        prepare_blocks(module, config)
        materialize(module, device)
        super().__init__(module, config, device, copies=world_size() > 1)
        self.accumulation, self.done = plan.accumulation, 0
        self.ddp: DistributedDataParallel | None = None
        if world_size() > 1:
            with warnings.catch_warnings():  # torch 2.13 has another name for it, which 2.11 does not know
                warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
                self.ddp = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)

    def forward(
        self, views: Sequence[Tensor], step: int | None, replay: Replay | None = None, lambda_: float | None = None
    ) -> dict[str, Tensor]:
        if self.ddp is not None:  # DDP decides in the forward pass whether the next backward reduces
            self.ddp.require_backward_grad_sync = self.done == self.accumulation - 1
        return (self.ddp or self.module)(views, step, replay, lambda_)

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        with (
            warnings.catch_warnings()
        ):  # of 1 x 1 convolutions, whose strides differ along sides of 1 alone: the same memory
            warnings.filterwarnings("ignore", message=".*Grad strides do not match bucket view strides")
            loss.backward()
        self.done = 0 if last_micro_batch else self.done + 1

    def close(self) -> None:
        self.ddp = None  # whose reducer holds the group, and would destroy it in its own destructor
        super().close()
