"""A stand-in for the program under local.sh: writes down what it got, and ends as $PLAY says, one word per process.

A number is an exit code. save: until SIGTERM, then 75. wait: until SIGTERM. deaf: until SIGKILL. crash: SIGABRT.
parent: deaf, with a child.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

index = int(next(arg.split("=")[1] for arg in sys.argv if arg.startswith("--process_id=")))
play = os.environ["PLAY"].split()[index]
note = {"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid()}
print("first line\nand $(more) \\n of it")
print("an error", file=sys.stderr)
child = subprocess.Popen(["sleep", "300"]) if play == "parent" else None
if play in ("deaf", "parent"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if play == "save":

    def save(number: int, frame: object) -> None:
        print("saving")
        time.sleep(0.2)
        print("saved", end="")
        sys.stdout.flush()
        os._exit(75)

    signal.signal(signal.SIGTERM, save)
if child:
    note["child"] = child.pid
folder = pathlib.Path(os.environ["NOTES"])
(folder / f"{index}.new").write_text(json.dumps(note))
(folder / f"{index}.new").rename(folder / f"{index}.json")
if play.isdigit():
    while len(list(folder.glob("*.json"))) < len(os.environ["PLAY"].split()):
        time.sleep(0.01)
    sys.exit(int(play))
if play == "crash":
    os.abort()
sys.stdout.flush()
while True:
    time.sleep(0.02)
