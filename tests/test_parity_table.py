"""The table at the end of a run says where tokens differ."""

from parity import table


def test_a_failed_comparison_is_marked_in_its_cell():
    lines = table(
        {
            ("llama", "tp 2"): {"shm": True, "threads": False},
            ("mixtral", "tp 4, moe_tp 2 x ep 2"): {"mpi": True},
        }
    )
    assert lines == [
        "         tp2  tp4 moe_tp2 ep2",
        "llama    !ts",
        "mixtral       m",
        "(t threads, s shm, m mpi; ! before a letter: other tokens there)",
    ]
