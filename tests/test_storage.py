import errno
import io
import subprocess
import sys
from types import SimpleNamespace

import pytest

from raydetr import config, storage
from raydetr.data.check.check import check
from raydetr.data.coco import find_split
from raydetr.errors import UserError
from raydetr.report.report import report
from raydetr.storage import copy, fetch, fetched, join, push, working_folder

pytest_plugins = "tests.stores"


def put(place, **files):
    """Files of a run, in its working copy and at its place."""
    write(working_folder(place), **files)
    push(place)


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)


def test_what_is_pushed_is_what_another_machine_fetches(each_store, monkeypatch, tmp_path):
    place = f"{each_store.uri}/runs/one"
    put(place, last__pth="epoch 1", log__txt="1")
    (working_folder(place) / "ray").mkdir()
    write(working_folder(place) / "ray", own="of use here only")
    write(working_folder(place), log__txt="1, 2")
    push(place)
    monkeypatch.setenv("RAYDETR_CACHE", str(tmp_path / "another machine"))
    folder = fetch(place)
    assert {file.name: file.read_text() for file in folder.rglob("*") if file.is_file()} == {"last.pth": "epoch 1", "log.txt": "1, 2"}
    write(folder, last__pth="a later one", stale__txt="not there")
    fetch(place)
    assert (folder / "last.pth").read_text() == "epoch 1"
    assert not (folder / "stale.txt").exists()
    assert fetched(f"{place}/log.txt").read_text() == "1, 2"
    assert storage.exists(place)
    assert not storage.exists(f"{place}/best.pth")


def test_a_place_has_one_owner(each_store):
    first = storage.become_owner(each_store.uri)
    storage.check_owner(each_store.uri, first)
    second = storage.become_owner(each_store.uri)
    with pytest.raises(UserError, match="another process has taken over"):
        storage.check_owner(each_store.uri, first)
    storage.check_owner(each_store.uri, second)
    assert storage.remove_tokens(each_store.uri, storage.OWNER) == [storage.OWNER]
    assert storage.read_token(each_store.uri, storage.OWNER) is None


def test_an_owner_who_is_answered_nonsense_asks_again(store, monkeypatch, capfd):
    token = storage.become_owner(store.uri)
    application, left = store._app, [2]

    def nonsense(environ, start_response):
        if environ["PATH_INFO"].endswith(storage.OWNER) and left[0] > 0:
            left[0] -= environ["REQUEST_METHOD"] == "GET"
            page = b"<html>welcome to the hotel</html>"
            start_response("200 OK", [("Content-Type", "text/html"), ("Content-Length", str(len(page)))])
            return [page if environ["REQUEST_METHOD"] == "GET" else b""]
        return application(environ, start_response)

    monkeypatch.setattr(store, "_app", nonsense)
    storage.check_owner(store.uri, token)
    assert left == [0]
    left[0] = 100
    with pytest.raises(UserError, match=r"\.owner: reads '<html>welcome to .*' instead of a token; is the store, or a proxy"):
        storage.check_owner(store.uri, token, patience_s=0)


@pytest.mark.parametrize("where", ["store", "folder"])
def test_a_deleted_mark_of_the_owner_is_written_again(where, request, tmp_path):
    place = request.getfixturevalue("store").uri if where == "store" else str(tmp_path)
    token = storage.become_owner(place)
    storage.remove_tokens(place, storage.OWNER)
    storage.check_owner(place, token, patience_s=0)
    assert storage.read_token(place, storage.OWNER) == token
    storage.remove_tokens(place, storage.OWNER)
    other = storage.become_owner(place)
    with pytest.raises(UserError, match=f"another process has taken over {place}; this one stops"):
        storage.check_owner(place, token)
    storage.check_owner(place, other)


@pytest.mark.parametrize("content", [b"", b"half a tok", b"0" * 31, b"\xff" * 32])
def test_only_what_reads_as_a_token_is_anothers(tmp_path, content):
    token = storage.become_owner(tmp_path)
    (tmp_path / storage.OWNER).write_bytes(content)
    with pytest.raises(UserError, match="instead of a token"):
        storage.check_owner(tmp_path, token, patience_s=0)
    (tmp_path / storage.OWNER).write_text("f" * 32)
    with pytest.raises(UserError, match="another process has taken over"):
        storage.check_owner(tmp_path, token, patience_s=0)


def test_only_what_changed_is_moved_and_the_last_checkpoint_last(store, monkeypatch):
    place = f"{store.uri}/runs/one"
    put(place, last__pth="epoch 1", best__pth="epoch 1", zuletzt__txt="1")
    store.requests.clear()
    push(place)
    fetch(place)
    assert store.moved() == []
    write(working_folder(place), last__pth="epoch 2", zuletzt__txt="2")  # of the same size
    push(place)
    assert store.moved() == [("PUT", "zuletzt.txt"), ("PUT", "last.pth")]
    monkeypatch.setenv("RAYDETR_CACHE", str(storage.cache_folder()) + "-2")
    store.requests.clear()
    fetch(place)
    assert store.moved()[0] == ("GET", "last.pth")


def test_a_file_that_changes_while_it_is_pushed_is_pushed_again(store, monkeypatch):
    place, put_object = f"{store.uri}/runs/one", storage._put
    write(working_folder(place), log__txt="epoch 1")

    def put_and_change(uri, file):
        put_object(uri, file)
        file.write_text("epoch 2")  # of the same size

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(storage, "_put", put_and_change)
        push(place)
    assert store.read(f"{place}/log.txt") == b"epoch 1"
    push(place)
    assert store.read(f"{place}/log.txt") == b"epoch 2"


def test_an_object_whose_name_leads_out_of_the_folder_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("RAYDETR_CACHE", str(tmp_path))
    found = [SimpleNamespace(path="bucket/run/../../outside", is_file=True, size=1, mtime_ns=0)]
    monkeypatch.setattr(storage, "_file_system", lambda _: SimpleNamespace(get_file_info=lambda _: found))
    with pytest.raises(UserError, match=r"the object \.\./\.\./outside has a name that leads out of the folder"):
        fetch("s3://bucket/run")


def test_a_transfer_that_ends_early_is_no_file(tmp_path):
    class Cut(io.BytesIO):
        def size(self):
            return 1000

        def metadata(self):
            return {}

    with pytest.raises(OSError, match="object ended after 7 of 1000 bytes"):
        storage._download(SimpleNamespace(open_input_file=lambda _: Cut(b"content")), "bucket/object", tmp_path / "file")


def test_readers_have_a_copy_of_their_own(store):
    place = f"{store.uri}/runs/one"
    put(place, events__tfevents="one ")
    copy = fetched(place, only=storage.EVENTS)
    assert copy != working_folder(place)
    opened = (copy / "events.tfevents").open()
    assert opened.read() == "one "
    with (working_folder(place) / "events.tfevents").open("a") as events:
        events.write("two")
    push(place)
    fetched(place, only=storage.EVENTS)
    assert opened.read() == "two"  # TensorBoard goes on reading the file that it has open
    assert fetched(f"{place}/events.tfevents").read_text() == "one two"
    with pytest.raises(UserError, match="there is nothing at this address"):
        fetched(f"{place}/best.pth")


def test_an_outage_only_delays(store, monkeypatch):
    place = f"{store.uri}/runs/one"
    put(place, last__pth="epoch 1")
    write(working_folder(place), last__pth="epoch 2")
    store.stop()
    store.start_in(3)
    push(place)
    assert fetched(f"{place}/last.pth").read_text() == "epoch 2"
    store.stop()
    now, pauses = [0.0], []

    def sleep(seconds):
        now[0] += seconds
        pauses.append(seconds)

    monkeypatch.setattr(storage, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    with pytest.raises(UserError, match=r"does not answer \(AWS Error NETWORK_CONNECTION\)"):
        push(place, patience_s=20)
    assert pauses == [1, 2, 4, 8]  # a fifth, of 10 seconds, would be more than twenty


def test_google_that_is_away_only_delays(google_store, monkeypatch, tmp_path, capfd):
    place, content = f"{google_store.uri}/run", "0123456789" * 500_000
    monkeypatch.setattr(storage, "GOOGLE_PATIENCE_S", 1)
    storage._connected.cache_clear()
    write(working_folder(place), last__pth=content, best__pth=content)
    for action, machine in ((push, "cache"), (fetch, "another machine")):
        monkeypatch.setenv("RAYDETR_CACHE", str(tmp_path / machine))
        google_store.server.stop()
        again = google_store.server.start_in(4)
        action(place)
        again.join()
        assert "retrying" in capfd.readouterr().err
    assert {file.name: file.read_text() == content for file in working_folder(place).iterdir()} == {"last.pth": True, "best.pth": True}
    storage._connected.cache_clear()


def test_a_transfer_that_breaks_off_is_begun_again(google_store, monkeypatch):
    place = f"{google_store.uri}/run"
    put(place, last__pth="epoch 1")
    monkeypatch.setenv("RAYDETR_CACHE", str(storage.cache_folder()) + "-2")
    original, asked = storage._get, []

    def get(system, info, target):
        asked.append(target.name)
        if len(asked) == 1:
            with system.open_input_file(info.path) as source:
                source.close()
                source.size()  # pyarrow's answer where the store broke off, too
        original(system, info, target)

    monkeypatch.setattr(storage, "_get", get)
    assert (fetch(place) / "last.pth").read_text() == "epoch 1"
    assert asked == ["last.pth", "last.pth"]


def test_what_the_store_refuses_is_said_at_once(store, capfd):
    for action in (fetch, fetched):
        with pytest.raises(UserError, match=r"no-such-bucket/run: there is no bucket no-such-bucket; create it"):
            action("s3://no-such-bucket/run")
    write(working_folder("s3://no-such-bucket/run"), last__pth="epoch 1")
    with pytest.raises(UserError, match="there is no bucket no-such-bucket"):
        push("s3://no-such-bucket/run")
    put(f"{store.uri}/run", last__pth="epoch 1")
    write(working_folder(f"{store.uri}/run"), last__pth="epoch 2")
    with store.refusing():
        for action in (fetch, fetched, push):
            with pytest.raises(UserError, match=rf"the store refuses access to bucket {store.bucket} \(.*\); allow") as caught:
                action(f"{store.uri}/run")
            assert "\n" not in str(caught.value)
    assert "retrying" not in capfd.readouterr().err


@pytest.mark.parametrize("address", ["s3://key:secret@bucket/runs", "s3://key:sec/ret@bucket", "s3://bucket/runs?secret_key=secret"])
def test_keys_in_an_address_are_refused_and_not_repeated(address):
    for name in ("run.storage", "data.path", "model.weights"):
        with pytest.raises(UserError, match=rf"{name}: .*AWS_SECRET_ACCESS_KEY") as caught:
            config.load_config({name: address})
        assert "secret" not in str(caught.value).replace("SECRET", "")
        assert "sec/ret" not in str(caught.value)
    with pytest.raises(UserError):
        fetch(address)


def test_other_addresses_are_refused():
    with pytest.raises(UserError, match=r"data.path: ftp:// is not known here"):
        config.load_config({"data.path": "ftp://host/photographs"})
    for address in ("s3://", "s3:///runs", "s3://bucket/../runs"):
        with pytest.raises(UserError, match="not an address such as"):
            fetch(address)


def test_local_places_are_left_alone(tmp_path):
    assert fetch(tmp_path) == fetched(tmp_path) == working_folder(tmp_path) == tmp_path
    push(tmp_path)
    assert join(tmp_path, "a") == str(tmp_path / "a")
    assert storage.split(f"{tmp_path}/a") == (str(tmp_path), "a")
    assert storage.split("s3://bucket/runs/a/") == ("s3://bucket/runs", "a")
    assert storage.split("/a") == ("/", "a")
    assert storage.split("a") == ("", "a")


def test_what_google_lacks_is_said(google_store, monkeypatch, tmp_path, capfd):
    write(working_folder("gs://no-such-bucket/run"), last__pth="epoch 1")
    for action in (fetch, fetched, push):
        with pytest.raises(UserError, match=r"no-such-bucket/run\S*: there is no bucket no-such-bucket; create it"):
            action("gs://no-such-bucket/run")
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS")
    for name, value in {"HOME": str(tmp_path), "GCE_METADATA_ROOT": "127.0.0.1:1"}.items():  # nor has the machine an account
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(storage, "GOOGLE_PATIENCE_S", 1)
    storage._connected.cache_clear()
    with pytest.raises(UserError, match=r"not answer \(Could not create a OAuth2 access token\); .* GOOGLE_APPLICATION_CREDENTIALS right"):
        push("gs://no-such-bucket/run", patience_s=6)
    assert "retrying (Could not create a OAuth2 access token)" in capfd.readouterr().err  # at once, not after all patience
    storage._connected.cache_clear()


def test_an_object_is_copied_within_the_store(each_store):
    one, two = f"{each_store.uri}/one", f"{each_store.uri}/two"
    put(one, last__pth="weights")
    copy(f"{one}/last.pth", f"{two}/last.pth")
    copy(f"{one}/absent.pth", f"{two}/absent.pth")
    assert [file.name for file in fetch(two).iterdir()] == ["last.pth"]


def test_photographs_are_fetched_once_and_what_is_complete_not_again(store, coco_folder, monkeypatch):
    folder, uri = coco_folder(train=8, val=2), f"{store.uri}/photographs"
    store.upload(folder, uri)
    data = config.load_config({"data.path": uri}).data
    original, got, broken = storage._get, [], []

    def get(system, info, target):
        got.append(target.name)
        if len(got) == 6 and not broken:
            broken.append(target.name)
            raise OSError(errno.ENOSPC, "no room")
        original(system, info, target)

    monkeypatch.setattr(storage, "_get", get)
    monkeypatch.setattr(storage, "THREADS", 1)
    with pytest.raises(OSError, match="no room"):
        find_split(data, "train")
    complete = [file.name for file in storage.cache_folder().rglob("*") if file.suffix in (".json", ".jpg")]
    got.clear()
    split = find_split(data, "train")
    assert broken[0] in got
    assert sorted([*complete, *got]) == sorted(file.name for file in folder.rglob("*") if file.is_file())
    for file in split.images.iterdir():
        assert file.read_bytes() == (folder / "train2017" / file.name).read_bytes()
    got.clear()
    assert find_split(data, "val").images.is_dir()
    assert got == []
    assert check(uri).ok


def test_a_damaged_transfer_is_fetched_again(each_store):
    place = f"{each_store.uri}/folder"
    put(place, file="the right content")
    system = storage._file_system(place)
    opened = []

    class Damaged:
        """The store over a line that spoils the first transfer."""

        def open_input_file(self, path):
            source = system.open_input_file(path)
            opened.append(path)
            return Spoiled(source) if len(opened) == 1 else source

    class Spoiled:
        def __init__(self, source):
            self.source = source
            self.size, self.metadata = source.size, source.metadata

        def read(self, size):
            return self.source.read(size)[::-1]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.source.close()

    info = storage._objects(place, recursive=True)["file"]
    target = storage.cache_folder() / "file"
    storage._get(Damaged(), info, target)
    assert target.read_text() == "the right content"
    assert len(opened) == 2


def test_processes_that_start_together_fetch_once(store, coco_folder):
    store.upload(coco_folder(), f"{store.uri}/photographs")
    store.requests.clear()
    command = [sys.executable, "-c", f"from raydetr.storage import fetched; fetched('{store.uri}/photographs')"]
    started = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    names = [name for method, name in store.moved() if name.endswith(".jpg")]
    assert len(names) == len(set(names)) == 6


def test_a_report_of_nothing_is_one_line(store):
    put(f"{store.uri}/search", notes="nothing")
    with pytest.raises(UserError, match=r"holds neither a run nor a search \(config.yaml is missing\)"):
        report([f"{store.uri}/search"])
