"""The page of a report: names stay text, numbers are readable, nothing outside the file is needed."""

import base64
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread, imsave

from attnswap.errors import ConfigError
from attnswap.evaluation.html import shown, write_html
from tests.helpers.browser import chromium, looked_at

HOSTILE = "<script>alert(1)</script> \"><img src=x onerror='alert(2)'> </title></style><!-- & &lt;"
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Reads a page, and fails where a tag is closed that was not open."""

    def __init__(self, path) -> None:
        super().__init__()
        self.tags, self.cells, self.scripts, self.open = [], [], [], []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open, "every tag is closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append([dict(attributes).get("class"), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif self.open and self.open[-1] != "style":
            self.text += data
            if self.open[-1] in ("td", "th"):
                self.cells[-1][1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def picture(path, size=(30, 60)):
    imsave(path, np.random.default_rng(0).random((*size, 3)))
    return path


def section(index, picture=None, rows=30):
    rows = [[512 * 2**i, 20.0 - 1.23456 * i - index, i % 2 == 0, None, "dense"] for i in range(rows)]
    columns = ["context", "perplexity", "used", "lost", "route"]
    table = {"columns": columns, "rows": rows}
    title = f"Section number {index}"
    return {"name": f"s{index}", "title": title, "text": f"What it says: {index}.", "table": table, "picture": picture}


def report(*sections, **model):
    return {"schema": "attnswap.suite/1", "title": "A report", "model": model, "sections": list(sections)}


def test_names_of_users_stay_text(tmp_path):
    table = {"columns": [HOSTILE, "b"], "rows": [[HOSTILE, {HOSTILE: [HOSTILE, 1.5]}]]}
    hostile = {"name": HOSTILE, "title": HOSTILE, "text": HOSTILE, "table": table, "picture": HOSTILE}
    files = [(HOSTILE, picture(tmp_path / "p.png"))]
    values = report(hostile, **{HOSTILE: HOSTILE})
    page = Page(write_html(values, files, tmp_path / "page.html", title=HOSTILE))
    assert page.text.count(HOSTILE) >= 9, "everywhere as it was written"
    assert len(page.all("script")) == 1
    assert [set(image) for image in page.all("img")] == [{"src", "alt"}]
    assert page.all("img")[0]["alt"] == HOSTILE
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in Page(tidy(tmp_path)).tags}
    assert json.loads(page.scripts[0]) == values


def tidy(tmp_path):
    files = [("p.png", picture(tmp_path / "p.png"))]
    return write_html(report(section(1, "p.png"), model="tidy"), files, tmp_path / "tidy.html", title="tidy")


@pytest.mark.parametrize("name", ["</script>", "</SCRIPT >", "<!--<script>", "]]>", "\u2028\ud800", "é 注意"])
def test_the_report_within_the_page_is_the_report(tmp_path, name):
    values = report(section(1), name=name, number=0.1 + 0.2, nothing=None, deep=[{"a": [1, 2.5, True]}])
    page = Page(write_html(values, [], tmp_path / "page.html", title="title"))
    assert page.all("script") == [{"type": "application/json", "id": "report"}]
    assert json.loads(page.scripts[0]) == values
    assert page.source.count("</script") == page.source.count("<script") == 1


def test_the_page_needs_no_other_file(tmp_path):
    files = [(f"{i}.png", picture(tmp_path / f"{i}.png", (10 * i, 20))) for i in (1, 2)]
    values = report(section(1, "2.png"), section(2, "1.png"), section(3))
    page = Page(write_html(values, files, tmp_path / "deep" / "page.html", title="title"))
    sources = [image["src"] for image in page.all("img")]
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    found = [base64.b64decode(source.partition(",")[2]) for source in sources]
    assert found == [files[1][1].read_bytes(), files[0][1].read_bytes()], "each in the section that names it"
    references = [a[name] for _, a in page.tags for name in ("src", "href", "srcset", "action", "data") if name in a]
    targets = {"#" + attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {r for r in references if not r.startswith("data:")} == {"#s1", "#s2", "#s3"} <= targets
    for outside in ("http:", "https:", "url(", "@import", "//fonts", "<link"):
        assert outside not in page.source
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "script-src" not in policy, "so that none may run"
    assert "prefers-color-scheme: dark" in page.source
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["page.html"]


def test_numbers_stand_on_the_right_and_text_on_the_left(tmp_path):
    page = Page(write_html(report(section(1, rows=2)), [], tmp_path / "page.html", title="title"))
    number, text = "number", None
    assert page.cells[5:] == [
        *([number, "512"], [number, "19.00"], [text, "yes"], [text, "-"], [text, "dense"]),
        *([number, "1024"], [number, "17.77"], [text, "no"], [text, "-"], [text, "dense"]),
    ]
    assert [cell[0] for cell in page.cells[:5]] == [number, number, text, text, text], "headings like their columns"
    assert len([a for a in page.all("div") if a.get("class") == "table"]) == 1, "in a container that scrolls"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (False, "no"),
        (8192, "8192"),
        (134515008, "134,515,008"),
        (0.0, "0.000"),
        (1.0, "1.000"),
        (0.123456, "0.1235"),
        (1234.5678, "1235"),
        (9999.99, "10,000"),
        (-24931.7, "-24,930"),
        (1.23456e-5, "1.235e-05"),
        (3.14159e12, "3.142e+12"),
        ([0.98764, None], "[0.9876, -]"),
        ({"name": "ssmax", "scale": 0.5}, "name: ssmax, scale: 0.5000"),
        ("1.23456", "1.23456"),
    ],
)
def test_values_as_readers_see_them(value, text):
    assert shown(value) == text


def test_what_is_missing_is_left_out(tmp_path):
    bare = Page(write_html({}, [], tmp_path / "bare.html", title="nothing"))
    assert bare.text.split() == ["nothing", "nothing"], "title and heading"
    little = {"sections": [{"name": "cost", "table": {"columns": ["a"], "rows": []}, "picture": None}]}
    page = Page(write_html(little, [], tmp_path / "little.html", title="little"))
    assert page.text.split() == ["little", "little", "Contents", "cost", "cost", "a"]


def test_a_report_that_cannot_be_shown_leaves_the_page_as_it_was(tmp_path):
    path = tidy(tmp_path)
    before = path.read_bytes()
    bad = [
        (report(section(1, "none.png")), [], 'names the picture "none.png"'),
        (report(section(1, "a.png")), [("a.png", tmp_path / "none.png")], "cannot read the picture"),
        (report(value=float("nan")), [], "not plain JSON"),
        (report(value=np.float32(1)), [], "not plain JSON"),
    ]
    for values, files, message in bad:
        with pytest.raises(ConfigError, match=message):
            write_html(values, files, path, title="title")
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.png", "tidy.html"]


@pytest.fixture
def opened(tmp_path):
    files = [(f"{i}.png", picture(tmp_path / f"{i}.png", (400, 900))) for i in range(6)]
    sections = [section(i, f"{i}.png", rows=4 + i) for i in range(6)]
    sections[0]["table"]["columns"][3] = "a column with a long heading " * 3
    return write_html(report(*sections, id=HOSTILE), files, tmp_path / "page.html", title=HOSTILE)


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 1300])
def test_a_browser_shows_all_of_it(opened, tmp_path, width):
    found = looked_at(opened, tmp_path, width)
    assert found["headings"] == [f"Section number {i}" for i in range(6)]
    for index in range(6):
        assert f"What it says: {index}." in found["text"]
        assert f"512\t{20 - index:#.4g}\tyes\t-\tdense" in found["text"]
    assert HOSTILE in found["text"]
    assert found["pictures"] == [900] * 6, "loaded, and allowed by the page's policy"
    assert found["page"][0] <= found["page"][1], "the page itself never scrolls sideways"
    assert found["tables"][0][0] > found["tables"][0][1] or width > 1000, "a wide table does"


@pytest.mark.slow
def test_a_browser_paints_it_light_and_dark(opened, tmp_path):
    corner = {}
    for name, scheme in (("light", 1), ("dark", 0)):
        file = tmp_path / f"{name}.png"
        size, colours = "--window-size=1300,1500", f"--blink-settings=preferredColorScheme={scheme}"
        chromium(tmp_path, size, colours, f"--screenshot={file}", opened.as_uri())
        pixels = imread(file)[..., :3]
        assert pixels.shape[:2] == (1500, 1300)
        assert len(np.unique(pixels.sum(-1))) > 300, "pictures and text"
        corner[name] = pixels[:8, :8].mean()
    assert corner["light"] > 0.9 > 0.3 > corner["dark"]
