"""CUDA graphs without a GPU: a stand-in for PyTorch's recorder computes at every call, but keeps its inputs, outputs and gradients in
the same memory from call to call, as a recorded graph does."""

import pytest
import torch
from torch.utils import _pytree as pytree


class Recorder:
    """Stands for ``torch.cuda.make_graphed_callables``."""

    def __init__(self):
        self.recorded, self.replayed, self.options = [], [], []

    def make(self, module, sample_args, allow_unused_input, pool, capture_error_mode="global"):
        assert not (torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled()), "PyTorch refuses this"
        shape = tuple(sample_args[0].shape)
        self.recorded.append(shape)
        self.options.append((pool, capture_error_mode))
        parameters = [each for each in module.parameters() if each.requires_grad]
        inputs = [each.clone() for each in sample_args]
        outputs, spec = pytree.tree_flatten(module(*inputs))
        outputs = [each.detach().clone() for each in outputs]
        gradients = [torch.zeros_like(each) for each in parameters]
        recorder = self

        class Graphed(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *arguments):
                recorder.replayed.append(shape)
                for mine, given in zip(inputs, arguments, strict=False):
                    mine.copy_(given)
                with torch.enable_grad():
                    ctx.computed, _ = pytree.tree_flatten(module(*inputs))
                for mine, computed in zip(outputs, ctx.computed, strict=True):
                    mine.copy_(computed.detach())
                return tuple(each.detach() for each in outputs)

            @staticmethod
            @torch.autograd.function.once_differentiable
            def backward(ctx, *grads):
                found = torch.autograd.grad(ctx.computed, parameters, grads)
                for mine, computed in zip(gradients, found, strict=True):
                    mine.copy_(computed)
                return (*[None] * len(inputs), *(each.detach() for each in gradients))

        def graphed(*arguments):
            return pytree.tree_unflatten(Graphed.apply(*arguments, *parameters), spec)

        return graphed


def record_with_stand_in(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Let PyTorch record with the stand-in until the end of the test."""
    recorder = Recorder()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorder.make)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    return recorder
