"""What every model of this package offers beside `forward`: initial values and example inputs."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ilm_compile.errors import IlmCompileError
from ilm_compile.models.config import ModelConfig
from ilm_compile.models.init import InitTable, initial_value, initialize_

InputSpec = dict[str, tuple[tuple[int, ...], torch.dtype]]


class CausalLM(nn.Module):
    """Base of InternLM and InternLM2. `init_table` maps parameter kinds to their distribution."""

    init_table: ClassVar[InitTable]

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config

    def initial_parameter(
        self, name: str, *, rows: tuple[int, int] | None = None, seed: int | None = None
    ) -> Tensor:
        """Initial value of the parameter `name`, or of its rows [start, stop): float32 on CPU.

        Depends on the seed (the config's when None) and the name only. Works on a meta model.
        """
        shapes = {key: tuple(value.shape) for key, value in self.named_parameters()}
        if name not in shapes:
            raise IlmCompileError(
                f"{type(self).__name__} has no parameter {name!r}; it has {', '.join(shapes)}"
            )
        seed = self.config.seed if seed is None else seed
        return initial_value(name, shapes[name], self.init_table, self.config, rows=rows, seed=seed)

    def example_inputs(
        self,
        batch: int = 1,
        seq: int | None = None,
        *,
        packed: bool = False,
        max_documents: int = 8,
    ) -> InputSpec:
        """Shape and dtype of each input of one micro-batch, by argument name of `forward`.

        seq: the config's max_seq_len when None. packed: with the boundaries of at most
        `max_documents` documents a row.
        """
        seq = self.config.max_seq_len if seq is None else seq
        spec: InputSpec = {
            "input_ids": ((batch, seq), torch.int64),
            "labels": ((batch, seq), torch.int64),
        }
        if packed:
            spec["cu_seqlens"] = ((batch, max_documents + 1), torch.int32)
        return spec

    def _fill_unless_meta(self) -> None:
        if not any(parameter.is_meta for parameter in self.parameters()):
            initialize_(self, self.config.seed)
