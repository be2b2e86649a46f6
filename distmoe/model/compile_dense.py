"""torch.compile of what needs no other rank: attention, norms, dense MLPs and the loss.

A layer's routing and exchange stay as they are: they wait for sizes, hold messages in flight and
replay decisions, none of which a graph can do. So does attention whose keys are gathered from the
ranks of a cp axis.

Compiled are functions inside of what is checkpointed and sharded: a recomputation runs the same
graph again, FSDP's hooks on the blocks around it see nothing of it, and names of parameters do not
change. All blocks share the graphs, since a graph belongs to the code and takes weights as inputs.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.utils._triton import has_triton

from distmoe.config import ConfigError
from distmoe.model.block import Block
from distmoe.model.transformer import Transformer
from distmoe.moe.mlp import SwiGluMlp


def compile_dense(model: Transformer, device: torch.device) -> None:
    """Compile the dense parts of ``model`` when they first run; before it is sharded. ConfigError
    if there is no compiler for ``device``."""
    _check_compiler(device)
    for block in model.blocks:
        if isinstance(block, Block):
            _compile_block(block)
    _compile(model.final_norm, "forward")
    _compile(model.head, "chunk_loss")


def _compile_block(block: Block) -> None:
    if block.gather.part.size == 1:
        _compile(block, "attend")
    if isinstance(block.mlp, SwiGluMlp):
        _compile(block, "dense")
        return
    _compile(block.mlp_norm, "forward")
    if block.mlp.shared is not None:
        _compile(block.mlp.shared, "forward")


def _compile(module: nn.Module, method: str) -> None:
    # A graph for every shape: of two that fit, a recomputation may take the other one, which saves
    # other tensors (pytorch issue 166926). The shapes of a run are few.
    compiled = torch.compile(getattr(module, method), fullgraph=True, dynamic=False)
    setattr(module, method, compiled)


def _check_compiler(device: torch.device) -> None:
    if device.type == "cpu":
        # Importing it costs a second.
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ConfigError(
                "train.compile is dense; it must be none on a CPU without a C++ compiler, such as "
                "g++ or the one that CXX names"
            ) from error
    elif not has_triton():
        raise ConfigError("train.compile is dense; it must be none on a GPU without triton")
