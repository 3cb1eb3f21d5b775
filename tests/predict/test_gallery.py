from html.parser import HTMLParser

from raydetr.draw import Box, category_colours
from raydetr.predict.gallery import Card, Column, gallery_page


class _Page(HTMLParser):
    """What a browser would make of the page: tags with their attributes, and the text outside style."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text, self._open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_data(self, data):
        if self._open[-1:] != ["style"]:
            self.text.append(data)

    def handle_endtag(self, tag):
        while self._open and self._open.pop() != tag:
            pass


def _card(name="a.jpg", boxes=(), true=None, best=0.5, columns=1):
    column = [Column(f"pictures/{place}.jpg", f"thumbnails/{place}.jpg", list(boxes), best) for place in range(columns)]
    return Card(name, (300, 200), true, column)


def test_the_page_counts_what_is_found_and_true():
    boxes = [Box((0, 0, 9, 9), name, 0.8) for name in ("balloon", "balloon", "face")]
    cards = [_card("a.jpg", boxes, true=[Box((0, 0, 9, 9), "balloon")]), _card("b.jpg", boxes[:1], true=[])]
    page = _Page(gallery_page({"found": "run/best.pth"}, cards, 0.7, category_colours(["balloon", "face", "kite"]), ["c.jpg: broken"]))
    text = " ".join(" ".join(page.text).split())
    assert "found by run/best.pth 2 images" in text
    assert "2 balloon, 1 face" in text
    assert "true no box" in text
    assert "balloon 3 1 face 1 0 true box" in text, "the legend's rows: category, found, true"
    assert "kite" not in text, "the legend has only what is to be seen"
    assert "1 image left out" in text
    assert "c.jpg: broken" in text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2
    assert all(image["loading"] == "lazy" for image in images)


def test_a_picture_without_boxes_says_so_and_how_near_it_came():
    assert "nothing above 0.70 (best 0.69)" in gallery_page({"found": "m"}, [_card(best=0.6999)], 0.7, {})
    assert "nothing above 0.0125 (best 0.01)" in gallery_page({"found": "m"}, [_card(best=0.0121)], 0.0125, {})


def test_names_from_data_cannot_become_html():
    evil = "<script>alert('x')</script>\"&'"
    boxes = [Box((0, 0, 9, 9), evil, 0.8)]
    card = _card(f"{evil}.jpg", boxes, true=boxes, columns=2)
    html = gallery_page({"before": evil, "after": evil}, [card], 0.7, category_colours([evil]), [f"{evil}: broken"])
    page = _Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script" not in html
    assert not [attributes for _, attributes in page.tags if any(name.startswith("on") for name in attributes)]
    assert " ".join(page.text).count(evil) >= 6, "every one of them is there to be read"


def test_the_page_needs_nothing_from_elsewhere_and_quotes_its_links():
    card = Card("x", (10, 10), None, [Column("pictures/ä #1?.jpg", "thumbnails/ä #1?.jpg", [], 0.1)])
    html = gallery_page({"found": "m"}, [card], 0.7, {})
    assert "http:" not in html
    assert "https:" not in html
    assert 'href="pictures/%C3%A4%20%231%3F.jpg"' in html
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html
