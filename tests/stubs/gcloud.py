"""A stand-in for gcloud: records its arguments, keeps a slice of simulated VMs, plays what $STUB_DIR/script.json says.

The script is {"workers": N, "lives": [LIFE, ...]}: each created slice is one life, the last one repeats. A life has
  create    exit code of the creation; with "message", what is printed
  waiting   states of the request, one per question; the last one stays. Default ["ACTIVE"]
  lost      "install", "start", "run:N" or "end": taken away on the installation, the start, the Nth status question, or
            as soon as the program has ended on all workers and was asked for its exit code
  install   exit code of the installation
  half      how many first starts reach worker 0 only
  deaf      how many first status questions stay unanswered; with "message", what ssh says
  offline   [N, COUNT, MESSAGE]: after the Nth status question, COUNT calls of gcloud fail with MESSAGE, here only
  made      when the request was made
VMs are directories; what ssh would run there is run by bash, with an environment of its own, as sshd would.
"""

import contextlib
import json
import os
import pathlib
import signal
import sys

STUB = pathlib.Path(os.environ["STUB_DIR"])


class Slice:
    def __init__(self):
        self.script = json.loads((STUB / "script.json").read_text())
        path = STUB / "state.json"
        self.state = json.loads(path.read_text()) if path.exists() else {"life": -1, "exists": False}

    def save(self):
        (STUB / "state.json").write_text(json.dumps(self.state))

    @property
    def life(self):
        return self.script["lives"][min(max(self.state["life"], 0), len(self.script["lives"]) - 1)]

    @property
    def homes(self):
        return [STUB / "vms" / f"w{worker}" for worker in range(self.script["workers"])]

    def create(self):
        self.state = {
            "life": self.state["life"] + 1,
            "exists": True,
            "asked": 0,
            "polls": 0,
            "starts": 0,
            "lost": False,
        }
        code = self.life.get("create", 0)
        if code:
            self.state["exists"] = False
            print(self.life.get("message", "ERROR: refused"), file=sys.stderr)
        for home in self.homes:
            home.mkdir(parents=True, exist_ok=True)
        self.save()
        return code

    def end(self, exists):
        """The VMs are gone, and with them what runs on them and what is on their disks."""
        for pid in STUB.glob("vms/*/.selfplay_jax/*/pid"):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)
        os.system(f"rm -rf '{STUB}/vms'")
        self.state.update(exists=exists, lost=True)
        self.save()

    def request_state(self):
        if self.state["lost"]:
            return "SUSPENDED"
        states = self.life.get("waiting", ["ACTIVE"])
        state = states[min(self.state["asked"], len(states) - 1)]
        self.state["asked"] += 1
        self.save()
        return state

    def ssh(self, command, workers):
        if not self.state["exists"] or self.state["lost"]:
            print("ERROR: this TPU has terminal state PREEMPTED", file=sys.stderr)
            return 1
        lost = self.life.get("lost", "")
        if "worker.sh status" in command and "worker.sh install" not in command:
            self.state["polls"] += 1
            self.save()
            if self.state["polls"] <= self.life.get("deaf", 0):
                print(self.life.get("message", ""), file=sys.stderr)
                return 255
            when, calls, message = self.life.get("offline", (0, 0, ""))
            if self.state["polls"] == when:
                self.state["offline"] = [calls, message]
                self.save()
            if lost.startswith("run:") and self.state["polls"] >= int(lost[4:]):
                self.end(exists=True)
                return 255
        if "worker.sh install" in command:
            if lost == "install":
                self.end(exists=True)
                return 255
            if self.life.get("install"):
                return self.life["install"]
        if "worker.sh start" in command:
            if lost == "start":
                self.end(exists=True)
                return 255
            self.state["starts"] += 1
            self.save()
            if self.state["starts"] <= self.life.get("half", 0):
                on_vm(self.homes[0], command)
                return 255
        homes = self.homes if workers == "all" else [self.homes[int(workers)]]
        codes = [on_vm(home, command) for home in homes]
        ended = all((home / ".selfplay_jax/demo/exit_code").exists() for home in homes)
        if lost == "end" and ended and "worker.sh status" in command:
            self.end(exists=True)
        return next((code for code in codes if code), 0)


def on_vm(home, command):
    path = f"{STUB / 'bin'}:{STUB / 'vm_bin'}:/usr/local/bin:/usr/bin:/bin"
    env = {"HOME": str(home), "PATH": path, "STUB_DIR": str(STUB), "STUB_WORKER": home.name[1:]}
    os.chdir(home)
    return os.spawnvpe(os.P_WAIT, "bash", ["bash", "-c", command], env)


def not_found():
    print("ERROR: (gcloud) NOT_FOUND: Resource was not found", file=sys.stderr)
    return 1


def main(argv):
    with (STUB / "calls.jsonl").open("a") as calls:
        calls.write(json.dumps(argv) + "\n")
    flags = dict(arg[2:].split("=", 1) for arg in argv if arg.startswith("--") and "=" in arg)
    if argv[:3] == ["secrets", "versions", "access"]:
        print((STUB / "secrets" / flags["secret"]).read_text(), end="")
        return 0
    if argv[:2] == ["storage", "cp"]:
        source, target = [arg for arg in argv[2:] if not arg.startswith("--")]
        place = STUB / "buckets" / target.removeprefix("gs://")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(pathlib.Path(source).read_bytes())
        return 0
    tpu, verb = Slice(), tuple(argv[2:4])
    calls, message = tpu.state.get("offline", (0, ""))
    if calls:
        tpu.state["offline"] = [calls - 1, message]
        tpu.save()
        print(message, file=sys.stderr)
        return 1
    if verb == ("queued-resources", "create"):
        return tpu.create()
    if not tpu.state["exists"]:
        return not_found()
    if verb == ("queued-resources", "delete"):
        tpu.end(exists=False)
    elif verb == ("queued-resources", "describe"):
        known = {"failedData": tpu.life.get("message", ""), "createTime": tpu.life.get("made", "2999-01-01T00:00:00Z")}
        asked = next((text for field, text in known.items() if field in flags["format"]), None)
        print(tpu.request_state() if asked is None else asked)
    elif verb == ("tpu-vm", "describe"):
        print(len(tpu.homes) if "len()" in flags["format"] else "PREEMPTED" if tpu.state["lost"] else "READY")
    elif verb == ("tpu-vm", "scp"):
        if tpu.state["lost"]:
            return 1
        for home in tpu.homes:
            (home / argv[5].partition(":")[2]).write_bytes(pathlib.Path(argv[4]).read_bytes())
    elif verb == ("tpu-vm", "ssh"):
        return tpu.ssh(flags["command"], flags["worker"])
    else:
        print(f"stub: unknown {argv}", file=sys.stderr)
        return 2
    return 0


sys.exit(main(sys.argv[1:]))
