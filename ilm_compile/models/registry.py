"""Models by name, for configs that say `model_type = "INTERNLM2"`."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

from ilm_compile.errors import IlmCompileError

BuilderT = TypeVar("BuilderT", bound=Callable[..., nn.Module])


class Registry:
    """Functions that build a model, by name. `what` names the kind of thing in error messages."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._builders: dict[str, Callable[..., nn.Module]] = {}

    def register_module(self, module_name: str) -> Callable[[BuilderT], BuilderT]:
        """A decorator that registers what it decorates, and returns it unchanged."""

        def register(builder: BuilderT) -> BuilderT:
            if module_name in self._builders:
                raise IlmCompileError(f"{self._what} {module_name!r} is registered already")
            self._builders[module_name] = builder
            return builder

        return register

    def names(self) -> list[str]:
        """Every registered name, sorted."""
        return sorted(self._builders)

    def has(self, module_name: str) -> bool:
        return module_name in self._builders

    def get_module(self, module_name: str) -> Callable[..., nn.Module]:
        if module_name not in self._builders:
            known = ", ".join(sorted(self._builders))
            raise IlmCompileError(f"unknown {self._what} {module_name!r}; known: {known}")
        return self._builders[module_name]


MODEL_INITIALIZER = Registry("model type")


def initialize_model(config: Mapping[str, Any]) -> nn.Module:
    """The model that a config asks for: `model_type` names it, `model` holds its fields."""
    missing = [key for key in ("model_type", "model") if key not in config]
    if missing:
        raise IlmCompileError(
            f"initialize_model: the config lacks {', '.join(missing)}; it has {', '.join(config)}"
        )
    return MODEL_INITIALIZER.get_module(config["model_type"])(**config["model"])
