"""The kernels of `triton_norm`: import it lazily.

Everything is computed in float32 from the moment it is loaded. What does not change from step to
step is a constexpr; the number of rows is not, nor is it specialised, so that no sequence length
compiles anew. Row numbers become int64 before they meet a stride.

Shapes in this file: x (R, H) with any row stride, weight, bias (H,), partial (programs, H).
"""

# Triton types neither its decorator nor what a kernel sees of its arguments.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# It unrolls loops over pieces at compile time: a tuple that grows has several types.
# mypy: disable-error-code="assignment,var-annotated"

import triton
import triton.language as tl


@triton.jit
def _load(base, row, stride, HIDDEN: tl.constexpr, column, mask, LAST: tl.constexpr = True):
    """Elements as float32. A stride of None says that rows lie end to end. LAST: never again."""
    # HIDDEN is known to the compiler, so that a multiple of 8 keeps loads of 128 bits.
    start = row.to(tl.int64) * HIDDEN if stride is None else row.to(tl.int64) * stride
    # with one policy for both, the compiler would keep what it loads twice, and spill it
    policy: tl.constexpr = "" if LAST else "evict_last"
    found = tl.load(base + start + column, mask=mask, other=0.0, eviction_policy=policy)
    return found.to(tl.float32)


@triton.jit
def _scale(weight, column, HIDDEN: tl.constexpr, OFFSET: tl.constexpr, LAST: tl.constexpr = True):
    """What the columns of a row are multiplied by."""
    policy: tl.constexpr = "" if LAST else "evict_last"
    scale = tl.load(weight + column, mask=column < HIDDEN, other=0.0, eviction_policy=policy)
    return scale.to(tl.float32) + OFFSET


@triton.jit
def _store(base, row, HIDDEN: tl.constexpr, column, mask, value):
    address = base + row.to(tl.int64) * HIDDEN + column
    tl.store(address, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _centered(pieces, mean, HIDDEN: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    """The pieces of rows without their mean, 0 beyond HIDDEN as before."""
    found = ()
    for i in tl.static_range(PIECES):
        column = i * BLOCK + tl.arange(0, BLOCK)[None, :]
        found += (tl.where(column < HIDDEN, pieces[i] - mean, 0.0),)
    return found


@triton.jit
def _both_sums(left, right, JOINED: tl.constexpr):
    """The sums of two tiles over columns."""
    if JOINED:  # one reduction: the warps meet for both sums at once
        return tl.split(tl.sum(tl.join(left, right), axis=1, keep_dims=True))
    # no registers are left for that beside a float32 stream
    return tl.sum(left, axis=1, keep_dims=True), tl.sum(right, axis=1, keep_dims=True)


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    x,
    residual,
    weight,
    bias,
    y,
    total,
    num_rows,
    x_stride,
    residual_stride,
    HIDDEN: tl.constexpr,
    EPS: tl.constexpr,
    CAST: tl.constexpr,
    OFFSET: tl.constexpr,
    CENTER: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    first = tl.arange(0, BLOCK)[None, :]
    sums = 0.0
    squares = 0.0
    pieces = ()
    scales = ()
    for i in tl.static_range(PIECES):
        column = i * BLOCK + first
        mask = (row < num_rows) & (column < HIDDEN)
        values = _load(x, row, x_stride, HIDDEN, column, mask)
        if residual is not None:
            values += _load(residual, row, residual_stride, HIDDEN, column, mask)
            _store(total, row, HIDDEN, column, mask, values)
            values = values.to(total.dtype.element_ty).to(tl.float32)
        if EARLY:  # the weight is on its way while the warps wait for their sum
            scales += (_scale(weight, column, HIDDEN, OFFSET),)
        sums = values if i == 0 else sums + values
        pieces += (values,)
    if CENTER:
        mean = tl.sum(sums, axis=1, keep_dims=True) / HIDDEN
        pieces = _centered(pieces, mean, HIDDEN, BLOCK, PIECES)
    for i in tl.static_range(PIECES):
        square = pieces[i] * pieces[i]
        squares = square if i == 0 else squares + square
    rstd = tl.rsqrt(tl.sum(squares, axis=1, keep_dims=True) / HIDDEN + EPS)
    for i in tl.static_range(PIECES):
        column = i * BLOCK + first
        values = pieces[i] * rstd
        if weight is not None:
            if CAST:
                values = values.to(y.dtype.element_ty).to(tl.float32)
            if EARLY:
                values *= scales[i]
            else:
                values *= _scale(weight, column, HIDDEN, OFFSET)
        if bias is not None:
            values += _scale(bias, column, HIDDEN, 0.0)
        _store(y, row, HIDDEN, column, (row < num_rows) & (column < HIDDEN), values)


@triton.jit(do_not_specialize=["num_rows"])
def backward_kernel(
    grad,
    x,
    weight,
    grad_sum,
    grad_x,
    grad_x_low,
    partial,
    partial_bias,
    num_rows,
    grad_stride,
    x_stride,
    grad_sum_stride,
    HIDDEN: tl.constexpr,
    EPS: tl.constexpr,
    CAST: tl.constexpr,
    OFFSET: tl.constexpr,
    CENTER: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    TWICE: tl.constexpr,
):
    HELD: tl.constexpr = PIECES if weight is not None else 0
    first = tl.arange(0, BLOCK)[None, :]
    scales = ()
    grad_weights = ()
    grad_biases = ()
    for i in tl.static_range(HELD):
        if not TWICE:
            scales += (_scale(weight, i * BLOCK + first, HIDDEN, OFFSET),)
        grad_weights += (tl.zeros((ROWS, BLOCK), tl.float32),)
        if partial_bias is not None:
            grad_biases += (tl.zeros((ROWS, BLOCK), tl.float32),)
    program, step = tl.program_id(0), tl.num_programs(0)
    for tile in tl.range(program, tl.cdiv(num_rows, ROWS), step, num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS)[:, None]
        lefts = 0.0
        rights = 0.0
        rows = ()
        arriving = ()
        for i in tl.static_range(PIECES):
            column = i * BLOCK + first
            mask = (row < num_rows) & (column < HIDDEN)
            values = _load(x, row, x_stride, HIDDEN, column, mask, not TWICE)
            scaled = _load(grad, row, grad_stride, HIDDEN, column, mask, not TWICE)
            if not TWICE:
                rows += (values,)
                arriving += (scaled,)
            if weight is not None:
                if TWICE:
                    scaled *= _scale(weight, column, HIDDEN, OFFSET, False)
                else:
                    scaled *= scales[i]
            left = values if CENTER else values * values
            right = scaled if CENTER else scaled * values
            lefts = left if i == 0 else lefts + left
            rights = right if i == 0 else rights + right
        square, product = _both_sums(lefts, rights, grad_x_low is None and not CENTER)
        shift = 0.0
        if CENTER:
            shift = product / HIDDEN
            rows = _centered(rows, square / HIDDEN, HIDDEN, BLOCK, PIECES)
            for i in tl.static_range(PIECES):
                scaled = arriving[i]
                if weight is not None:
                    scaled *= scales[i]
                left = rows[i] * rows[i]
                right = scaled * rows[i]
                lefts = left if i == 0 else lefts + left
                rights = right if i == 0 else rights + right
            square, product = _both_sums(lefts, rights, grad_x_low is None and not CENTER)
        rstd = tl.rsqrt(square / HIDDEN + EPS)
        more = ()
        more_biases = ()
        for i in tl.static_range(PIECES):
            column = i * BLOCK + first
            mask = (row < num_rows) & (column < HIDDEN)
            if TWICE:
                unit = _load(x, row, x_stride, HIDDEN, column, mask) * rstd
                scaled = _load(grad, row, grad_stride, HIDDEN, column, mask)
            else:
                unit = rows[i] * rstd
                scaled = arriving[i]
            if weight is not None:
                seen = unit
                if CAST:
                    seen = unit.to(grad.dtype.element_ty).to(tl.float32)
                more += (grad_weights[i] + scaled * seen,)
                if partial_bias is not None:
                    more_biases += (grad_biases[i] + scaled,)
                if TWICE:
                    scaled *= _scale(weight, column, HIDDEN, OFFSET)
                else:
                    scaled *= scales[i]
            result = rstd * (scaled - shift - unit * (rstd * product / HIDDEN))
            if grad_sum is not None:
                result += _load(grad_sum, row, grad_sum_stride, HIDDEN, column, mask)
            _store(grad_x, row, HIDDEN, column, mask, result)
            if grad_x_low is not None:
                _store(grad_x_low, row, HIDDEN, column, mask, result)
        grad_weights = more
        grad_biases = more_biases
    for i in tl.static_range(HELD):
        column = i * BLOCK + first
        found = tl.sum(grad_weights[i], axis=0, keep_dims=True)
        tl.store(partial + program.to(tl.int64) * HIDDEN + column, found, mask=column < HIDDEN)
        if partial_bias is not None:
            found = tl.sum(grad_biases[i], axis=0, keep_dims=True)
            place = partial_bias + program.to(tl.int64) * HIDDEN + column
            tl.store(place, found, mask=column < HIDDEN)
