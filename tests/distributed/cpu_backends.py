"""FSDP2 and DeepSpeed among CPU processes, for tests only: Accelerate does not offer them there."""

import functools
import os


def enable_fsdp():
    """Let Accelerate treat gloo processes that ask for FSDP as such; by itself it takes DDP without a word."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    @functools.wraps(original)
    def initialise(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = initialise


def enable_deepspeed():
    """Let DeepSpeed work without a compiler, and with gloo before ZeRO-3 builds a model."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}
    deepspeed.init_distributed("gloo")
