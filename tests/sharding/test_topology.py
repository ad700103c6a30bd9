import json

import pytest

from shardwise.sharding import topology


@pytest.mark.parametrize("name", topology.BUILT_IN)
def test_a_built_in_topology_survives_its_file(name, tmp_path):
    file = tmp_path / "machine.json"
    topology.save(topology.BUILT_IN[name], file)
    assert topology.load(str(file)) == topology.BUILT_IN[name]


def test_groups_beyond_a_node_use_the_slow_link():
    h200 = topology.load("h200")
    two = h200.spread(16)
    assert (two.nodes, two.ranks_per_node) == (2, 8) and two.link(8) is h200.intra and two.link(16) is h200.inter
    four = h200.spread(16, nodes=4)
    assert four.ranks_per_node == 4 and four.link(4) is h200.intra and four.link(8) is h200.inter


def test_a_group_that_straddles_two_nodes_uses_the_slow_link():
    h200 = topology.load("h200").spread(12, nodes=2)
    assert h200.link(3) is h200.intra and h200.link(4) is h200.inter


@pytest.mark.parametrize(("ranks", "nodes", "legal"), [(8, 3, "1, 2, 4, 8"), (16, 1, "2, 4, 8, 16"), (4, 8, "1, 2, 4")])
def test_ranks_that_cannot_lie_on_so_many_nodes_are_refused_with_those_they_can(ranks, nodes, legal):
    with pytest.raises(ValueError, match=f"--nodes {nodes}: {ranks} ranks, .* lie on {legal}$"):
        topology.load("h200").spread(ranks, nodes)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"device": 3}, "device is int, should be an object"),
        ({"ranks_per_node": -1}, "ranks_per_node is -1, should be a positive number"),
        ({"ranks_per_node": 2.5}, "ranks_per_node is 2.5, should be a whole number"),
        ({"intra": {"latency_seconds": "short"}}, "latency_seconds is 'short', should be a positive number"),
        ({"source": 5}, "source is 5, should be a text"),
        ({"colour": 1}, "unknown field colour"),
        ({"schema_version": 9}, "schema_version is 9"),
        ({"schema_version": None}, "`shardwise bench comm --calibrate FILE` writes one"),
        ({"intra": {"latency_seconds": 1e-6}}, "bandwidth_bytes_per_second"),
    ],
)
def test_a_wrong_file_is_refused_by_field(change, complaint, tmp_path):
    file = tmp_path / "machine.json"
    topology.save(topology.BUILT_IN["h200"], file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=complaint):
        topology.load(str(file))


def test_an_unknown_device_lists_the_known_ones():
    with pytest.raises(ValueError, match="h200, h100, b200"):
        topology.load("h9000")
