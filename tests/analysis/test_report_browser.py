"""The report in a browser: headless Chromium, with what axe-core says of its accessibility."""

import json
import shutil
from importlib import resources
from pathlib import Path

import pytest
from report_runs import HOSTILE_NAMES, write_run, write_token_records

from entropy_trl.analysis.logs.runs import read_runs
from entropy_trl.analysis.report import write_report


CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if CHROMIUM is None or DRIVER is None:
    pytest.skip("Chromium or chromedriver is not installed", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver")
pytest.importorskip("axe_core_python")

WIDTHS = (360, 768, 1600)
SCHEMES = {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 24, 29)"}
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page on three methods, one of them interrupted, with token records and with names that are hard to show."""
    folder = tmp_path_factory.mktemp("runs")
    names = (HOSTILE_NAMES[0], HOSTILE_NAMES[2], "kl_cov_" + "long" * 30)
    specs = []
    for i, name in enumerate(names):
        for seed in (0, 1):
            settings = {"entropy_control_kwargs": {"coef": i}, "path": "/a/long/path" * 12}
            run = write_run(folder / f"{i}-{seed}", seed, 0.05 + 0.1 * i, settings, finished=i != 2)
            specs.append(f"{name}={run}")
        write_token_records(run, i, length=40, control="kl_cov" if i == 2 else None)
    return write_report(read_runs(specs), folder / "report")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


def show(browser, page, width=1600, scheme="light"):
    """Opens a page; returns what it requested, besides itself, and what it wrote to the console."""
    browser.get_log("performance")
    browser.get_log("browser")
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(Path(page).as_uri())
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    requests = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert Path(page).as_uri() in requests
    others = [url for url in requests if url != Path(page).as_uri() and not url.startswith("data:")]
    return others, [entry["message"] for entry in browser.get_log("browser")]


def violations(browser):
    """What axe-core finds, with everything that can be opened opened."""
    browser.execute_script("document.querySelectorAll('details').forEach(element => { element.open = true; })")
    browser.execute_script((resources.files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8"))
    found = browser.execute_async_script(
        "const done = arguments[arguments.length - 1];"
        "axe.run(document, {runOnly: arguments[0], resultTypes: ['violations']})"
        ".then(result => done(result.violations), error => done([{id: String(error), nodes: []}]))",
        RULES,
    )
    return [(rule["id"], [node["html"][:200] for node in rule["nodes"][:3]]) for rule in found]


def test_requests_nothing_and_has_no_errors(browser, page):
    requests, console = show(browser, page)
    assert requests == []
    assert console == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_layout(browser, page, width, scheme):
    show(browser, page, width, scheme)
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == SCHEMES[scheme]
    for opened in ("false", "true"):
        browser.execute_script(f"document.querySelectorAll('details').forEach(e => {{ e.open = {opened}; }})")
        assert browser.execute_script("return innerWidth") == width
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    figures = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(e => { const box = e.getBoundingClientRect();"
        " return [box.left, box.right, box.height, e.checkVisibility(), e.getAttribute('role'),"
        " e.getAttribute('aria-label')]; })"
    )
    assert len(figures) == 16
    for left, right, height, visible, role, text in figures:
        assert 0 <= left < right <= width
        assert right - left > 280 and height > 180
        assert visible and role == "img" and len(text) > 20
    words = browser.execute_script(
        "return [...document.querySelectorAll('figure svg text')].map(e => { const box = e.getBoundingClientRect();"
        " return [Math.max(box.width, box.height), getComputedStyle(e).fill]; })"
    )
    assert min(size for size, _ in words) >= 9  # can be read on a phone
    dark = {"light": ("rgb(27, 27, 27)", "rgb(89, 89, 89)"), "dark": ("rgb(242, 242, 242)", "rgb(180, 180, 180)")}
    assert {colour for _, colour in words} <= set(dark[scheme])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_accessibility(browser, page, scheme):
    show(browser, page, 768, scheme)
    assert violations(browser) == []


def test_the_checks_find_what_they_look_for(browser, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<!DOCTYPE html><title>x</title><main><h1>x</h1><p style="color: #bbb; background: #fff">faint</p>'
        '<img src="http://127.0.0.1:9/x.png"><script>console.error("wrong")</script></main>'
    )
    requests, console = show(browser, bad)
    assert requests == ["http://127.0.0.1:9/x.png"]
    assert any("wrong" in message for message in console)
    found = {rule for rule, _ in violations(browser)}
    assert {"color-contrast", "image-alt", "html-has-lang"} <= found
