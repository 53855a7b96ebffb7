"""Change the core's code one place at a time and count the changes that its tests notice: `python bench/mutate.py`.

A change swaps an operator, moves a number by one, negates a condition, returns nothing, or leaves a call out. Each runs
in a forked process that imports the changed module; no file is touched. Goes on where it was interrupted, and starts
anew for a file that is another one since. Writes bench/results/mutation.json.
"""

import argparse
import ast
import hashlib
import importlib.machinery
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from ertacache.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "bench" / "results" / "mutation.json"
# module -> arguments of pytest that run the tests of it
TESTS = {
    "fit.schedule": ["test_schedule.py"],
    "cache": ["test_history.py", "test_channels.py", "test_attach.py"],
    "fit.step_by_step": ["test_calibrate.py", "test_end_to_end.py"],
    "attach": ["test_attach.py", "test_no_sync.py"],
}
SWAPS: dict[type, type] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Pow: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
}
NOT_RUN = ("annotation", "returns", "decorator_list")  # fields that say nothing about what is done
SLACK = 5  # times as long as without a change, before tests count as hanging


def changed(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What a node may become, each with a few words."""
    if isinstance(node, ast.Compare):
        for index, op in enumerate(node.ops):
            swap = SWAPS[type(op)]
            ops = [*node.ops[:index], swap(), *node.ops[index + 1 :]]
            yield f"{type(op).__name__} to {swap.__name__}", ast.Compare(node.left, ops, node.comparators)
    elif isinstance(node, (ast.BinOp, ast.AugAssign, ast.BoolOp)) and type(node.op) in SWAPS:
        swap = SWAPS[type(node.op)]
        fields = {**dict(ast.iter_fields(node)), "op": swap()}
        yield f"{type(node.op).__name__} to {swap.__name__}", type(node)(**fields)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield f"{type(node.op).__name__} left out", node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        other = not node.value if isinstance(node.value, bool) else node.value + 1
        yield f"{node.value} to {other}", ast.Constant(other)
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield "returns nothing", ast.Return(ast.Constant(None))
    elif isinstance(node, (ast.If, ast.IfExp)) and not isinstance(node.test, (ast.Compare, ast.UnaryOp, ast.BoolOp)):
        fields = {**dict(ast.iter_fields(node)), "test": ast.UnaryOp(ast.Not(), node.test)}
        yield f"not {ast.unparse(node.test)}", type(node)(**fields)
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield f"{ast.unparse(node.value.func)} is not called", ast.Pass()


class Mutation(ast.NodeTransformer):
    """Visit what is run of a module, and put the wanted change in place."""

    def __init__(self, wanted: int = -1):
        self.wanted = wanted
        self.found: list[tuple[int, str]] = []  # line and words of every change that there is

    def visit(self, node: ast.AST) -> Any:
        made = None
        for words, replacement in changed(node):
            if len(self.found) == self.wanted:
                made = ast.copy_location(replacement, node)
            self.found.append((node.lineno, words))  # type: ignore[attr-defined]
        return made if made is not None else self.generic_visit(node)

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.Raise):  # its message
            return node
        kept = {name: getattr(node, name) for name in NOT_RUN if getattr(node, name, None)}
        for name in kept:
            setattr(node, name, [] if name == "decorator_list" else None)
        super().generic_visit(node)
        for name, value in kept.items():
            setattr(node, name, value)
        return node


def changes_of(source: str) -> list[tuple[int, str]]:
    """Line and words of every change of a source."""
    mutation = Mutation()
    mutation.visit(ast.parse(source))
    return mutation.found


def code_of(source: str, wanted: int, path: Path) -> CodeType:
    """The source with one change, compiled."""
    return compile(ast.fix_missing_locations(Mutation(wanted).visit(ast.parse(source))), str(path), "exec")


class Changed(importlib.machinery.SourceFileLoader):
    """Load a module from changed code."""

    def __init__(self, name: str, path: Path, code: CodeType):
        super().__init__(name, str(path))
        self.code = code

    def get_code(self, fullname: str) -> CodeType:
        return self.code

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None


def tests_pass(module: str, code: CodeType | None, limit: float | None) -> tuple[bool, float]:
    """Whether the module's tests pass in a process of their own, and how many seconds they took."""
    import pytest

    start = time.monotonic()
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.setsid()  # with its own children
        for name in [name for name in sys.modules if name.split(".")[0] == "ertacache"]:
            del sys.modules[name]
        if code is not None:
            path = ROOT / "common" / "ertacache" / f"{module.replace('.', '/')}.py"
            sys.meta_path.insert(0, Changed(f"ertacache.{module}", path, code))
        os.chdir(ROOT)
        tests = [str(ROOT / "tests" / name) for name in TESTS[module]]
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - start
        if done:
            return os.waitstatus_to_exitcode(status) == 0, seconds
        if limit is not None and seconds > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return False, seconds
        time.sleep(0.02)


def read_result() -> dict[str, Any]:
    return json.loads(RESULT.read_text(encoding="utf-8")) if RESULT.exists() else {}


def summary(files: dict[str, Any]) -> dict[str, Any]:
    """Counts over all files, and what survived."""
    tried = [(name, *one) for name, file in files.items() for one in file["outcomes"].items()]
    survived = [f"{name}.py {place}" for name, place, killed in tried if not killed]
    rate = 1 - len(survived) / max(1, len(tried))
    return {"tried": len(tried), "survived": survived, "kill_rate": round(rate, 3), "files": files}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", default=list(TESTS), help=f"of {', '.join(TESTS)}")
    parser.add_argument("--seconds", type=float, default=1200, help="stop after so long (default: 1200)")
    parser.add_argument("--again", action="store_true", help="try what survived once more")
    options = parser.parse_args(argv)
    os.environ["OMP_NUM_THREADS"] = "1"
    # what takes long to import is imported once, and nothing of ours with it
    import diffusers  # noqa: F401
    import hypothesis  # noqa: F401
    from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel, UniPCMultistepScheduler  # noqa: F401

    end = time.monotonic() + options.seconds
    files: dict[str, Any] = read_result().get("files", {})
    queue: list[tuple[str, str, CodeType]] = []
    for module in options.modules:
        path = ROOT / "common" / "ertacache" / f"{module.replace('.', '/')}.py"
        source = path.read_text(encoding="utf-8")
        digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        if files.get(module, {}).get("sha256") != digest:
            files[module] = {"sha256": digest, "changes": len(changes_of(source)), "outcomes": {}}
        known = files[module]["outcomes"]
        places: dict[str, int] = {}
        for index, (line, words) in enumerate(changes_of(source)):
            places[f"line {line}: {words}"] = times = places.get(f"line {line}: {words}", 0) + 1
            place = f"line {line}: {words}" + (f" ({times})" if times > 1 else "")
            if place not in known or (options.again and not known[place]):
                queue.append((module, place, code_of(source, index, path)))
    random.Random(0).shuffle(queue)  # so that an interrupted run is a sample
    limits: dict[str, float | None] = {}
    for module, place, code in queue:
        if time.monotonic() > end:
            break
        if module not in limits:
            passed, seconds = tests_pass(module, None, None)
            limits[module] = SLACK * seconds + 30 if passed else None
            print(f"{module}: {'' if passed else 'FAILS '}without a change ({seconds:.0f} s)", flush=True)
        if limits[module] is None:
            continue
        survived, seconds = tests_pass(module, code, limits[module])
        files[module]["outcomes"][place] = not survived
        print(f"{'SURVIVED' if survived else 'killed'} {module} {place} ({seconds:.0f} s)", flush=True)
        write_atomically(RESULT, json.dumps(summary(files), indent=1) + "\n")
    made = summary(files)
    print(f"{made['kill_rate']:.1%} of {made['tried']} changes noticed; {len(queue)} were left at the start")


if __name__ == "__main__":
    main()
