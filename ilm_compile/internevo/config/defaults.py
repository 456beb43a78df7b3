"""What a config of InternEvo means by the keys that it leaves out.

A ``.py`` file is a config of InternEvo. Where it is silent, what InternEvo at c628a8c does holds
(args_sanity_check in internlm/initialize/launch.py, the builders in internlm/model/modeling_*.py,
internlm/solver/schedulers/lr_scheduler.py), not our own default.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ilm_compile.config.config import Config
from ilm_compile.config.options import shown
from ilm_compile.config.table import Place, Table
from ilm_compile.models import DECODERS

_TYPE = "INTERNLM"

# Keys that they have too, under whatever name, with the value that leaving them out gives there.
LEFT_OUT: dict[str, Any] = {
    "train.dtype": "float16",
    "train.max_grad_norm": 0.0,
    "lr_scheduler.warmup_ratio": 0.0,
    "lr_scheduler.eta_min": 0.0,
    "model.mlp_ratio": 4.0,
    "model.embed_grad_scale": 0.1,
}
OF_FAMILIES: dict[str, dict[str, Any]] = {
    "INTERNLM": {},
    "LLAMA": {"model.rope_base": 10000.0, "model.no_bias": False, "model.adapt_hf": False},
    "INTERNLM2": {"model.rope_base": 10000.0, "model.no_bias": False},
}
_FAMILY = {"INTERNLM": "INTERNLM", "LLAMA": "LLAMA", "LLAMA2": "LLAMA"} | dict.fromkeys(
    ("INTERNLM2", "INTERNLM2_PUBLIC", "INTERNLM3"), "INTERNLM2"
)
_FAMILY |= {name: name for name in DECODERS}
_AS_MANY_KEY_HEADS = ("LLAMA", "INTERNLM2", "INTERNLM_MoE", "BAICHUAN2")
# What they have no key for, since it is always so there.
ALWAYS: dict[str, Any] = {
    "optimizer.decay_all": True,
    "lr_scheduler.hold_peak": True,
    "data.zero_is_target": False,
    "data.learn_ends": False,
    "ckpt.keep_every": 1,
}


def fill_defaults(table: Table, place: Place) -> list[str]:
    """Put into `table`, in our keys, what a config of InternEvo means where it says nothing.

    Returns the notices: one line with the keys whose default here is another.
    """
    told = [f"model_type={_TYPE!r}"] if _put(table, "model.type", _TYPE, place) else []
    named = table.find("model.type")
    family = _FAMILY.get(named[0]) if named is not None and isinstance(named[0], str) else None
    for path, value in (LEFT_OUT | OF_FAMILIES.get(family or "", {})).items():
        is_model = path.startswith("model.")
        if (family or not is_model) and _put(table, path, value, place):
            told.append(f"{path}={shown(value)}")
    heads = table.find("model.num_attention_heads")
    if family in _AS_MANY_KEY_HEADS and heads is not None:
        _put(table, "model.num_kv_attention_heads", heads[0], place)
    for path, value in ALWAYS.items():
        _put(table, path, value, place)
    _put(table, "data.one_row", _has_one_row(table), place)
    if not told:
        return []
    return [f"{place}: left out, so as InternEvo has it: {', '.join(told)}"]


def differences(config: Config, place: Place) -> Iterator[str]:
    """What such a config still does otherwise here, a line each."""
    yield (
        f"{place}: the loss is the mean over all targets of a step; InternEvo takes the mean of "
        "its micro-batches' means, another one where they have more or fewer targets"
    )
    yield from (f"{place}: {difference}" for difference in _of_experts(config))
    if not config.logging.tensorboard:
        yield f"{place}: no TensorBoard files; write enable_tb=True for them, as InternEvo has it"


def _of_experts(config: Config) -> Iterator[str]:
    model, parallel = config.model.fields, config.parallel
    if model.get("num_experts", 1) == 1 or config.model.type not in DECODERS:
        return
    if model["capacity_factor"] and model["top_k"] <= 2:
        yield (
            "an expert takes rows in their order, and a token its most probable experts, as with "
            "use_fused_gating=True; without it InternEvo draws them: with top_k=1 the rows that "
            "are kept, with top_k=2 the second expert"
        )
    if max(parallel.tensor, parallel.context, parallel.expert) > 1:
        yield (
            "capacity and loss of a router are those of a micro-batch; InternEvo counts on each "
            "rank, which may hold a part of it"
        )
    if config.train.dtype != "float32":
        yield (
            f"the routers' product is in {config.train.dtype}, their softmax in float32; InternEvo "
            "computes both in float32"
        )
    if model["balance"] == "layers":
        yield "the routers' loss counts all tokens; InternEvo leaves out documents of zeros"


def _has_one_row(table: Table) -> bool:
    """Whether their packing is on: of token files, unless pack_sample_into_one."""
    packing, kind = table.find("data.packing"), table.find("data.type")
    is_cut = packing is None or packing[0] == "cut"
    return is_cut and (kind is None or kind[0] in ("tokenized", "random"))


def _put(table: Table, path: str, value: Any, place: Place) -> bool:
    found = table.find(path)
    if found is not None and found[0] is not None:
        return False
    section = table.find(path.partition(".")[0])
    if section is not None and not isinstance(section[0], Table):
        return False  # refused by its own name
    table.insert(path, value, place)
    return True
