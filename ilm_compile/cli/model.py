"""The MODEL argument: a preset's name, MODULE:FUNCTION, or a config file."""

import argparse
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ilm_compile.config import load_config
from ilm_compile.errors import IlmCompileError
from ilm_compile.models import presets
from ilm_compile.training.model import build_model


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add MODEL."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a preset such as internlm2_7b; MODULE:FUNCTION, a function without arguments that "
        "returns the model, in a module of the current folder or of the environment; or a config "
        "file, .toml or .py",
    )


def is_config(name: str) -> bool:
    """Whether MODEL is a config file."""
    return Path(name).suffix in (".toml", ".py")


def load_model(name: str) -> nn.Module:
    """The model that MODEL names, on the meta device: of any size, on any machine."""
    if is_config(name):
        return build_model(load_config(name))
    build = _imported(*name.split(":", 1)) if ":" in name else _preset(name)
    with torch.device("meta"):
        model = build()
    if not isinstance(model, nn.Module):
        raise IlmCompileError(
            f"{name}: expected a function that returns an nn.Module, it returned "
            f"{type(model).__name__}"
        )
    return model


def _preset(name: str) -> Callable[[], Any]:
    functions = inspect.getmembers(presets, inspect.isfunction)
    known = {key: f for key, f in functions if f.__module__ == presets.__name__}
    if name not in known:
        raise IlmCompileError(
            f"unknown model {name!r}: expected a config file, MODULE:FUNCTION or one of "
            f"{', '.join(known)}"
        )
    return known[name]


def _imported(module_name: str, function: str) -> Callable[[], Any]:
    # An installed command, unlike `python -m`, does not search the current folder.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise IlmCompileError(f"cannot import the module {module_name!r}: {error}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise IlmCompileError(f"the module {module_name!r} has no function {function!r}")
    build: Callable[[], Any] = found
    return build
