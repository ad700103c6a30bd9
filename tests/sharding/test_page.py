import re
import xml.etree.ElementTree as ElementTree

import pytest

from shardwise.sharding import topology
from shardwise.sharding.cost import Workload, estimate
from shardwise.sharding.page.page import page
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


def test_the_refused_layouts_stand_with_their_reason(html):
    assert re.search(r"<h2>Refused</h2>.*<li>tp 16: .*9 q_heads in 3 groups on 16 ranks", html)


def test_how_many_sequences_fit_is_among_the_figures(html):
    assert re.search(r"<b>\d+</b><span>sequences of 4096 tokens fit</span>", html)
