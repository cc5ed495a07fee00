"""Measures the memory that a computation keeps for its backward pass."""

import weakref

import torch


def kept_bytes(run):
    """Bytes that the graph of `run()` holds for its backward pass when that is done, parameters included."""
    kept = []

    def pack(tensor):
        tensor = tensor.detach()
        kept.append(weakref.ref(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    alive = [tensor for reference in kept if (tensor := reference()) is not None]
    del result
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in alive}.values())
