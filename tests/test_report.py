"""The page that compares runs."""

import json
import re
import shutil
import subprocess

import pytest
import torch
from conftest import run_command

from mfengine.data.pictures import save_picture

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of two runs, one of which has no pictures and was not evaluated."""
    cwd = tmp_path_factory.mktemp("report")
    for name, share in (("meanflow", 0.25), ("flow-matching", 0.0)):
        run = cwd / name
        run.mkdir()
        config = {"network": "dit", "objective": "meanflow", "method": {"interval_share": share}, "seed": 0}
        (run / "config.json").write_text(json.dumps({**config, "name": name}))
        constant = {"lr": 1e-4, "mfu": 0.5, "memory_gb": None, "weight_norm/blocks.0": 1.0, "weight_norm/blocks.1": 2.0}
        lines = [{"step": i, "v_loss": 9 - i, "samples_per_second": 100.0 * i, **constant} for i in (1, 2, 3)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_picture(torch.rand(3, 16, 16), cwd / "meanflow/samples/00000003.png")
    (cwd / "meanflow/metrics.json").write_text(json.dumps({"frechet_1nfe": 17.6, "seed": 0}))
    done = run_command("mfengine.report", "meanflow", "flow-matching", cwd=cwd)
    assert (done.returncode, done.stdout) == (0, "report of 2 run(s): meanflow/report.html\n"), done.stderr
    return cwd / "meanflow/report.html"


def test_page_is_self_contained_and_shows_differences(page):
    html = re.sub(r"<script.*?</script>", "", page.read_text(), flags=re.DOTALL)
    rows = {re.sub(r"<.*?>", "|", row).strip("|") for row in re.findall(r"<tr>(.*?)</tr>", html, flags=re.DOTALL)}
    assert "method.interval_share||0.25||0.0" in rows
    assert not any(row.startswith(("seed", "name")) for row in rows)
    assert "samples/s (median)||200||200" in rows
    assert "v_loss, last||6||6" in rows
    assert "frechet_1nfe, by mfengine.evaluate||17.6" in {row.rstrip("|") for row in rows}
    assert html.count("data:image/png;base64,") == 1
    assert not re.search(r'(src|href)="(?!data:)', html)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_page_draws_its_curves_in_a_browser(page):
    done = subprocess.run(
        [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom",
         page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert len(re.findall(r'<text class="gtitle"', done.stdout)) == done.stdout.count("plotly-graph-div") == 6
    assert "weight_norm of each block, meanflow" in done.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["other"], "other/metrics.jsonl has no metrics yet"),
        (["none"], "cannot read none/config.json"),
        ([], "RUN must be given"),
    ],
)
def test_folder_without_a_run_is_rejected(args, says, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")
    done = run_command("mfengine.report", *args, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert says in done.stderr
