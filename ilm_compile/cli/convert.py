"""Rewrite the weights of an InternLM or InternLM2 in the names and layout of another format.

Formats: ilm (our own), hf-llama (transformers' LlamaForCausalLM), hf-internlm2 (InternLM2 on the
Hugging Face hub).
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ilm_compile import models
from ilm_compile.cli.files import read_tensors, write_tensors
from ilm_compile.cli.model import add_model_argument, load_model
from ilm_compile.errors import IlmCompileError

Rewrite = Callable[[Any, Mapping[str, Tensor]], Mapping[str, Tensor]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    add_model_argument(parser)
    parser.add_argument("input", type=Path, metavar="INPUT", help="safetensors file or folder")
    parser.add_argument("output", type=Path, metavar="OUTPUT", help="safetensors file")
    parser.add_argument("--from", dest="source", choices=FORMATS, required=True)
    parser.add_argument("--to", dest="target", choices=FORMATS, required=True)


def run(options: argparse.Namespace) -> None:
    """Read, rewrite into our own format and out of it, write."""
    if options.source == options.target:
        raise IlmCompileError(
            f"convert: --from and --to are both {options.source}, so there is nothing to do"
        )
    model = load_model(options.model)
    if not isinstance(model, models.InternLM | models.InternLM2):
        raise IlmCompileError(
            f"convert: expected an InternLM or InternLM2, got {type(model).__name__}"
        )
    (read, _), (_, write) = FORMATS[options.source], FORMATS[options.target]
    converted = write(model, read(model, read_tensors(options.input)))
    write_tensors(converted, options.output)
    print(f"wrote {len(converted)} tensors to {options.output}")


def _own(model: models.InternLM | models.InternLM2, tensors: Mapping[str, Tensor]) -> Any:
    """The tensors unchanged, if they are those of `model`."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    got = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in sorted(expected.keys() | got.keys()):
        if expected.get(name) != got.get(name):
            raise IlmCompileError(
                f"convert: {name}: expected {_shape(expected, name)}, got {_shape(got, name)}; "
                "are MODEL and --from those of the input?"
            )
    return tensors


def _shape(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    return f"shape {shapes[name]}" if name in shapes else "no such tensor"


# Of each format: how it is read into our own, and how it is written from our own.
FORMATS: dict[str, tuple[Rewrite, Rewrite]] = {
    "ilm": (_own, _own),
    "hf-llama": (models.from_hf_llama_state_dict, models.to_hf_llama_state_dict),
    "hf-internlm2": (models.from_hf_internlm2_state_dict, models.to_hf_internlm2_state_dict),
}
