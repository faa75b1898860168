"""Programs of a deployment in processes of their own, each found again by its folder."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path


class Machines:
    """The programs of a deployment, each found again by its folder."""

    def __init__(self, folder):
        self.folder, self.logs, self.started = folder, [], []

    def start(self, program, *words, **settings):
        """Start a program as its user would; what it prints is kept."""
        log = self.folder / f"{len(self.logs)}.log"
        self.logs.append(log)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **settings}
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        with log.open("w") as file:
            process = subprocess.Popen(
                [program, *words], stdout=file, stderr=file, env=environment, cwd=self.folder,
                start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def start_node(self, name, **settings):
        """Start a client's script, on a port that nobody has."""
        settings = {"FEDVEIL_PORT": str(free_port()), "FEDVEIL_RETRY": "1", **settings}
        return self.start(self.folder / "deployment" / name / "supernode.sh", **settings)

    def log_of(self, process):
        """What a program has printed."""
        return self.logs[self.started.index(process)].read_text()

    def find(self, folder, word):
        """Ids of processes of one folder's programs that have a word in their command."""
        home = f"FLWR_HOME={folder / 'flwr'}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                if word.encode() in command and home in (process / "environ").read_bytes():
                    found.append(int(process.name))
            except OSError:
                continue  # it has just ended, or is not ours
        return found

    def kill(self, folder, word):
        """Kill programs with -9; whether there were any."""
        found = self.find(folder, word)
        for number in found:
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return bool(found)

    def freeze(self, folder, go_on=False):
        """Let a client's program hold still, or go on."""
        (number,) = self.find(folder, "fedveil partner run")
        os.kill(number, signal.SIGCONT if go_on else signal.SIGSTOP)

    def wait(self, for_what, condition, seconds=120.0):
        """Wait until something is so."""
        last = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > last:
                raise AssertionError(f"{for_what}: not in {seconds:.0f} s\n{self.told()}")
            time.sleep(0.2)
        return found

    def told(self):
        """The end of everything that was printed."""
        return "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in self.logs)

    def close(self):
        """End everything: what was started, then what that started."""
        for process in self.started:
            process.kill()
            process.wait()
        for folder in self.folder.glob("deployment/*"):
            while self.kill(folder, ""):
                time.sleep(0.1)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
