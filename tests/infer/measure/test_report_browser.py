"""The report in a real browser: no console error, every picture drawn, readable at 400 and 1600 pixels, light and dark.

Debian's chromium, headless; where there is none the tests are skipped and say so.
"""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from draftsmith.infer.measure.report.report import write_report
from draftsmith.infer.measure.runners import Question

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: the page was not opened in one")

# What the page would say of itself, had it a script: sizes of its pictures, and what sticks out to the right. A table's
# head is not shown on a narrow screen, and its marks are not either.
PROBE = """<script>
document.querySelectorAll('details').forEach(one => one.open = true);
const pictures = [...document.querySelectorAll('svg')].filter(one => !one.closest('thead')).map(one => {
  const box = one.getBoundingClientRect();
  const marks = [...one.querySelectorAll('path,line,rect,polyline')];
  const colours = marks.map(mark => { const s = getComputedStyle(mark); return s.fill + s.stroke; });
  return {css: one.getAttribute('class'), width: box.width, height: box.height, marks: marks.length,
          unpainted: colours.filter(c => c === 'nonenone').length};
});
const words = [...document.querySelectorAll('svg.wide text')].map(one => one.getBoundingClientRect().height);
parent.postMessage(JSON.stringify({pictures, smallest: Math.min(...words), width: document.documentElement.clientWidth,
  scroll: document.documentElement.scrollWidth, background: getComputedStyle(document.body).backgroundColor}), '*');
</script></body>"""
# A browser's own window has a least width, a frame in it has none.
FRAME = """<!doctype html><pre id="probe"></pre>
<script>addEventListener('message', told => document.getElementById('probe').textContent = told.data);</script>
<iframe src="probed.html" style="border: 0; width: WIDTHpx; height: 1000px"></iframe>"""


def chromium(profile, page, *words, dark=False):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr"]
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    command += [f"--user-data-dir={profile}", scheme, *words, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def page(run_folder):
    """A page with every picture, and with texts that would break out if they could."""
    evil = "<script>alert(1)</script>"
    asked = [Question(at, evil if at % 2 else "writing", (f"question {at} {evil} " + "long" * 60,)) for at in range(6)]

    def change(results):
        counts = {"reached": 40, "accepted": 20, "share": 0.5}
        for name in ("pld", "small"):
            results["drafters"][name] |= {
                "by_exit": {"6": 30, "12": 10},
                "by_source": {name: {"nodes": 80, **counts, "acceptance_rate": 0.25}},
                "by_depth": [{"depth": depth, **counts, "by_source": {}} for depth in (1, 2, 3)],
                "time_shares": {"target": 0.6, "draft": 0.3, "overhead": 0.1},
            }

    steps = {"answer": lambda prompt: list(range(97, 97 + 24)) * 8}
    runners = {"pld": {"per_step": 2} | steps, "small": {"per_step": 3, "step_s": 1.3} | steps, "oracle": steps}
    one = run_folder("one", runners, asked=asked, change=change)
    three = run_folder("three", runners, asked=asked, change=change, batch_size=3)
    return write_report([one, three], None, {"oracle": {"control": True}}).page


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1600])
def test_every_picture_is_drawn_and_nothing_sticks_out(page, tmp_path, width, dark):
    html = re.sub(r"<meta http-equiv=\"Content-Security-Policy\"[^>]*>", "", page.read_text())
    probed = tmp_path / "probed.html"
    probed.write_text(html.replace("</body>", PROBE))
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.replace("WIDTH", str(width)))
    words = ["--window-size=1700,1100", "--virtual-time-budget=5000", "--dump-dom"]
    done = chromium(tmp_path / "profile", frame, *words, dark=dark)
    found = json.loads(re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL).group(1))
    wide = [one for one in found["pictures"] if one["css"] == "wide"]
    assert len(wide) >= 1 + 2 * 6
    for picture in found["pictures"]:
        assert picture["width"] > 10, picture
        assert picture["height"] > 10, picture
        assert picture["marks"] > 0, picture
        assert picture["unpainted"] == 0, picture
    assert found["scroll"] <= found["width"] == width
    assert found["smallest"] > 9
    shade = [int(part) for part in re.findall(r"\d+", found["background"])[:3]]
    assert max(shade) < 60 if dark else min(shade) > 200


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_itself_opens_without_a_console_line_and_is_not_blank(page, tmp_path, dark):
    from matplotlib.image import imread

    shot = tmp_path / "shot.png"
    words = ["--window-size=1600,1000", f"--screenshot={shot}"]
    done = chromium(tmp_path / "profile", page, *words, dark=dark)
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    grey_HW = imread(shot)[..., :3].mean(axis=2)
    assert grey_HW.shape == (1000, 1600)
    # Ink on paper in all four quarters of what is seen first.
    paper = np.median(grey_HW)
    for part in (grey_HW[:500, :800], grey_HW[:500, 800:], grey_HW[500:, :800]):
        assert (np.abs(part - paper) > 0.3).mean() > 0.003


def test_a_console_error_would_be_seen(page, tmp_path):
    """The check above can fail: a page that tries to run a script is told off by its own policy, on the console."""
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("</body>", "<script>alert(1)</script></body>"))
    done = chromium(tmp_path / "profile", broken, "--window-size=800,600", f"--screenshot={tmp_path / 's.png'}")
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line]
