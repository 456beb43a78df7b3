"""Which dimensions of a graph's values have one size by nature, op by op.

The dimensions of all values fall into classes: those of a class grow and shrink together. An op
ties the dimensions of what it takes to those of what it gives; a reshape says that the product of
some sizes is that of others; a slice or an `arange` names positions, which must move along. An op
that no row of the table speaks of keeps all its sizes.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import fx

from ilm_compile.ops.call import tensor_inputs
from ilm_compile.ops.experts import GROUPED
from ilm_compile.program.layout import layout_of
from ilm_compile.program.program import Program
from ilm_compile.program.values import tensors_of
from ilm_compile.proof import place_relations as place
from ilm_compile.proof import size_relations as size
from ilm_compile.proof.dims import Classes, Dims, Relation, View, op_name, pin, same
from ilm_compile.proof.numbers import sizes_of


def dimensions(classes: Classes, program: Program) -> dict[fx.Node, list[Dims]]:
    """Return the dimensions of every value of `program`, tied as its calls tie them."""
    sizes = sizes_of(program)
    found: dict[fx.Node, list[Dims]] = {}
    for node in program.graph.nodes:
        values = tensors_of(node.meta.get("val")) if node.op != "output" else ()
        layout = layout_of(node)
        shapes = [tuple(value.shape) for value in values]
        found[node] = [classes.add(layout.global_shape(s, sizes), s) for s in shapes]
        for axis, cut in layout.shards(sizes):
            parts = layout.parts_before(axis, sizes)
            for dim in (dims[cut.dim] for dims in found[node] if cut.folded):
                (half,) = classes.add([classes.sizes[dim]], [classes.locals[dim] // 2])
                classes.tie(half, dim)  # each rank has two pieces of it
            ends = [parts * end for end in accumulate(cut.segments[:-1])]
            classes.positions += [(dims[cut.dim], end) for dims in found[node] for end in ends]
    for node in program.calls():
        sources = [found[source][0] for source in tensor_inputs(node) if found[source]]
        view = View(node, sources, found[node], classes, found)
        relation_of(node)(view) if not is_item(node) else _item(view, found)
    return found


def is_item(node: fx.Node) -> bool:
    """Whether `node` takes one result of several."""
    return getattr(node.target, "__name__", "") == "getitem"


def relation_of(node: fx.Node) -> Relation:
    """Return what is known of an op; that of an unknown one pins everything."""
    name = op_name(node, whole=True)
    is_pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return RELATIONS.get(name) or (same if is_pointwise else pin)


def _item(view: View, found: dict[fx.Node, list[Dims]]) -> None:
    source, index = view.node.args[0], view.node.args[1]
    view.classes.tie_all(view.out, found[source][index])  # type: ignore[index]


ALONG_LAST = (
    *("redistribute", "expert_order", "seeded_dropout", "to", "clone", "contiguous", "detach"),
    *("alias", "where"),
    *("masked_fill", "softmax", "log_softmax", "cumsum", "cumprod", "layer_norm", "rms_norm"),
    *("ilm::rms_norm", "ilm::add_rms_norm", "ilm::layer_norm", "ilm::add_layer_norm", "ilm::glu"),
    *("tril", "triu", "type_as", "flip"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "fill", "expand", "copy", "dropout"),
    *("softplus", "log_sigmoid"),
    *("hardtanh", "relu6", "mish", "bitwise_not", "floor_divide", "pad", "constant_pad_nd"),
)
RELATIONS: dict[str, Relation] = {
    **dict.fromkeys(ALONG_LAST, same),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "logsumexp", "prod"),
                    size.reduced(1, "dim")),
    **dict.fromkeys(("var", "std", "any", "all", "argmax", "argmin"), size.reduced(1, "dim")),
    "linalg_vector_norm": size.reduced(2, "dim"),
    **dict.fromkeys(("linear", "output_logits"), size.linear),
    "linear_cross_entropy": size.linear_cross_entropy,
    "gather_products": size.gather_products,
    "product_scatter": size.linear,
    **dict.fromkeys(("matmul", "bmm", "mm", "addmm", "baddbmm"), size.matmul),
    "einsum": size.einsum,
    "transpose": size.permuted(size.transposed),
    "permute": size.permuted(lambda view, rank: [d % rank for d in view.argument(1, "dims")]),
    "t": size.permuted(lambda view, rank: list(range(rank))[::-1]),
    "unsqueeze": size.one_more,
    "squeeze": size.reduced(1, "dim"),
    "reshape": size.reshape,
    "slice": size.sliced,
    "select": size.select,
    "cat": size.cat,
    "stack": size.stack,
    "embedding": size.embedding,
    "scaled_dot_product_attention": size.attention,
    "ilm::attention": size.head_attention,
    **dict.fromkeys(("ilm::document_boundaries", "ilm::query_boundaries"), size.boundaries),
    "ilm::rotary": size.heads,
    "ilm::qkv_rotary": size.packed_heads,
    "cross_entropy_loss": size.cross_entropy,
    **dict.fromkeys(("full", "zeros", "ones", "empty", "scalar_tensor", "new_zeros", "new_ones",
                     "new_full", "new_empty"), size.made),
    "arange": size.arange,
    "gather": place.gather,
    **dict.fromkeys(("topk", "sort", "argsort"), place.ordered),
    **dict.fromkeys(("ge", "gt", "le", "lt", "eq", "ne"), place.compared),
    **dict.fromkeys((name.removeprefix("aten::") for name in GROUPED), size.grouped),
    "sort_rows": size.sorted_rows,
    "unsort_rows": size.unsorted_rows,
    "route": size.routed,
    "index": place.indexed,
    "index_put": place.index_put,
    **dict.fromkeys(("histc", "ilm::counts"), place.histogram),
}  # fmt: skip
