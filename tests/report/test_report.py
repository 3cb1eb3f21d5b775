import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from raydetr.config import load_config
from raydetr.errors import UserError
from raydetr.report.report import report
from raydetr.search.space import read_space
from raydetr.search.study import create_search
from raydetr.training.metrics import REPORTED

SPACE = {
    "optim.lr": {"loguniform": [1e-5, 1e-3]},
    "loss.eos_coef": {"uniform": [0.02, 0.5]},
    "optim.schedule": {"choice": ["step", "cosine"]},
    "optim.lr_drop": {"uniform": [0.4, 0.9], "when": {"optim.schedule": "step"}},
}


class Page(HTMLParser):
    """What a reader of the page meets: headings, tables as lists of rows, pictures by their div, scripts and links that leave it."""

    VOID = frozenset({"meta", "br", "hr", "img", "link", "input", "wbr"})

    def __init__(self, text: str):
        super().__init__()
        self.headings, self.tables, self.pictures, self.links, self.words, self.open = [], [], [], [], "", []
        self.feed(text)
        assert not self.open, "unclosed tags"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.links += [attrs[name] for name in ("src", "href") if name in attrs]
        if "plotly-graph-div" in attrs.get("class", ""):
            self.pictures.append(re.sub(r"-\d+$", "", attrs["id"]))  # of several in one card, the card's
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag in ("h1", "h2"):
            self.headings.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            return
        self.words += data
        if {"td", "th"} & set(self.open[-2:]):
            self.tables[-1][-1][-1] += data
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings[-1] += data


def page_of(path) -> Page:
    return Page(path.read_text())


@pytest.fixture
def make(tmp_path):
    """``make(name, ends)``: a search whose trials end as told: a number (complete), ("pruned", number), "failed" or "running"."""

    def make(name="search", ends=(), metric="AP", trials=None, metrics=None):
        search = create_search(tmp_path / name, read_space(SPACE), load_config(), trials=trials or max(1, len(ends)), metric=metric)
        for number, end in enumerate(ends):
            search.ask()
            state, value = end if isinstance(end, tuple) else (end, None) if isinstance(end, str) else ("complete", end)
            for epoch in range(1, 3 if state == "pruned" else 5):
                if value is not None:
                    search.report(number, epoch, value * epoch / 4 if state == "complete" else value)
            if state != "running":
                search.tell(number, state, value, reason="out of memory: lower <optim.batch_size>", metrics=metrics or {"AP50": 0.875})
        return search

    return make


def test_a_search_is_told_with_all_its_pictures(make):
    search = make(ends=[0.4, 0.5, ("pruned", 0.1), 0.3, "failed", 0.625, 0.2, "running"])
    page = page_of(report([search.folder]))
    names = ("history", "curves", "importances", "parallel", "slices", "slices", "slices", "slices", "timeline")  # four settings are drawn
    assert page.pictures == [f"s0-{name}" for name in names]
    assert "Not confirmed: trial 5 reaches AP 0.6250; the default settings (trial 0) reach 0.4000: +0.2250." in page.words
    beside = {row[0]: row[1:] for row in page.tables[0]}
    assert beside[""] == ["trial 0 (default)", "trial 5 (best)"]
    assert beside["AP"] == ["0.4", "0.625"]
    assert beside["AP50"] == ["0.875", "0.875"]
    assert beside["optim.lr"] == ["0.0001", f"{search.settings(5)['optim.lr']:.4g}"]
    assert page.tables[1] == [["trial", "reason"], ["4", "out of memory: lower <optim.batch_size>"]]
    assert [row[:2] for row in page.tables[2][1:]] == [
        [str(number), state]
        for number, state in enumerate(["complete", "complete", "pruned", "complete", "failed", "complete", "complete", "running"])
    ]
    assert "loguniform: [1.0e-05, 0.001]" in page.words
    assert "nan" not in page.words.lower()


def test_the_tables_hold_metrics_and_settings_and_nothing_else(make):
    """Studies of earlier versions also hold what Ray Tune adds to a result."""
    internals = {"trial_id": "a1", "pid": 7, "experiment_tag": "1_x=2", "config/number": 0, "timestamp": 1, "hostname": "h"}
    metrics = {**dict.fromkeys(REPORTED, 0.25), "node": "f00", "cards": "0", **internals}
    search = make(ends=[0.4, 0.5], metrics=metrics)
    beside, trials = page_of(report([search.folder])).tables
    reported = [name for name in REPORTED if name not in ("AP", "seconds")]
    varied = [name for name in search.space.dimensions if search.settings(1).get(name, search.base[name]) != search.base[name]]
    assert [row[0] for row in beside] == ["", "AP", "epochs", *reported, *varied]
    drawn = [name for name in search.space.names if name != "optim.lr_drop" or "optim.lr_drop" in trials[0]]
    assert trials[0] == ["trial", "state", "AP", "epochs", "seconds", *drawn, *reported]


def test_the_report_needs_no_network(make):
    path = report([make(ends=[0.4, 0.5, 0.6, 0.1]).folder])
    text = path.read_text()
    assert page_of(path).links == []
    assert len(re.findall(r"plotly\.js v\d", text)) == 1  # embedded once
    assert "cdn.plot.ly" not in re.sub(r"<script>.*?</script>", "", text, count=1, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("ends", "pictures", "words"),
    [
        ([], [], "No trial has ended with a value of AP yet."),
        (["running"], ["timeline"], "No trial has ended with a value of AP yet."),
        ([0.25], ["history", "curves", "timeline"], "No trial beats the default settings (trial 0), which reach AP 0.2500."),
        (["failed", "failed", "failed"], ["timeline"], "No trial has ended with a value of AP yet."),
        (
            ["failed", 0.5],
            ["history", "curves", "timeline"],
            "Not confirmed: trial 1 reaches AP 0.5000; the default settings (trial 0) have no value.",
        ),
        ([("pruned", 0.1), ("pruned", 0.2)], ["curves", "timeline"], "Not confirmed: trial 1 reaches AP 0.2000"),
        ([0.0] * 6, ["history", "curves", "parallel", *["slices"] * 4, "timeline"], "No trial beats the default settings"),
    ],
)
def test_a_search_with_little_to_show_is_told_all_the_same(make, ends, pictures, words):
    page = page_of(report([make(ends=ends).folder]))
    assert [name.removeprefix("s0-") for name in page.pictures] == pictures
    assert words in page.words


def test_searches_are_compared(make):
    tpe = make("tpe", [0.4, ("pruned", 0.1), 0.6])
    other = make("random", [0.4, 0.5, "failed", 0.3])
    page = page_of(report([tpe.folder, other.folder], tpe.folder.parent / "both.html"))
    assert page.pictures[:2] == ["compared-trials", "compared-epochs"]
    ids = re.findall(r'id="(s\d-[\w-]+)"', (tpe.folder.parent / "both.html").read_text())
    assert len(set(ids)) == len(ids) > 6
    rows = [row[:-1] for row in page.tables[0]]  # without the time
    assert rows[1:] == [
        ["tpe", "0.6", "2", "0.4", "+0.2000", "3", "0", "10"],
        ["random", "0.5", "1", "0.4", "+0.1000", "4", "1", "12"],
    ]
    assert page.headings[0] == "2 searches compared"
    assert [heading for heading in page.headings if heading.startswith("Search ")] == ["Search tpe", "Search random"]


def test_the_curves_of_a_comparison_rise_only(make):
    search = make("one", [0.4, 0.2, "failed", 0.6])
    text = report([search.folder, make("two", [0.3]).folder], search.folder.parent / "both.html").read_text()
    script = text[text.index('id="compared-trials"') :]
    curve = re.search(r'"x":\[1,2,3,4\],"y":\[(.*?)\]', script)
    assert [float(value) for value in curve[1].split(",")] == [0.4, 0.4, 0.4, 0.6]


def test_one_search_reports_into_its_folder_and_several_where_one_stands(make, tmp_path, monkeypatch):
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


def test_what_cannot_be_reported_is_one_line(make, tmp_path):
    with pytest.raises(UserError, match="name the folder of at least one search"):
        report([])
    with pytest.raises(UserError, match="nowhere: holds no search"):
        report([tmp_path / "nowhere"])
    first, second = make("first", [0.4]), make("second", [0.4], metric="AP50")
    with pytest.raises(UserError, match=r"first maximizes AP, .*second maximizes AP50; not comparable"):
        report([first.folder, second.folder])
    with pytest.raises(UserError, match=r"out.html: cannot write the report \(No such file or directory\)"):
        report([first.folder], tmp_path / "missing" / "out.html")


MEASURE = """
<iframe src="{address}" style="width: 1280px; height: 2000px"></iframe>
<iframe src="{address}" style="width: 400px; height: 2000px"></iframe>
<script>
const frames = [...document.querySelectorAll("iframe")];
const loaded = frames.map((frame) => new Promise((done) => frame.addEventListener("load", done)));
Promise.all(loaded).then(() => setTimeout(() => {{
  for (const frame of frames) {{
    const page = frame.contentDocument.documentElement, said = [];
    if (page.scrollWidth > page.clientWidth) said.push("the page is wider than the window");
    for (const each of page.querySelectorAll(".chart, table, .tile, pre")) {{
      const card = each.closest("section, .tiles"), box = each.closest(".scroll, pre, .tile").getBoundingClientRect();
      if (box.right > card.getBoundingClientRect().right) said.push(each.outerHTML.slice(0, 80));
    }}
    for (const each of page.querySelectorAll(".chart")) {{
      const drawn = each.querySelector(".main-svg");
      if (!drawn || drawn.getBoundingClientRect().width > each.getBoundingClientRect().width + 1) said.push("a chart leaves its card");
    }}
    const beside = page.querySelector("table");
    if (beside.scrollWidth > beside.closest(".scroll").clientWidth) said.push("the table of the best trial is cut");
    document.body.append(`[${{frame.clientWidth}}: ${{page.querySelectorAll(".chart").length}} charts, ${{said.join("; ") || "well"}}]`);
  }}
}}, 3000));
</script>
"""


@pytest.mark.slow
def test_a_browser_draws_every_chart_within_its_card_at_both_widths(make, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium to look at the page with")
    metrics = dict.fromkeys(REPORTED, 0.123456)
    path = report([make(ends=[0.4, 0.5, ("pruned", 0.1), 0.3, "failed", 0.625], metrics=metrics).folder])
    (tmp_path / "measure.html").write_text(MEASURE.format(address=path.as_uri()))
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    command += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--enable-logging=stderr", "--allow-file-access-from-files", "--virtual-time-budget=12000", "--dump-dom"]
    done = subprocess.run([*command, (tmp_path / "measure.html").as_uri()], capture_output=True, text=True, timeout=180)
    charts = len(page_of(path).pictures)
    assert re.findall(r"\[(\d+): (\d+) charts, (.*?)\]", done.stdout) == [("1280", str(charts), "well"), ("400", str(charts), "well")]
    assert "Uncaught" not in done.stderr


def test_the_first_sentence_of_a_confirmed_search_is_the_verdict(make):
    search = make(ends=[0.4, 0.5]).folder
    words = {
        "sentence": "No difference can be shown <here>.",
        "caveat": "Judged elsewhere.",
        "chosen": 0,
        "judged_on": "val",
    }
    (search / "verdict.json").write_text(json.dumps(words))
    page = page_of(report([search]))
    first, second = page.words.index(words["sentence"]), page.words.index(words["caveat"])
    assert page.words.index("Search ") < first < second < page.words.index("In the search itself, trial")
    assert "Not confirmed" not in page.words
    (search / "verdict.json").write_text("{}")
    with pytest.raises(UserError, match=r"verdict\.json: is damaged; write it again with raydetr confirm"):
        report([search])
