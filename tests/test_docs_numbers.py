"""Numbers that are typed on the pages are those that were measured, set or published."""

import ast
import json
import math
import re
from pathlib import Path

import pytest
from page_texts import FIRST_FOLDER, FOLDERS, ROOT

from compare.results import read_results
from ertacache.calibration import Calibration
from ertacache.cli import settings


def training(folder: Path) -> dict:
    return json.loads((folder / "tiny" / "training.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_how_well_a_tiny_pipeline_follows_its_prompts_is_what_was_measured(folder):
    report = training(folder)
    page = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
    made, rendered = report["adherence"], report["adherence_of_rendered_scenes"]
    said = f"Of the objects named in {report['prompts']} prompts that it was not trained on, a judge finds "
    if isinstance(made, float):
        said += f"{made:.0%} right in shape and colour; of rendered scenes it finds {rendered:.0%}"
    else:
        parts = ("first_frame", "motion", "all")
        first, motion, everything = (f"{made[part]:.0%}" for part in parts)
        said += f"{first} right in shape and colour in the first frame, {motion} in direction where one is named, and "
        said += f"{everything} in all of that; of rendered scenes it finds "
        said += "{:.0f}, {:.0f} and {:.0f} %".format(*(100 * rendered[part] for part in parts))
    assert said.replace("%", " %").replace("  ", " ") in page


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_settings_on_a_folders_page_are_those_of_its_config(folder):
    constants = settings.read_constants(folder / "config.py")
    said = re.findall(r"`([A-Z_]+) = ([^`]+)`", (folder / "README.md").read_text(encoding="utf-8"))
    assert {"NUM_INFERENCE_STEPS", "GUIDANCE_SCALE", "DTYPE"} <= {name for name, _ in said}
    for name, value in said:
        assert ast.literal_eval(value) == constants[name.lower()][0], f"{name} = {value}"


def test_the_front_page_says_how_badly_the_video_pipelines_follow_their_prompts():
    rates = [report["adherence"]["all"] for report in map(training, FOLDERS) if isinstance(report["adherence"], dict)]
    page = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"a judge finds {100 * min(rates):.0f} to {100 * max(rates):.0f} % of the named objects right" in page


def words_of(page: Path) -> str:
    """A page's text with every run of white space as one space."""
    return " ".join(page.read_text(encoding="utf-8").split())


def psnrs_of_flux(method: str) -> dict[int, float]:
    """Computed steps -> PSNR of the FLUX comparison's rows of a method."""
    rows, _ = read_results(ROOT / "bench" / "results" / "flux_tiny.json")
    return {row.asked_steps: row.psnr for row in rows if row.method == method}


def kept_calibrations() -> list[Path]:
    return sorted(ROOT.glob("ERTACache4*/calibration/tiny-*.json"))


def test_the_front_page_says_what_the_efforts_brought():
    page, best, plain = words_of(ROOT / "README.md"), psnrs_of_flux("ertacache"), psnrs_of_flux("+ on computed steps")
    assert f"reaches {best[11]:.1f} dB at 11 of 28 steps" in page
    assert f"without descent, it has {psnrs_of_flux('+ fitted end to end')[11]:.1f}" in page
    tried = psnrs_of_flux("+ our schedule")
    assert f"by {max(abs(tried[steps] - plain[steps]) for steps in plain):.1f} dB at most" in page
    assert f"{plain[14]:.1f}, {plain[11]:.1f} and {plain[9]:.1f} dB for FLUX" in page


def test_the_front_page_says_what_effort_the_kept_calibrations_took():
    page = words_of(ROOT / "README.md")
    efforts = [Calibration.load(path) for path in kept_calibrations()]
    tries, refined = (max(each.settings.get(name) or 0 for each in efforts) for name in ("search_budget", "refine"))
    assert f"took up to {tries} tries of schedules" in page and f"refinement on up to {refined} prompts" in page
    descended = [each for each in efforts if each.settings.get("descent")]
    counts = sorted((len(each.computed_steps) for each in descended), reverse=True)
    assert f"FLUX at {' and '.join(map(str, counts))} steps, gradient descent" in page
    for each in descended:
        assert f"gradient descent on {each.prompts['count']} prompts" in page
        assert f"with {each.settings['descent']} steps and {each.prompts['count']} prompts" in page


@pytest.mark.parametrize("page", ["README.md", "docs/calibration-file.md"])
def test_pages_say_how_large_calibrations_are(page):
    sizes = {path: path.stat().st_size / 1000 for path in kept_calibrations()}
    large = [size for path, size in sizes.items() if Calibration.load(path).channel_coefficients]
    small = [size for size in sizes.values() if size not in large]
    assert min(small) >= 5 and max(small) <= 8 and "five to eight kilobytes" in words_of(ROOT / page)
    assert f"{round(min(large), -1):.0f} to {round(max(large), -1):.0f} where channels" in words_of(ROOT / page)


PUBLISHED = json.loads((ROOT / "common/ertacache/published.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_the_front_page_says_the_published_time_and_the_size_of_the_folders_page(folder):
    (line,) = re.findall(rf"^\| \[[^\]]+\]\({folder.name}/README.md\) \|.* GB .*$", front_page(), re.MULTILINE)
    _, _, weights, size, seconds, _, _ = (cell.strip() for cell in line.split("|"))
    (row,) = [row for row in PUBLISHED["rows"] if row["method"] == "ERTACache" and belongs(row, folder)]
    assert seconds == f"{row['seconds']:.2f} s"
    assert f"needs about {size.split(' GB')[0]} GB of GPU memory" in words_of(folder / "README.md")
    assert settings.read_constants(folder / "config.py")["real_model"][0] in weights


def front_page() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def belongs(row: dict, folder: Path) -> bool:
    return any(name in folder.name.lower() for name in row["match"])


def test_the_flux_page_counts_the_parameters_of_its_tiny_pipeline():
    counts = {part: parameters(FIRST_FOLDER / "tiny" / part) / 1e6 for part in ("transformer", "vae")}
    encoders = sum(parameters(FIRST_FOLDER / "tiny" / part) / 1e6 for part in ("text_encoder", "text_encoder_2"))
    said = f"{sum(counts.values()) + encoders:.1f} million parameters (transformer {counts['transformer']:.2f}, "
    assert said + f"VAE {counts['vae']:.2f}, text encoders {encoders:.2f})" in words_of(FIRST_FOLDER / "README.md")


def parameters(folder: Path) -> int:
    """Numbers in a folder's safetensors files, by their headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total
