"""ZeRO stages 1 to 3 with DeepSpeed, which is imported here (and in the ZeRO conversion) alone."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lejepa_scale.config import BatchPlan, Config
from lejepa_scale.engine.base import VALUE, Engine, Factory, Shard, Update, full_shape
from lejepa_scale.engine.extensions import release_stale_locks
from lejepa_scale.engine.optim import adamw, moments, set_hyperparameters
from lejepa_scale.engine.wrap import prepare_blocks, sharding_units, without_weights
from lejepa_scale.errors import UserError
from lejepa_scale.model import LeJEPA, Replay
from lejepa_scale.model.packed import PackedBlock
from lejepa_scale.parallel import launch
from lejepa_scale.parallel.process_group import rank

_MINIMUM = (0, 19, 5)


def deepspeed_config(config: Config, plan: BatchPlan, module: LeJEPA) -> dict[str, Any]:
    """The DeepSpeed dictionary of a run, with the defaults that changed between releases written out.

    module: on the meta device. Its blocks are what stage 3 gathers and releases as one, `engine.prefetch` of them ahead:
    DeepSpeed fetches a bucket more at every call of any submodule, so that only the limit on live parameters holds it back.
    """
    sizes = [p.numel() for p in module.parameters()]
    blocks = [sum(p.numel() for p in unit.parameters()) for unit in sharding_units(module)]
    unit = max(blocks, default=sum(sizes))
    persistent = min(100_000, unit // 100)  # parameters up to this size stay on every rank: vectors
    bucket = min(200_000_000, 2 * unit)  # elements reduced or gathered at once, in memory of their own
    live = sum(sizes) - sum(blocks) + sum(size for size in sizes if size < persistent)
    stage = int(config.engine.name.removeprefix("zero"))
    host = {"device": "cpu", "pin_memory": torch.cuda.is_available()} if config.engine.cpu_offload else None
    return {
        "train_batch_size": plan.micro_batch * plan.ranks * plan.accumulation,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.accumulation,
        "gradient_clipping": config.optim.clip_norm or 0.0,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": config.engine.precision == "bf16", "check_grad_overflow": True},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage,
            "reduce_scatter": True,
            "contiguous_gradients": True,
            "overlap_comm": torch.cuda.is_available(),
            "round_robin_gradients": False,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "sub_group_size": 100_000_000,  # updated at once: bounds the optimizer's transient memory
            "stage3_prefetch_bucket_size": config.engine.prefetch * unit,
            "stage3_param_persistence_threshold": persistent,
            "stage3_max_live_parameters": live + (1 + config.engine.prefetch) * unit,
            "stage3_max_reuse_distance": 0,  # a block is released after its forward pass, whatever the model's size
            "offload_optimizer": host,
            "offload_param": host if stage == 3 else None,
        },
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
        "dump_state": False,
    }


class ZeROEngine(Engine):
    """Parameters are held in the compute precision, with fp32 masters and moments partitioned by DeepSpeed."""

    def __init__(
        self, factory: Factory, config: Config, plan: BatchPlan, device: torch.device, shapes: LeJEPA | None = None
    ) -> None:
        if launch.local_rank() == 0:
            release_stale_locks()
        deepspeed = _import()
        if shapes is None:
            with torch.device("meta"):
                shapes = factory()
        settings = deepspeed_config(config, plan, shapes)
        self.device, self.stage = device, settings["zero_optimization"]["stage"]
        # Kernels for inference on CPUs, which nothing here calls: half a minute to build at the first start and whenever
        # another environment has built them since, under a lock that a killed process leaves behind.
        getattr(deepspeed.ops, "__compatible_ops__", {})["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=False)
        self.module = _partitioned(factory, settings) if self.stage == 3 else factory()
        prepare_blocks(self.module, config)
        if self.module.encoder.packed:
            deepspeed.utils.set_z3_leaf_modules(self.module, [PackedBlock])
        parameter: Any
        for parameter in self.module.parameters():  # NaN: a weight nobody loads shows at the first step
            parameter.data = parameter.data.contiguous().fill_(torch.nan)
            if self.stage == 3:
                parameter.ds_tensor.fill_(torch.nan)
        optimizer, self.moments = adamw(self.module, config.optim), moments(self.module, config.optim)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module, optimizer=optimizer, config=settings, dist_init_required=False
        )
        exact = dict(without_weights(factory).named_buffers())
        # DeepSpeed casts them, running statistics too, and computes them in bf16 under zero.Init.
        for name, buffer in self.module.named_buffers():
            own = exact[name]  # on the meta device where timm has a parameter that it does not train
            buffer.data = torch.full_like(own, torch.nan, device=device) if own.is_meta else own.to(device)
        self.optimizer.check_grad_overflow = True  # DeepSpeed sets this for 16-bit runs alone
        if self.stage < 3:
            self._create_moments()
        else:
            self._refuse_squares_that_overflow()
        self.parameters = dict(self.module.named_parameters())

    def forward(
        self, views: Sequence[Tensor], step: int | None, replay: Replay | None = None, lambda_: float | None = None
    ) -> dict[str, Tensor]:
        dtype = self.engine.get_data_types()[0]
        return self.engine([view.to(dtype) for view in views], step, replay, lambda_)

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last_micro_batch)
        self.engine.backward(loss, scale_wrt_gas=False)
        if not last_micro_batch:
            self.engine.step()  # counts the micro-batch; updates nothing

    def step(self, lr: float, weight_decay: float) -> Update:
        set_hyperparameters(self.optimizer, lr, weight_decay)
        self.engine.step()
        norm = torch.nan if self.optimizer.overflow else self.engine.get_global_grad_norm()
        norm = torch.as_tensor(norm, dtype=torch.float32, device=self.device)
        return Update(norm, torch.isfinite(norm))

    def shards(self) -> Iterator[Shard]:
        updated = self.updates() > 0
        for name, parameter in self.parameters.items():
            for kind in (VALUE, *(self.moments[name] if updated else ())):
                start, data = self._part(parameter, kind)
                yield Shard(name, kind, full_shape(parameter), start, data)

    def _part(self, parameter: Any, kind: str) -> tuple[int, Tensor]:
        """Where this rank's elements of a master or a moment begin in the whole, and they themselves, without padding."""
        key = None if kind == VALUE else kind
        if self.stage == 3:  # cut evenly over ranks, the last part padded
            held = self.optimizer.get_local_fp32_param(parameter, key)
            start = min(parameter.ds_numel, rank() * held.numel())
            return start, held[: parameter.ds_numel - start]
        mapping = parameter._hp_mapping  # groups are cut, not parameters: a rank may have no part
        if mapping is None:
            return 0, torch.empty(0, device=self.device)
        return mapping.lp_fragment_address.start, mapping.get_hp_fragment(key)

    @torch.no_grad()
    def take(self, shard: Shard) -> None:
        parameter: Any = self.parameters[shard.name]
        if self.stage < 3:
            self._part(parameter, shard.kind)[1].copy_(shard.data)
            return
        padded = torch.zeros(parameter.ds_tensor.ds_numel, device=shard.data.device)
        padded[: len(shard.data)] = shard.data
        self.optimizer.set_local_hp_param(padded, parameter, None if shard.kind == VALUE else shard.kind)

    @torch.no_grad()
    def settle(self) -> None:
        """Parameters in the compute precision follow their masters."""
        if self.stage < 3:
            self.optimizer.update_lp_params()
            return
        parameter: Any
        for parameter in self.parameters.values():
            parameter.ds_tensor.copy_(self.optimizer.get_local_fp32_param(parameter))
        # the small ones, which stay on every rank: the next forward pass fetches them, as DeepSpeed's own trace expects
        if whole := self.optimizer.persistent_parameters:
            whole[0].partition(whole)

    def _refuse_squares_that_overflow(self) -> None:
        """Stage 3 takes norms in double, and would take a step that makes second moments infinite for good. The other stages
        and torch's engines skip it."""
        norms = self.optimizer._get_norm_groups
        invalid = -1.0  # DeepSpeed's own word for it
        self.optimizer._get_norm_groups = lambda: [
            torch.where(norm.square() > torch.finfo(torch.float32).max, invalid, norm) for norm in norms()
        ]

    def _create_moments(self) -> None:
        """For stages 1 and 2 before DeepSpeed would, which links moments to parameters after the first group's first
        update, when the other groups have none yet; for stage 3 where a checkpoint has some, else its first update does."""
        states = self.optimizer.optimizer.state
        for flat in self._masters():
            states[flat] = {
                "step": torch.tensor(0.0, device=flat.device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        if self.stage < 3:
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def prepare_moments(self, updates: int) -> None:
        if self.stage == 3:
            self._create_moments()
        for flat in self._masters():
            self.optimizer.optimizer.state[flat]["step"].fill_(updates)

    def updates(self) -> int:
        states = self.optimizer.optimizer.state
        return max((int(states[flat]["step"]) for flat in self._masters() if flat in states), default=0)

    def close(self) -> None:
        self.engine.destroy()
        del self.engine, self.optimizer, self.parameters, self.module

    def _masters(self) -> list[Tensor]:
        """This rank's flat fp32 partitions, the tensors that the inner optimizer updates."""
        if self.stage == 3:
            return self.optimizer.fp32_partitioned_groups_flat
        return [flat for group in self.optimizer.optimizer.param_groups for flat in group["params"]]


def _partitioned(factory: Factory, settings: dict[str, Any]) -> LeJEPA:
    """Each submodule is partitioned as soon as it is built or, where a constructor computes with its weights (hybrids of
    timm), when the module is whole."""
    import deepspeed

    try:
        with deepspeed.zero.Init(config_dict_or_path=settings):
            return factory()
    except UserError:  # what is wrong for another reason fails again
        module = factory()
        deepspeed.zero.Init(module=module, config_dict_or_path=settings)
        return module


def _import() -> Any:
    try:
        import deepspeed
    except ImportError as error:
        raise UserError("engine.name=zero* needs DeepSpeed: pip install 'lejepa_scale[zero]'.") from error
    version = tuple(int(part) for part in deepspeed.__version__.split("+")[0].split(".")[:3])
    if version < _MINIMUM:
        raise UserError(f"engine.name=zero* needs deepspeed >= 0.19.5; this is {deepspeed.__version__}.")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
