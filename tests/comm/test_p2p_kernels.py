"""The kernels' arithmetic, addressing and re-arming, one rank at a time in Triton's interpreter.

Programs run one after another there, so what the peers push is laid into the rank's slots before the launch, and
what the rank pushes is read from theirs after it.
"""

import itertools

import pytest
import torch

from shardwise import partition
from shardwise.comm.p2p.workspace import COUNTERS

tl = pytest.importorskip("triton.language")
arithmetic = pytest.importorskip("shardwise.comm.p2p.arithmetic")
gather = pytest.importorskip("shardwise.comm.p2p.gather").gather
one_shot = pytest.importorskip("shardwise.comm.p2p.one_shot").one_shot
two_shot = pytest.importorskip("shardwise.comm.p2p.two_shot").two_shot
asm = pytest.importorskip("shardwise.comm.p2p.asm")
rounded_sum = pytest.importorskip("p2p_checks").rounded_sum

interpreted = pytest.mark.skipif(not asm.INTERPRET.value, reason="kernels of this process are compiled for a GPU")
pytestmark = [
    interpreted,
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),  # inside the interpreter
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # the norm of a row that is masked out
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
]
ARMED = -1
EPS = 1e-5


class Slots:
    """All ranks' slots in CPU memory, addressed as the kernels do."""

    def __init__(self, world: int, rows: int, chunks: int):
        self.world, self.row_words = world, chunks * 4
        self.region_words = rows * self.row_words
        words = 2 * (world - 1) * self.region_words
        self.memory = [torch.full((words,), ARMED, dtype=torch.int32) for _ in range(world)]

    @property
    def addresses(self) -> tuple[int, ...]:
        return tuple(memory.data_ptr() for memory in self.memory)

    def row(self, owner: int, source: int, parity: int, row: int) -> torch.Tensor:
        index = source - 1 if source > owner else source
        start = (parity * (self.world - 1) + index) * self.region_words + row * self.row_words
        return self.memory[owner][start : start + self.row_words]


def words(values: torch.Tensor, row_words: int) -> torch.Tensor:
    padded = torch.zeros(row_words * 4 // values.element_size(), dtype=values.dtype)
    padded[: values.numel()] = values
    return padded.view(torch.int32)


def launch(
    kernel, world, rank, slots, tensors, rows, width, total, chunks, *,
    fused, call, aligned=True, grid=2, ahead=0, bulk=False, pushers=1, share=1, missing=(),
):  # fmt: skip
    """`missing`: ranks whose data never comes; the deadline is short then. `pushers`, `share`: of two-shot."""
    counters = torch.full((COUNTERS,), call, dtype=torch.int32)
    abort = torch.zeros(1, dtype=torch.int32)
    records = torch.zeros(world, dtype=torch.int64)
    lanes = max(32, 1 << (chunks - 1).bit_length())
    form, sizes = {"AHEAD": ahead, "BULK": bulk}, (rows, width, total, chunks)
    if kernel is two_shot:
        turns = -(-rows // world)
        late = turns if grid == pushers else max(0, turns - share * (pushers // (world - 1)))
        form, sizes = {"BULK": bulk}, (*sizes, pushers, late)
    kernel[(grid,)](
        *tensors, slots.addresses, counters, abort.data_ptr(), records.data_ptr(), slots.region_words * 4,
        10**7 if missing else 10**9, *sizes, EPS, 1.0,
        WORLD=world, RANK=rank, LANES=lanes, ALIGNED=aligned, FUSED=fused, **form,
        PAUSING=False, PDL=False,
    )  # fmt: skip
    assert counters.eq(call + 1).all(), "every copy of the call counter moves on"
    assert records.nonzero().view(-1).tolist() == list(missing), "who is missing is named, and nobody else"
    assert abort.item() == bool(missing)


def check_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The interpreter truncates float32 to bfloat16, so a value may be one unit in the last place off, twice."""
    unit = {torch.float32: 2**-22, torch.float16: 2**-10, torch.bfloat16: 2**-6}[found.dtype]
    assert torch.isfinite(found).all()
    assert ((found.double() - expected.double()).abs() <= unit * (expected.double().abs() + 1)).all()


def random_rows(world: int, rows: int, width: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(world * 1000 + rows * 10 + width)
    return [torch.randn(rows, width, generator=generator).to(dtype) for _ in range(world)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("world, rank", [(2, 0), (2, 1), (4, 2)])
@pytest.mark.parametrize(
    "ahead, bulk",
    [(0, False), (2, False), (1, True)],
    ids=["", "2 ahead", "1 ahead in bulk"],
)
def test_one_shot_sums_pushes_and_rearms(world, rank, dtype, ahead, bulk):
    rows, width, call = 5, 64, 7
    chunks = width * dtype.itemsize // 16
    x = random_rows(world, rows, width, dtype)
    slots = Slots(world, rows, chunks)
    for source in set(range(world)) - {rank}:
        for row in range(rows):
            slots.row(rank, source, call & 1, row).copy_(words(x[source][row], slots.row_words))
    out = torch.full_like(x[rank], float("nan"))
    tensors = (x[rank], x[rank], x[rank], out, out)
    launch(one_shot, world, rank, slots, tensors, rows, width, rows * width, chunks,
           fused=False, call=call, ahead=ahead, bulk=bulk)  # fmt: skip
    check_close(out, rounded_sum(x))
    assert slots.memory[rank].eq(ARMED).all(), "what was taken is armed again"
    for peer in set(range(world)) - {rank}:
        for row in range(rows):
            assert torch.equal(slots.row(peer, rank, call & 1, row), words(x[rank][row], slots.row_words))


def test_all_who_did_not_come_are_named_at_once():
    world, rank, width = 4, 1, 64
    x = random_rows(world, 1, width, torch.float32)
    slots = Slots(world, 1, width // 4)
    slots.row(rank, 2, 1, 0).copy_(words(x[2][0], slots.row_words))
    out = torch.zeros_like(x[rank])
    tensors = (x[rank], x[rank], x[rank], out, out)
    launch(one_shot, world, rank, slots, tensors, 1, width, width, width // 4,
           fused=False, call=1, grid=1, missing=(0, 3))  # fmt: skip
    assert out.isnan().all(), "what did not arrive is not a number"


@pytest.mark.parametrize("width, aligned", [(64, True), (51, False)])
@pytest.mark.parametrize("kernel", [one_shot, two_shot], ids=["one_shot", "two_shot"])
@pytest.mark.parametrize("world, rank, rows", [(2, 1, 5), (4, 1, 3), (4, 3, 9), (8, 5, 9)])
def test_fused_equals_the_three_steps(kernel, world, rank, rows, width, aligned):
    dtype, call = torch.float16, 4
    chunks = -(-width * 2 // 16)
    x = random_rows(world, rows, width, dtype)
    residual, weight = random_rows(1, rows, width, dtype)[0], random_rows(1, 1, width, dtype)[0][0]
    total = rounded_sum(x)
    slots = Slots(world, rows + world, chunks)
    lay_peers = lay_one_shot if kernel is one_shot else lay_two_shot
    lay_peers(slots, world, rank, x, total, call & 1)
    out, residual_out = torch.full_like(total, float("nan")), torch.full_like(total, float("nan"))
    tensors = (x[rank], residual, weight, out, residual_out)
    launch(kernel, world, rank, slots, tensors, rows, width, rows * width, chunks,
           fused=True, call=call, aligned=aligned)  # fmt: skip
    stream = (total.float() + residual.float()).to(dtype)
    scale = torch.rsqrt(stream.float().square().mean(-1, keepdim=True) + EPS)
    check_close(residual_out, stream)
    check_close(out, stream.float() * scale * (weight.float() + 1))
    assert slots.memory[rank].eq(ARMED).all()


@pytest.mark.parametrize("kernel", [one_shot, two_shot], ids=["one_shot", "two_shot"])
def test_sums_over_a_block_that_follow_each_other_take_places_by_turns(kernel, monkeypatch):
    """With one place a fast warp would overwrite what a slow one still reads of the sum before."""
    turns = []

    def recorded(values, turn):
        turns.append(int(turn.handle.data.item()) if hasattr(turn, "handle") else int(turn))
        return tl.sum(values)

    monkeypatch.setattr(arithmetic, "block_sum", recorded)
    world, rank, rows, width = 4, 1, 12, 64
    x = random_rows(world, rows, width, torch.float32)
    slots = Slots(world, rows + world, width // 4)
    lay_peers = lay_one_shot if kernel is one_shot else lay_two_shot
    lay_peers(slots, world, rank, x, rounded_sum(x), 0)
    out, total = torch.empty_like(x[0]), torch.empty_like(x[0])
    launch(kernel, world, rank, slots, (x[rank], x[0], x[0][0], out, total), rows, width,
           rows * width, width // 4, fused=True, call=0, grid=1)  # fmt: skip
    assert len(turns) >= rows
    assert all((first + second) % 2 for first, second in itertools.pairwise(turns)), turns


def lay_one_shot(slots, world, rank, x, total, parity):
    for source in set(range(world)) - {rank}:
        for row in range(len(total)):
            slots.row(rank, source, parity, row).copy_(words(x[source][row], slots.row_words))


def lay_two_shot(slots, world, rank, x, total, parity):
    rows = len(total)
    start, stop = partition.extent(rows, world, rank)
    for peer in set(range(world)) - {rank}:
        for place, row in enumerate(range(start, stop)):
            slots.row(rank, peer, parity, place).copy_(words(x[peer][row], slots.row_words))
        for place, row in enumerate(range(*partition.extent(rows, world, peer))):
            place += -(-rows // world)
            slots.row(rank, peer, parity, place).copy_(words(total[row], slots.row_words))


@pytest.mark.parametrize(
    "grid, pushers, share, bulk",
    [(1, 1, 1, False), (5, 2, 1, True), (4, 3, 1, False), (6, 4, 2, True), (12, 9, 1, False)],
)
def test_two_shot_pushes_contributions_and_sums(grid, pushers, share, bulk):
    """A block that does everything; blocks that push alone, or also take sums of the last turns, of all turns."""
    world, rank, rows, width, call = 4, 1, 10, 32, 3
    chunks = width * 4 // 16
    x = random_rows(world, rows, width, torch.float32)
    total = rounded_sum(x)
    slots = Slots(world, rows + world, chunks)
    lay_two_shot(slots, world, rank, x, total, call & 1)
    out = torch.full_like(total, float("nan"))
    launch(two_shot, world, rank, slots, (x[rank], x[rank], x[rank], out, out), rows, width, rows * width,
           chunks, fused=False, call=call, grid=grid, pushers=pushers, share=share, bulk=bulk)  # fmt: skip
    assert torch.equal(out, total)
    start, stop = partition.extent(rows, world, rank)
    for peer in (0, 2, 3):
        for place, row in enumerate(range(*partition.extent(rows, world, peer))):
            assert torch.equal(slots.row(peer, rank, call & 1, place), words(x[rank][row], slots.row_words))
        for place, row in enumerate(range(start, stop)):
            found = slots.row(peer, rank, call & 1, -(-rows // world) + place)
            assert torch.equal(found, words(total[row], slots.row_words))


def test_the_last_row_of_a_flat_tensor_may_be_short():
    world, rank, width, total = 2, 0, 128, 300
    x = random_rows(world, 1, total, torch.float32)
    slots = Slots(world, 3, width * 4 // 16)
    for row in range(3):
        slots.row(0, 1, 0, row).copy_(words(x[1][0, row * width : (row + 1) * width], slots.row_words))
    out = torch.full((384,), float("nan"))
    launch(one_shot, world, rank, slots, (x[0], x[0], x[0], out, out), 3, width, total, 32, fused=False, call=0)
    assert torch.equal(out[:total], (x[0] + x[1])[0])
    assert out[total:].isnan().all(), "nothing is written past the end"


def test_a_word_that_means_not_arrived_is_sent_as_another_nan():
    world, width = 2, 32
    x = torch.zeros(1, width)
    x.view(torch.int32)[0, 5] = ARMED
    slots = Slots(world, 1, 8)
    slots.row(0, 1, 0, 0).copy_(words(torch.ones(width), slots.row_words))
    out = torch.zeros(1, width)
    launch(one_shot, world, 0, slots, (x, x, x, out, out), 1, width, width, 8, fused=False, call=0, grid=1)
    sent = slots.row(1, 0, 0, 0)
    assert not sent.eq(ARMED).any()
    assert sent.view(torch.float32)[5].isnan()
    assert out[0, 5].isnan()
    assert out.isnan().sum() == 1


def halves(values: torch.Tensor) -> torch.Tensor:
    """Bytes as a gather sends them, two in a word, eight in a chunk."""
    padded = torch.zeros(-(-values.numel() // 8) * 8, dtype=torch.uint8)
    padded[: values.numel()] = values.view(torch.uint8)
    return padded[0::2].int() | padded[1::2].int() << 8


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("world, rank", [(2, 0), (4, 2), (8, 5)])
@pytest.mark.parametrize("total, stretch", [(640, 64), (8, 8), (51, 17)])
def test_a_gather_lays_every_byte_in_its_place(world, rank, total, stretch, aligned):
    lanes, call = 32, 3
    rows = -(-total // (lanes * 8))
    x = [torch.arange(total).add(source).to(torch.int8) for source in range(world)]
    x[rank][:8] = -1
    slots = Slots(world, rows, lanes)
    for source in set(range(world)) - {rank}:
        sent = halves(x[source])
        whole_region(slots, rank, source, call)[: sent.numel()] = sent
    out, counters = torch.zeros(world * total, dtype=torch.int8), torch.full((COUNTERS,), call, dtype=torch.int32)
    abort, records = torch.zeros(1, dtype=torch.int32), torch.zeros(world, dtype=torch.int64)
    gather[(2,)](
        x[rank], out, slots.addresses, counters, abort.data_ptr(), records.data_ptr(), slots.region_words * 4, 10**9,
        rows, stretch, total,
        WORLD=world, RANK=rank, LANES=lanes, ALIGNED=aligned and stretch % 8 == 0, PAUSING=0, PDL=False,
    )  # fmt: skip
    assert torch.equal(out, torch.stack([part.view(-1, stretch) for part in x], 1).view(-1))
    assert slots.memory[rank].eq(ARMED).all(), "what was taken is armed again"
    assert counters.eq(call + 1).all()
    for peer in set(range(world)) - {rank}:
        sent = whole_region(slots, peer, rank, call)
        count = halves(x[rank]).numel()
        assert torch.equal(sent[:count], halves(x[rank]))
        assert sent[count:].eq(ARMED).all(), "nothing is sent past the end"


def whole_region(slots: Slots, owner: int, source: int, call: int) -> torch.Tensor:
    first = slots.row(owner, source, call & 1, 0)
    return first.as_strided((slots.region_words,), (1,), first.storage_offset())
