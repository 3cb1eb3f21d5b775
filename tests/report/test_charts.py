import re
from xml.etree import ElementTree

import pytest

from raydetr.report.charts import HEIGHT, WIDTH, Axis, Chart, axis, bars, parallel


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (Axis("", 0, 10), ["0", "2", "4", "6", "8", "10"]),
        (Axis("", 1, 3, whole=True), ["1", "2", "3"]),
        (Axis("", 10, 0), ["0", "2", "4", "6", "8", "10"]),
        (Axis("", 0.02, 0.5), ["0.1", "0.2", "0.3", "0.4", "0.5"]),
        (Axis("", 1e-5, 1e-3, log=True), ["1e-5", "3e-5", "1e-4", "3e-4", "1e-3"]),
        (Axis("", 1e-9, 1e-1, log=True), ["1e-9", "1e-7", "1e-5", "1e-3", "0.1"]),
        (Axis("", 2.1e-4, 2.9e-4, log=True), ["2.1e-4", "2.9e-4"]),
        (Axis("", -0.4, 1.4, names=("step", "cosine")), ["step", "cosine"]),
    ],
)
def test_ticks_are_round_numbers(scale, expected):
    assert [text for _, text in scale.ticks()] == expected


def test_a_logarithmic_axis_spaces_factors_evenly():
    assert Axis("", 1, 100, log=True).share(10) == pytest.approx(0.5)
    assert Axis("", 0, 100).share(10) == pytest.approx(0.1)
    assert Axis("", 5, 5).share(5) == 0.5


def test_an_axis_holds_its_values_with_a_margin():
    found = axis("", [1.0, 3.0, float("nan")], margin=0.1)
    assert (found.low, found.high) == pytest.approx((0.8, 3.2))
    assert axis("", [1e-4], log=True).low == pytest.approx(5e-5)
    assert axis("", []).high > axis("", []).low
    assert axis("", [2.0]).low < 2 < axis("", [2.0]).high


def test_a_chart_is_valid_within_its_frame_and_escapes_text():
    figure = Chart("<name>", Axis("a & b", 0, 1), Axis("y", 0, 1))
    figure.band([(0, 0.2), (1, 0.3)], [(0, 0.4), (1, 0.6)], "s0")
    figure.line([(0, 0), (0.5, float("nan")), (1, 1)], "s1", "<title>")
    figure.dot((1, 1), "best", "at the corner")
    figure.bar(0, 1, 0.5, "trial")
    figure.across(0.5, "default")
    figure.upright(0.5, "default")
    figure.line([], "s1")
    root = ElementTree.fromstring(figure.svg())
    assert root.get("aria-label") == "<name>"
    assert root.get("viewBox") == f"0 0 {WIDTH} {HEIGHT}"
    (line,) = [each for each in root if each.get("class") == "line s1"]
    assert line.attrib["d"] == "M44 194L338 12"
    assert line[0].text == "<title>"
    numbers = [float(value) for each in root for name in ("cx", "x") if (value := each.get(name))]
    assert all(0 <= number <= WIDTH for number in numbers)


def test_parallel_coordinates_lead_lines_without_a_value_below_the_axis():
    axes = [Axis("lr", 1e-5, 1e-3, log=True), Axis("drop", 0, 1), Axis("AP", 0, 100)]
    root = ElementTree.fromstring(parallel("trials", axes, [([1e-4, None, 50.0], "best", "trial 1")]))
    (line,) = [each for each in root if each.get("class") == "line best"]
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", line.attrib["d"])]
    assert heights[0] == heights[2]  # the middle of a logarithmic axis and of a linear one
    assert heights[1] > 250  # below the axis


def test_bars_show_their_interval():
    root = ElementTree.fromstring(bars("importance", [("optim.lr", 0.5, 0.25, 0.75)], "share"))
    (whisker,) = [each for each in root if each.get("class") == "whisker"]
    low, high = map(float, re.fullmatch(r"M([\d.]+) [\d.]+H([\d.]+)", whisker.attrib["d"]).groups())
    (bar,) = [each for each in root if each.get("class") == "bar trial"]
    middle = float(bar.attrib["x"]) + float(bar.attrib["width"])
    assert middle == pytest.approx((low + high) / 2, abs=0.2)
    assert "0.50 (95 % interval 0.25 to 0.75)" in "".join(root.itertext())
