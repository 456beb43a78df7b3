"""The tensors of a module by their paths, such as ``layers.0.norm.weight``."""

from __future__ import annotations

from operator import attrgetter

from torch import Tensor, nn


def tensor_at(root: nn.Module, path: str) -> Tensor:
    """Return the tensor at `path`. Raises `AttributeError` if there is none."""
    found: Tensor = attrgetter(path)(root)
    return found


def put_tensor(root: nn.Module, path: str, tensor: Tensor, *, persistent: bool = False) -> None:
    """Put `tensor`, a parameter or a buffer, at `path`, making the modules on the way."""
    *owners, leaf = path.split(".")
    for name in owners:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    if isinstance(tensor, nn.Parameter):
        root.register_parameter(leaf, tensor)
    else:
        root.register_buffer(leaf, tensor, persistent=persistent)
