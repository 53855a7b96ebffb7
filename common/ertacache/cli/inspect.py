"""The command `ertacache`: inspect calibration files, look after the stored ones, say what a pipeline is made of."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ertacache.calibration import Bundle, Calibration
from ertacache.cli import command, stored
from ertacache.errors import UsageError
from ertacache.schema import printable


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 for a bad file or a mismatch, 2 for a wrong flag."""
    return command.run(lambda: _main(sys.argv[1:] if argv is None else argv))


def _main(argv: Sequence[str]) -> None:
    parser = command.Parser(
        prog="ertacache", description="Inspect ERTACache calibration files, and look after the stored ones."
    )
    actions = parser.add_subparsers(dest="action", required=True, parser_class=command.Parser)
    inspect = actions.add_parser("inspect", help="print schedule, predicted quality and provenance")
    inspect.add_argument("file", metavar="FILE")
    inspect.add_argument("--json", action="store_true", help="print them as JSON")
    actions.add_parser("validate", help="check a file").add_argument("file", metavar="FILE")
    stored.add_to(actions)
    doctor = actions.add_parser("doctor", help="say what would be attached to a pipeline, and what its call is made of")
    doctor.add_argument("folder", metavar="FOLDER", help="of a diffusers pipeline, with its model_index.json")
    doctor.add_argument("--prompt", default="a photo", help="of the call, two steps of which are run")
    doctor.add_argument("--arguments", default="{}", metavar="JSON", help="further ones of the call, as a JSON object")
    chosen = parser.parse_args(argv)
    if chosen.action in stored.ACTIONS:
        stored.run(chosen, inspection)
        return
    if chosen.action == "doctor":
        print(diagnosis(chosen.folder, chosen.prompt, chosen.arguments))
        return
    bundle = Bundle.load(chosen.file)
    if chosen.action == "inspect":
        shown = [json.dumps(described(one), indent=1) if chosen.json else inspection(one) for one in bundle]
        print("\n\n".join(shown))
        return
    print(f"{chosen.file}: valid")


def diagnosis(folder: str, prompt: str, arguments: str) -> str:
    """Describe the pipeline of a folder and one call of it; see `fit.explain.explain`."""
    try:
        given = json.loads(arguments)
    except ValueError as error:
        raise UsageError(f"--arguments is no JSON: {error}") from None
    if not isinstance(given, dict):
        raise UsageError('--arguments must be a JSON object, such as {"height": 512}')
    if not (Path(folder) / "model_index.json").is_file():
        raise UsageError(f"{folder}: no folder of a diffusers pipeline, it holds no model_index.json")
    from diffusers import DiffusionPipeline  # heavy

    from ertacache.fit.explain import explain

    return explain(DiffusionPipeline.from_pretrained(folder, local_files_only=True), prompt, **given)


def inspection(calibration: Calibration) -> str:
    """Describe a calibration for a person: summary and provenance."""
    c = calibration
    settings = ", ".join(f"{printable(k)}={printable(v)}" for k, v in c.settings.items())
    versions = ", ".join(f"{printable(k)} {printable(v)}" for k, v in c.versions.items())
    prompts = f"{printable(c.prompts.get('count', '?'))} (sha256 {printable(c.prompts.get('sha256', '?'))[:16]}...)"
    weights = printable(c.model.get("weights_fingerprint") or "not recorded")
    config = printable(c.model.get("config_sha256") or "not recorded")[:16]
    return "\n".join(
        [
            c.summary(),
            f"settings   {settings or 'not recorded'}",
            f"prompts    {prompts}",
            f"weights    fingerprint {weights}, configuration sha256 {config}...",
            f"made       {printable(c.date) or 'on an unknown day'} with {versions or 'unknown versions'}",
        ]
    )


def described(calibration: Calibration) -> dict[str, object]:
    """Describe a calibration as JSON data: every field, schedule strip, speed-up."""
    data = calibration.to_dict()
    return {"strip": calibration.strip(), "speedup": calibration.speedup, **data}
