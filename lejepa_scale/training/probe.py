"""Online linear probe: a classifier trained beside the run on detached features. Gives nothing back to the encoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lejepa_scale.engine.optim import leave_out
from lejepa_scale.parallel.collectives import all_reduce_sum
from lejepa_scale.parallel.process_group import world_size


class OnlineProbe:
    """Standardize, then one linear layer, replicated on every rank with averaged gradients; AdamW at a fixed rate."""

    def __init__(self, width: int, num_classes: int, lr: float, seed: int, device: torch.device) -> None:
        torch.manual_seed(seed)
        self.head = nn.Sequential(nn.LayerNorm(width, elementwise_affine=False), nn.Linear(width, num_classes)).to(
            device
        )
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=lr, weight_decay=1e-4, fused=True)

    def step(
        self, features: Float[Tensor, "b e"], labels: Int[Tensor, " b"], finite: Bool[Tensor, ""]
    ) -> Float[Tensor, "2"]:
        """One update; hits and images of this batch *before* it (so of images not yet seen by the probe), global. Nothing is
        learned and counted where the features are of a step that is not `finite`: decided on the device."""
        logits = self.head(features.float())
        F.cross_entropy(logits, labels).backward()
        for parameter in self.head.parameters():
            assert parameter.grad is not None
            parameter.grad = all_reduce_sum(parameter.grad) / world_size()
        leave_out(self.optimizer, ~finite)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        hits = (logits.argmax(1) == labels).sum()
        return all_reduce_sum(torch.stack([hits, torch.full_like(hits, len(labels))]).double() * finite)

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors, for safetensors."""
        out = {
            f"head.{name}": t.detach().to("cpu", copy=True).contiguous() for name, t in self.head.state_dict().items()
        }
        for i, state in self.optimizer.state_dict()["state"].items():
            out |= {f"optimizer.{i}.{key}": t.detach().to("cpu", copy=True).contiguous() for key, t in state.items()}
        return out

    def load_state_dict(self, flat: dict[str, Tensor]) -> None:
        self.head.load_state_dict({k.removeprefix("head."): t for k, t in flat.items() if k.startswith("head.")})
        state: dict[int, dict[str, Tensor]] = {}
        for key, tensor in flat.items():
            if key.startswith("optimizer."):
                _, i, name = key.split(".", 2)
                state.setdefault(int(i), {})[name] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
