"""What a person sees in MLflow's pages after a study, looked at through a real browser."""

import os
import shutil
import signal
import subprocess
import sys
import urllib.request

import pytest
from programs import HANGS_S, free_port, wait_until
from study_files import study_config, write_results, write_trials

from syncbn.tracking.study import StudyTracker

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")

SERVE = (
    "import sys; from syncbn.tracking.ui import serve_ui; serve_ui(sys.argv[1], int(sys.argv[2]))"
)
WAIT_MS = 300_000  # bounds what hangs


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory):
    """A runs folder whose store holds the study `demo`."""
    cfg = study_config(tmp_path_factory.mktemp("ui") / "runs")
    tracker = StudyTracker(cfg)
    tracker.follow(write_trials(cfg))
    write_results(cfg)
    assert tracker.finish(timeout_s=HANGS_S) == 0
    return cfg.runs_dir


@pytest.fixture(scope="module")
def links(runs_dir, tmp_path_factory):
    """The pages that the server names at its start, while it serves them."""
    port = free_port()
    out = tmp_path_factory.mktemp("server") / "out"
    with out.open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(runs_dir), str(port)],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        wait_until(lambda: _answers(f"http://127.0.0.1:{port}/health"))
        lines = [line.strip() for line in out.read_text().splitlines()]
        yield dict(line.split(": ", 1) for line in lines if ": http://" in line and "#/" in line)
        server.send_signal(signal.SIGTERM)
        server.wait(HANGS_S)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


@pytest.fixture(scope="module")
def page(links):
    """A browser's page, that notes which other machines it asks for something."""
    options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=options, timeout=WAIT_MS)
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.set_default_timeout(WAIT_MS)
        page.asked = set()
        page.on("request", lambda request: page.asked.add(request.url))
        yield page
        browser.close()


def _answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=2).close()
    except OSError:
        return False
    return True


def open_launch(page, links) -> None:
    """From the study's page to the page of its launch."""
    page.goto("about:blank")
    page.goto(links["demo"], wait_until="domcontentloaded")
    follow(page, "demo")


def follow(page, name: str) -> None:
    """Click the link to the run `name`."""
    page.locator("a[href*='/runs/']").filter(has_text=name).first.click()
    page.get_by_role("heading", name=name, exact=True).first.wait_for()


def test_the_study_is_named_with_its_page(links):
    assert list(links) == ["demo", "all experiments"]


def test_a_launch_shows_its_verdicts_and_its_trials(page, links):
    open_launch(page, links)
    page.get_by_text("claim.sync_beats_local").first.wait_for()
    page.get_by_role("cell", name="sync_beats_local", exact=True).wait_for()
    page.locator("a[href*='/runs/']").filter(has_text="sync-1").first.wait_for()


def test_a_launch_shows_its_figures_and_its_report(page, links):
    open_launch(page, links)
    page.get_by_text("Artifacts", exact=True).first.click()
    page.get_by_text("figures", exact=True).first.click()
    page.get_by_text("convergence.png").first.click()
    width = "Array.from(document.images).some(image => image.naturalWidth === 320)"
    page.wait_for_function(width)
    page.get_by_text("report.html").first.click()
    page.frame_locator("iframe").get_by_text("demo: the report").wait_for()


def test_a_trial_shows_its_curve_over_true_steps(page, links):
    open_launch(page, links)
    follow(page, "sync-1")
    page.get_by_text("Model metrics", exact=True).first.click()
    page.get_by_text("test_error").first.wait_for()
    page.locator(".xtick").get_by_text("600", exact=True).first.wait_for()


def test_the_pages_ask_no_other_machine(page, links):
    host = links["demo"].split("/#")[0]
    local = (host, "data:", "blob:", "about:")
    assert {url for url in page.asked if not url.startswith(local)} == set()
