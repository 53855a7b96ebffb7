"""The calibration file: round trip, and one clear error for whatever is wrong with it."""

import json
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import ToyPipeline, curved

import ertacache
from ertacache import provenance
from ertacache.calibration import SCHEMA, Calibration
from ertacache.errors import CalibrationError

pytestmark = pytest.mark.core


@pytest.fixture(scope="module", params=["ertacache", "paper"])
def made(request) -> Calibration:
    return ertacache.calibrate(
        ToyPipeline(curved), ["p", "q"], computed_steps=4, method=request.param, num_inference_steps=8, progress=False
    )


def test_round_trip(made, tmp_path):
    path = made.save(tmp_path / "sub" / "calibration.json")
    assert Calibration.load(path) == made
    assert [p.name for p in path.parent.iterdir()] == ["calibration.json"]
    assert path.stat().st_size < 10_000


def test_a_checkout_that_is_not_installed_knows_its_version(monkeypatch):
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(provenance, "version", absent)
    versions = provenance.package_versions()
    assert versions["ertacache"] == ertacache.__version__ and versions["torch"] == "unknown"


def test_summary_says_what_a_person_asks(made):
    text = made.summary()
    for part in ("of 8 steps computed", "predicted", "schedule   #", "ToyTransformer", "FlowMatchEuler"):
        assert part in text


def test_a_step_has_a_length_only_where_outputs_alone_are_combined(made):
    assert "step size" in made.summary() and len(made.effective_lengths()) == 8
    for kind in ({"sample_coefficients": [0.1] * 8}, {"channel_coefficients": [[]] * 8, "channel_axis": -1}):
        other = replace(made, **kind)
        assert other.effective_lengths() is None and "step size" not in other.summary()


def test_truncated_file_is_one_clear_line(made, tmp_path):
    path = made.save(tmp_path / "c.json")
    text = path.read_text()
    for cut in range(0, len(text) - 2, 97):
        path.write_text(text[:cut])
        with pytest.raises(CalibrationError) as error:
            Calibration.load(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "magic"),
        ("num_inference_steps", 0),
        ("num_inference_steps", "8"),
        ("computed_steps", []),
        ("computed_steps", [1, 2]),
        ("computed_steps", [0, 8]),
        ("computed_steps", [0, 2, 2]),
        ("timesteps", [1.0]),
        ("sigmas", [1.0, 2.0]),
        ("scheduler", {}),
        ("model", None),
        ("latent_shape", "4x4"),
        ("dtype", 7),
        ("predicted", {"psnr": "high"}),
        ("predicted", {"psnr": 50.0, "psnr_p10": 45.0, "folds": 2, "psnr_range": 3.0}),
        ("guidance_scale", "3"),
    ],
)
def test_wrong_field_is_named(made, field, value):
    with pytest.raises(CalibrationError, match=f"'{field}'"):
        Calibration.from_dict({"schema": SCHEMA, **asdict(made), field: value})


def test_wrong_coefficients_are_named():
    good = ertacache.calibrate(ToyPipeline(curved), "p", computed_steps=4, num_inference_steps=8, progress=False)
    for rows in (None, [], [[1.0]] * 7, [[]] * 8, [["1"]] * 8, [[1.0, 1.0]] * 8):
        with pytest.raises(CalibrationError, match="'coefficients'"):
            Calibration.from_dict({"schema": SCHEMA, **asdict(good), "coefficients": rows})


def test_foreign_files_are_refused(tmp_path, made):
    cases = {
        "list.json": "[]",
        "nan.json": '{"schema": NaN}',
        "deep.json": "[" * 100_000,
        "old.json": json.dumps({**asdict(made), "schema": 0}),
        "unknown.json": json.dumps({**asdict(made), "schema": SCHEMA, "extra": 1}),
        "binary.json": b"\xff\xfe\x00",
    }
    for name, content in cases.items():
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(CalibrationError):
            Calibration.load(path)
    with pytest.raises(CalibrationError, match="cannot be read"):
        Calibration.load(tmp_path / "missing.json")


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_random_damage_gives_the_documented_error_or_a_valid_calibration(made, data):
    plain = json.loads(json.dumps({"schema": SCHEMA, **asdict(made)}))
    key = data.draw(st.sampled_from(sorted(plain)))
    values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
        max_leaves=12,
    )
    plain[key] = data.draw(values)
    try:
        Calibration.from_dict(plain).summary()
    except CalibrationError as error:
        assert "\n" not in str(error)
