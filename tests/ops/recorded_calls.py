"""What the tests of recorded calls look at: their tapes, and calls on another stream and in a graph."""

import torch


def tapes_of(layouts):
    """Of a recorded operator's layouts."""
    return [tape for found in layouts._plans.values() for _, kinds in found for tape in kinds.values()]


def beside_and_captured(call):
    """Results of four calls on another stream; a graph of one call and its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        beside = [call() for _ in range(4)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    return beside, graph, captured
