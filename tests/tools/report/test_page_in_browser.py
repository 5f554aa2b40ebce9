"""The page in a real browser: nothing sticks out at the width of a phone or a desk, and its own script alone runs."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tools.report.fake_run import make_run
from tools.report.build import build_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")

PROBE = """<script>addEventListener('load', () => {
  const wide = [...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll') && !e.closest('svg')
    && e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + '.' + e.className);
  const figures = {scroll: document.documentElement.scrollWidth, inner: innerWidth, wide: wide, title: document.title,
    plots: document.querySelectorAll('figure svg').length, rows: document.querySelectorAll('tbody tr').length};
  document.documentElement.setAttribute('data-probe', JSON.stringify(figures)); });
addEventListener('error', e => document.documentElement.setAttribute('data-error', e.message)); </script></body>"""


def dump(page: Path, profile: Path, width: int) -> str:
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--no-first-run",
        "--dump-dom",
    ]
    command = [str(BROWSER), *options, f"--user-data-dir={profile}", f"--window-size={width},900", page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1200])
def test_nothing_sticks_out_and_nothing_runs(tmp_path: Path, width: int) -> None:
    root = make_run(tmp_path / "run")
    build_report([root])
    text = (root / "report.html").read_text()
    assert text.count("</body>") == 1
    # The page forbids scripts; the probe needs one, so the copy that is measured goes without the policy.
    probed = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text).replace("</body>", PROBE)
    (tmp_path / "probed.html").write_text(probed)
    dom = dump(tmp_path / "probed.html", tmp_path / "profile", width)
    assert "data-error" not in dom.split("<head>")[0]
    found = re.search(r"data-probe=\"([^\"]+)\"", dom)
    assert found, dom[:500]
    figures = json.loads(found.group(1).replace("&quot;", '"'))
    assert figures["scroll"] <= figures["inner"], figures
    assert figures["wide"] == []
    assert figures["plots"] == 8
    assert "owned" not in figures["title"]


WIDEST = """<script>addEventListener('load', () => { const wide = [...document.querySelectorAll('th, td')].map(
  e => e.getBoundingClientRect().width), places = [...document.querySelectorAll('main *')].filter(e =>
  !e.closest('.scroll') && !e.closest('svg') && e.getBoundingClientRect().right > innerWidth + 1);
  document.documentElement.setAttribute('data-probe', Math.max(...wide) + ' ' + places.length); }); </script></body>"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1400])
def test_long_names_push_nothing_away(tmp_path: Path, width: int) -> None:
    root = make_run(tmp_path / "run")
    for file in (root / "evaluate").glob("*.json*"):
        file.write_text(file.read_text().replace('"math"', json.dumps("ein_name_ohne_ende" * 12)))
    build_report([root])
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", (root / "report.html").read_text())
    assert text.count("ein_name_ohne_ende") > 40
    (tmp_path / "probed.html").write_text(text.replace("</body>", WIDEST))
    found = re.search(r"data-probe=\"([^\"]+)\"", dump(tmp_path / "probed.html", tmp_path / "profile", width))
    assert found
    widest, outside = map(float, found.group(1).split())
    assert widest < 450 or width == 500  # a phone has a card per row
    assert outside == 0


SEARCH = """<script>addEventListener('load', () => {
  const box = document.getElementById('filter'), shown = () => [...document.querySelectorAll('.sample')].filter(
    card => card.checkVisibility()).length, figures = {all: document.querySelectorAll('.sample').length, open: shown()};
  const set = (name, value) => { const field = box.querySelector(`[name=${name}]`); field.value = value;
    field.dispatchEvent(new Event('input')); };
  set('domain', 'code'); figures.code = shown(); set('search', 'no such words'); figures.none = shown();
  set('search', ''); set('domain', ''); figures.again = shown();
  set('outcome', 'better'); figures.better = shown();
  figures.wanted = document.querySelectorAll('.sample[data-outcome~=better]').length;
  figures.of_code = document.querySelectorAll('.sample[data-domain=code]').length;
  document.documentElement.setAttribute('data-probe', JSON.stringify(figures)); }); </script></body>"""


@pytest.mark.slow
def test_the_policy_lets_the_pages_own_script_run_and_no_other(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run")
    build_report([root])
    dom = dump(root / "report.html", tmp_path / "profile", 1200)
    box = re.search(r'<div id="filter"[^>]*>', dom)
    assert box and "hidden" not in box.group(0), "the search box is shown by the script alone"
    assert re.search(r"<output[^>]*>\d+ questions</output>", dom)
    text = (root / "report.html").read_text()
    (tmp_path / "foreign.html").write_text(text.replace("</body>", "<script>document.title = 'owned'</script></body>"))
    assert "<title>owned</title>" not in dump(tmp_path / "foreign.html", tmp_path / "profile", 1200)


@pytest.mark.slow
def test_search_and_filters_show_what_was_asked_for_and_fold_the_rest_again(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run")
    build_report([root])
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", (root / "report.html").read_text())
    (tmp_path / "probed.html").write_text(text.replace("</body>", SEARCH))
    found = re.search(r"data-probe=\"([^\"]+)\"", dump(tmp_path / "probed.html", tmp_path / "profile", 1200))
    assert found
    figures = json.loads(found.group(1).replace("&quot;", '"'))
    assert figures["none"] == 0
    assert figures["code"] == figures["of_code"] > 3
    assert figures["again"] == figures["open"] < figures["all"]
    assert figures["better"] == figures["wanted"] > 0
