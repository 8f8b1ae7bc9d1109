"""Altered video files: each is read or refused with a reason; none kills or hangs the process."""

import json

from tests.launch import run_python
from tests.uvit import fuzz_videos

COUNT = 500


def test_no_altered_video_kills_or_hangs(tmp_path, write_video):
    for suffix in (".mp4", ".webm", ".mkv", ".gif", ".avi", ".ts"):
        write_video(tmp_path / f"video{suffix}", 12)
    (tmp_path / "altered").mkdir()
    out = tmp_path / "outcomes.json"
    done = run_python(fuzz_videos.__file__, tmp_path, str(COUNT), out, check=False, timeout_s=1200)
    outcomes = json.loads(out.read_text())
    assert done.returncode == 0, (outcomes, done.stderr[-3000:])
    assert sum(outcomes.values()) == COUNT
    assert min(outcomes["read"], outcomes["refused"]) > COUNT // 10
