"""Which processes can share memory, and how the ranks of a group come to a segment of it.

The memory is a memfd: it has no name that could be left behind, and the size limit of /dev/shm (64 MiB in many
containers) does not hold for it. It goes when the last rank has dropped its tensors and views, or died.
"""

import os
import platform
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass

from shardwise.comm import watch
from shardwise.comm.bootstrap import Rendezvous
from shardwise.comm.segment import Segment


@dataclass(frozen=True)
class Identity:
    """Where a process lives: two processes with the same `host` can share memory."""

    host: str
    pid: int
    started: int

    @classmethod
    def mine(cls) -> "Identity":
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot = file.read().strip()
        namespace = os.readlink("/proc/self/ns/pid")
        return cls(f"{boot} {namespace} uid {os.getuid()}", os.getpid(), watch.process_start(os.getpid()))


def usable() -> tuple[bool, str]:
    """(this machine can have segments, reason), not regarding where the peers are."""
    if not sys.platform.startswith("linux"):
        return False, f"shared memory needs Linux (memfd), this is {sys.platform}"
    if platform.machine() not in ("x86_64", "AMD64"):
        return False, (
            f"shared memory needs x86-64, where plain stores become visible in program order; this is "
            f"{platform.machine()}"
        )
    return True, "Linux on x86-64"


def one_host(meeting: Rendezvous, limit: float) -> tuple[bool, str]:
    """(all ranks of `meeting` can share a segment, reason), the same on every rank."""
    possible, reason = usable()
    host = Identity.mine().host if possible else None
    facts = meeting.gather("host", (host, reason), limit)
    for rank, (name, why) in zip(meeting.ranks, facts, strict=True):
        if name is None:
            return False, f"rank {rank}: {why}"
    hosts = {name for name, _ in facts}
    if len(hosts) > 1:
        return False, f"the ranks are in {len(hosts)} hosts or containers"
    return True, f"{meeting.size} ranks on one host, {reason}"


def share(
    gather: Callable[[str, object], list],
    members: list[int],
    rank: int,
    half: int,
    *,
    key: str,
    crowded: bool = False,
    root: Segment | None = None,
) -> Segment:
    """Segment of `members` (ranks in `gather`'s numbering), of which this process is number `rank`.

    gather(key, value) gives everyone's value; all its ranks call `share`, each with its own group's members.
    Raises OSError where the memory cannot be shared; then it does so on every rank of `gather`.
    """
    fd = -1
    segment = problem = None
    try:
        if rank == 0:
            fd, problem = _memory(Segment.length(len(members), half))
        everyone = gather(key + "/offer", (*astuple(Identity.mine()), fd))
        offers = [(Identity(*everyone[member][:-1]), everyone[member][-1]) for member in members]
        identities = [identity for identity, _ in offers]
        try:
            opened = _open(offers[0], identities)
            try:
                segment = Segment(opened, len(members), rank, half, identities, crowded, root)
            finally:
                os.close(opened)
        except OSError as error:
            problem = problem or f"process {os.getpid()}: {error}"
        problems = [text for text in gather(key + "/mapped", problem) if text]
    finally:
        if fd >= 0:
            os.close(fd)
    if segment is None or problems:
        raise OSError("; ".join(problems))
    return segment


def _memory(length: int) -> tuple[int, str | None]:
    """(descriptor, None), or (-1, reason): the peers must hear of it, so it is not raised here."""
    fd = -1
    try:
        fd = os.memfd_create("shardwise", os.MFD_CLOEXEC)
        os.ftruncate(fd, length)
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        return -1, f"process {os.getpid()}: {error}"
    return fd, None


def _open(offer: tuple[Identity, int], members: list[Identity]) -> int:
    """A descriptor of the memory that the first member offers as (who, descriptor in that process)."""
    leader, fd = offer
    hosts = {member.host for member in members}
    if len(hosts) > 1:
        raise OSError(f"the ranks are on {len(hosts)} hosts, in different containers, or of different users")
    if fd < 0:
        raise OSError(f"process {leader.pid} could not make the memory")
    return os.open(f"/proc/{leader.pid}/fd/{fd}", os.O_RDWR)
