import re
import xml.etree.ElementTree as ElementTree

import pytest
from published_models import CONFIGS

from shardwise.sharding import topology
from shardwise.sharding.cost import Workload, estimate
from shardwise.sharding.page.page import _map_row, page
from shardwise.sharding.page.svg import holding_map
from shardwise.sharding.plan import plan
from shardwise.sharding.search import Objective, search

CONFIG = {
    "_meta": {"name": "a <b> & c"},
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 1000,
    "torch_dtype": "bfloat16",
}


@pytest.fixture(scope="module")
def html():
    planned, machine, work = plan(CONFIG, tp=2), topology.load("h200"), Workload()
    found = search(planned.model, machine, work, devices=16, objective=Objective.LATENCY)
    return page(planned, machine, work, estimate(planned, machine, work), found)


def test_the_page_loads_nothing_from_outside(html):
    assert not re.search(r"(src|href|url\()\s*=?\s*['\"]?(https?:)?//", html) and "<script" not in html


def test_names_are_escaped(html):
    assert "a &lt;b&gt; &amp; c" in html and "<b> & c" not in html


def test_drawings_are_well_formed_and_show_both_ranks(html):
    drawings = re.findall(r"<svg.*?</svg>", html)
    assert len(drawings) == 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    assert "rank 0" in drawings[0] and "rank 1" in drawings[0]
    # 6 + 2 heads of 64 on rank 0, 3 + 1 on rank 1: query rows 0 to 384 and 384 to 576.
    assert "rank 0: 0 to 384 of 576" in drawings[1] and "rank 1: 384 to 576 of 576" in drawings[1]


def held(made, role):
    """[(x, y, width, height)] of what the ranks hold of a tensor, in ranks' order, as fractions of their cells."""
    row = next(_map_row(made, p) for p in made.loaded if p.spec.role == role)
    drawn = ElementTree.fromstring(holding_map([row], "map"))
    boxes = [[float(r.get(k)) for k in ("x", "y", "width", "height")] + [r.get("class")] for r in drawn.iter("rect")]
    cells = [box for box in boxes if box[4] == "free"]
    inside = [
        ((x - cx) / cw, (y - cy) / ch, w / cw, h / ch)
        for cx, cy, cw, ch, _ in cells
        for x, y, w, h, kind in boxes
        if kind == "weights" and cx <= x < cx + cw
    ]
    return [tuple(round(n, 2) for n in box) for box in inside]


@pytest.mark.parametrize("name", ["Qwen/Qwen3-30B-A3B", "openai/gpt-oss-20b"], ids=["one by one", "stacked"])
def test_experts_that_are_cut_as_well_lie_in_a_part_of_the_cell(name):
    """Sideways which experts a rank holds, downwards which part of each."""
    role = "gate.weight" if "Qwen" in name else "gate_up.weight"
    spread, cut = plan(CONFIGS[name], tp=2, ep=2), plan(CONFIGS[name], tp=2)
    assert held(spread, role) == [(0, 0, 0.5, 1), (0.5, 0, 0.5, 1)]
    assert held(cut, role) == [(0, 0, 1, 0.5), (0, 0.5, 1, 0.5)]
    both = plan(CONFIGS[name], tp=4, ep=2)
    quarters = [(x, y, 0.5, 0.5) for x in (0, 0.5) for y in (0, 0.5)]
    assert sorted(held(both, role)) == quarters


def test_the_refused_layouts_stand_with_their_reason(html):
    assert re.search(r"<h2>Refused</h2>.*<li>tp 16: .*9 q_heads in 3 groups on 16 ranks", html)


def test_how_many_sequences_fit_is_among_the_figures(html):
    assert re.search(r"<b>\d+</b><span>sequences of 4096 tokens fit</span>", html)
