"""Decode over pages of latents equals attention with keys and values expanded, for sequences of any lengths."""

import pytest
import torch

from shardwise.ops.mla import decode
from shardwise.ops.mla.decode import LatentWorkspace, Tile, latent_decode_attention
from shardwise.ops.triton_support import interpreting

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or interpreting()), reason="needs a CUDA device or Triton's interpreter"
)
SMALL = dict(heads=6, nope=16, rank=32, rope=16, value=16)
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
EPS = 1e-5


class Case:
    """A step's random inputs: a cache that already holds `positions` keys of each sequence, pages in random order."""

    def __init__(self, positions, *, heads, nope, rank, rope, value, page=16, dtype=torch.float32):
        torch.manual_seed(0)
        self.count, self.sizes = len(positions), (heads, nope, rank, rope, value)
        self.positions = torch.tensor(positions, dtype=torch.int32, device=DEVICE)
        pages = max(*positions, 0) // page + 1
        draw = lambda *shape: torch.randn(*shape, device=DEVICE).to(dtype)  # noqa: E731
        # Rows stand in one tensor, as a fused projection leaves them.
        self.rows = draw(self.count, heads * (nope + rope) + rank + rope)
        self.q, self.key = self.rows.split_with_sizes((heads * (nope + rope), rank + rope), 1)
        self.key_up, self.value_up = draw(heads, nope, rank) / rank**0.5, draw(heads, rank, value) / rank**0.5
        self.pool = draw(self.count * pages, page, rank + rope)
        self.pool[:, :, rank:] *= 2.0
        self.slots = torch.randperm(self.count, device=DEVICE).int()
        self.table = torch.randperm(self.count * pages, device=DEVICE).int().view(self.count, pages)
        self.norm = 1.0 + 0.1 * draw(rank)
        angles = torch.rand(pages * page, rope // 2, device=DEVICE) * 6.0
        self.rope = torch.cat((angles.cos(), angles.sin()), 1)
        self.scale = (nope + rope) ** -0.5
        self.workspace = LatentWorkspace.create(self.count, heads, rank, DEVICE)

    def run(self, **options):
        return latent_decode_attention(
            self.q, self.key, self.key_up, self.value_up, self.pool, self.table, self.slots, self.positions,
            self.workspace, scale=self.scale, **options,
        )  # fmt: skip

    def row(self, sequence: int, position: int) -> tuple[int, int]:
        page = self.pool.shape[1]
        return int(self.table[self.slots[sequence], position // page]), position % page

    def expected(self, *, norm: bool, rope: bool) -> tuple[torch.Tensor, dict[tuple[int, int], torch.Tensor]]:
        """Outputs [T, N Dv], and the new keys by their places, in float64."""
        heads, nope, rank, rope_dim, value = self.sizes
        pool, outputs, keys = self.pool.double(), [], {}
        for sequence, position in enumerate(self.positions.tolist()):
            if position < 0:
                outputs.append(torch.zeros(heads * value, device=DEVICE, dtype=torch.float64))
                continue
            latent, rotated = self.key[sequence].double().split((rank, rope_dim))
            query = self.q[sequence].double().view(heads, -1)
            if norm:
                latent = latent * (latent.square().mean() + EPS) ** -0.5 * self.norm.double()
            if rope:
                rotated, turned = (self._turned(x, position) for x in (rotated, query[:, nope:]))
                query = torch.cat((query[:, :nope], turned), 1)
            keys[self.row(sequence, position)] = new = torch.cat((latent, rotated))
            cached = pool[self.table[self.slots[sequence]].long()].flatten(0, 1)[:position]
            rows = torch.cat((cached, new.to(self.pool.dtype).double()[None]))
            k = torch.einsum("lc,npc->nlp", rows[:, :rank], self.key_up.double())
            shared = rows[:, rank:].expand(heads, -1, -1)
            scores = torch.einsum("np,nlp->nl", query, torch.cat((k, shared), 2)) * self.scale
            v = torch.einsum("lc,ncd->nld", rows[:, :rank], self.value_up.double())
            outputs.append(torch.einsum("nl,nld->nd", scores.softmax(1), v).flatten())
        return torch.stack(outputs), keys

    def _turned(self, x, position):
        cos, sin = self.rope[position].double().chunk(2)
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def check(case: Case, *, norm=True, rope=True, **options) -> None:
    expected, keys = case.expected(norm=norm, rope=rope)
    before = case.pool.clone()
    found = case.run(norm=case.norm if norm else None, eps=EPS, rope=case.rope if rope else None, **options)
    tolerance = TOLERANCES[case.pool.dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)
    for place, key in keys.items():
        torch.testing.assert_close(case.pool[place].double(), key, atol=tolerance, rtol=tolerance)
        before[place] = case.pool[place]
    assert torch.equal(case.pool, before), "no other place of the cache changes"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "positions",
    [[0], [15], [16], [100], [0, 1, 15, 16, 17], [3, -1, 70, 200], [-1, -1], [40] * 9],
    ids=str,
)
def test_a_step_equals_expanded_attention_and_appends_its_keys(positions, dtype):
    check(Case(positions, **SMALL, dtype=dtype))


def test_rows_that_are_normed_and_rotated_already_are_taken_as_they_are():
    check(Case([5, 33], **SMALL), norm=False, rope=False)


@pytest.mark.parametrize("heads", [1, 16, 20, 40])
def test_any_number_of_heads_is_cut_into_tiles(heads):
    check(Case([50, 9], **{**SMALL, "heads": heads}), tile=Tile(16, 16, 4, 1))


@pytest.mark.parametrize("programs", [1, 3, 64])
def test_shares_of_any_size_give_the_same_result(monkeypatch, programs):
    monkeypatch.setattr(decode, "multiprocessors", lambda device: programs)
    check(Case([100, 0, -1, 31, 64, 5], **SMALL))


def test_what_lies_behind_the_last_key_is_not_read():
    case = Case([20, 3], **SMALL)
    for sequence, position in enumerate((20, 3)):
        page, place = case.row(sequence, position)
        case.pool[page, place + 1 :] = float("nan")
    assert torch.isfinite(case.run(norm=case.norm, rope=case.rope)).all()


def test_illegal_sizes_are_named():
    with pytest.raises(ValueError, match="latents of 24 elements, need a power of two from 16 to 512"):
        Case([1], **{**SMALL, "rank": 24}).run()
    with pytest.raises(ValueError, match="heads of 12 elements without rotation, need a multiple of 16"):
        Case([1], **{**SMALL, "nope": 12}).run()
    case = Case([1, 2], **SMALL)
    with pytest.raises(ValueError, match=r"queries \(2, 191\) and keys \(2, 48\)"):
        case.q = case.q[:, 1:]
        case.run()


DEEPSEEK = dict(nope=128, rank=512, rope=64, value=128, page=64)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def lengths(count: int, most: int) -> list[int]:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, most, (count,), generator=generator).tolist()


class TestRealSizes:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("heads", [16, 32, 128])
    @pytest.mark.parametrize(
        "positions", [[511], [32767, 5, -1, 8191], lengths(33, 3000), lengths(64, 700), lengths(128, 300)], ids=len
    )
    def test_a_step_equals_expanded_attention(self, heads, dtype, positions):
        check(Case(positions, heads=heads, **DEEPSEEK, dtype=dtype), pdl=True)

    @pytest.mark.parametrize("heads", [16, 128])
    def test_one_graph_serves_sequences_of_any_length(self, heads):
        case = Case([4000] * 8, heads=heads, **DEEPSEEK, dtype=torch.bfloat16)
        options = dict(norm=case.norm, eps=EPS, rope=case.rope, pdl=True)
        case.run(**options)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = case.run(**options)
        for positions in (lengths(8, 4000), [0] * 8, [3999, -1, 63, 64, 65, -1, 2000, 1]):
            case.positions.copy_(torch.tensor(positions))
            expected, _ = case.expected(norm=True, rope=True)
            graph.replay()
            torch.testing.assert_close(found.double(), expected, atol=3e-2, rtol=3e-2)
