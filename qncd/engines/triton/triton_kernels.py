"""The Triton code behind `qncd.engines.triton.kernels`, which says what the arguments are.

Products are summed in int32 and leave as floats. What a time step chooses is read on the device. Numbers that change from
layer to layer without changing the code are not specialized for: each would be compiled anew.
"""

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding and taking it off rounds |x| < 2^22 to even


@triton.jit
def rounded(values, divisor, low, high):
    """The nearest code, from the zero point. A product with the reciprocal: half as many instructions as the quotient."""
    values = values * (1.0 / divisor)
    return (tl.minimum(tl.maximum(values, low), high) + ROUND) - ROUND


@triton.jit
def divisors(scale, row, smoothing, c, real, SMOOTH: tl.constexpr):
    """What each of the channels c is divided by."""
    result = tl.zeros(c.shape, tl.float32) + tl.load(scale + tl.load(row))
    if SMOOTH:
        result *= tl.load(smoothing + c, mask=real, other=1.0)
    return result


@triton.jit
def scores_of(left, rights, there, real, EVEN: tl.constexpr):
    """Queries (M, D) by the keys at `rights` (D, N); minus infinity where there is none."""
    if EVEN:
        result = tl.dot(left, tl.load(rights, mask=real[:, None], other=0.0))
    else:
        right = tl.load(rights, mask=there[None, :] & real[:, None], other=0.0)
        result = tl.where(there[None, :], tl.dot(left, right), float("-inf"))
    return result


@triton.jit
def masks_of(mask, image, head, m, keys, strides, length, count, inverse):
    """What a mask (N, heads, L, L2) adds to the scores of queries m (M,) and keys (N,), in their unit; strides of 0 repeat it."""
    place = image.to(tl.int64) * strides[0] + head * strides[1] + m[:, None] * strides[2] + keys[None, :] * strides[3]
    values = tl.load(mask + place, mask=(m < length)[:, None] & (keys < count)[None, :], other=0.0).to(tl.float32)
    return tl.maximum(values * inverse, -1e30)  # finite, so that a block without a key leaves no NaN


@triton.jit(do_not_specialize=["pixels", "chunks"])
def group_norm_sums_kernel(x, means, squares, pixels, channels, chunks, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Mean and sum of squared differences from it of each channel in each chunk of pixels."""
    image, chunk = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = chunk * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = (p < pixels)[:, None] & (c < channels)[None, :]
    rows = image.to(tl.int64) * pixels + p
    values = tl.load(x + rows[:, None] * channels + c[None, :], mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(pixels - chunk * BLOCK_P, BLOCK_P).to(tl.float32)
    mean = tl.sum(values, 0) / count
    apart = tl.where(inside, values - mean[None, :], 0.0)
    place = (image * chunks + chunk) * channels + c
    tl.store(means + place, mean, mask=c < channels)
    tl.store(squares + place, tl.sum(apart * apart, 0), mask=c < channels)


@triton.jit(do_not_specialize=["pixels", "chunks", "block"])
def group_norm_affine_kernel(
    means, squares, weight, bias, factor, term, pixels, channels, chunks, size, epsilon, block,
    CHUNKS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """What the norm multiplies each channel of each image by, and adds."""
    image, group = tl.program_id(0), tl.program_id(1)
    k, i = tl.arange(0, CHUNKS), tl.arange(0, SIZE)
    c = group * size + i
    inside = (k < chunks)[:, None] & (i < size)[None, :]
    place = (image * chunks + k)[:, None] * channels + c[None, :]
    mean = tl.load(means + place, mask=inside, other=0.0)
    square = tl.load(squares + place, mask=inside, other=0.0)
    count = tl.where(inside, tl.minimum(pixels - k * block, block).to(tl.float32)[:, None], 0.0)
    total = (pixels * size).to(tl.float32)
    center = tl.sum(tl.sum(mean * count, 1), 0) / total
    apart = mean - center
    variance = tl.sum(tl.sum(square + count * apart * apart, 1), 0) / total
    inverse = 1.0 / tl.sqrt(variance + epsilon)
    own = tl.load(weight + c, mask=i < size, other=0.0).to(tl.float32) * inverse
    offset = tl.load(bias + c, mask=i < size, other=0.0).to(tl.float32) - center * own
    tl.store(factor + image * channels + c, own, mask=i < size)
    tl.store(term + image * channels + c, offset, mask=i < size)


@triton.jit
def activated(values, ACT: tl.constexpr):
    """Nothing (0), SiLU (1), GELU (2) or its approximation by tanh (3)."""
    if ACT == 1:
        values = values / (1.0 + tl.exp(-values))
    if ACT == 2:
        values = values * (0.5 + 0.5 * tl.erf(values * 0.7071067811865476))
    if ACT == 3:  # (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u))
        values = values / (1.0 + tl.exp(-1.5957691216057308 * (values + 0.044715 * values * values * values)))
    return values


@triton.jit(do_not_specialize=["height", "width", "out_height", "out_width", "top", "left", "factor_step", "term_step"])
def pointwise_kernel(
    x, out, factor, term, smoothing, scale, row, zero, low, high,
    height, width, pitch, first, channels, out_height, out_width, out_pitch, top, left, factor_step, term_step,
    NORM: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, SMOOTH: tl.constexpr, QUANTIZE: tl.constexpr, UP: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What stands between two products: norm, activation or GEGLU, upsampling, padding, smoothing and rounding, in one pass."""
    image = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    real = c < channels
    i, j = p // out_width - top, p % out_width - left
    inside = (i >= 0) & (i < height * UP) & (j >= 0) & (j < width * UP)
    source = (image * height + i // UP) * width + j // UP
    mask = inside[:, None] & real[None, :]
    place = x + source[:, None] * pitch + (first + c)[None, :]
    values = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        values = values * activated(tl.load(place + channels, mask=mask, other=0.0).to(tl.float32), 2)
    if NORM:
        values = values * tl.load(factor + image * factor_step + first + c, mask=real, other=0.0)[None, :]
        values = values + tl.load(term + image * term_step + first + c, mask=real, other=0.0)[None, :]
    values = activated(values, ACT)
    target = (image * out_height * out_width + p)[:, None] * out_pitch + c[None, :]
    kept = (p < out_height * out_width)[:, None] & (c < out_pitch)[None, :]
    if QUANTIZE:
        divisor = divisors(scale, row, smoothing, c, real, SMOOTH)
        values = tl.where(mask, rounded(values, divisor[None, :], low, high), 0.0) + zero
    tl.store(out + target, values.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["rows", "each", "factor_step", "term_step"])
def rows_kernel(
    x, out, weight, bias, factor, term, smoothing, scale, row, zero, low, high, scales, zeros,
    rows, each, channels, pitch, epsilon, factor_step, term_step,
    NORM: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, FACTOR: tl.constexpr, TERM: tl.constexpr, ACT: tl.constexpr,
    SMOOTH: tl.constexpr, QUANTIZE: tl.constexpr, TOKENS: tl.constexpr, SIGNED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Whole rows of channels at a time: a root-mean-square (1) or layer norm (2), what an image multiplies by and adds, an
    activation, and rounding; to a grid, or to that of the row's own range, which is kept in `scales` and `zeros`.
    """
    r, c = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    real = c < channels
    mask = (r < rows)[:, None] & real[None, :]
    values = tl.load(x + r.to(tl.int64)[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if NORM == 2:
        values = tl.where(mask, values - (tl.sum(values, 1) / channels)[:, None], 0.0)
    if NORM > 0:
        values = values * (1.0 / tl.sqrt(tl.sum(values * values, 1) / channels + epsilon))[:, None]
    if WEIGHT:
        values = values * tl.load(weight + c, mask=real, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        values = values + tl.load(bias + c, mask=real, other=0.0).to(tl.float32)[None, :]
    image = (r // each).to(tl.int64)[:, None]
    if FACTOR:
        values = values * tl.load(factor + image * factor_step + c[None, :], mask=mask, other=0.0).to(tl.float32)
    if TERM:
        values = values + tl.load(term + image * term_step + c[None, :], mask=mask, other=0.0).to(tl.float32)
    values = activated(values, ACT)
    if TOKENS:
        if SMOOTH:
            values = values / tl.load(smoothing + c, mask=real, other=1.0)[None, :]
        values = tl.where(mask, values, 0.0)
        least, most = tl.minimum(tl.min(values, 1), 0.0), tl.maximum(tl.max(values, 1), 0.0)
        width = tl.maximum(-least, most) / high if SIGNED else (most - least) / (high - low)
        step = tl.where(width == 0.0, 1e-8, tl.maximum(width, 1.1754943508222875e-38))
        own = tl.zeros([BLOCK_R], tl.float32)
        if not SIGNED:
            own = tl.minimum(tl.maximum((-least / step + ROUND) - ROUND, low), high)
        tl.store(scales + r, step, mask=r < rows)
        tl.store(zeros + r, (own + zero).to(tl.int32), mask=r < rows)
        values = (tl.minimum(tl.maximum(values / step[:, None], -2097152.0), 2097152.0) + ROUND) - ROUND
        values = tl.minimum(tl.maximum(values + own[:, None], low), high) + zero
    elif QUANTIZE:
        values = rounded(values, divisors(scale, row, smoothing, c, real, SMOOTH)[None, :], low, high) + zero
    kept = (r < rows)[:, None] & (c < pitch)[None, :]
    tl.store(out + r.to(tl.int64)[:, None] * pitch + c[None, :], values.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["zero", "each", "rows", "height", "width", "out_height", "out_width", "gate_step"])
def convolve_kernel(
    x, weight, out, weight_scale, weight_sum, scale, row, zero, each, bias, embedding, gate, residual,
    out_scale, out_row, out_smoothing, out_zero, low, high,
    rows, outputs, pitch, height, width, out_height, out_width, stride, columns, taps, gate_step,
    BIAS: tl.constexpr, EMBEDDING: tl.constexpr, GATE: tl.constexpr, RESIDUAL: tl.constexpr, ACT: tl.constexpr,
    ROUND_OUT: tl.constexpr, SMOOTH: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Codes (N, H, W, pitch) by codes (O, taps * pitch), padded already: no bounds are checked along the sums.

    With TOKENS `each` rows have a scale and a zero point, the latter at `row`.
    """
    count_m, count_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    program = tl.program_id(0)
    wave = GROUP * count_n  # neighbours share weights in the second-level cache
    start = (program // wave) * GROUP
    size = tl.minimum(count_m - start, GROUP)
    block_m, block_n = start + (program % wave) % size, (program % wave) // size
    m, n = block_m * BLOCK_M + tl.arange(0, BLOCK_M), block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    plane = out_height * out_width
    image, pixel = (m % rows) // plane, (m % rows) % plane
    corner = (image.to(tl.int64) * height + (pixel // out_width) * stride) * width + (pixel % out_width) * stride
    left = x + corner[:, None] * pitch + k[None, :]
    right = weight + (n % outputs).to(tl.int64)[None, :] * (taps * pitch) + k[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    parts = pitch // BLOCK_K
    for i in range(taps * parts):
        tap = i // parts
        shift = ((tap // columns) * width + tap % columns) * pitch + (i % parts) * BLOCK_K
        total = tl.dot(tl.load(left + shift), tl.load(right + i * BLOCK_K), total, out_dtype=tl.int32)
    inside = n < outputs
    step, sums = tl.load(weight_scale + n, mask=inside, other=0.0), tl.load(weight_sum + n, mask=inside, other=0)
    if TOKENS:
        zeros = tl.load(row + m // each, mask=m < rows, other=0)
        values = (total - zeros[:, None] * sums[None, :]).to(tl.float32) * step[None, :]
        values = values * tl.load(scale + m // each, mask=m < rows, other=0.0)[:, None]
    else:
        values = (total - zero * sums[None, :]).to(tl.float32) * (step * tl.load(scale + tl.load(row)))[None, :]
    if BIAS:
        values += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[None, :]
    kept = (m < rows)[:, None] & inside[None, :]
    if EMBEDDING:
        values += tl.load(embedding + image[:, None] * outputs + n[None, :], mask=kept, other=0.0).to(tl.float32)
    if GATE:
        values *= tl.load(gate + image.to(tl.int64)[:, None] * gate_step + n[None, :], mask=kept, other=0.0).to(tl.float32)
    place = m.to(tl.int64)[:, None] * outputs + n[None, :]
    if RESIDUAL:
        values += tl.load(residual + place, mask=kept, other=0.0).to(tl.float32)
    values = activated(values, ACT)
    if ROUND_OUT:
        values = rounded(values, divisors(out_scale, out_row, out_smoothing, n, inside, SMOOTH)[None, :], low, high) + out_zero
    tl.store(out + place, values.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["zero", "height", "width", "out_height", "out_width"])
def depthwise_kernel(
    x, weight, out, weight_scale, scale, row, zero, bias, height, width, channels, pitch, out_height, out_width, stride, columns,
    BIAS: tl.constexpr, TAPS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Codes (N, H, W, pitch), padded already, by codes (taps, pitch): each channel by its own. TOKENS: a scale for each image."""
    image = tl.program_id(0).to(tl.int64)
    if TOKENS:
        zero, place_of_scale = tl.load(row + image), image
    else:
        place_of_scale = tl.load(row).to(tl.int64)
    p, c = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    kept = (p < out_height * out_width)[:, None] & (c < channels)[None, :]
    corner = (image * height + (p // out_width) * stride) * width + (p % out_width) * stride
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.int32)
    for tap in tl.static_range(TAPS):
        place = corner + (tap // columns) * width + tap % columns
        left = tl.load(x + place[:, None] * pitch + c[None, :], mask=kept, other=0).to(tl.int32) - zero
        total += left * tl.load(weight + tap * pitch + c, mask=c < channels, other=0).to(tl.int32)[None, :]
    step = tl.load(weight_scale + c, mask=c < channels, other=0.0) * tl.load(scale + place_of_scale)
    values = total.to(tl.float32) * step[None, :]
    if BIAS:
        values += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    target = (image * out_height * out_width + p)[:, None] * channels + c[None, :]
    tl.store(out + target, values.to(out.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["length", "keys", "mask_image", "mask_head", "mask_row", "mask_key"])
def attend_kernel(
    q, k, v, out, q_scale, q_row, k_scale, k_row, w_scale, w_row, v_scale, v_row, gain, high, heads, length, keys, units,
    mask, mask_image, mask_head, mask_row, mask_key,
    UNIT: tl.constexpr, WIDE: tl.constexpr, EVEN: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attention on codes, whole numbers in half precision, whose products the matrix units sum in float32.

    The weights are rounded after they are normalized, so the keys are visited twice: for the sums, and for the result.
    """
    image, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    m, d, n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    depth = units * UNIT  # so that the compiler knows what divides it
    width = heads * depth
    column, real = head * depth + d, d < depth
    queries, first = image.to(tl.int64) * length + m, image.to(tl.int64) * keys
    kept = (m < length)[:, None] & real[None, :]
    left = tl.load(q + queries[:, None] * width + column[None, :], mask=kept, other=0.0)
    rights = k + (first + n)[None, :] * width + column[:, None]
    factor = tl.load(q_scale + tl.load(q_row)) * tl.load(k_scale + tl.load(k_row)) * gain * 1.4426950408889634
    inverse, strides = 1.4426950408889634 / factor, (mask_image, mask_head, mask_row, mask_key)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, keys, BLOCK_N):
        scores = scores_of(left, rights + start * width, start + n < keys, real, EVEN)
        if MASKED:
            scores += masks_of(mask, image, head, m, start + n, strides, length, keys, inverse)
        new = tl.maximum(largest, tl.max(scores, 1))
        shift = new * factor
        total = total * tl.exp2(largest * factor - shift) + tl.sum(tl.exp2(scores * factor - shift[:, None]), 1)
        largest = new
    step = tl.load(w_scale + tl.load(w_row))
    shift = largest * factor + tl.log2(total * step)  # exp2(scores * factor - shift) are weights in steps
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    downs = v + (first + n)[:, None] * width + column[None, :]
    for start in range(0, keys, BLOCK_N):
        there = start + n < keys
        scores = scores_of(left, rights + start * width, there, real, EVEN)
        if MASKED:
            scores += masks_of(mask, image, head, m, start + n, strides, length, keys, inverse)
        values = tl.load(downs + start * width, mask=real[None, :] if EVEN else there[:, None] & real[None, :], other=0.0)
        weights = tl.minimum(tl.exp2(scores * factor - shift[:, None]), high)
        weights = (weights + ROUND) - ROUND
        if WIDE:  # codes of up to 16 bits as two halves
            upper = (weights * 0.00390625 - 0.498046875 + ROUND) - ROUND  # floor(weights / 256)
            result += tl.dot(upper.to(tl.float16), values) * 256.0
            weights = weights - upper * 256.0
        result = tl.dot(weights.to(tl.float16), values, result)
    result = result * (step * tl.load(v_scale + tl.load(v_row)))
    tl.store(out + queries[:, None] * width + column[None, :], result.to(out.dtype.element_ty), mask=kept)
