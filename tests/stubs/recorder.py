"""A stand-in for kubectl, docker and sky: records its name, arguments, working directory and its input."""

import json
import os
import pathlib
import sys

name, *argv = sys.argv[1:]
text = sys.stdin.read() if "--filename=-" in argv else ""
with (pathlib.Path(os.environ["STUB_DIR"]) / "calls.jsonl").open("a") as calls:
    calls.write(json.dumps({"name": name, "argv": argv, "stdin": text, "cwd": os.getcwd()}) + "\n")
