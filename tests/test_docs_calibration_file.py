"""docs/calibration-file.md says what is in the files, and which messages come."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from page_texts import FIRST_FOLDER, ROOT

from ertacache.calibration import Calibration
from ertacache.errors import CalibrationError
from ertacache.schema import MAX_FILE_BYTES

FILE_PAGE = (ROOT / "docs" / "calibration-file.md").read_text(encoding="utf-8")


def test_the_page_lists_every_field_of_a_calibration():
    table = FILE_PAGE.split("## Fields")[1].split("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert sorted(listed) == sorted(["schema", *(field.name for field in fields(Calibration))])
    required = [field.name for field in fields(Calibration) if field.default is field.default_factory]
    assert set(listed[:10]) == {"schema", *required}


def test_messages_on_the_page_are_those_that_come(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a long path would be shortened
    path = next(iter(sorted((FIRST_FOLDER / "calibration").glob("tiny-*.json"))))
    good = json.loads(path.read_text(encoding="utf-8"))
    good = {**good, "channel_coefficients": None, "channel_axis": None}
    steps = good["num_inference_steps"]
    wrong = [
        "[]",
        '{"schema": NaN}',
        " " * (MAX_FILE_BYTES + 1),
        *(
            json.dumps(data)
            for data in (
                {**good, "schema": 2},
                {key: value for key, value in good.items() if key != "dtype"},
                {**good, "sigma": 1},
                {**good, "computed_steps": [1, 2]},
                {**good, "adjusted_sigmas": good["sigmas"]},
                {**good, "computed_steps": [0, 1], "coefficients": [[1.0], *[[1.0, 0.0, 0.0]] * (steps - 1)]},
            )
        ),
    ]
    said = [message(Path("none.json"))]
    for number, text in enumerate(wrong):
        Path(f"{number}.json").write_text(text)
        said.append(message(Path(f"{number}.json")))
    table = FILE_PAGE.split("| Wrong |")[1].split("\n\n")[0]
    assert sorted(re.findall(r"\| `(.+)` \|$", table, re.MULTILINE)) == sorted(said)


def message(path: Path) -> str:
    """What loading the file says after the file's name."""
    with pytest.raises(CalibrationError) as error:
        Calibration.load(path)
    return str(error.value).removeprefix(f"{path}: ")
