import html
import re
import shutil
import subprocess

import pytest

from raydetr.cli import main
from raydetr.errors import UserError
from raydetr.evaluate.coco import METRICS
from raydetr.report.report import report
from raydetr.training.fit import fit
from raydetr.training.metrics import REPORTED
from tests.helpers import TINY, tiny_config
from tests.report.pages import make_search, page_of


@pytest.fixture
def make(tmp_path):
    return lambda name="search", *args, **kwargs: make_search(tmp_path / name, *args, **kwargs)


@pytest.fixture(scope="module")
def runs(module_coco_folder, tmp_path_factory):
    """The folders of two runs of two epochs, which differ in their learning rate."""
    storage = tmp_path_factory.mktemp("runs")
    data = module_coco_folder(train=4, val=6, size=(64, 64))
    for name, lr in (("first", 1e-4), ("second", 5e-4)):
        changes = {"optim__epochs": 2, "optim__lr": lr, "optim__batch_size": 2, "run__name": name}
        fit(tiny_config(TINY, data, storage, **changes))
    return storage / "first", storage / "second"


def test_a_run_is_told_with_its_curves_diagnosis_errors_and_settings(runs):
    path = report([runs[0]])
    assert path == runs[0] / "report.html"
    page = page_of(path)
    assert re.match(
        r"AP \d+\.\d( \(95 % interval .*\))? on 6 validation images, in epoch [12] of 2\.", page.words[page.words.index("AP ") :]
    )
    assert page.headings[0] == "Run first"
    curves = ["AP", "loss", "loss_ce", "loss_bbox", "loss_giou", "class_error", "cardinality_error"]
    assert page.charts[:7] == [f"{name} after every epoch" for name in curves]
    assert {"What the curves say", "Why objects are missed", "Confusion", "The worst images"} <= set(page.headings)
    changed = {row[0]: row[1:3] for row in page.table("setting")}
    assert changed["optim.lr"] == ["1e-4", "5e-4"]
    assert "optim.weight_decay" not in changed
    assert [row[0] for row in page.table("metric")[1:]] == list(METRICS)
    assert all(link.startswith("data:image/jpeg") for link in page.links)


def test_runs_are_compared_and_chance_is_said(runs, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["report", *map(str, runs)]) == 0
    assert capsys.readouterr().out == "report written to report.html\n"
    page = page_of(tmp_path / "report.html")
    assert page.headings[:2] == ["2 runs and searches", "Side by side"]
    assert re.search(r"reaches the highest AP, .* Image by image: .*one seed of each says nothing about seeds", page.words)
    assert [row[0] for row in page.tables[0]] == ["", "first", "second"]
    different = page.table("setting")
    assert different == [["setting", "first", "second"], ["optim.lr", "1e-4", "5e-4"]]


def test_a_run_without_its_data_is_told_without_errors(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "alone")
    config = tmp_path / "alone" / "config.yaml"
    config.write_text(re.sub(r"path: .*data.*", "path: /nowhere", config.read_text()))
    page = page_of(report([tmp_path / "alone"]))
    assert "The errors are not shown: " in page.words
    assert "Name the data set with --data, if it is elsewhere now." in page.words
    assert "Confusion" not in page.headings
    assert "Why objects are missed" not in page_of(report([tmp_path / "alone"], errors=False)).headings
    (tmp_path / "alone" / "best.pth").unlink()
    assert "best.pth is missing" in page_of(report([tmp_path / "alone"])).words


def test_a_run_before_its_first_epoch(runs, tmp_path):
    (tmp_path / "new").mkdir()
    shutil.copy(runs[0] / "config.yaml", tmp_path / "new")
    assert "No epoch is finished yet." in page_of(report([tmp_path / "new"])).words


def test_the_best_trial_of_a_search_is_explained(runs, make):
    search = make(ends=[0.4, 0.5], data__path=str(runs[0].parents[1] / "none"))
    folder = search.folder / "trials" / search.trial_name(1)
    shutil.copytree(runs[1], folder)
    data = re.search(r"path: (\S*data\S*)", (runs[0] / "config.yaml").read_text())[1]
    page = page_of(report([search.folder], data={"data.path": data}))
    assert {"What the curves say of trial 1", "Curves of trial 1", "Why objects are missed", "The worst images"} <= set(page.headings)


def test_the_report_needs_no_network_and_no_script(make):
    path = report([make(ends=[0.4, 0.5, 0.6, 0.1]).folder])
    assert page_of(path).links == []
    assert "http" not in path.read_text()


def test_a_report_of_32_trials_is_small_enough_to_send(make):
    random = iter(range(1, 1000))
    ends = [
        0.4,
        *((0.1 + 0.4 * (next(random) * 37 % 31) / 31) for _ in range(15)),
        *(("pruned", 0.2 + number / 99) for number in range(16)),
    ]
    path = report([make(ends=ends, metrics=dict.fromkeys(REPORTED, 0.123456)).folder])
    assert path.stat().st_size < 300_000  # 1.5 MB with images
    assert len(page_of(path).table("trial")) == 33


def test_searches_are_compared(make):
    tpe = make("tpe", [0.4, ("pruned", 0.1), 0.6])
    other = make("random", [0.4, 0.5, "failed", 0.3])
    page = page_of(report([tpe.folder, other.folder], tpe.folder.parent / "both.html"))
    rows = [row[:-1] for row in page.table("search")]  # without the time
    assert rows[1:] == [
        ["tpe", "60.0", "2", "40.0", "+20.0", "no", "3", "0", "10"],
        ["random", "50.0", "1", "40.0", "+10.0", "no", "4", "1", "12"],
    ]
    assert page.charts.count("Best AP so far") == 2
    assert [heading for heading in page.headings if heading.startswith("Search ")] == ["Search tpe", "Search random"]


def test_one_subject_reports_into_its_folder_and_several_where_one_stands(make, tmp_path, monkeypatch):
    first, second = make("first", [0.4]), make("second", [0.4])
    assert report([first.folder]) == first.folder / "report.html"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert report([first.folder, second.folder]).resolve() == tmp_path / "here" / "report.html"
    assert report([first.folder], tmp_path / "named.html") == tmp_path / "named.html"


def test_names_are_shown_and_not_run(make):
    search = make("<script>alert(1)<", [0.4])
    text = report([search.folder]).read_text()
    assert "<script>alert(1)" not in text
    assert html.escape("<script>alert(1)<") in text


def test_what_cannot_be_reported_is_one_line(make, tmp_path, runs):
    with pytest.raises(UserError, match="name the folder of at least one run or search"):
        report([])
    with pytest.raises(UserError, match="nowhere: there is no such run or search"):
        report([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: holds neither a run nor a search \(config.yaml is missing\)"):
        report([tmp_path / "empty"])
    first, second = make("first", [0.4]), make("second", [0.4], metric="AP50")
    with pytest.raises(UserError, match=r"first maximizes AP, .*second maximizes AP50; not comparable"):
        report([first.folder, second.folder])
    with pytest.raises(UserError, match=r"out.html: cannot write the report \(No such file or directory\)"):
        report([first.folder], tmp_path / "missing" / "out.html")
    shutil.copytree(runs[0], tmp_path / "damaged")
    (tmp_path / "damaged" / "log.txt").write_text('{"epoch": 0}\n')
    with pytest.raises(UserError, match=r"log.txt: the line of epoch 0 is not one of a training log of raydetr"):
        report([tmp_path / "damaged"])


MEASURE = """
<iframe src="{address}" style="width: 1280px; height: 2000px"></iframe>
<iframe src="{address}" style="width: 400px; height: 2000px"></iframe>
<script>
const frames = [...document.querySelectorAll("iframe")];
const loaded = frames.map((frame) => new Promise((done) => frame.addEventListener("load", done)));
Promise.all(loaded).then(() => {{
  for (const frame of frames) {{
    const page = frame.contentDocument.documentElement, said = [];
    if (page.scrollWidth > page.clientWidth) said.push("the page is wider than the window");
    for (const each of page.querySelectorAll(".chart, table, .tile, pre, img")) {{
      const card = each.closest("section, .tiles").getBoundingClientRect();
      const box = (each.closest(".scroll") || each).getBoundingClientRect();
      if (box.right > card.right || box.left < card.left) said.push(each.outerHTML.slice(0, 80));
    }}
    for (const each of page.querySelectorAll("svg.chart")) {{
      const letters = each.getBoundingClientRect().width / each.viewBox.baseVal.width;
      if (letters < 0.85) said.push(`letters of ${{10 * letters}} pixels in ${{each.ariaLabel}}`);
      for (const text of each.querySelectorAll("text")) {{
        const ends = text.getBoundingClientRect(), frame = each.getBoundingClientRect();
        if (ends.right > frame.right + 2 || ends.left < frame.left - 2) said.push(`cut: ${{text.textContent}}`);
      }}
    }}
    document.body.append(`[${{frame.clientWidth}}: ${{page.querySelectorAll("svg.chart").length}} charts, ${{said.join("; ") || "well"}}]`);
  }}
}});
</script>
"""


@pytest.mark.slow
def test_a_browser_draws_every_chart_within_its_card_at_both_widths(make, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium to look at the page with")
    metrics = dict.fromkeys(REPORTED, 0.123456)
    ends = [0.4, 0.5, ("pruned", 0.1), 0.3, "failed", 0.625, 0.2, 0.45, ("pruned", 0.3), 0.35, 0.5, ("pruned", 0.3), 0.31, 0.52, 0.4]
    path = report([make(ends=ends, metrics=metrics).folder])
    (tmp_path / "measure.html").write_text(MEASURE.format(address=path.as_uri()))
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--allow-file-access-from-files", "--virtual-time-budget=12000", "--dump-dom"]
    done = subprocess.run([*command, (tmp_path / "measure.html").as_uri()], capture_output=True, text=True, timeout=180)
    charts = path.read_text().count('<svg class="chart"')
    assert charts >= 9
    assert re.findall(r"\[(\d+): (\d+) charts, (.*?)\]", done.stdout) == [("1280", str(charts), "well"), ("400", str(charts), "well")]
    assert "Uncaught" not in done.stderr
