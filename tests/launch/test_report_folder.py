"""Reports of jobs that the user's own launcher started lie where nobody else can write."""

import stat
import sys

import pytest

from shardwise.comm import watch
from shardwise.comm.rank import RankInfo
from shardwise.launch import guard
from shardwise.launch.guard import Guard, job_folder

INFO = RankInfo(rank=0, world=2, source="torchrun")


@pytest.fixture(autouse=True)
def nobody_chose(monkeypatch, tmp_path):
    monkeypatch.delenv(watch.LOG_FOLDER_ENV, raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_the_folder_above_all_reports_is_its_users_alone(tmp_path):
    for _ in range(2):  # and again, when it is there
        parent = job_folder(INFO).parent
        assert parent.parent == tmp_path and stat.S_IMODE(parent.stat().st_mode) == 0o700
        parent.chmod(0o755)


def test_a_link_in_its_place_is_not_followed(tmp_path):
    parent = job_folder(INFO).parent
    parent.rmdir()
    (tmp_path / "elsewhere").mkdir()
    parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(PermissionError, match="not this user's"):
        job_folder(INFO)


def test_a_folder_that_somebody_else_made_is_refused(monkeypatch):
    parent = job_folder(INFO).parent
    another = parent.stat().st_uid + 1
    parent.rename(parent.with_name(f"shardwise-{another}"))
    monkeypatch.setattr("os.getuid", lambda: another)
    with pytest.raises(PermissionError, match="name another place by SHARDWISE_LOG_DIR"):
        job_folder(INFO)


def test_a_place_that_the_user_chose_is_taken_as_it_is(monkeypatch, tmp_path):
    monkeypatch.setenv(watch.LOG_FOLDER_ENV, str(tmp_path / "mine"))
    assert job_folder(INFO) == tmp_path / "mine" and (tmp_path / "mine").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_place_where_no_folder_can_be_is_refused_before_the_work_and_not_after_it(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv(watch.LOG_FOLDER_ENV, str(tmp_path / "file" / "logs"))
    with pytest.raises(ValueError, match="SHARDWISE_LOG_DIR .*/file/logs: no folder can be made there: Not a"):
        job_folder(INFO)


@pytest.mark.parametrize("left", ["", "7", "{}"])
@pytest.mark.parametrize("error, words", [(RuntimeError, "rank 0 of 2 failed"), (ValueError, "error: on purpose")])
def test_what_was_left_in_the_folder_keeps_no_rank_from_ending_the_job(
    monkeypatch, tmp_path, capsys, left, error, words
):
    (tmp_path / "failure-rank-1.json").write_text(left)
    monkeypatch.setattr(guard, "end_job", sys.exit)
    with pytest.raises(SystemExit, match="1"):
        Guard(INFO, tmp_path).fail(error("on purpose"))
    assert words in capsys.readouterr().err
