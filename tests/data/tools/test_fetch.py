import dataclasses
import hashlib
import io
import json
import stat
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from raydetr.cli import main
from raydetr.data.check.check import check
from raydetr.data.tools import fetch
from raydetr.data.tools.fetch import ARCHIVES, unpack
from raydetr.errors import UserError


def small_archive():
    """A zip archive laid out as the balloon data set is: balloon/train and balloon/val, each with a VIA file without attributes."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        for part, number in (("train", 4), ("val", 2)):
            entries = {}
            for index in range(number):
                pixels = io.BytesIO()
                random = np.random.default_rng([index, number])
                Image.fromarray(random.integers(0, 255, (64, 96, 3), dtype=np.uint8)).save(pixels, "JPEG")
                name = f"{part}_{index}.jpg"
                opened.writestr(f"balloon/{part}/{name}", pixels.getvalue())
                shape = {"name": "polygon", "all_points_x": [5, 40, 40], "all_points_y": [5, 5, 50]}
                regions = {"0": {"shape_attributes": shape, "region_attributes": {}}}
                entries[name] = {"filename": name, "size": len(pixels.getvalue()), "regions": regions}
            opened.writestr(f"balloon/{part}/via_region_data.json", json.dumps(entries))
    return file.getvalue()


CONTENT = small_archive()


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A real server: ``break_after`` ends its next answer early, ``resumes`` says whether it continues, ``ranges`` lists the requests."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            server.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and server.resumes else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(server.content) - start))
            self.end_headers()
            until, server.break_after = server.break_after, None
            self.wfile.write(server.content[start : None if until is None else start + until])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.ranges, server.break_after, server.content, server.resumes = [], None, CONTENT, True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    known = {"url": f"http://127.0.0.1:{server.server_port}/balloon_dataset.zip", "size": len(CONTENT), "unpacked": 1_000_000}
    archive = dataclasses.replace(ARCHIVES["balloon"], **known, sha256=hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(ARCHIVES, "balloon", archive)
    monkeypatch.setenv("RAYDETR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def cached(tmp_path):
    return {path.name for path in (tmp_path / "cache" / "downloads").iterdir() if path.suffix != ".lock"}


def test_a_data_set_is_downloaded_once_and_converted(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "fetch", "balloon"]) == 0
    shown = capsys.readouterr()
    assert "train 4 images, 4 boxes" in shown.out
    assert ["balloon", "4", "2"] in [line.split() for line in shown.out.splitlines()]
    assert "downloading balloon_dataset.zip" in shown.err
    assert check(tmp_path / "balloon", quick=True).ok
    assert all(not path.is_symlink() for path in (tmp_path / "balloon" / "train2017").iterdir())  # what was unpacked is gone
    assert main(["data", "fetch", "balloon", "again"]) == 0
    assert server.ranges == [None]
    assert cached(tmp_path) == {"balloon_dataset.zip"}


@pytest.mark.parametrize("resumes", [True, False])
def test_an_interrupted_download_continues(server, tmp_path, resumes):
    server.break_after, server.resumes = 3000, resumes
    with pytest.raises(UserError, match=rf"not downloaded \(the answer ended after 3000 of {len(CONTENT)} bytes; retry\)"):
        fetch.fetch("balloon", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert cached(tmp_path) == {"balloon_dataset.zip.part"}
    assert fetch.fetch("balloon", tmp_path / "out").images == {"train": 4, "val": 2}
    assert server.ranges == [None, "bytes=3000-"]
    assert cached(tmp_path) == {"balloon_dataset.zip"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (CONTENT[:-1] + b"x", "its sha256 is"),
        (CONTENT + b"x", f"offers {len(CONTENT) + 1} bytes instead of {len(CONTENT)}"),
        (b"<html>moved</html>", f"offers 18 bytes instead of {len(CONTENT)}"),
    ],
)
def test_another_file_is_refused_and_forgotten(server, tmp_path, capsys, content, message):
    server.content = content
    assert main(["data", "fetch", "balloon", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert f"put the file at {tmp_path / 'cache' / 'downloads' / 'balloon_dataset.zip'}" in error
    assert error.splitlines()[-1].startswith("raydetr: http://127.0.0.1")
    assert not (tmp_path / "out").exists()
    server.content = CONTENT
    assert fetch.fetch("balloon", tmp_path / "out").images == {"train": 4, "val": 2}


def test_a_file_that_somebody_put_there_is_taken(server, tmp_path):
    folder = tmp_path / "cache" / "downloads"
    folder.mkdir(parents=True)
    (folder / "balloon_dataset.zip").write_bytes(CONTENT)
    assert fetch.fetch("balloon", tmp_path / "out").images == {"train": 4, "val": 2}
    assert not server.ranges


def test_a_folder_with_something_in_it_is_not_written_to(server, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="exists and is not an empty folder"):
        fetch.fetch("balloon", tmp_path / "out")
    assert not server.ranges
    with pytest.raises(UserError, match="there is no data set 'ballon'; known are balloon"):
        fetch.fetch("ballon", tmp_path / "out")


def test_no_network(server, tmp_path, monkeypatch):
    monkeypatch.setitem(ARCHIVES, "balloon", dataclasses.replace(ARCHIVES["balloon"], url="http://127.0.0.1:9/balloon_dataset.zip"))
    with pytest.raises(UserError, match=r"not downloaded \(Connection refused\); without a network, put the file at"):
        fetch.fetch("balloon", tmp_path / "out")


def packed(tmp_path, *entries):
    with zipfile.ZipFile(tmp_path / "some.zip", "w", zipfile.ZIP_DEFLATED) as opened:
        for entry, content in entries:
            opened.writestr(entry, content)
    return tmp_path / "some.zip"


LINK = zipfile.ZipInfo("balloon/link")
LINK.external_attr = (stat.S_IFLNK | 0o777) << 16


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("../outside.txt", "'../outside.txt' leads out of the folder"),
        ("balloon/../../outside.txt", "leads out of the folder"),
        ("/outside.txt", "'/outside.txt' leads out of the folder"),
        ("..\\outside.txt", "leads out of the folder"),
        ("C:\\outside.txt", "leads out of the folder"),
        (LINK, "'balloon/link' is a link"),
    ],
)
def test_nothing_leaves_the_folder(tmp_path, entry, message):
    file = packed(tmp_path, ("balloon/a.txt", "a"), (entry, "/etc/passwd"))
    with pytest.raises(UserError, match=message.replace("\\", "\\\\").replace(".", r"\.")):
        unpack(file, tmp_path / "in" / "here", 1000)
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["some.zip"]


def test_a_zip_bomb_is_refused_before_it_unfolds(tmp_path):
    file = packed(tmp_path, *((f"{number}.bin", bytes(5_000_000)) for number in range(3)))
    assert file.stat().st_size < 20_000
    with pytest.raises(UserError, match=r"not unpacked: 15 MB in 3 files; at most 10 MB"):
        unpack(file, tmp_path / "out", 10_000_000)
    assert not (tmp_path / "out").exists()


def test_an_entry_that_states_less_than_it_holds_ends_the_unpacking(tmp_path):
    file = packed(tmp_path, ("a.bin", bytes(2_000_000)))
    content = file.read_bytes()
    assert content.count((2_000_000).to_bytes(4, "little")) == 2
    file.write_bytes(content.replace((2_000_000).to_bytes(4, "little"), (1000).to_bytes(4, "little")))
    with pytest.raises(UserError, match="not a sound zip archive"):
        unpack(file, tmp_path / "out", 10_000)
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file()) <= 1000


@pytest.mark.parametrize("content", [b"", b"PK nothing", CONTENT[:-30], CONTENT[:2000] + bytes(20) + CONTENT[2020:]])
def test_a_damaged_archive_is_one_line(tmp_path, content):
    (tmp_path / "some.zip").write_bytes(content)
    with pytest.raises(UserError, match=r"some\.zip: not unpacked: not a sound zip archive") as error:
        unpack(tmp_path / "some.zip", tmp_path / "out", 1_000_000)
    assert "\n" not in str(error.value)
