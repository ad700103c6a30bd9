"""Operators with kernels of their own keep to their arguments: what lies around these is neither read nor written.

`sanitize.py` beside this file is the other half: a program for compute-sanitizer, which also sees what kernels do to
memory that they allocate themselves.
"""

import pytest
import torch
from guarded import Guarded, guard_all
from operator_samples import Sample, flat, mutated
from test_operator_table import INFOS, RUNS, build

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning", "ignore::RuntimeWarning")
NAN, ZERO = 0xFF, 0x00  # bytes that make NaN or -1, and 0


def has_kernels(sample: Sample) -> bool:
    return bool(INFOS[sample.qualified_name].needs)


@pytest.mark.parametrize("sample,device", [run for run in RUNS if has_kernels(run.values[0])])
def test_neither_results_nor_neighbours_depend_on_the_memory_around_the_arguments(sample, device):
    results = []
    for poison in (NAN, ZERO):
        made: list[Guarded] = []
        args = guard_all(build(sample, device), poison, made)
        results.append([x.clone() for x in flat(sample.overload(*args)) + mutated(sample.overload, args)])
        assert all(one.untouched() for one in made)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def rows(device="cpu"):
    return torch.arange(40, dtype=torch.float32, device=device).view(5, 8)[:, 1:4]


def test_a_guarded_copy_keeps_values_strides_and_alignment():
    guarded = Guarded.around(rows(), NAN)
    assert torch.equal(guarded.tensor, rows()) and guarded.tensor.stride() == (8, 1)
    assert guarded.tensor.data_ptr() % 16 == rows().data_ptr() % 16
    assert torch.equal(Guarded.around(torch.ones(3).expand(4, 3), NAN).tensor, torch.ones(4, 3))
    assert Guarded.around(torch.empty(0, 4), NAN).tensor.shape == (0, 4)


@pytest.mark.parametrize("place", [3, 5, -1, 4 * 8 + 3])
def test_a_write_beside_the_rows_is_noticed(place):
    guarded = Guarded.around(rows(), ZERO)
    assert guarded.untouched()
    guarded.tensor.add_(1)
    assert guarded.untouched()
    first = guarded.tensor.storage_offset()
    guarded.memory.view(torch.float32)[first + place] = 7.0
    assert not guarded.untouched()
