"""Calibration files from anybody, and disks that fail: the documented error, in bounded time, or the whole file."""

import errno
import json
import math
import multiprocessing
import os
import random
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from toys import ToyPipeline, curved

import ertacache
from compare.ledger import Ledger
from ertacache import files
from ertacache.calibration import SCHEMA, Calibration, to_json
from ertacache.errors import CalibrationError
from ertacache.files import write_atomically
from ertacache.schema import MAX_FILE_BYTES

CHECKED_IN = sorted(Path(__file__).parents[1].glob("ERTACache4*/calibration/*.json"))
SECONDS = 20.0  # for any file, on a slow and busy machine; most take a thousandth of it


@pytest.fixture(scope="module", params=["ertacache", "paper"])
def made(request) -> Calibration:
    return ertacache.calibrate(
        ToyPipeline(curved), ["p", "q"], computed_steps=4, method=request.param, num_inference_steps=8, progress=False
    )


def load_or_refuse(path: Path) -> Calibration | None:
    """The calibration, or None where loading gave the documented error of one line."""
    start = time.monotonic()
    try:
        loaded = Calibration.load(path)
        assert all(line.isprintable() for line in loaded.summary().split("\n"))
        assert Calibration.from_dict(json.loads(to_json(loaded.to_dict()))) == loaded
    except CalibrationError as error:
        loaded = None
        assert "\n" not in str(error) and len(str(error)) < 1000
    assert time.monotonic() - start < SECONDS
    return loaded


# -- what a file may hold --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CHECKED_IN, ids=lambda path: path.name)
def test_checked_in_files_load(path):
    assert load_or_refuse(path) is not None


def test_truncations_and_bit_flips(made, tmp_path):
    data = bytearray(made.save(tmp_path / "c.json").read_bytes())
    generator = random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(generator.choice([1, 1, 1, 8])):
            damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        if generator.random() < 0.3:
            del damaged[generator.randrange(len(damaged)) :]
        (tmp_path / "d.json").write_bytes(bytes(damaged))
        load_or_refuse(tmp_path / "d.json")


def everywhere(value, path=()):
    """Paths of all values inside a JSON value."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from everywhere(inner, (*path, key))


def with_value(data, path, value):
    if not path:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = with_value(copy[path[0]], path[1:], value)
    return copy


@pytest.mark.parametrize(
    "value", ["x", "", None, True, -1, 0, 1.5, 2**80, -(2**80), 1e308, [], {}, [[]], {"a": {}}, "\ud800", "\x1b[2J"]
)
def test_a_wrong_value_anywhere(made, value):
    data = json.loads(to_json(made.to_dict()))
    for path in everywhere(data):
        try:
            loaded = Calibration.from_dict(with_value(data, path, value))
        except CalibrationError as error:
            assert "\n" not in str(error)
        else:
            assert all(line.isprintable() for line in loaded.summary().split("\n"))
            to_json(loaded.to_dict())


OF_OURS = {
    "coefficients": [[1.0]] * 8,
    "sample_coefficients": [0.0] * 8,
    "channel_coefficients": [[]] * 8,
    "channel_axis": -1,
}
OF_PAPER = {
    "threshold": 0.1,
    "step_factors": [1.0] * 8,
    "adjusted_sigmas": [1 - step / 8 for step in range(9)],
    "adjusted_timesteps": [1000 - 125 * step for step in range(8)],
    "error_model": [None] * 8,
}


def test_no_method_carries_fields_of_the_other(made):
    """An adjusted grid in a file of ours would be applied, whatever the method."""
    for name, value in (OF_PAPER if made.method == "ertacache" else OF_OURS).items():
        for wrong in (value, "x"):
            with pytest.raises(CalibrationError, match=f"'{name}' must be null for method {made.method}"):
                Calibration.from_dict({"schema": SCHEMA, **asdict(made), name: wrong})


def test_the_paper_has_factors_in_range_and_adjusted_sigmas_only_beside_sigmas():
    pipe = ToyPipeline(curved)
    paper = ertacache.calibrate(
        pipe, ["p", "q"], computed_steps=4, method="paper", num_inference_steps=8, progress=False
    )
    good = {"schema": SCHEMA, **asdict(paper)}
    for factor in (0.0, 0.04, 1.01, -1.0):
        with pytest.raises(CalibrationError, match=r"'step_factors' must be null or numbers from 0\.05 to 1"):
            Calibration.from_dict({**good, "step_factors": [1.0] * 7 + [factor]})
    Calibration.from_dict({**good, "step_factors": [1.0, 0.05] * 4})
    with pytest.raises(CalibrationError, match="'adjusted_sigmas'"):
        Calibration.from_dict({**good, "sigmas": []})


def test_a_dtype_is_one_of_torch(made):
    """Whichever, since a quantised or a float64 model is calibrated as well."""
    assert Calibration.from_dict({"schema": SCHEMA, **asdict(made), "dtype": "float64"}).dtype == "float64"
    for dtype in ("", "x", "nn", "Tensor", "__name__"):
        with pytest.raises(CalibrationError, match="'dtype' must be a dtype of torch"):
            Calibration.from_dict({"schema": SCHEMA, **asdict(made), "dtype": dtype})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 1000,
        b"[" * 1_000_000,
        b'{"schema":' * 200_000,
        b"9" * 3_000_000,
        b"0." + b"9" * 3_000_000,
        b"1e999",
        b'{"schema": 1e999}',
        b'{"schema": NaN}',
        b'{"schema": Infinity}',
        b'{"schema": true}',
        b'{"schema": 1.0}',
        b'{"schema": ' + b"1" * 5000 + b"}",
        b'{"schema": "' + b"x" * 3_000_000 + b'"}',
        b'{"schema": 1, "' + b"y" * 3_000_000 + b'": 0}',
        b"[" + b"[]," * 1_000_000 + b"[]]",
        b"\xff\xfe\x00\x00",
        b'\xef\xbb\xbf{"schema": 1}',
        b"\x80\x04cos\nsystem\n(S'true'\ntR.",
    ],
    ids=lambda content: repr(content[:16]),
)
def test_hostile_contents_are_refused_in_bounded_time(content, tmp_path):
    (tmp_path / "c.json").write_bytes(content)
    assert load_or_refuse(tmp_path / "c.json") is None


def test_a_hundred_megabytes_are_not_read(tmp_path):
    path = tmp_path / "digits.json"
    with open(path, "wb") as file:
        for _ in range(100):
            file.write(b"7" * 2**20)
    start = time.monotonic()
    with pytest.raises(CalibrationError, match=f"larger than {MAX_FILE_BYTES >> 20} MiB"):
        Calibration.load(path)
    assert time.monotonic() - start < SECONDS


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "loop.json").symlink_to(tmp_path / "loop.json")
    (tmp_path / "gone.json").symlink_to(tmp_path / "nowhere")
    for name in ("pipe.json", "loop.json", "gone.json", ".", "a\0b", "n" * 300):
        assert load_or_refuse(tmp_path / name) is None
    for device in ("/dev/zero", "/dev/null", "/proc/self/mem"):
        assert load_or_refuse(Path(device)) is None


@pytest.mark.parametrize(
    ("schema", "advice"), [(0, "calibrate again: "), (SCHEMA + 1, "newer ertacache"), (None, "again")]
)
def test_another_schema_says_what_to_do(made, schema, advice):
    with pytest.raises(CalibrationError, match=advice):
        Calibration.from_dict({**asdict(made), "schema": schema})


def test_no_pickle_is_ever_read(made, tmp_path, monkeypatch):
    import pickle

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, lambda *_: pytest.fail("pickle"))
    assert Calibration.load(made.save(tmp_path / "c.json")) == made


# -- disks -----------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file(made, tmp_path, monkeypatch):
    path = made.save(tmp_path / "c.json")
    before = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(files.os, function, full)
            with pytest.raises(OSError, match="No space left"):
                made.save(path)
        assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_disk_that_is_full_at_once(monkeypatch, tmp_path):
    real = open
    monkeypatch.setattr("builtins.open", lambda path, *a, **k: real("/dev/full", "wb"))
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "c.json", "x" * 100_000)
    monkeypatch.undo()
    assert not (tmp_path / "c.json").exists()


def test_a_folder_that_cannot_be_written_to(made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        made.save(tmp_path / "file" / "c.json")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(PermissionError):
            made.save(tmp_path / "locked" / "c.json")
        assert not list((tmp_path / "locked").iterdir())


def test_many_threads_write_the_same_file(made, tmp_path):
    path = tmp_path / "c.json"
    threads = [threading.Thread(target=lambda: [made.save(path) for _ in range(5)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Calibration.load(path) == made and [p.name for p in tmp_path.iterdir()] == ["c.json"]


def test_what_a_killed_process_left_behind_goes_away(made, tmp_path):
    old, young = tmp_path / ".c.json.123-ab.tmp", tmp_path / ".c.json.456-cd.tmp"
    old.write_text("half"), young.write_text("half")
    os.utime(old, (1, 1))
    made.save(tmp_path / "c.json")
    assert not old.exists() and young.exists()  # somebody may be writing the young one


def write_for_ever(out: Path, source: Path, ready: Any) -> None:
    """What a process does that is killed."""
    ledger, text = Ledger(out, {"subject": 1}), source.read_text()
    ready.set()
    while True:
        for index in range(50):
            ledger.get(f"piece {index}", lambda i=index: {"index": i, "values": [0.5] * 20000})
        write_atomically(out / "c.json", text)


def test_killed_while_writing_nothing_is_half(made, tmp_path):
    """A few kills here; bench/fuzz_kill.py does a hundred, of calibration and its ledger."""
    source = made.save(tmp_path / "source.json")
    out = tmp_path / "out"
    generator = random.Random(1)
    for _ in range(2):
        processes = multiprocessing.get_context("fork")  # which has everything imported
        ready = processes.Event()
        process = processes.Process(target=write_for_ever, args=(out, source, ready))
        process.start()
        assert ready.wait(60)
        time.sleep(0.02 + 0.3 * generator.random())
        process.kill()
        process.join()
        for path in out.rglob("*.json"):
            if path.name == "c.json":
                assert Calibration.load(path) == made
            else:
                assert len(json.loads(path.read_text())["values"]) == 20000


def test_a_damaged_piece_of_a_ledger_is_made_again(tmp_path, capsys):
    ledger = Ledger(tmp_path, {"a": 1})
    assert ledger.get("piece", lambda: [1, 2]) == [1, 2]
    ledger.path("piece", ".json").write_text("[1, ")
    assert ledger.get("piece", lambda: [3]) == [3]
    assert "made again" in capsys.readouterr().err
    assert ledger.get("piece", lambda: pytest.fail("made a third time")) == [3]


def test_numbers_that_json_has_not_are_never_written(made, tmp_path):
    from dataclasses import replace

    with pytest.raises(ValueError):
        replace(made, threshold=math.nan).save(tmp_path / "c.json")
    assert not list(tmp_path.iterdir())
