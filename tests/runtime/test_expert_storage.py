"""Who holds what of the experts: they are stored by the ranks that have them, and by no other."""

from __future__ import annotations

import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor

import ilm_compile
from ilm_compile.runtime import parameters
from ilm_compile.runtime.checkpoint import CheckpointManager
from ilm_compile.runtime.expert_storage import HAS_MESHES
from tests.support.equality import EXAMPLE, VOCAB, Errors, compare, make_batch, reference
from tests.support.experts import MixtureOfExperts
from tests.support.promote import promoted_float32
from tests.support.world import World

EXPERTS = ("layers.0.up", "layers.0.down")
NUM_RANKS = 4  # ep=2, dp=2
MESHES = pytest.mark.skipif(
    not HAS_MESHES, reason="before torch 2.13 FSDP has one mesh for all parameters of a module"
)
Stored = dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...]]]


def test_torch_can_give_experts_a_mesh_of_their_own() -> None:
    """These names of torch are not public: a version that lost them must be seen here."""
    assert (torch.__version__ >= (2, 13)) == HAS_MESHES


def train(
    rank: int, folder: str, num_experts: int, has_meshes: bool
) -> tuple[Stored, Errors | None, float, list[str]]:
    """How this rank stores the parameters; a step's errors: of loss, gradients and their norm.

    And what it was warned of.
    """
    model = MixtureOfExperts(VOCAB, num_layers=1, num_experts=num_experts).double()
    up = model.layers[0].up
    places = torch.linspace(1.0, 2.0, up.numel(), dtype=torch.float64).view_as(up)
    up.register_hook(lambda gradient: gradient * places)  # must see the whole
    patch = mock.patch.object(parameters, "HAS_MESHES", has_meshes)
    with patch, promoted_float32(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        parallel = ilm_compile.parallelize(
            model, example_inputs=EXAMPLE, ep=2, zero=3, num_microbatches=2
        )
        batch = make_batch(8)
        loss = parallel.execute_schedule(batch)
        gradients = parallel.full_gradients()
        expected, want = reference(model, batch)
    manager = CheckpointManager(folder, parallel)
    manager.save(1, wait=True)
    for _, parameter in parallel.named_parameters():
        parameter.detach().zero_()
    assert manager.resume() == 1
    manager.close()
    stored = {}
    for name, parameter in parallel.named_parameters():
        assert isinstance(parameter, DTensor)
        assert torch.equal(parameter.full_tensor(), model.get_parameter(name))
        names = parameter.device_mesh.mesh_dim_names
        assert names is not None
        placements = tuple(str(placement) for placement in parameter.placements)
        stored[name] = (names, placements, tuple(parameter.to_local().shape))
    errors = compare(loss, expected, gradients, want) if gradients else None
    norm = torch.stack([gradient.norm() for gradient in want.values()]).norm()
    said = [str(w.message) for w in told if "hold" in str(w.message)]
    return stored, errors, float(parallel.grad_norm() / norm) - 1, said


@pytest.mark.parametrize(
    ("num_experts", "has_meshes", "shapes"),
    [
        # two on each rank of ep, one on each rank
        pytest.param(4, True, [(1, 16, 32), (1, 32, 16)], marks=MESHES),
        # one on each rank of ep, half of it on each rank
        pytest.param(2, True, [(1, 8, 32), (1, 16, 16)], marks=MESHES),
        (4, False, [(2, 16, 32), (2, 32, 16)]),  # as with torch 2.11
    ],
)
def test_each_rank_has_its_part_of_its_experts(
    world4: World, tmp_path: Path, num_experts: int, has_meshes: bool, shapes: list[tuple[int, ...]]
) -> None:
    results = world4.run(train, str(tmp_path), num_experts, has_meshes)
    errors, said = results[0][1], [rank[3] for rank in results]
    assert errors.loss <= 1e-10, errors
    assert errors.gradient <= 1e-10, errors
    assert said == [[] if has_meshes else [mock.ANY], [], [], []]
    assert has_meshes or "each of the 2 ranks that have the same experts" in said[0][0]
    for stored, _, norm_error, _ in results:
        assert abs(norm_error) <= 1e-12
        assert [stored[name][2] for name in EXPERTS] == shapes
        assert [stored[name][0] for name in EXPERTS] == [("tp", "ep", "dp")] * 2
        assert stored["head.weight"] == (("tp", "dp"), ("R", "S(0)"), (VOCAB // NUM_RANKS, 16))
