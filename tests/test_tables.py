"""The tables in the READMEs are the ones that the checked-in results make, and the commands named there exist."""

import re
from pathlib import Path

import pytest

from ertacache.table import main as table_main

ROOT = Path(__file__).parents[1]
TABLES = {"ERTACache4FLUX/README.md": "bench/results/flux_tiny.json"}


@pytest.mark.parametrize(("readme", "results"), TABLES.items())
def test_table_is_generated_from_the_results(readme, results):
    assert table_main([str(ROOT / results), "--into", str(ROOT / readme), "--check"]) == 0


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("[dE]*/*.md")), ids=lambda p: p.name)
def test_links_lead_to_files(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), link
