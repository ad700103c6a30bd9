"""Which rank this process is, by every launcher's variables, alone and mixed."""

import os

import pytest

from shardwise.comm.rank import RankInfo
from shardwise.launch import worker
from shardwise.launch.env import LauncherConflict, detect, explain, rank_variables, without_launcher

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "3",
    "MV2_COMM_WORLD_SIZE": "8",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}
SLURM_STEP = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2(x4)",
    "SLURM_NODEID": "1",
}


@pytest.mark.parametrize(
    "environ, source",
    [(TORCHRUN, "torchrun"), (OPEN_MPI, "Open MPI"), (MPICH, "MPICH"), (MVAPICH, "MPICH"), (SLURM_STEP, "Slurm")],
    ids=["torchrun", "openmpi", "mpich", "mvapich", "slurm"],
)
def test_every_launcher_numbers_its_ranks(environ, source):
    assert detect(environ) == RankInfo(3, 8, 1, 2, 1, source)
    assert explain(environ).startswith(f"rank 3 of 8, from {source}")


def test_no_variables_mean_a_single_process():
    assert detect({}) == RankInfo()
    assert "single process" in explain({})


def test_a_plain_process_inside_a_slurm_allocation_is_single():
    environ = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}
    assert detect(environ) == RankInfo()
    assert "not a Slurm job step" in explain(environ)


def test_one_slurm_task_is_a_single_process():
    one = {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert detect({**SLURM_STEP, **one}) == RankInfo()


@pytest.mark.parametrize("winner, source", [(TORCHRUN, "torchrun"), (OPEN_MPI, "Open MPI")])
def test_a_launcher_inside_slurm_wins(winner, source):
    other_place = {**SLURM_STEP, "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    assert detect({**other_place, **winner}).source == source


def test_one_mpi_rank_in_a_larger_slurm_step_is_one_rank():
    alone = {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    alone |= {"OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    assert detect({**SLURM_STEP, **alone}).world == 1


def test_agreeing_launchers_are_no_conflict():
    assert detect({**TORCHRUN, **OPEN_MPI}).source == "torchrun"


def test_disagreeing_launchers_are_both_named_and_a_choice_settles_it():
    environ = {**TORCHRUN, **OPEN_MPI, "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    with pytest.raises(LauncherConflict, match=r"torchrun \(RANK=3.*Open MPI \(OMPI_COMM_WORLD_RANK=1"):
        detect(environ)
    assert detect({**environ, "SHARDWISE_LAUNCHER": "mpi"}).rank == 1
    assert detect({**environ, "SHARDWISE_LAUNCHER": "torchrun"}).rank == 3
    assert detect({**environ, "SHARDWISE_LAUNCHER": "single"}) == RankInfo()


def test_one_mpi_process_around_torchrun_makes_no_claim():
    around = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    assert detect({**TORCHRUN, **around}).source == "torchrun"


@pytest.mark.parametrize(
    "environ, text",
    [
        ({"SHARDWISE_LAUNCHER": "mpi"}, "none of that launcher's variables"),
        ({"SHARDWISE_LAUNCHER": "nonsense"}, "legal are local, mpi, single, slurm, torchrun"),
        ({"RANK": "0"}, "WORLD_SIZE is not"),
        ({"WORLD_SIZE": "2"}, "RANK is not"),
        ({**TORCHRUN, "RANK": "three"}, "RANK=three: an integer is expected"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK=-1: must not be negative"),
        ({**TORCHRUN, "RANK": "8"}, "rank 8 is not in"),
    ],
)
def test_unusable_variables_are_named(environ, text):
    with pytest.raises(ValueError, match=text):
        detect(environ)


def test_our_own_variables_come_first_and_round_trip():
    info = RankInfo(1, 4, 1, 2, 0, "Ray")
    assert detect({**TORCHRUN, **OPEN_MPI, **rank_variables(info)}) == info


def test_children_inherit_no_launcher():
    environ = {**TORCHRUN, **OPEN_MPI, **SLURM_STEP, **rank_variables(RankInfo()), "PATH": "/bin", "PMIX_RANK": "1"}
    assert {name for name in without_launcher(environ) if not name.startswith("SHARDWISE_")} == {"PATH"}
    assert detect(without_launcher(environ)) == RankInfo()


def test_children_inherit_what_the_user_set_for_open_mpi_but_nothing_of_an_mpirun_around():
    chosen = {"OMPI_MCA_plm_rsh_agent": "", "PRTE_MCA_plm_ssh_agent": "false", "OMPI_OTHER": "1"}
    assert set(without_launcher(chosen)) == {"OMPI_MCA_plm_rsh_agent", "PRTE_MCA_plm_ssh_agent"}
    assert without_launcher({**chosen, **OPEN_MPI}) == {}


def test_job_steps_with_one_log_folder_meet_in_stores_of_their_own(monkeypatch, tmp_path):
    """Else the second one would find what the first one said there."""
    monkeypatch.setenv("SHARDWISE_LOG_DIR", str(tmp_path))
    monkeypatch.setattr(worker.env, "prepare_rank", lambda info: None)
    stores = []
    for place in ({"SLURM_JOB_ID": "7"}, {"SLURM_JOB_ID": "8"}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"}):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", {**os.environ, **SLURM_STEP, "SLURM_STEP_TASKS_PER_NODE": "8", **place})
            worker.context_here(detect(), {}, lambda event: None)
            stores.append(os.environ["SHARDWISE_STORE"])
    assert len(set(stores)) == 3 and {os.path.dirname(store) for store in stores} == {str(tmp_path)}
