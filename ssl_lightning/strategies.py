"""Sharding of parameters, gradients and optimizer state among processes."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from ssl_lightning.backbones.tokens import blocks_in
from ssl_lightning.checkpoints import reading
from ssl_lightning.distributed import sharded_like
from ssl_lightning.errors import UserError


class FSDP2Strategy(ModelParallelStrategy):
    """Torch's fully sharded data parallelism: each process holds a part of parameters, gradients and optimizer state.

    ``trainer.strategy: fsdp2``. The blocks of a ViT are gathered one by one as they compute, everything else for the
    step. A checkpoint is a single file, as with other strategies, so any strategy can resume
    the run of another.

    Own class because Lightning's ``ModelParallelStrategy`` shards nothing by itself, leaves ``sync_batchnorm`` and
    the extra state of modules out, and numbers the optimizer's state as no other strategy does; its ``FSDPStrategy``
    needs GPUs and flattens parameters, but weight decay, LARS and DINO's clipping need them separately.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Divide the data, not the layers, among the processes."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: L.Trainer) -> None:
        """Shard the method before its optimizer is built.

        Raises:
            UserError: The method or the precision cannot be sharded, or torch is too old.
        """
        if not hasattr(FSDPModule, "set_reshard_after_forward"):
            raise UserError(f"fsdp2 needs torch 2.8, and this is {torch.__version__}; set --trainer.strategy to ddp.")
        module = self.lightning_module
        assert module is not None
        if not getattr(module, "shardable", True):
            raise UserError(
                f"{type(module).__name__} sets or uses weights outside its step; set --trainer.strategy to ddp."
            )
        if self.precision_plugin.precision not in ("32-true", "bf16-mixed"):
            raise UserError("fsdp2 trains in 32-true and bf16-mixed only; set --trainer.precision to either.")
        loops = trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop, trainer.predict_loop
        for loop in loops:
            loop.inference_mode = False  # what is gathered in inference mode cannot be trained
        if not isinstance(module, FSDPModule):
            module.to(self.root_device, memory_format=torch.contiguous_format)  # all that torch shards
            if self._layer_sync is not None:
                self._layer_sync.apply(module)
            mesh = self.device_mesh["data_parallel"]
            for block in blocks_in(module):
                fully_shard(block, mesh=mesh)
            fully_shard(module, mesh=mesh)
            register_fsdp_forward_method(module, "training_step")
        super().setup(trainer)

    # Evaluation: processes may have different numbers of batches, so no batch may wait for another process

    def on_validation_start(self) -> None:
        """Gather the parts that evaluation uses."""
        for part in self._evaluated:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()

    def on_validation_end(self) -> None:
        """Shard them again."""
        for part in self._evaluated:
            part.set_reshard_after_forward(part is not self.lightning_module, recurse=False)
            part.reshard()

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    @property
    def _evaluated(self) -> list[FSDPModule]:
        module: Any = self.lightning_module
        parts = [module, *getattr(module, "evaluated_backbone", module).modules()]
        return [part for part in dict.fromkeys(parts) if isinstance(part, FSDPModule)]

    # Checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole state, on the first process."""
        assert self.lightning_module is not None
        return self._whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The whole state of an optimizer, on the first process.

        Args:
            optimizer: One of the strategy's.
        """
        return self._whole(
            (optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer).state_dict()
        )

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        def gathered(tensor: DTensor) -> Tensor | None:
            whole = tensor.full_tensor()  # on every process: they gather together
            return whole.cpu() if self.is_global_zero else None

        return tree_map_only(DTensor, gathered, state)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint on every process; the file is mapped, not copied.

        Args:
            checkpoint_path: The file.
            weights_only: As for ``torch.load``.
        """
        path = Path(self.broadcast(checkpoint_path))
        with reading(path):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning calls ``load_optimizer_state_dict``."""
        return True

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Restore this process's part of the module.

        Args:
            checkpoint: The whole.
            strict: Whether the names must agree.
        """
        assert self.lightning_module is not None
        shards = self.lightning_module.state_dict()
        state = {name: sharded_like(shards.get(name), value) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Restore this process's part of the optimizers' state.

        Args:
            checkpoint: The whole.
        """
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            params = [param for group in optimizer.param_groups for param in group["params"]]
            parts = {
                number: {name: sharded_like(params[number], value) for name, value in values.items()}
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": parts})


StrategyRegistry.register("fsdp2", FSDP2Strategy, description="Torch's fully sharded data parallelism (FSDP2)")
