import hashlib
import http.server
import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from raydetr import downloads
from raydetr.errors import UserError
from raydetr.weights import files

CONTENT = os.urandom(3_000_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
NAME = f"detr-{SHA256[:8]}.pth"


@pytest.fixture
def server():
    """A real server; ``server.requests`` counts, ``server.answers`` maps a path to what is done for it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with server.counting:
                server.requests.append(self.path)
            server.answers[self.path](self)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.requests, server.answers, server.counting = [], {}, threading.Lock()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def send(content, length=None, pause=0.0):
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(length or len(content)))
        handler.end_headers()
        for start in range(0, len(content), 1 << 20):
            handler.wfile.write(content[start : start + (1 << 20)])
            handler.wfile.flush()
            time.sleep(pause)

    return answer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "torch" / "hub" / "checkpoints"


def whole_files(cache):
    return {file.name for file in cache.iterdir() if not file.name.endswith(".lock")}


def download_in_processes(url, number):
    code = "import sys; from raydetr.weights.files import download; print(download(sys.argv[1]))"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, url]
    return [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
        for _ in range(number)
    ]


def test_download_fetches_once_and_says_so(server, cache, capfd):
    server.answers[f"/{NAME}"] = send(CONTENT)
    file = files.download(f"{server.url}/{NAME}")
    assert file == cache / NAME
    assert file.read_bytes() == CONTENT
    shown = capfd.readouterr().err
    assert NAME in shown
    assert "3.0 of 3.0 MB" in shown
    assert files.download(f"{server.url}/{NAME}") == file
    assert len(server.requests) == 1
    assert whole_files(cache) == {NAME}


@pytest.mark.slow
def test_many_processes_fetch_once(server, cache):
    server.answers[f"/{NAME}"] = send(CONTENT, pause=1.0)
    processes = download_in_processes(f"{server.url}/{NAME}", 4)
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, answers
    assert {out.strip() for out, _ in answers} == {str(cache / NAME)}
    assert server.requests == [f"/{NAME}"]
    assert whole_files(cache) == {NAME}


@pytest.mark.slow
def test_killed_downloader_blocks_nobody(server, cache):
    url = f"{server.url}/{NAME}"
    begun = threading.Event()

    def begin_and_stall(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(CONTENT)))
        handler.end_headers()
        handler.wfile.write(CONTENT[:2_000_000])
        handler.wfile.flush()
        begun.set()
        time.sleep(5)

    server.answers[f"/{NAME}"] = begin_and_stall
    (process,) = download_in_processes(url, 1)
    assert begun.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    server.answers[f"/{NAME}"] = send(CONTENT)
    assert files.download(url).read_bytes() == CONTENT


def test_damaged_file_in_the_cache_is_fetched_again(server, cache):
    cache.mkdir(parents=True)
    (cache / NAME).write_bytes(CONTENT[:-1])
    server.answers[f"/{NAME}"] = send(CONTENT)
    assert files.download(f"{server.url}/{NAME}").read_bytes() == CONTENT


def test_cache_that_cannot_be_written_is_read(server, cache):
    cache.mkdir(parents=True)
    (cache / NAME).write_bytes(CONTENT)
    cache.chmod(0o555)
    assert files.download(f"{server.url}/{NAME}") == cache / NAME
    assert not server.requests
    assert os.listdir(cache) == [NAME]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (send(CONTENT[:-1]), "was promised"),
        (send(CONTENT[:1_500_000], length=len(CONTENT)), "ended after 1500000 of 3000000 bytes"),
        (lambda handler: handler.send_error(404), "404 Not Found"),
        (lambda handler: handler.send_error(503), "503 Service Unavailable"),
        (lambda handler: handler.wfile.write(b"nonsense\r\n\r\n"), "not downloaded"),
        (lambda handler: handler.connection.close(), "not downloaded"),
    ],
)
def test_bad_answer(server, cache, answer, reason):
    url = f"{server.url}/{NAME}"
    server.answers[f"/{NAME}"] = answer
    with pytest.raises(UserError) as error:
        files.download(url)
    message = str(error.value)
    assert reason in message
    assert message.startswith(url)
    assert str(cache / NAME) in message
    assert "\n" not in message
    assert not whole_files(cache)


def test_no_network(cache):
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9/detr-12345678.pth: not downloaded \(Connection refused\)"):
        files.download("http://127.0.0.1:9/detr-12345678.pth")
    with pytest.raises(UserError, match=r"nowhere\.invalid/detr-12345678.pth: not downloaded"):
        files.download("http://nowhere.invalid/detr-12345678.pth")
    with pytest.raises(UserError, match=r"\[broken/detr-12345678.pth: not a URL"):
        files.download("http://[broken/detr-12345678.pth")


def test_silent_server(server, cache, monkeypatch):
    monkeypatch.setattr(downloads, "TIMEOUT", 0.5)
    server.answers[f"/{NAME}"] = lambda handler: time.sleep(3)
    with pytest.raises(UserError, match="timed out"):
        files.download(f"{server.url}/{NAME}")


def test_same_name_on_two_addresses_is_two_files(server, cache):
    server.answers |= {"/a/best.pth": send(b"a"), "/b/best.pth": send(b"b"), "/c/..%2f..%2fescape.pth?token=s3cr3t": send(b"c")}
    one, other, third = (files.download(f"{server.url}{path}") for path in server.answers)
    assert (one.read_bytes(), other.read_bytes(), third.read_bytes()) == (b"a", b"b", b"c")
    assert {file.parent for file in (one, other, third)} == {cache}
    assert "s3cr3t" not in third.name


def test_secret_of_an_address_is_not_shown(server, cache):
    server.answers["/best.pth?token=s3cr3t"] = lambda handler: handler.send_error(403)
    with pytest.raises(UserError, match="403") as error:
        files.download(f"{server.url}/best.pth?token=s3cr3t")
    assert "s3cr3t" not in str(error.value)


@pytest.mark.slow
def test_progress_bar_in_a_terminal(server, cache):
    pty = pytest.importorskip("pty")
    server.answers[f"/{NAME}"] = send(CONTENT, pause=0.2)
    terminal, end = pty.openpty()
    code = "import sys; from raydetr.weights.files import download; download(sys.argv[1])"
    process = subprocess.Popen([sys.executable, "-c", code, f"{server.url}/{NAME}"], stderr=end, env=os.environ | {"TERM": "xterm"})
    os.close(end)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 65536)
        except OSError:  # how a terminal says that nobody is left at its other end
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    assert process.wait(60) == 0
    assert "3.0/3.0 MB" in shown.decode()
    assert "━" in shown.decode()


@pytest.mark.slow
def test_full_disk_while_downloading(server, cache):
    server.answers[f"/{NAME}"] = send(CONTENT)
    limit = 1_000_000
    code = "import sys; from raydetr.weights.files import download; download(sys.argv[1])"
    process = subprocess.run(
        [sys.executable, "-c", code, f"{server.url}/{NAME}"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "UserError" in process.stderr
    assert "File too large" in process.stderr
    assert not whole_files(cache)
