"""What README, CONTRIBUTING and the pages of docs/ name is there."""

import importlib.util
import re
from pathlib import Path

import pytest

from ppl_bnn.__main__ import COMMANDS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_fits_on_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_names_runs_scripts_and_commands_that_exist(page):
    text = page.read_text()
    for name in re.findall(r"\bruns/([\w-]+)", text):
        assert (ROOT / "runs" / name / "config.yaml").exists(), name
    for name in re.findall(r"\b((?:benchmarks|examples|tests|tools|ppl_bnn)/[\w/]+\.(?:py|c))\b", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"-m (ppl_bnn\.\w+)", text):
        assert importlib.util.find_spec(name) is not None, name
    for name in re.findall(r"^(?:    )?ppl_bnn ([^\s-]+)", text, flags=re.MULTILINE):
        assert name in COMMANDS, name


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_a_page_links_to_files_and_headings_that_exist(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if anchor:
            assert anchor in {_anchor(line) for line in path.read_text().splitlines() if line.startswith("#")}, target


def test_the_site_lists_every_page():
    listed = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")}


def _anchor(heading):
    """The fragment that a heading has in the site."""
    kept = re.sub(r"[^\w\s-]", "", heading.lstrip("#")).strip().lower()
    return re.sub(r"[\s]+", "-", kept)
