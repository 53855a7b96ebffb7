"""Trains the embedded pipelines side by side: `python -m tiny_training.train_all --data DATA --work WORK`.

Each one runs for a while, then another takes its turn, in as many lanes as are asked for; what a lane's turn ends is
resumed in its next turn, and after an interruption the same command goes on. Flags that this script does not know go to
every train_tiny.py. DATA holds stills/ and clips/ (their packages: tiny_training/sprites.py), WORK/NAME checkpoints and
WORK/NAME.log what NAME says. Two lanes of one thread train more than one of two threads. A finished pipeline is in
WORK/NAME/finished; after --minutes the training stops, and what is there of the others goes there too.
"""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = {
    "flux": "ERTACache4FLUX",
    "wan": "ERTACache4Wan2.1",
    "cogvideox": "ERTACache4CogVideoX",
    "opensora": "ERTACache4OpenSora1.2",
}
NEEDS = {"opensora": Path("flux/vae")}  # what must be in WORK before a training can start
PATIENCE = 300  # seconds for the last checkpoint


class Turns:
    """Pipelines that wait for their turn, those that run, and how each one ended."""

    def __init__(self, names: list[str], args: argparse.Namespace):
        self.waiting, self.args = deque(names), args
        self.running: dict[str, subprocess.Popen] = {}
        self.lock, self.stopped = threading.Lock(), False

    def lane(self) -> None:
        """Give turns until none waits and none that runs may come back."""
        while not self.stopped:
            with self.lock:
                name = self._next()
                if name is not None:
                    self.waiting.remove(name)
                    self.running[name] = self._start(name)
            if name is not None:
                self._turn(name)
            elif self.running:
                time.sleep(1)
            else:
                return

    def stop(self) -> None:
        """End all turns; each writes its checkpoint."""
        self.stopped = True
        for process in list(self.running.values()):
            process.terminate()

    def report(self) -> None:
        """Write the pipelines that are not finished as they are."""
        begun = [name for name in self.waiting if list((self.args.work / name).glob("vae*.pt"))]
        for process in [self._start(name, "--report") for name in begun]:
            process.wait()

    def _next(self) -> str | None:
        """The first that waits for nothing but its turn; where nothing runs, the first one, to say what it lacks."""
        ready = [n for n in self.waiting if n not in NEEDS or (self.args.work / NEEDS[n]).exists()]
        if ready or self.running:
            return ready[0] if ready else None
        return self.waiting[0] if self.waiting else None

    def _start(self, name: str, *flags: str) -> subprocess.Popen:
        args, folder = self.args, ROOT / FOLDERS[name]
        command = [sys.executable, "train_tiny.py", "--data", args.data, "--work", args.work / name]
        command += ["--out", args.work / name / "finished", *args.flags, *flags]
        threads = str(max(1, (os.cpu_count() or 1) // args.lanes))
        compiled = str(args.work / "compiled")
        env = os.environ | {"OMP_NUM_THREADS": threads, "TORCHINDUCTOR_CACHE_DIR": compiled}
        with open(args.work / f"{name}.log", "a") as log:
            return subprocess.Popen([str(part) for part in command], cwd=folder, env=env, stdout=log, stderr=log)

    def _turn(self, name: str) -> None:
        process = self.running[name]
        try:
            code, ended = process.wait(self.args.turn), True
        except subprocess.TimeoutExpired:
            process.terminate()
            code, ended = _wait(process), False
        with self.lock:
            del self.running[name]
            if not ended or self.stopped:
                self.waiting.append(name)
        if not self.stopped:
            state = ("finished" if code == 0 else "failed") if ended else "paused"
            print(time.strftime("%H:%M"), name, state, flush=True)


def _wait(process: subprocess.Popen) -> int:
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with stills/ and clips/")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints, latents and logs")
    parser.add_argument("--only", nargs="+", choices=FOLDERS, default=list(FOLDERS), help="which, in this order")
    parser.add_argument("--lanes", type=int, default=2, help="how many train at a time")
    parser.add_argument("--turn", type=float, default=3600, help="seconds")
    parser.add_argument("--minutes", type=float, help="when to stop (default: when all is finished)")
    args, flags = parser.parse_known_args()
    args.data, args.work = args.data.resolve(), args.work.resolve()
    args.flags = flags
    args.work.mkdir(parents=True, exist_ok=True)
    turns = Turns(args.only, args)
    lanes = [threading.Thread(target=turns.lane) for _ in range(args.lanes)]
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: turns.stop())
    for lane in lanes:
        lane.start()
    if args.minutes:
        timer = threading.Timer(60 * args.minutes, turns.stop)
        timer.start()
    for lane in lanes:
        lane.join()
    if args.minutes:
        timer.cancel()
        turns.report()


if __name__ == "__main__":
    main()
