"""Sharing: the hub client against a local stand-in of its interface, and the command `ertacache`."""

import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
import tomllib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import tiny_models
from huggingface_hub import constants
from tiny_models import fitted, make

from ertacache import hub
from ertacache.calibration import Calibration
from ertacache.cli import inspect
from ertacache.errors import CalibrationError
from ertacache.schema import MAX_FILE_BYTES

ROOT = Path(__file__).parents[1]

REPOSITORY, NAME = "someone/calibrations", "flux/28-2x.json"


class StandIn(BaseHTTPRequestHandler):
    """The few requests of the hub that uploading and downloading one file take."""

    def log_message(self, *_):
        pass

    def _answer(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(self.path)
        if self.path == "/api/repos/create":
            answer = {"url": f"{self.server.url}/{REPOSITORY}", "name": REPOSITORY}
        elif "/preupload/" in self.path:
            wanted = [f["path"] for f in json.loads(data)["files"]]
            answer = {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in wanted]}
        elif "/commit/" in self.path:
            for line in data.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.stored[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            answer = {
                "success": True,
                "commitOid": "a" * 40,
                "commitUrl": f"{self.server.url}/{REPOSITORY}/commit/{'a' * 40}",
            }
            if "create_pr=1" in self.path:
                answer["pullRequestUrl"] = f"{self.server.url}/{REPOSITORY}/discussions/7"
        else:
            return self._answer(b"{}", 404)
        self._answer(json.dumps(answer).encode(), Content_Type="application/json")

    def do_GET(self):
        self.server.requests.append(self.path)
        match = re.fullmatch(rf"/{REPOSITORY}/resolve/[^/]+/(.+)", self.path)
        body = self.server.stored.get(match.group(1)) if match else None
        if body is None:
            return self._answer(b"{}", 404, X_Error_Code="EntryNotFound", X_Repo_Commit="a" * 40)
        self._answer(body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit="a" * 40)

    do_HEAD = do_GET


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    running = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    running.stored, running.requests = {}, []
    running.url = f"http://127.0.0.1:{running.server_port}"
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def test_a_calibration_goes_to_the_hub_and_comes_back(server, tmp_path):
    made = fitted("flux")
    url = made.push_to_hub(REPOSITORY, NAME, token="t", endpoint=server.url)
    assert url.endswith("/commit/" + "a" * 40) and json.loads(server.stored[NAME])["method"] == "ertacache"
    back = Calibration.from_hub(REPOSITORY, NAME, endpoint=server.url, cache_dir=tmp_path)
    assert back == made
    assert made.push_to_hub(REPOSITORY, NAME, token="t", create_pr=True, endpoint=server.url).endswith("/discussions/7")


def test_what_comes_from_the_hub_is_validated(server, tmp_path):
    server.stored["a.json"] = b'{"schema": 1, "method": "magic"}'
    with pytest.raises(CalibrationError, match="missing"):
        Calibration.from_hub(REPOSITORY, "a.json", endpoint=server.url, cache_dir=tmp_path)
    server.stored["big.json"] = b" " * (MAX_FILE_BYTES + 1)
    with pytest.raises(CalibrationError, match="not downloaded"):
        Calibration.from_hub(REPOSITORY, "big.json", endpoint=server.url, cache_dir=tmp_path)
    with pytest.raises(CalibrationError, match=r"cannot download none\.json"):
        Calibration.from_hub(REPOSITORY, "none.json", endpoint=server.url, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("repository", "name"),
    [
        ("someone/x", "../x.json"),
        ("someone/x", "a/../../x.json"),
        ("someone/x", "/etc/x.json"),
        ("someone/x", "a\\..\\x.json"),
        ("someone/x", ".hidden.json"),
        ("someone/x", "a/./x.json"),
        ("someone/x", "x.pkl"),
        ("someone/x", "x.json\n"),
        ("someone/x", "x.json?download=1"),
        ("someone/x", ""),
        ("someone/x", None),
        ("../x", "x.json"),
        ("/tmp/x", "x.json"),
        ("x", "x.json"),
        ("a/b/c", "x.json"),
        ("https://example.com/a", "x.json"),
        (None, "x.json"),
    ],
)
def test_names_that_lead_elsewhere_are_refused(server, repository, name, tmp_path):
    for action in (
        lambda: fitted("flux").push_to_hub(repository, name, endpoint=server.url),
        lambda: Calibration.from_hub(repository, name, endpoint=server.url, cache_dir=tmp_path),
    ):
        with pytest.raises(CalibrationError, match="must be"):
            action()
    assert not server.requests


def test_a_link_out_of_the_cache_is_refused(server, tmp_path, monkeypatch):
    import huggingface_hub

    fitted("flux").save(tmp_path / "elsewhere.json")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "x.json").symlink_to(tmp_path / "elsewhere.json")
    server.stored["x.json"] = b"{}"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "cache" / "x.json"))
    with pytest.raises(CalibrationError, match="leads out of the cache"):
        hub.fetch(REPOSITORY, "x.json", endpoint=server.url, cache_dir=tmp_path / "cache")


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CalibrationError, match=r"cannot (up|down)load") as error:
        fitted("flux").push_to_hub(REPOSITORY, NAME, token="t", endpoint="http://127.0.0.1:9")
    assert "\n" not in str(error.value)


# -- the command -----------------------------------------------------------------------------------------


def test_inspect_prints_strip_prediction_and_provenance(tmp_path, capsys):
    pipe = make("flux")
    made = tiny_models.calibrate(pipe, "flux", effort="balanced")
    path = made.save(tmp_path / "c.json")
    assert inspect.main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    for part in (made.strip(), "predicted", "dB", "FluxTransformer2DModel", "fingerprint", "diffusers", made.date):
        assert part in out
    assert inspect.main(["inspect", "--json", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["strip"] == made.strip()


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path, capsys):
    data = fitted("flux").to_dict()
    evil = "\x1b]0;owned\x07\u202e"
    data["model"] = {**data["model"], "id": evil}
    data["settings"] = {evil: evil}
    data["versions"] = {"torch": evil}
    (tmp_path / "c.json").write_text(json.dumps(data))
    assert inspect.main(["inspect", str(tmp_path / "c.json")]) == 0
    assert all(line.isprintable() for line in capsys.readouterr().out.split("\n"))


def test_validate_refuses_a_bad_file_and_a_wrong_word(tmp_path, capsys):
    path = str(fitted("flux").save(tmp_path / "c.json"))
    assert inspect.main(["validate", path]) == 0
    (tmp_path / "bad.json").write_text("{")
    assert inspect.main(["validate", str(tmp_path / "bad.json")]) == 1
    assert inspect.main(["validate"]) == 2 and inspect.main([]) == 2 and inspect.main(["explain", path]) == 2
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 4 and all(line.startswith("error: ") for line in lines)


def test_the_command_that_is_installed(tmp_path):
    """As the script does that `pip install` makes of pyproject.toml."""
    name = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]["ertacache"]
    assert EntryPoint("ertacache", name, "console_scripts").load() is inspect.main
    module, function = name.split(":")
    script = f"import sys; from {module} import {function}; sys.exit({function}())"
    path = fitted("flux").save(tmp_path / "c.json")
    done = subprocess.run(
        [sys.executable, "-c", script, "inspect", path],
        capture_output=True,
        text=True,
        cwd=ROOT / "common",
        check=False,
    )
    assert done.returncode == 0 and "steps computed" in done.stdout


@pytest.mark.parametrize("path", sorted(ROOT.glob("ERTACache4*/calibration/tiny-*.json")), ids=lambda p: p.stem)
def test_validate_accepts_what_is_checked_in(path, capsys):
    assert inspect.main(["validate", str(path)]) == 0
    assert "valid" in capsys.readouterr().out
