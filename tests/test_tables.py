"""The tables in the READMEs are the ones that the checked-in results make."""

from dataclasses import replace
from pathlib import Path

import pytest
from made_up import row, rows

from compare.overview import main as overview_main
from compare.overview import overview_markdown
from compare.table import main as table_main

ROOT = Path(__file__).parents[1]
TABLES = {
    "ERTACache4FLUX/README.md": "bench/results/flux_tiny.json",
    "ERTACache4Wan2.1/README.md": "bench/results/wan_tiny.json",
    "ERTACache4CogVideoX/README.md": "bench/results/cogvideox_tiny.json",
    "ERTACache4OpenSora1.2/README.md": "bench/results/opensora_tiny.json",
}


@pytest.mark.parametrize(("readme", "results"), TABLES.items())
def test_table_is_generated_from_the_results(readme, results):
    assert table_main([str(ROOT / results), "--into", str(ROOT / readme), "--check"]) == 0


def test_the_front_page_is_generated_from_the_results():
    results = [str(ROOT / results) for results in TABLES.values()]
    assert overview_main([*results, "--into", str(ROOT / "README.md"), "--check"]) == 0


def test_how_far_predictions_were_off_is_said_where_a_comparison_kept_them():
    made, bare = (overview_markdown([rows()], [meta]) for meta in ({"predicted": {"14": 61.5}}, {}))
    assert made.count("**62.00**") == bare.count("**62.00**") == 1
    assert "the 1 rows that kept a prediction: \N{MINUS SIGN}0.50 to" in made and "Predicted" not in bare


def test_the_front_page_has_a_column_for_each_effort_where_both_were_measured():
    one, both = [row()], [row(), row("ertacache-best", psnr=65.0)]
    assert "| ERTACache, dB |" in overview_markdown([one], [{}])
    page = overview_markdown([both], [{}])
    assert "| ERTACache, dB | best effort |" in page and "| **62.00** | 65.00 |" in page


def test_the_front_page_counts_the_speed_up():
    """Seconds of a busy machine, as in the folders' tables, can lie beyond N / K."""
    made = [row(compute_fraction=0.5, speedup=9.0), row("magcache", "rival", compute_fraction=0.52, speedup=9.0)]
    page = overview_markdown([[*made[:1], replace(made[1], comparable=True)]], [{}])
    assert "| 14 of 28 | 2.00x |" in page and "| magcache | " in page and "9.00x" not in page


def test_a_front_page_that_differs_is_noticed(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(
        "".join(f"<!-- {name}:{end} -->\n" for name in ("overview", "schedule") for end in ("begin", "end"))
    )
    results = [str(ROOT / results) for results in TABLES.values()]
    assert overview_main([*results, "--into", str(page), "--check"]) == 1 and "make figures" in capsys.readouterr().err
    assert overview_main([*results, "--into", str(page)]) == 0
    assert overview_main([*results, "--into", str(page), "--check"]) == 0
    assert "| ERTACache, dB |" in page.read_text() and "#.#" in page.read_text()
    (tmp_path / "bare.md").write_text("no markers")
    assert overview_main([*results, "--into", str(tmp_path / "bare.md")]) == 1
