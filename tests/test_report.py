"""report.html: what is in it, and that it works in a real browser."""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import Browser, find_chromium
from made_up import curves, examples, picture, row, rows

from compare.chart_data import linear_ticks, quality_series, spread_labels, tick_texts
from compare.plots import plot_schedule
from compare.report import write_report

META = {"title": "Made <up> & unmeasured", "command": "sh reproduce.sh --prompts '<x>'"}


def report(path: Path, frames: int | None = None, **changes: Any) -> Path:
    """A report of made-up rows under `path`; `changes` replace what goes in."""
    parts = {"rows": rows(), "examples": examples(frames), "curves": curves(), "meta": META} | changes
    write_report(path / "report.html", **parts)
    return path / "report.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("neither chromium nor chromium-browser is on PATH")
    with Browser(chromium) as started:
        yield started


def test_the_file_fetches_nothing_and_escapes_text(tmp_path: Path) -> None:
    text = report(tmp_path).read_text()
    assert re.findall(r"(?:src|href)=(.{6})", text) == ['"data:'] and "http:" not in text and "https:" not in text
    assert "Made &lt;up&gt; &amp; unmeasured" in text and "<up>" not in text and "'<x>'" not in text
    assert "two discs </script>" not in text
    assert not re.search(r"<!--@|/\*@", text)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_bad_examples_are_refused_by_name(tmp_path: Path) -> None:
    lone = {"prompt": "p", "seed": 0, "method": "teacache", "computed_steps": 14, "image": picture(0)}
    reference = lone | {"method": "none", "computed_steps": None}
    for bad, message in (
        ([lone], "no uncached picture"),
        ([reference, lone | {"image": picture(0, size=32)}], "teacache: shape"),
        ([lone | {"image": picture(0) / 255.0}, reference], "expected uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            report(tmp_path, examples=bad)
    with pytest.raises(ValueError, match="one model"):
        report(tmp_path, rows=[row(), row(model="another")])


def test_the_slider_moves_with_keys_and_mouse(browser: Browser, tmp_path: Path) -> None:
    browser.problems.clear()
    browser.open(report(tmp_path))
    shown = (
        "[+compare.getAttribute('aria-valuenow'), getComputedStyle(uncached).clipPath, "
        "handle.getBoundingClientRect().x]"
    )
    browser.evaluate("compare.scrollIntoView({block: 'center'}); compare.focus()")
    before = browser.evaluate(shown)
    browser.press("ArrowRight")
    after = browser.evaluate(shown)
    assert before[0] == 50 and after[0] == 52 and after[1] != before[1] and after[2] > before[2]
    browser.press("End")
    assert browser.evaluate(shown)[0] == 100
    box = browser.evaluate("(({x, y, width, height}) => [x, y, width, height])(compare.getBoundingClientRect())")
    middle = box[1] + box[3] / 2
    for kind, share in (("mousePressed", 0.9), ("mouseMoved", 0.5), ("mouseMoved", 0.25), ("mouseReleased", 0.25)):
        browser.mouse(kind, box[0] + share * box[2], middle)
    assert browser.evaluate(shown)[0] == pytest.approx(25, abs=1)
    assert browser.evaluate("getComputedStyle(uncached).imageRendering") == "pixelated"
    assert browser.problems == []


def test_choices_change_what_is_shown(browser: Browser, tmp_path: Path) -> None:
    browser.problems.clear()
    browser.open(report(tmp_path))
    picture_of = "cached.style.backgroundImage"
    visible = "[...document.querySelectorAll('figure')].filter(f => !f.hidden).map(f => ({...f.dataset}))"
    chosen = {"metric": "psnr", "label": "PSNR", "axis": "flops"}
    assert browser.evaluate(visible) == [chosen, {"asked": "14"}]
    first = browser.evaluate(picture_of)
    browser.evaluate("[...methods.children].find(t => t.textContent.includes('teacache')).click()")
    second = browser.evaluate(picture_of)
    browser.evaluate("document.querySelectorAll('[data-choice=asked] button')[2].click()")
    third = browser.evaluate(picture_of)
    browser.evaluate("prompts.children[1].click()")
    assert len({first, second, third, browser.evaluate(picture_of)}) == 4
    assert browser.evaluate("tag.textContent") == "teacache"
    assert browser.evaluate("caption.textContent").startswith('two discs </script><b>& a "fish" 🐟')
    browser.evaluate("document.querySelectorAll('[data-choice=metric] button')[2].click()")
    assert browser.evaluate(visible) == [chosen | {"metric": "lpips", "label": "LPIPS"}, {"asked": "9"}]
    browser.evaluate("document.querySelectorAll('[data-choice=view] button')[1].click()")
    assert browser.evaluate("getComputedStyle(uncached).mixBlendMode") == "difference"
    assert browser.problems == [] and not [url for url in browser.requests if url.startswith("http")]


def test_a_video_has_strips_and_plays(browser: Browser, tmp_path: Path) -> None:
    browser.problems.clear()
    browser.open(report(tmp_path, frames=5))
    assert browser.evaluate("document.querySelectorAll('.strip').length") == 3
    before = browser.evaluate("uncached.style.backgroundPosition")
    browser.evaluate("find('play').click(); new Promise(done => setTimeout(done, 400))")
    assert browser.evaluate("uncached.style.backgroundPosition") != before
    browser.evaluate("find('play').click()")
    browser.evaluate("find('frame').value = 3; find('frame').dispatchEvent(new Event('input'))")
    assert browser.evaluate("uncached.style.backgroundPosition") == "75% 0px"
    assert browser.evaluate("find('frame-number').textContent") == "4 of 5"
    assert before == "0% 0px" and browser.problems == []


def test_a_video_report_shows_the_temporal_error(browser: Browser, tmp_path: Path) -> None:
    browser.problems.clear()
    moving = [replace(one, temporal_error=0.0 if one.role == "reference" else 1 / one.psnr) for one in rows()]
    browser.open(report(tmp_path, frames=3, rows=moving))
    names = "[...document.querySelectorAll('[data-choice=metric] button')].map(b => b.textContent)"
    assert browser.evaluate(names) == ["PSNR", "SSIM", "LPIPS", "Temporal error"]
    browser.evaluate("document.querySelectorAll('[data-choice=metric] button')[3].click()")
    shown = "[...document.querySelectorAll('figure[data-metric]')].filter(f => !f.hidden).map(f => f.textContent)"
    (text,) = browser.evaluate(shown)
    assert "Temporal error, up is better" in text and "teacache" in text
    browser.open(report(tmp_path))
    assert browser.evaluate(names) == ["PSNR", "SSIM", "LPIPS"]
    assert browser.problems == []


def test_a_video_is_shown_with_all_of_its_frames_or_evenly_picked_ones(tmp_path: Path) -> None:
    for frames, shown in ((17, 17), (81, 24)):
        text = report(tmp_path, examples=examples(frames)[:2]).read_text()
        assert f'"frames": {shown}, "width": 64' in text


def test_a_report_stays_small_enough_to_send(tmp_path: Path) -> None:
    both = report(tmp_path).read_text()
    one = report(tmp_path, max_bytes=len(both) // 2).read_text()
    assert (both.count('"seed": '), one.count('"seed": ')) == (2, 1) and len(one) < 0.7 * len(both)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(browser: Browser, tmp_path: Path, scheme: str) -> None:
    browser.open(report(tmp_path, frames=3), width=360, height=740, scheme=scheme)
    assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    dark = browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 21, 20)"
    assert dark == (scheme == "dark")


def test_a_report_without_pictures_curves_or_lpips_loads(browser: Browser, tmp_path: Path) -> None:
    browser.problems.clear()
    bare = [row(lpips=None, lpips_p10=None, reasons={"lpips": "no trunk"}, computed_steps=None)]
    browser.open(report(tmp_path, rows=bare, examples=[], curves={}))
    assert browser.evaluate("see.hidden") is True
    assert "no trunk" in browser.evaluate("document.body.textContent")
    assert browser.problems == []


def test_labels_are_spread_and_stay_near() -> None:
    assert spread_labels([10.0, 50.0], 5, 0, 100) == [10.0, 50.0]
    assert spread_labels([20.0, 20.0, 20.0], 6, 0, 100) == [14.0, 20.0, 26.0]
    assert spread_labels([99.0, 100.0], 10, 0, 100) == [90.0, 100.0]
    assert spread_labels([5.0] * 11, 50, 0, 100) == pytest.approx(list(range(0, 101, 10)))


def test_ticks_are_round_and_inside() -> None:
    assert linear_ticks(0.2, 9.7) == [2, 4, 6, 8]
    assert linear_ticks(1.0, 1.0) == pytest.approx([1.0])
    assert tick_texts(linear_ticks(0.0, 0.003)) == ["0.000", "0.001", "0.002", "0.003"]
    assert tick_texts([20.0, 40.0]) == ["20", "40"]


def test_series_hold_the_rows_and_draw_ours_last() -> None:
    series = quality_series(rows(), "psnr", "flops")
    assert series[-1].method == "ertacache" and len(series) == 13
    assert [value for point in series[-1].points for value in point] == pytest.approx(
        [28 / 14, 62.0, 28 / 11, 58.22, 28 / 9, 55.7]
    )


def test_points_are_joined_in_the_order_of_asked_steps() -> None:
    """Also where fewer steps were timed slower."""
    timed = [row(asked=asked, speedup=speed, psnr=asked) for asked, speed in ((14, 1.9), (11, 2.5), (9, 2.4))]
    (series,) = quality_series(timed, "psnr", "speedup")
    assert series.points == [(1.9, 14), (2.5, 11), (2.4, 9)]


def test_a_strip_of_steps_has_no_tick_beyond_the_last() -> None:
    axes = plot_schedule([row(asked=14), row(asked=9)]).axes[0]
    assert max(axes.get_xticks()) <= 27 and axes.get_xlim()[1] < 28
