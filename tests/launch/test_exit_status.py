import os
import subprocess

import pytest

from shardwise.launch.exit_status import exit_code


@pytest.mark.parametrize("end, code", [("exit 7", 7), ("kill -9 $$", -9)])
def test_how_a_grandchild_ended_is_told_once_it_is_reaped(end, code):
    script = f"exec 3<&0; sh -c 'read word <&3; {end}' & echo $!; wait $!"
    with subprocess.Popen(["bash", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        pidfd = os.pidfd_open(int(child.stdout.readline()))
        assert exit_code(pidfd) is None
        child.stdin.write("go\n")
    told = exit_code(pidfd)
    os.close(pidfd)
    if told is None:
        pytest.skip("this kernel does not tell")
    assert told == code
