"""What a step costs, counted before it is run: FLOPs and memory of a rank by formula, and the peaks of chips."""

from lejepa_scale.cost.chips import Chip, chip, peak_flops
from lejepa_scale.cost.flops import StepFlops, step_flops
from lejepa_scale.cost.memory import StepMemory, step_memory
from lejepa_scale.cost.summary import describe

__all__ = ["Chip", "StepFlops", "StepMemory", "chip", "describe", "peak_flops", "step_flops", "step_memory"]
