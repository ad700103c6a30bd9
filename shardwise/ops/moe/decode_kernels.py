"""Kernels of `decode.py` for plain weights: routing and the two products of a token's experts."""

from shardwise.ops.triton_support import await_and_trigger, tl, triton

WARP = tl.constexpr(32)  # lanes, one for each choice of a token


@triton.jit
def choose(logit_ptr, e, slots, choice, experts, scale, TOP_K: tl.constexpr, NORMALIZE: tl.constexpr):
    """Local slot and weight of a token's expert number `choice`, the lowest number first among equal logits; the weight
    of programs that are first of their pair alone, for the others stop at their choice.

    Of experts `e`, with their `slots`. Compared as integers of the same order: those a warp reduces in one instruction.
    """
    logits = tl.load(logit_ptr + e, mask=e < experts, other=float("-inf")).to(tl.float32) + 0.0
    bits = logits.to(tl.int32, bitcast=True)
    keys = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    best = tl.max(keys, 0)
    top = (best ^ ((best >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    total = tl.sum(tl.exp(logits - top), 0)
    chosen = total * 0.0
    expert = best * 0
    power = total * 0.0
    for number in range(TOP_K if tl.program_id(0) == 0 else choice + 1):
        best = tl.max(keys, 0)
        place = tl.minimum(tl.min(tl.where(keys == best, e, 0x7FFFFFFF), 0), experts - 1)
        keys = tl.where(e == place, -0x80000000, keys)
        its_power = tl.exp((best ^ ((best >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True) - top)
        chosen += its_power
        expert = tl.where(number == choice, place, expert)
        power = tl.where(number == choice, its_power, power)
    return tl.sum(tl.where(e == expert, slots, 0), 0), scale * power / (chosen if NORMALIZE else total)


@triton.jit
def routed(slot, weight, position, id_ptr, route_ptr, PADDED: tl.constexpr):
    """Slot of a pair, -1 if it is nobody's here; the pair's first program writes it and its weight down."""
    if PADDED:
        slot = tl.where(position < 0, -1, slot)
    if tl.program_id(0) == 0:
        tl.store(id_ptr, slot)
        tl.store(route_ptr, weight)
    return slot


@triton.jit
def routed_slot(
    logit_ptr, slot_ptr, position_ptr, id_ptr, route_ptr, pair, e, logit_row, experts, scale,
    TOP_K: tl.constexpr, NORMALIZE: tl.constexpr, PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `routed`, of the expert that a pair chooses; e: all experts, in the caller's layout.

    Only what no kernel before this one writes is read before its end.
    """
    token = pair // TOP_K
    slots = tl.load(slot_ptr + e, mask=e < experts, other=-1)
    position = tl.load(position_ptr + token) if PADDED else 0
    await_and_trigger(PDL)
    slot, weight = choose(logit_ptr + token * logit_row, e, slots, pair % TOP_K, experts, scale, TOP_K, NORMALIZE)
    return routed(slot, weight, position, id_ptr + pair, route_ptr + pair, PADDED)


@triton.jit
def activate(gate, up, alpha, limit, CLAMPED: tl.constexpr):
    if CLAMPED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit) + 1.0
        return up * gate / (1.0 + tl.exp(-alpha * gate))
    return up * gate / (1.0 + tl.exp(-gate))


@triton.jit
def _added(total, w, x, scale_ptr, line, start, columns,
           GRAIN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):  # fmt: skip
    """The sums with a tile's part: [BLOCK_N, BLOCK_K], of e4m3 weights those of a thread's 16 columns in one."""
    if GRAIN == "":
        return total + w * x[None, :]
    else:
        part = tl.sum(tl.reshape(w * x[None, :], (BLOCK_N, BLOCK_K // 16, 16)), 2)
        if GRAIN == "tile":
            column = start + tl.arange(0, BLOCK_K // 16) * 16
            scales = scale_ptr + line * tl.cdiv(columns, 128) + column // 128
            part *= tl.load(scales, mask=column < columns, other=0.0)[None, :]
        return total + part


@triton.jit(do_not_specialize=["scale", "alpha", "limit"])
def plain_up(
    x_ptr, logit_ptr, slot_ptr, position_ptr, id_ptr, route_ptr, out_ptr, size, hidden, experts, logit_row, scale,
    alpha, limit, weight_ptr, scale_ptr, bias_ptr, shared_ptr, shared_scale_ptr, local,
    TOP_K: tl.constexpr, E_BLOCK: tl.constexpr, NORMALIZE: tl.constexpr, PADDED: tl.constexpr, CLAMPED: tl.constexpr,
    PDL: tl.constexpr, GRAIN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    BIAS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """Rows of one pair's activation, BLOCK_N at once; a program takes several turns, for it chooses only once.

    GRAIN   "tile", "channel": weights are e4m3, scale_ptr has their scales, as `Float8Weight`; BLOCK_N divides 128
    SHARED  each token's last pair is the shared expert, of slot `local`: its gate rows lie before its up rows
    """
    CHOICES: tl.constexpr = TOP_K + SHARED
    pair = tl.program_id(1)
    token, choice = pair // CHOICES, pair % CHOICES
    e = tl.arange(0, E_BLOCK)
    slots = tl.load(slot_ptr + e, mask=e < experts, other=-1)
    position = tl.load(position_ptr + token) if PADDED else 0
    await_and_trigger(PDL)
    logits = logit_ptr + token * logit_row
    if SHARED and choice == TOP_K:
        slot = tl.cast(local, tl.int32)
        weight = tl.sigmoid(tl.load(logits + experts).to(tl.float32))
    else:
        slot, weight = choose(logits, e, slots, choice, experts, scale, TOP_K, NORMALIZE)
    slot = routed(slot, weight, position, id_ptr + pair, route_ptr + pair, PADDED)
    if slot < 0:
        return
    own = SHARED and choice == TOP_K
    matrix = tl.where(own, shared_ptr, weight_ptr) if SHARED else weight_ptr
    scales = tl.where(own, shared_scale_ptr, scale_ptr) if SHARED and GRAIN != "" else scale_ptr
    up_row = tl.where(own, size, slot * 2 * size)
    gate_row = tl.where(own, 0, up_row + size)
    column = tl.arange(0, BLOCK_K)
    x_ptr += token.to(tl.int64) * hidden
    steps = tl.cdiv(hidden, BLOCK_K)
    turns = tl.cdiv(tl.cdiv(size, BLOCK_N) - tl.program_id(0), tl.num_programs(0))
    WIDTH: tl.constexpr = BLOCK_K if GRAIN == "" else BLOCK_K // 16
    ups = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    gates = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for index in tl.range(0, turns * steps, num_stages=STAGES):
        row = (tl.program_id(0) + index // steps * tl.num_programs(0)) * BLOCK_N
        rows = row + tl.arange(0, BLOCK_N)
        start = index % steps * BLOCK_K
        inside = rows < size
        here = inside[:, None] & (start + column < hidden)[None, :]
        up_rows = matrix + (up_row + rows).to(tl.int64)[:, None] * hidden + (start + column)[None, :]
        gate_rows = matrix + (gate_row + rows).to(tl.int64)[:, None] * hidden + (start + column)[None, :]
        u = tl.load(up_rows, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
        g = tl.load(gate_rows, mask=here, other=0.0, eviction_policy="evict_first").to(tl.float32)
        x = tl.load(x_ptr + start + column, mask=start + column < hidden, other=0.0).to(tl.float32)
        ups = _added(ups, u, x, scales, (up_row + row) // 128, start, hidden, GRAIN, BLOCK_N, BLOCK_K)
        gates = _added(gates, g, x, scales, (gate_row + row) // 128, start, hidden, GRAIN, BLOCK_N, BLOCK_K)
        if index % steps == steps - 1:
            up = tl.sum(ups, 1)
            gate = tl.sum(gates, 1)
            if GRAIN == "channel":
                up *= tl.load(scales + up_row + rows, mask=inside, other=0.0)
                gate *= tl.load(scales + gate_row + rows, mask=inside, other=0.0)
            if BIAS:
                up += tl.load(bias_ptr + up_row + rows, mask=inside, other=0.0).to(tl.float32)
                gate += tl.load(bias_ptr + gate_row + rows, mask=inside, other=0.0).to(tl.float32)
            value = activate(gate, up, alpha, limit, CLAMPED)
            tl.store(out_ptr + pair.to(tl.int64) * size + rows, value.to(out_ptr.dtype.element_ty), mask=inside)
            ups = tl.zeros([BLOCK_N, WIDTH], tl.float32)
            gates = tl.zeros([BLOCK_N, WIDTH], tl.float32)


@triton.jit
def _local_choices(id_ptr, TOP_K: tl.constexpr):
    """How many of a token's choices are local; of each choice its slot and its place among these, -1 for others."""
    choice = tl.arange(0, WARP)
    slots = tl.load(id_ptr + choice, mask=choice < TOP_K, other=-1)
    held = (slots >= 0).to(tl.int32)
    return tl.sum(held, 0), slots, tl.where(slots >= 0, tl.cumsum(held, 0) - 1, -1)


@triton.jit
def _local_choice(slots, places, number):
    """Slot and choice of a token's local expert `number`: sums of a warp, an instruction each."""
    here = places == number
    return tl.sum(tl.where(here, slots, 0), 0), tl.sum(tl.where(here, tl.arange(0, WARP), 0), 0)


@triton.jit
def store_sum(total, token, rows, inside, residual_ptr, out_ptr, hidden, RESIDUAL: tl.constexpr):
    """Rows of a token's result: the sum, and the residual where there is one."""
    at = tl.cast(token, tl.int64) * hidden + rows
    if RESIDUAL:
        total += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def plain_down(
    inner_ptr, id_ptr, route_ptr, residual_ptr, out_ptr, hidden, size, weight_ptr, scale_ptr, bias_ptr,
    shared_ptr, shared_scale_ptr, local,
    CHOICES: tl.constexpr, RESIDUAL: tl.constexpr, PDL: tl.constexpr, GRAIN: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, STAGES: tl.constexpr, BIAS: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of one token's sum, one expert behind the other in one loop. GRAIN and SHARED as in `plain_up`."""
    await_and_trigger(PDL)
    pair = tl.program_id(1) * CHOICES
    count, slots, places = _local_choices(id_ptr + pair, CHOICES)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < hidden
    column = tl.arange(0, BLOCK_K)
    row_at = rows.to(tl.int64)[:, None] * size + column[None, :]
    steps = tl.cdiv(size, BLOCK_K)
    WIDTH: tl.constexpr = BLOCK_K if GRAIN == "" else BLOCK_K // 16
    totals = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for index in tl.range(0, count * steps, num_stages=STAGES):
        slot, choice = _local_choice(slots, places, index // steps)
        start = index % steps * BLOCK_K
        here = start + column < size
        matrix = weight_ptr
        scales = scale_ptr
        if SHARED:
            own = slot == local
            slot = tl.where(own, 0, slot)
            matrix = tl.where(own, shared_ptr, weight_ptr)
            if GRAIN != "":
                scales = tl.where(own, shared_scale_ptr, scale_ptr)
        expert = matrix + slot.to(tl.int64) * hidden * size + start
        w = tl.load(expert + row_at, mask=inside[:, None] & here[None, :], other=0.0, eviction_policy="evict_first").to(
            tl.float32
        )
        x = tl.load(inner_ptr + (pair + choice).to(tl.int64) * size + start + column, mask=here, other=0.0)
        x = x.to(tl.float32) * tl.load(route_ptr + pair + choice)
        if GRAIN == "channel":
            w *= tl.load(scales + slot * hidden + rows, mask=inside, other=0.0)[:, None]
        line = slot * tl.cdiv(hidden, 128) + tl.program_id(0) * BLOCK_N // 128
        totals = _added(totals, w, x, scales, line, start, size, GRAIN, BLOCK_N, BLOCK_K)
    total = tl.sum(totals, 1)
    if BIAS:
        for number in range(count):
            slot, choice = _local_choice(slots, places, number)
            biases = tl.load(bias_ptr + slot * hidden + rows, mask=inside, other=0.0).to(tl.float32)
            total += biases * tl.load(route_ptr + pair + choice)
    store_sum(total, tl.program_id(1), rows, inside, residual_ptr, out_ptr, hidden, RESIDUAL)
