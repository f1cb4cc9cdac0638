"""The documentation: links, the site, and the files and versions that it mentions."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import mfengine

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_to_files(page):
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    files = set(re.findall(r"\b(?:kernels|mfengine|tests|benchmarks|docs)/[\w/.-]+\.(?:py|md)\b", text))
    assert len(files) > 20
    assert [file for file in files if not (ROOT / file).exists()] == []


def test_version_is_the_same_everywhere():
    changelog = re.search(r"^## \[([\d.]+)\] - ([\d-]+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = dict(re.findall(r"^(version|date-released): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M))
    assert changelog.groups() == (citation["version"], citation["date-released"])
    assert citation["version"] == mfengine.__version__


def test_reference_has_every_public_name():
    pages = "".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    named = set(re.findall(r"^::: mfengine\.(\w+)", pages, re.M))
    assert set(mfengine.__all__) <= named


@pytest.mark.slow
def test_site_builds_without_a_warning_or_a_network(tmp_path):
    if not find_spec("mkdocs") or not find_spec("mkdocstrings"):
        pytest.skip("needs the extra docs: make docs installs it")
    closed = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")  # a closed port
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", tmp_path],
        cwd=ROOT,
        env={**os.environ, **closed, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert "velocity" in (tmp_path / "api/methods/index.html").read_text()
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r'(?:<script[^>]*src|<link[^>]*rel="stylesheet"[^>]*href|<img[^>]*src)="(\w+:[^"]*)"', page.read_text()
        )
        assert loaded == [], page
