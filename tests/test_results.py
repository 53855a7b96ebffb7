"""results.json and the tables made from it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from made_up import row, rows

from compare.merge import merged, merged_meta
from compare.pages import replace_between
from compare.plots import main as plots_main
from compare.results import METRICS, Row, best_rival, is_comparable, read_results, write_results
from compare.table import load_published, margins, table_markdown
from compare.table import main as table_main

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def section_of(title: str, markdown: str) -> str:
    """What stands between one heading and the next."""
    return markdown.split(f"### {title}\n")[1].split("### ")[0]


def test_rows_and_meta_survive_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, rows(), {"title": "made up"})
    assert read_results(path) == (rows(), {"title": "made up"})
    assert isinstance(json.loads(path.read_text()), list)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.json", "results.meta.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_results(path, [row()])
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_results(path, [row(knob={"threshold": object()})])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("psnr", "62"),
        ("psnr", True),
        ("role", "winner"),
        ("role", []),
        ("compute_fraction", 0),
        ("n", 1.5),
        ("seeds", []),
        ("computed_steps", [0, 28]),
        ("computed_steps", [3, 1]),
        ("computed_steps", []),
        ("speedup", float("inf")),
        ("versions", {"torch": 2}),
        ("model", ""),
        ("knob", 0.1),
        ("comparable", None),
        ("asked_steps", None),
    ],
)
def test_a_bad_value_names_its_field_in_one_line(tmp_path: Path, field: str, value: Any) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps([asdict(row()), asdict(row()) | {field: value}]))
    with pytest.raises(ValueError, match=rf"results.json: row 1: {field}: ") as error:
        read_results(path)
    assert "\n" not in str(error.value)


def test_missing_unknown_and_foreign_content_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    values = asdict(row())
    del values["lpips"]
    for content, message in (
        ([values], "lpips: missing"),
        ([asdict(row()) | {"lpisp": 1}], "lpisp: unknown"),
        ({}, "list of rows"),
        ([3], "row 0: expected an object"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            read_results(path)
    path.write_text('[{"model": "tin')
    with pytest.raises(ValueError, match="not JSON"):
        read_results(path)


def test_a_null_metric_needs_a_reason_and_shows_it() -> None:
    with pytest.raises(ValueError, match="reasons: lpips is null"):
        row(lpips=None)
    made = row(lpips=None, lpips_p10=None, reasons={"lpips": "no trunk weights | set ERTACACHE_LPIPS_TRUNK"})
    markdown = table_markdown([made])
    assert "| **\N{EN DASH} [1]** |" in markdown
    assert "[1] LPIPS not measured: no trunk weights \\| set ERTACACHE\\_LPIPS\\_TRUNK" in markdown


def test_the_comparable_band_is_closed() -> None:
    assert is_comparable(0.5, 0.5) and is_comparable(0.55, 0.5)
    assert not is_comparable(0.499, 0.5) and not is_comparable(0.551, 0.5)


def test_the_margin_is_over_the_best_comparable_rival_of_each_metric() -> None:
    section = [
        row(psnr=60.0, ssim=0.99, lpips=0.01),
        row("a", "rival", psnr=50.0, ssim=0.9, lpips=0.03),
        row("b", "rival", psnr=49.0, ssim=0.95, lpips=0.02),
        row("costly", "rival", psnr=70.0, ssim=1.0, lpips=0.0, comparable=False),
        row("trained", "rival", psnr=70.0, ssim=1.0, lpips=0.0, calibration_runs=100.5),
    ]
    assert best_rival(section, "psnr").method == "a" and best_rival(section, "lpips").method == "b"
    found = {label: (difference, method) for label, difference, method in margins(section)}
    assert found["PSNR"] == ("+10.00 dB", "a")
    assert found["SSIM"] == ("+0.0400", "b") and found["LPIPS"] == ("\N{MINUS SIGN}0.0100", "b")
    assert margins(section[:1] + section[3:]) == []


def test_the_table_has_a_section_for_each_cost_and_ours_in_bold() -> None:
    markdown = table_markdown(rows(), load_published())
    for asked in (14, 11, 9):
        section = section_of(f"tiny FLUX: {asked} of 28 steps computed", markdown)
        assert section.count("| **ertacache** |") == 1 and "| magcache | threshold 0.031 |" in section
        assert "PSNR, dB ↑ (p10)" in section and "LPIPS ↓ (p10)" in section
        assert "Margin of ertacache over the best comparable rival in each metric: PSNR +1" in section
        assert "pyramid\\_attention\\_broadcast [1] |" in section and "[1] does not reach the asked cost" in section
    trained = table_markdown([row(), row("trained", "rival", calibration_runs=100.5)])
    assert "[1] its calibration took more uncached runs" in trained


def test_the_table_says_what_a_calibration_cost_and_what_a_rival_is() -> None:
    plain = [row(), row("magcache", "rival")]
    assert "Calibrated" not in table_markdown(plain)
    fitted = row("solver", "rival", calibration_runs=99.6, form="weights of all outputs")
    markdown = table_markdown([row(calibration_runs=22.0), fitted, plain[1]])
    (ours,), (theirs,) = ([x for x in markdown.splitlines() if x.startswith(y)] for y in ("| **ertacache", "| solver"))
    assert [cell.strip() for cell in ours.split("|")][3] == "**22**"
    assert [cell.strip() for cell in theirs.split("|")][1:4:2] == ["solver [1]", "100"]
    assert "[1] solver: weights of all outputs" in markdown


def test_files_of_before_lack_later_fields(tmp_path: Path) -> None:
    values = {name: value for name, value in asdict(row()).items() if name not in ("form", "calibration_runs")}
    path = tmp_path / "results.json"
    path.write_text(json.dumps([values]))
    assert read_results(path)[0] == [row()]


def test_what_a_metric_cannot_tell_from_nothing_is_not_shown_as_nothing() -> None:
    lpips = METRICS["lpips"]
    assert [lpips.show(v) for v in (0.0, 0.00004, 0.00006)] == ["0.0000", "<0.0001", "0.0001"]
    assert lpips.show(0.00004, sign=True) == "+0.0000"


def test_published_rows_are_those_of_the_model_and_labelled() -> None:
    section = section_of("tiny FLUX: published and measured here", table_markdown(rows(), load_published()))
    where = "FLUX-dev 1.0, the real model | one A800"
    assert f"| ERTACache (published) | {where} | 14.01 | 20.51 | 0.8962 | 0.3029 |" in section
    assert "Wan2.1" not in section
    assert "Wan2.1" in table_markdown([row(model="other")], load_published())


def test_the_command_that_made_the_rows_is_said_where_it_is_known() -> None:
    assert "Made by `sh reproduce.sh --seeds 1,2`." in table_markdown([row()], command="sh reproduce.sh --seeds 1,2")
    assert "Made by" not in table_markdown([row()])


def test_text_of_rows_cannot_break_the_table() -> None:
    line = next(x for x in table_markdown([row(model="a|b\n<script>*")]).splitlines() if x.startswith("### "))
    assert line == "### a\\|b &lt;script>\\*: 14 of 28 steps computed"


def test_command_fills_and_checks_a_readme(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, readme = tmp_path / "results.json", tmp_path / "README.md"
    write_results(results, rows())
    readme.write_text(f"before\n{BEGIN}\nstale\n{END}\nafter\n")
    command = [str(results), "--into", str(readme)]
    assert table_main([*command, "--check"]) == 1
    assert "stale" in readme.read_text()
    assert table_main(command) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text and "magcache" in text
    assert table_main([*command, "--check"]) == 0
    write_results(results, [row(psnr=61.0)])
    capsys.readouterr()
    assert table_main([*command, "--check"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="markers"):
        replace_between(f"{END}{BEGIN}", "x", "results")
    assert table_main([str(tmp_path / "none.json")]) == 1
    for bad in (["a.json", "--unknown"], ["a.json", "--check"]):
        assert table_main(bad) == 2
    assert capsys.readouterr().err.count("\n") == 3


def test_figures_know_the_rows_that_they_show(tmp_path: Path) -> None:
    results, out = tmp_path / "results.json", tmp_path / "figures"
    write_results(results, rows())
    command = [str(results), "--out", str(out)]
    assert plots_main([*command, "--check"]) == 1
    assert plots_main(command) == 0
    assert {p.name for p in out.iterdir()} == {
        "quality-psnr.png",
        "quality-psnr-time.png",
        "quality-ssim.png",
        "quality-lpips.png",
        "schedule.png",
    }
    assert plots_main([*command, "--check"]) == 0
    write_results(results, [Row(**asdict(r) | {"psnr": 1.0}) for r in rows()])
    assert plots_main([*command, "--check"]) == 1


def test_what_is_said_of_merged_rows_is_what_their_newest_run_said() -> None:
    old = {"predicted": {"ertacache 14": 50.0}, "calibration": "8 prompts", "not applicable": {"a": "not installed"}}
    new = {"predicted": {}, "calibration": "4 prompts", "date": "2026-11-27"}
    meta = merged_meta({**old, "merged": "a, b of 2026-11-26"}, [row("a", "rival")], new)
    assert meta["predicted"] == old["predicted"] and meta["calibration"] == "8 prompts" and not meta["not applicable"]
    assert meta["merged"] == "b of 2026-11-26; a of 2026-11-27"
    meta = merged_meta(old, [row()], {**new, "predicted": {"ertacache 14": 51.0}})
    assert (meta["predicted"]["ertacache 14"], meta["calibration"]) == (51.0, "4 prompts")
    kept = merged([row("none", "reference", None), row(psnr=1.0), row("a", "rival")], [row(psnr=2.0)])
    assert [(one.method, one.psnr) for one in kept] == [("none", 62.0), ("ertacache", 2.0), ("a", 62.0)]


def test_seconds_of_merged_rows_belong_to_the_run_that_they_join() -> None:
    reference = row("none", "reference", None, denoise_seconds=2.0, speedup=1.0)
    slow = row(denoise_seconds=90.0, speedup=4.0)  # on a machine that was busy
    assert [one.denoise_seconds for one in merged([reference, row()], [slow])] == [2.0, 0.5]
