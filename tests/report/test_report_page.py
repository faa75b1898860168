import base64
import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
from matplotlib.image import imread
from page_samples import attacked, audit, hostile, real_run, records, write_run

from fedveil.errors import AuditError, CheckpointError, FedveilError
from fedveil.report.curves import best
from fedveil.report.page import write_page
from fedveil.report.page.heatmap import heat_map
from fedveil.report.page.rendering import ENVIRONMENT
from fedveil.run import ClientExposure, UpdateGuess
from fedveil.tasks.metrics import metric_named

CHROMIUM = shutil.which("chromium")


class Browser:
    """Chromium without a window or a network, spoken to over two pipes."""

    # File descriptors 3 and 4 are what it expects.
    START = (
        "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); "
        "os.execv(sys.argv[3], sys.argv[3:])"
    )
    OPTIONS = (
        "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe",
        "--disable-background-networking", "--no-first-run", "--hide-scrollbars",
        "--host-resolver-rules=MAP * ~NOTFOUND",
    )  # fmt: skip

    def __init__(self, home):
        pairs = (os.pipe(), os.pipe())
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (pairs[0][0], pairs[1][1])]
        assert CHROMIUM is not None
        start = (sys.executable, "-c", self.START, *map(str, theirs), CHROMIUM)
        self.process = subprocess.Popen(
            [*start, *self.OPTIONS, f"--user-data-dir={home}", "about:blank"],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (*theirs, pairs[0][0], pairs[1][1]):
            os.close(end)
        self.write, self.read = os.fdopen(pairs[0][1], "wb"), os.fdopen(pairs[1][0], "rb")
        self.count, self.events, self.session = 0, [], None
        pages = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in pages if target["type"] == "page")
        attach = self.send("Target.attachToTarget", targetId=page, flatten=True)
        self.session = attach["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method, **parameters):
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        self.write.write(json.dumps(message).encode() + b"\0")
        self.write.flush()
        while (answer := self.receive()).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def receive(self):
        data = bytearray()
        while (octet := self.read.read(1)) != b"\0":
            assert octet, "the browser has gone"
            data += octet
        return json.loads(data)

    def open(self, path, width, height, *, dark=False):
        """Load a file; returns what was said on the console, and what was asked of the network."""
        mobile = width < 500
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=1, mobile=mobile)  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.send("Page.navigate", url=path.as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())
        self.evaluate("document.fonts.ready.then(() => 1)")
        said = [e for e in self.events if e["method"] in COMPLAINTS]
        asked = [
            e["params"]["request"]["url"]
            for e in self.events
            if e["method"] == "Network.requestWillBeSent"
        ]
        return said, [url for url in asked if url != path.as_uri()]

    def evaluate(self, code):
        result = self.send(
            "Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True
        )
        return result["result"]["value"]

    def screenshot(self, path, *, whole=False):
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self):
        printed = self.send("Page.printToPDF", preferCSSPageSize=True, paperWidth=8.27,
                            paperHeight=11.69, printBackground=False)  # fmt: skip
        return base64.b64decode(printed["data"])

    def close(self):
        with contextlib.suppress(AssertionError, OSError):
            self.session = None
            self.send("Browser.close")
        self.write.close()
        self.read.close()
        self.process.wait(timeout=20)


COMPLAINTS = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
VOID = {"meta"}


class Structure(HTMLParser):
    """What a page is made of; complains about tags that do not match."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.stack, self.tags, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert "svg" in self.stack, tag
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.stack[-1] if self.stack else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def text(self, tag=None):
        return " ".join(" ".join(t for name, t in self.texts if tag in (None, name)).split())


def structure(path):
    return Structure(path.read_text(encoding="utf-8"))


SCRIPT = '<script>alert("x&y")</script>'
SIZES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "small": (3, 2, {}),
    "ten": (10, 5, {"attacks": 4, "alarms": [("replayed-mask", "Round 3 repeats round 2.")]}),
    "hundred": (100, 100, {"attacks": 4}),
    "single": (1, 1, {}),
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of each kind: of audits large and small, of a hostile one, and of runs without."""
    folder = tmp_path_factory.mktemp("pages")
    runs = {
        name: write_run(folder / name, clients, rounds, found=audit(clients, rounds, **words))
        for name, (clients, rounds, words) in SIZES.items()
    }
    settings = {SCRIPT: {SCRIPT: [SCRIPT]}, "long": "x" * 9999}
    runs["hostile"] = write_run(folder / "hostile", found=hostile(SCRIPT), **settings)
    runs["not audited"] = real_run(folder / "real")
    runs["nothing measured"] = real_run(folder / "bare", rounds=1, clients=1, test=False)
    runs["nothing at all"] = write_run(folder / "empty", lines=[])
    return {name: write_page(run) for name, run in runs.items()}


KINDS = (*SIZES, "hostile", "not audited", "nothing measured", "nothing at all")


@pytest.mark.parametrize("kind", KINDS)
def test_page_is_sound_html_that_needs_nothing_else(pages, kind):
    text = pages[kind].read_text(encoding="utf-8")
    page = Structure(text)
    assert len(text.encode()) < 2_000_000
    assert page.all("html") == [{"lang": "en"}]
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy.startswith("default-src 'none'")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object"}
    for _, attributes in page.tags:
        assert "src" not in attributes
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("href", "xlink:href"):
            assert attributes.get(name, "#").startswith("#")
    assert not re.findall(r"url\((?!#)|@import", text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = {a["href"][1:] for a in page.all("a")} | set(re.findall(r"url\(#(\w+)\)", text))
    assert wanted <= set(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_page_can_be_read_without_seeing_it(pages, kind):
    page = structure(pages[kind])
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    for svg in page.all("svg"):
        if svg.get("aria-hidden") != "true":
            title, description = svg["aria-labelledby"].split()
            assert {"id": title} in page.all("title")
            assert {"id": description} in page.all("desc")
    assert all("scope" in cell for cell in page.all("th"))
    assert all(table["aria-label"] for table in page.all("table"))
    assert len(page.all("figure")) == len(page.all("figcaption"))


def test_headline_then_alarms_then_the_rest(pages):
    page = structure(pages["ten"])
    assert page.text("h1").startswith("The strongest attack with what 10 clients were sent reaches")
    headings = [t for name, t in page.texts if name == "h2"]
    assert headings[0] == "Alarm: a check of the messages failed"
    assert headings[1] == "What is kept, and what is shown"
    rows = page.text("span")
    assert rows.index("ALARM") < rows.index("not applicable") < rows.index("sound")
    assert "Alarm" not in structure(pages["small"]).text("h2")


def test_what_was_not_checked_looks_like_nothing_that_was(pages):
    page = pages["small"].read_text()
    assert '<span class="unmade">not applicable</span>' in page
    assert page.count('<span class="sound">sound</span>') == 2
    assert "that speaks neither for the scheme nor against it" in page
    assert ".unmade{color:var(--soft)" in page


def test_page_shows_every_finding(pages):
    found, page = audit(10, 5, **SIZES["ten"][2]), structure(pages["ten"])
    text = page.text()
    for name in ("base", "public model", "server model", "proxy as received", "proxy after local"):
        assert name in page.text("li")
    for limit in found.not_protected:
        assert limit in text
    strongest = found.strongest
    for value in (strongest.measures["accuracy"], 100 * strongest.leak, 100 * strongest.gain_shown):
        assert f"{value:.1f}\u00a0%" in "".join(t for name, t in page.texts if name == "td")
    assert "10 clients" in text
    assert "and 7 more" in text
    assert "scheme.client_mask" in text
    assert f"All {len(found.attacks)} attacks" in text
    assert "infers of the mean of the others' updates" in text


def test_the_gain_that_attackers_make_by_themselves_stands_beside_what_is_shown(tmp_path):
    found = audit(base=54.0)
    end, own = found.models["global"]["accuracy"], found.own["accuracy"]
    text = structure(write_page(write_run(tmp_path, found=found))).text()
    assert f"Gain of own work alone {100 * (own - 54) / (end - 54):.0f} %" in text


def drawn_heat_map(exposure, rounds):
    heat = heat_map(exposure, rounds)
    return ENVIRONMENT.get_template("heatmap.html.j2").render(heat=heat)


def test_heat_map_has_a_cell_for_every_client_and_round():
    after = {1: 0.25, 3: 0.5}
    page = Structure(
        drawn_heat_map(
            {"a": ClientExposure(0.5, 2.0, after, 0.1), "b": ClientExposure(0.0, 0.0, {}, 0.0)}, 4
        )
    )
    cells = [(a.get("class"), int(a.get("colspan", 1))) for a in page.all("td")]
    assert cells == [
        ("k2", 2), ("k5", 2), ("number k5", 1), ("kx", 4), ("number k0", 1),
    ]  # fmt: skip
    texts = [t for name, t in page.texts if name == "td"]
    assert texts == ["25", "50", "50.0\u00a0%", "–", "0.0\u00a0%"]
    assert [a["aria-label"] for a in page.all("th") if "aria-label" in a] == [
        "round 1", "round 2", "round 3", "round 4",
    ]  # fmt: skip


def test_heat_map_of_very_many_stays_small_and_says_so():
    many = {
        f"c{i:04d}": ClientExposure(i / 1000, 1.0, {r: i * r / 250_000 for r in range(1, 251)}, 0.0)
        for i in range(1000)
    }
    text = drawn_heat_map(many, 250)
    page = Structure(text)
    assert len(text) < 1_000_000
    assert "900 clients who were shown less are left out" in page.text("p")
    assert "Not every round is shown" in page.text("p")
    names = [t for name, t in page.texts if name == "span" and t.startswith("c0")]
    assert names == [f"c{i:04d}" for i in range(900, 1000)]
    for row in text.split("<tr>")[2:]:
        spans = re.findall(r'<td class="k\w+"(?: colspan="(\d+)")?>', row)
        assert sum(int(span or 1) for span in spans) == 84  # every third round, and the last


def test_texts_stay_texts(pages):
    page = structure(pages["hostile"])
    assert SCRIPT in page.text("h1")
    assert SCRIPT in page.text("td")
    assert "x" * 500 + "…" in page.text("span")
    assert "x" * 501 not in page.text("span")


@pytest.mark.parametrize("audited", [True, False])
def test_no_text_of_a_run_steers_its_page(tmp_path, audited):
    text = "\x1b[2J\x9b\r\u2028\x85\u202egpj.<b>\x00 5 %"
    found = dataclasses.replace(hostile(text), metric=text, inferred=[UpdateGuess(text, 1, 0, 0)])
    lines = [
        dataclasses.replace(
            one, bytes_down={text: 1}, bytes_up={text: 1}, loss_first={text: 1.0},
            failed={text: text}, refused={text: text}, bounded={text: text}, rejected=text,
        )
        for one in records()
    ]  # fmt: skip
    run = write_run(
        tmp_path / f"a\u202e{text[:3]}", found=found if audited else None, lines=lines,
        **{text: {text: text}},
    )  # fmt: skip
    shown = write_page(run).read_text(encoding="utf-8")
    assert all(one.isprintable() or one in "\n\u00a0" for one in shown)
    assert "<b>\\x00" not in shown
    assert "\\x1b[2J\\x9b\\r\\u2028\\x85\\u202egpj.&lt;b&gt;\\x00 5\u00a0%" in shown


def test_half_characters_and_formulas_do_no_harm(tmp_path):
    found = dataclasses.replace(audit(3, 2), metric="$\\frac{", sentence="half: \ud83d")
    path = write_page(write_run(tmp_path, found=found))
    assert "half: ?" in structure(path).text("h1")


def test_attacks_that_were_not_measured_are_dashes(tmp_path):
    found = audit(3, 2)
    bare = [dataclasses.replace(a, measures={}, leak=None, gain_shown=None) for a in found.attacks]
    found = dataclasses.replace(found, attacks=bare, models={})
    page = structure(write_page(write_run(tmp_path, found=found, lines=records(measured=False))))
    assert "Nothing was measured: the run has no test set." in page.text("p")
    assert "Strongest attack" not in page.text("dt")


def test_loss_is_better_when_it_is_lower():
    attacks = [
        attacked(name, ["a"], 1, "", accuracy, 50, 90)
        for name, accuracy in (("weak", 60.0), ("strong", 80.0), ("middle", 70.0))
    ]
    assert best(attacks, metric_named("accuracy")).attack == "strong"
    assert best(attacks, metric_named("loss")).attack == "strong"
    assert best(attacks, metric_named("unheard-of")) is None


def test_page_of_a_run_that_was_never_audited(pages):
    page = structure(pages["not audited"])
    folder = pages["not audited"].parent
    assert "has not been audited" in page.text("h1")
    assert f"fedveil audit {folder}" in page.text("code")
    assert "was shown most" in page.text("p")  # from the ledger
    assert "No attack was tried on this run." in page.text("p")
    assert "Losses over rounds" in page.text("h3")


def test_reporting_changes_nothing_in_a_run_that_goes_on(tmp_path):
    run = real_run(tmp_path / "run")
    ledger = run / "exposure.jsonl"
    torn = ledger.read_bytes() + b'{"round": 3, "cli'
    ledger.write_bytes(torn)
    write_page(run, tmp_path / "out.html")
    assert ledger.read_bytes() == torn
    assert not (run / "report.html").exists()


def test_the_same_run_gives_the_same_bytes(pages, tmp_path):
    for kind in ("ten", "not audited"):
        again = write_page(pages[kind].parent, tmp_path / "deep" / "again.html")
        assert again.read_bytes() == pages[kind].read_bytes()


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    run = write_run(tmp_path / "run", found=audit())
    (tmp_path / "taken").mkdir()
    with pytest.raises(CheckpointError, match="taken could not be written"):
        write_page(run, tmp_path / "taken")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "taken"]


DEEP = "[" * 99_999
DAMAGE = {
    "run.json": ("", "[]", DEEP, '{"format": 7}', "configuration=5", "tensors=[]", "groups=[[]]"),
    "metrics.jsonl": ("{\n", "[1]\n", '{"round": "x"}\n', '{"round": 2}\n', "\udcff\n", DEEP),
    "audit.json": (
        "{", "null", DEEP, '{"format": 2}', '{"format": 1}', "exposure=[]", "attacks=5",
        "coalitions={'x': 1}", "metric=5", "sentence=null",
        'exposure={"a": {"share": "all", "bits": 1, "after": {}, "next": 0}}',
    ),
    "summary.json": ("{", "[]", '{"schemes": 5}'),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_named(tmp_path, name):
    for number, damage in enumerate(DAMAGE[name]):
        run = write_run(tmp_path / str(number), found=audit())
        key, equals, value = damage.partition("=")
        if equals:
            whole = json.loads((run / name).read_text())
            damage = json.dumps(whole | {key: json.loads(value.replace("'", '"'))})
        (run / name).write_bytes(damage.encode("utf-8", "surrogateescape"))
        with pytest.raises((CheckpointError, AuditError)) as caught:
            write_page(run)
        assert name in caught.value.where or name in str(caught.value), damage
        assert caught.value.found or caught.value.expected
        assert not (run / "report.html").exists()


def test_a_folder_that_is_no_run(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FedveilError, match="not the folder of a run"):
            write_page(folder)


def test_a_damaged_ledger_is_named(tmp_path):
    run = real_run(tmp_path)
    (run / "exposure.jsonl").write_text("{}\n")
    with pytest.raises(CheckpointError, match=r"exposure\.jsonl") as caught:
        write_page(run)
    assert caught.value.fix


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium: apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_browser_shows_it_on_a_phone_and_on_a_desk(browser, pages, kind, tmp_path):
    for width, height, dark in ((360, 800, False), (1200, 1600, False), (1200, 1600, True)):
        said, asked = browser.open(pages[kind], width, height, dark=dark)
        assert not said
        assert not asked
        assert browser.evaluate("document.scripts.length") == 0
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        browser.screenshot(tmp_path / "page.png")
        pixels = imread(tmp_path / "page.png")
        assert pixels.shape[:2] == (height, width)
        assert (pixels[0, 0, :3].mean() < 0.2) == dark


def test_a_browser_draws_all_lines_and_lets_wide_tables_scroll(browser, pages):
    browser.open(pages["hundred"], 360, 800)
    boxes = "[...document.querySelectorAll('.scroll')]"
    assert browser.evaluate(f"{boxes}.some(box => box.scrollWidth > box.clientWidth)")
    drawn = "[...document.querySelectorAll('figure > svg')].map(svg => svg.getBBox().width)"
    assert min(browser.evaluate(drawn)) > 200
    size = "parseFloat(getComputedStyle(document.querySelector('figure text')).fontSize)"
    scale = "document.querySelector('figure > svg').clientWidth / 331.2"  # points of its view box
    assert browser.evaluate(f"{size} * {scale}") > 9  # pixels of a phone


def test_a_browser_prints_it_on_light_paper(browser, pages):
    browser.open(pages["hundred"], 1200, 1600, dark=True)
    pdf = browser.pdf()
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type /Page\b", pdf)) < 12
    browser.send("Emulation.setEmulatedMedia", media="print")
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    browser.send("Emulation.setEmulatedMedia", media="")
    assert ground == "rgb(255, 255, 255)"
