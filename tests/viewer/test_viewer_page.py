"""The page of the viewer in headless Chromium: what it shows, its keys, and that hostile traces stay text."""

import contextlib
import urllib.parse

import pytest

from tests.evaluation.test_report import HOSTILE, LEAVE, listening
from tests.viewer import made_runs
from tests.viewer.browser import Browser
from tests.viewer.serving import index_of, serving

pytestmark = [pytest.mark.slow, pytest.mark.chromium]


@pytest.fixture(scope="module")
def elsewhere():
    """A server that should never be asked: its address, and what it was asked."""
    with listening() as server:
        yield server


@pytest.fixture(scope="module")
def hostile(elsewhere):
    return HOSTILE + LEAVE.format(elsewhere[0]) + "\u202eabc{{1+1}}${alert(1)}`javascript:alert(1)"


@pytest.fixture(scope="module")
def pages(tmp_path_factory, hostile):
    """Viewers of plain runs, of plain evaluations, and of hostile ones of both kinds."""
    folder = tmp_path_factory.mktemp("runs")
    runs = [made_runs.training(folder / f"run-{i}", seed=i, settings={"seed": i}) for i in range(2)]
    evaluations = [made_runs.evaluation(folder / f"eval-{i}", 120, seed=i) for i in range(2)]
    bad = [
        made_runs.training(folder / "bad-run", text=hostile),
        made_runs.evaluation(folder / "bad-eval", 8, text=hostile),
    ]
    with contextlib.ExitStack() as stack:
        asks = [stack.enter_context(serving(index_of(*some))) for some in (runs, evaluations, bad)]
        yield [f"http://127.0.0.1:{ask.port}/" for ask in asks], folder


@pytest.fixture
def browser(tmp_path):
    with Browser(tmp_path / "profile") as browser:
        yield browser


def texts(browser, selector):
    return browser.run(f"[...document.querySelectorAll({selector!r})].map((x) => x.textContent)")


def count(browser, selector):
    return browser.run(f"document.querySelectorAll({selector!r}).length")


def at(browser, view, **fields):
    browser.run(f"location.hash = {'#' + view + '?' + urllib.parse.urlencode(fields)!r}")


def test_curves_of_two_runs_side_by_side(pages, browser):
    browser.open(pages[0][0])
    browser.until("document.querySelectorAll('.chart').length")
    assert texts(browser, ".run h3") == ["run-0", "run-1"] and "40 of 40 iterations" in texts(browser, ".run dd")
    assert texts(browser, ".chart figcaption b")[0] == "rl: accuracy"
    assert count(browser, ".chart:first-child polyline[points]") == 8  # two lines of each run, and their legend
    assert "seed" in texts(browser, "details td")
    browser.run("document.querySelector('.chart > svg').focus()")
    for _ in range(3):
        browser.key("ArrowRight")
    assert texts(browser, ".chart:first-child [role=status]") == ["at 3 iterations"]
    assert float(texts(browser, ".chart:first-child .legend b")[0]) > 0
    assert browser.errors == []


def test_the_list_is_filtered_and_read_by_keys(pages, browser):
    browser.open(pages[0][1] + "#traces?side=1")
    browser.until("document.querySelectorAll('.list tbody tr').length === 50")
    browser.key("n")
    browser.until("document.querySelector('.pages').textContent.includes('51–100 of 120')")
    browser.key("j")
    browser.key("j")
    assert browser.run("document.activeElement.textContent") == "q00051"
    browser.key("Enter")
    browser.until("document.querySelector('h2')?.textContent === 'q00051'")
    browser.key("j")
    browser.until("document.querySelector('h2')?.textContent === 'q00052'")
    browser.key("Escape")
    browser.until("document.querySelector('.list') && document.activeElement.textContent === 'q00052'")  # where one was
    browser.run(
        "(x => { x.value = 'wrong'; x.dispatchEvent(new Event('change')); })(document.querySelector('[name=verdict]'))"
    )
    browser.until(
        "[...document.querySelectorAll('.list .right')].length === 0 && document.querySelectorAll('.list .wrong').length"
    )
    browser.key("/")
    browser.run("document.execCommand('insertText', false, 'number 1')")
    browser.until(
        "location.hash.includes('text=number') && !document.querySelector('.pages').textContent.includes('120')"
    )
    assert browser.run("document.activeElement.name") == "text"  # typing goes on
    assert browser.errors == []


def test_what_changed_between_two_runs_is_shown_side_by_side(pages, browser):
    browser.open(pages[0][1] + "#traces?change=lost&before=0&to=1")
    browser.until("document.querySelectorAll('.list tbody tr').length")
    assert count(browser, ".list .right") == 0
    browser.run("document.querySelector('.list a').click()")
    browser.until("document.querySelectorAll('.sides article').length === 2")
    assert texts(browser, ".sides article .pairs .right, .sides article .pairs .wrong") == ["✓ right", "✗ wrong"]


def test_a_trace_has_its_boxes_crops_and_log_probabilities(pages, browser):
    browser.open(pages[0][0] + "#traces?tool=any")
    browser.until("document.querySelectorAll('.list a').length")
    browser.run(
        "[...document.querySelectorAll('.list tr')].find(x => x.textContent.includes('select_frames')).querySelector('a').click()"
    )
    browser.until("document.querySelectorAll('article rect.box').length === 2")
    browser.until("[...document.querySelectorAll('svg image')].length === 4")
    assert count(browser, ".turn.tool figure") == 2 and not count(browser, "pre span")
    browser.key("t")
    browser.until("document.querySelectorAll('pre span').length === 33")
    assert "11 tokens, log-probability -" in texts(browser, ".scale")[0]
    assert texts(browser, "pre span")[9] == "é"
    pixels = browser.run(
        "fetch(document.querySelector('svg image').getAttribute('href')).then((x) => x.blob()).then(createImageBitmap)"
        ".then((x) => [x.width, x.height])"
    )
    assert pixels == [180, 120] and browser.errors == []


def test_a_running_run_is_followed(pages, browser):
    urls, folder = pages
    browser.open(urls[0])
    browser.until("document.querySelectorAll('.chart').length")
    metrics = folder / "run-1/rl/metrics.jsonl"
    with metrics.open("a") as file:
        file.write('{"step": 40, "accuracy": 0.875}\n{"step": 41, "accu')
    browser.until("document.body.innerText.includes('41 of 40 iterations')")
    browser.until("document.body.innerText.includes('→ 0.875')")


def test_hostile_traces_stay_text(pages, browser, hostile, elsewhere):
    """Everywhere, and the first lines show that the test would notice."""
    browser.run("document.body.innerHTML = '<img src=x onerror=alert(7)>'")
    browser.until("true")
    browser.listen(1)
    browser.listen(1)
    assert browser.dialogs == ["7"]
    browser.dialogs.clear()
    browser.requests.clear()
    url = pages[0][2]
    browser.open(url)
    browser.until("document.querySelectorAll('.chart').length")
    seen = browser.run("document.body.innerText")
    addresses = []
    for side, rows in (("0", 50), ("1", 8)):
        at(browser, "traces", side=side)
        browser.until(f"document.querySelectorAll('.list tbody tr').length === {rows}")
        seen += browser.run("document.body.textContent")
        addresses += browser.run("[...document.querySelectorAll('.list a')].map((x) => x.hash)")
    at(browser, "traces", tool="=" + hostile, category="=" + hostile, text=hostile, side=hostile)
    browser.until("document.querySelector('[role=alert]') || document.querySelector('.pages')")
    for address in (addresses[i] for i in (0, 2, -1, -8)):
        browser.run("document.querySelector('main').replaceChildren()")
        browser.run(f"location.hash = {address!r}")
        browser.until("document.querySelectorAll('article').length")
        browser.key("t")
        browser.until("!document.querySelector('button.tokens') || document.querySelector('pre span')")
        seen += browser.run("document.body.textContent")
    assert seen.count("<script>alert(1)</script>") > 30
    tags = {"script", "img", "iframe", "base", "form", "link", "meta", "object", "embed"}
    kept = browser.run(f"[...document.querySelectorAll({', '.join(sorted(tags))!r})].map((x) => x.outerHTML)")
    assert len(kept) == 6 and not any("alert" in x for x in kept)  # the page's own, three of them meta
    assert (
        browser.run(
            "[...document.querySelectorAll('*')].flatMap((x) => [...x.attributes]).filter((x) => x.name.startsWith('on')).length"
        )
        == 0
    )
    browser.listen(1)
    assert browser.dialogs == [] and elsewhere[1] == []
    assert {urllib.parse.urlsplit(x).netloc for x in browser.requests} == {urllib.parse.urlsplit(url).netloc}
    assert [x for x in browser.errors if "Failed to load resource" not in x] == []


@pytest.mark.parametrize("attempt", [
    "fetch('{0}')", "new Promise((yes, no) => Object.assign(new Image(), {{src: '{0}', onload: yes, onerror: no}}))",
    "eval('1')", "document.body.innerHTML = '<b>x</b>'", "new Promise((yes, no) => document.head.append(Object.assign("
    "document.createElement('link'), {{rel: 'stylesheet', href: '{0}', onload: yes, onerror: no}})))",
    "navigator.sendBeacon('{0}') || Promise.reject()",
])  # fmt: skip
def test_the_policy_stops_a_script_that_would_run_all_the_same(attempt, pages, browser, elsewhere):
    browser.open(pages[0][2])
    browser.until("document.querySelectorAll('.chart').length")
    script = attempt.format(elsewhere[0])
    assert browser.run(f"Promise.resolve().then(() => {script}).then(() => 'done', () => 'stopped')") in (
        "stopped",
        "done",
    )
    browser.listen(0.3)
    assert elsewhere[1] == [] and count(browser, "body > b") == 0


@pytest.mark.parametrize("width, dark", [(1280, False), (1280, True), (360, False)])
def test_it_fits_the_screen_and_can_be_read(width, dark, pages, tmp_path):
    with Browser(tmp_path / "profile", width=width, height=800, dark=dark) as browser:
        for view in ("#runs", "#traces", "#trace?n=1", "#traces?change=any&before=0&to=1"):
            browser.open("about:blank")
            browser.open(pages[0][1] + view)
            browser.until("document.querySelector('main .run, main .pages')")
            assert browser.run("document.documentElement.scrollWidth <= innerWidth"), view
            low = browser.run(CONTRAST)
            assert low == [], (view, low)


# Texts whose contrast with the ground behind them is under 4.5 (WCAG 2.2, 1.4.3).
CONTRAST = """(() => {
  const parse = (x) => x.match(/[\\d.]+/g).map(Number);
  const linear = (x) => (x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
  const light = (c) => 0.2126 * linear(c[0] / 255) + 0.7152 * linear(c[1] / 255) + 0.0722 * linear(c[2] / 255);
  const ground = (x) => {
    for (; x; x = x.parentElement) {
      const c = parse(getComputedStyle(x).backgroundColor);
      if (c.length < 4 || c[3] === 1) return c;
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const x of document.querySelectorAll("body *")) {
    if (![...x.childNodes].some((n) => n.nodeType === 3 && n.data.trim())) continue;
    if (x.closest("svg, noscript, option, button:disabled")) continue;
    const [a, b] = [light(parse(getComputedStyle(x).color)), light(ground(x))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push([x.tagName, x.className, x.textContent.slice(0, 30), ratio]);
  }
  return low;
})()"""
