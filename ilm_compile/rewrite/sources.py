"""The code of each stage as a file, to be read, set breakpoints in and run.

A stage is run from code that torch.fx generates in memory. `save_sources` writes that very code to
``stage_0.py``, ``stage_1.py``, ..., one function per region and one for the stage, with the module
path and the user's line in comments. ``install(module)`` of such a file makes the live modules of
that stage run the file's functions, with the tensors they hold:

    import stage_0                            # from the folder
    stage_0.install(lowered.stages[0].module)
    breakpoint()                              # now `step` goes through stage_0.py line by line

Ops that create a tensor are bound to a GPU when a stage is filled with its weights, so for a run on
GPUs save the stages afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import fx

from ilm_compile.program.lowered import LoweredProgram, Stage
from ilm_compile.program.program import Source

_ASSIGNMENT = re.compile(r"(\s+)(\w+) = ")
_INSTALL = '''

def install(module):
    """Make `module`, the live module of this stage, run the functions of this file."""
    for path, function in FORWARDS.items():
        part = module.get_submodule(path)
        part.forward = types.MethodType(function, part)
'''


def save_sources(lowered: LoweredProgram, folder: str | Path) -> list[Path]:
    """Write one Python file per stage into `folder`, made if needed, and return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"stage_{stage.index}.py" for stage in lowered.stages]
    for path, stage in zip(paths, lowered.stages, strict=True):
        path.write_text(_source(stage, len(lowered.stages)))
    return paths


def _source(stage: Stage, num_stages: int) -> str:
    """Return the text of one file."""
    graphs = {p: m for p, m in stage.module.named_modules() if isinstance(m, fx.GraphModule)}
    graphs[""] = graphs.pop("")  # the stage calls its regions: it comes last
    names = {path: _function_name(path) for path in graphs}
    names_used: dict[str, Any] = {}
    functions = []
    for path, module in graphs.items():
        code = module.graph.python_code("self")
        text = code.src.strip().replace("def forward(", f"def {names[path]}(", 1)
        functions.append("\n".join(_with_comments(text, module.graph)))
        names_used |= {n: v for n, v in code.globals.items() if re.search(rf"\b{n}\b", text)}
    table = "".join(f'    "{path}": {name},\n' for path, name in names.items())
    what = f"takes {', '.join((*stage.batch_inputs, *(b.name for b in stage.received)))}; "
    what += f"returns {', '.join(stage.outputs or (b.name for b in stage.sent))}"
    return (
        f'"""Stage {stage.index} of {num_stages}, generated: {what}."""\n\n'
        + "\n".join(["import types", *sorted(_imports(names_used))])
        + "".join(f"\n\n\n{function}" for function in functions)
        + "\n\n\n# The module of the stage that each function is the forward of.\n"
        + f"FORWARDS = {{\n{table}}}\n"
        + _INSTALL
    )


def _function_name(path: str) -> str:
    return path.removesuffix(".body").replace(".", "_") or "stage"


def _with_comments(text: str, graph: fx.Graph) -> Iterator[str]:
    """Yield the lines of a function, with a comment wherever the user's module or line changes."""
    nodes = {node.name: node for node in graph.nodes}
    last = None
    for line in text.splitlines():
        match = _ASSIGNMENT.match(line)
        node = nodes.get(match[2]) if match else None
        source: Source | None = node.meta.get("source") if node is not None else None
        if match and source is not None and source != last:
            yield f"{match[1]}# {source}"
            last = source
        yield line


def _imports(names: dict[str, Any]) -> Iterator[str]:
    """Yield the statements that give each name its value."""
    for name, value in names.items():
        if isinstance(value, ModuleType):
            yield f"import {value.__name__}" + (f" as {name}" if name != value.__name__ else "")
        elif isinstance(value, float):
            yield f'{name} = float("{value}")'
        elif value is type(None):
            yield f"{name} = type(None)"
        else:
            yield f"from {value.__module__} import {value.__qualname__} as {name}"
