"""Which rank am I? Read from the environment that the launcher left, with the reason.

Order: Shardwise's own launchers, then torchrun, then MPI (Open MPI, MPICH and its kin), then Slurm. Slurm
counts only inside a job step: a plain process in an allocation also sees SLURM_NTASKS, and believing it hangs.
Two launchers that both claim more than one rank and disagree are an error, not a guess.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from shardwise.comm.rank import RankInfo

NO_MULTICAST = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
}
"""Set in every rank before torch is imported: NVLink multicast is never used."""

CHOICE = "SHARDWISE_LAUNCHER"
"""Names the launcher to believe when two of them left their variables."""

FOREIGN = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_", "HYDRA_", "MPIR_", "MPI_LOCAL", "MV2_", "TORCHELASTIC_")
"""Prefixes of launcher variables that a process started by us must not inherit from a launcher around us."""
MPI_SETTINGS = ("OMPI_MCA_", "PRTE_MCA_", "PMIX_MCA_")
"""Prefixes of what a user sets for Open MPI. Inside of mpirun its own are among them, and not told apart."""
TORCH_NAMES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class LauncherConflict(ValueError):
    """Two sources name different ranks or worlds; the text names both."""


@dataclass(frozen=True)
class Source:
    """The variables by which one launcher tells a process its place."""

    name: str
    """Stands in messages and in RankInfo.source."""
    choice: str
    """Value of SHARDWISE_LAUNCHER that picks it."""
    rank: str
    world: str
    local_rank: str
    local_world: str
    node: str | None = None
    requires: tuple[str, ...] = ()
    """Further variables without which this launcher is not believed."""

    def read(self, environ: Mapping[str, str]) -> RankInfo | None:
        """The rank that this launcher numbered, or None when its variables are absent."""
        present = [name in environ for name in (self.rank, self.world)]
        if not all(present) or any(name not in environ for name in self.requires):
            if any(present) and self.choice == "torchrun":
                here, missing = (self.rank, self.world) if present[0] else (self.world, self.rank)
                raise ValueError(f"{here} is set but {missing} is not: set both, as torchrun does, or neither")
            return None
        world = _integer(environ, self.world)
        local_world = _integer(environ, self.local_world, 1 if world == 1 else world)
        rank = _integer(environ, self.rank)
        return RankInfo(
            rank=rank,
            world=world,
            local_rank=_integer(environ, self.local_rank, rank % local_world),
            local_world=local_world,
            node=_integer(environ, self.node, 0) if self.node else rank // local_world,
            source=environ.get("SHARDWISE_SOURCE", self.name) if self.choice == "local" else self.name,
        )

    def spelled(self, environ: Mapping[str, str]) -> str:
        return f"{self.name} ({self.rank}={environ[self.rank]}, {self.world}={environ[self.world]})"


SOURCES = (
    Source(
        name="local",
        choice="local",
        rank="SHARDWISE_RANK",
        world="SHARDWISE_WORLD",
        local_rank="SHARDWISE_LOCAL_RANK",
        local_world="SHARDWISE_LOCAL_WORLD",
        node="SHARDWISE_NODE",
    ),
    Source("torchrun", "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    Source(
        "Open MPI",
        "mpi",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    Source(
        "MPICH",
        "mpi",
        "MV2_COMM_WORLD_RANK",
        "MV2_COMM_WORLD_SIZE",
        "MV2_COMM_WORLD_LOCAL_RANK",
        "MV2_COMM_WORLD_LOCAL_SIZE",
    ),
    Source("MPICH", "mpi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
SLURM = Source(
    name="Slurm",
    choice="slurm",
    rank="SLURM_PROCID",
    world="SLURM_NTASKS",
    local_rank="SLURM_LOCALID",
    local_world="SLURM_STEP_TASKS_PER_NODE",
    node="SLURM_NODEID",
    requires=("SLURM_STEP_ID",),
)


def detect(environ: Mapping[str, str] | None = None) -> RankInfo:
    """This process's place in its job; a single process when no launcher is around.

    Raises LauncherConflict when two launchers disagree, ValueError for malformed or incomplete variables.
    """
    environ = os.environ if environ is None else environ
    choice = environ.get(CHOICE, "")
    claims = _claims(environ, choice)
    if not claims:
        return RankInfo()
    source, info = claims[0]
    for other, theirs in claims[1:]:
        if (theirs.rank, theirs.world) != (info.rank, info.world):
            raise LauncherConflict(
                f"two launchers disagree: {source.spelled(environ)} and {other.spelled(environ)}; "
                f"set {CHOICE}={source.choice} or {CHOICE}={other.choice}, or unset the variables of one"
            )
    return info


def _claims(environ: Mapping[str, str], choice: str) -> list[tuple[Source, RankInfo]]:
    legal = sorted({source.choice for source in (*SOURCES, SLURM)} | {"single"})
    if choice and choice not in legal:
        raise ValueError(f"{CHOICE}={choice}: legal are {', '.join(legal)}")
    if choice == "single":
        return []
    candidates = [source for source in (*SOURCES, SLURM) if choice in ("", source.choice)]
    found = [(source, info) for source in candidates if (info := source.read(environ)) is not None]
    if not found and choice:
        raise ValueError(f"{CHOICE}={choice}, but this process has none of that launcher's variables")
    if found and found[0][0].choice == "local":
        return found[:1]
    by_launcher = [claim for claim in found if claim[0] is not SLURM]
    if not by_launcher:
        return [claim for claim in found if claim[1].world > 1]
    # A launcher that started one rank only makes no claim against one that started several.
    return [claim for claim in by_launcher if claim[1].world > 1] or by_launcher[:1]


def explain(environ: Mapping[str, str] | None = None) -> str:
    """One sentence: the place that `detect` reports and the variables it was read from."""
    environ = os.environ if environ is None else environ
    info = detect(environ)
    for source in (*SOURCES, SLURM):
        if source.rank in environ and info.source in (source.name, environ.get("SHARDWISE_SOURCE")):
            return f"rank {info.rank} of {info.world}, from {source.spelled(environ)}"
    if "SLURM_NTASKS" in environ:
        return "single process; SLURM_NTASKS is set, but this is not a Slurm job step with several tasks"
    return "single process: no launcher's variables are set"


def slurm_step(environ: Mapping[str, str] | None = None) -> str:
    """A name of this job step that no other one has, nor the same one of a job that was requeued."""
    environ = os.environ if environ is None else environ
    return ".".join(environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))


def without_launcher(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` less every variable by which a launcher numbers processes."""
    dropped = {name for source in SOURCES for name in (source.rank, source.world)} | set(TORCH_NAMES)
    kept = () if "OMPI_COMM_WORLD_SIZE" in environ else MPI_SETTINGS
    return {
        name: text
        for name, text in environ.items()
        if name.startswith(kept) or not (name in dropped or name.startswith(FOREIGN))
    }


def rank_variables(info: RankInfo) -> dict[str, str]:
    """The variables by which Shardwise's own launchers tell a process its place."""
    return {
        "SHARDWISE_RANK": str(info.rank),
        "SHARDWISE_WORLD": str(info.world),
        "SHARDWISE_LOCAL_RANK": str(info.local_rank),
        "SHARDWISE_LOCAL_WORLD": str(info.local_world),
        "SHARDWISE_NODE": str(info.node),
        "SHARDWISE_SOURCE": info.source,
    }


def prepare_rank(info: RankInfo) -> None:
    """Set, before torch is imported, what every rank needs; a thread count that the user chose is kept."""
    os.environ.update(NO_MULTICAST)
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // info.local_world))


def _integer(environ: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environ.get(name)
    if text is None and default is not None:
        return default
    try:
        value = int(re.split("[(,]", str(text))[0])  # Slurm writes "4(x2)" for two nodes with four tasks each
    except ValueError:
        raise ValueError(f"{name}={text}: an integer is expected") from None
    if value < 0:
        raise ValueError(f"{name}={text}: must not be negative")
    return value
