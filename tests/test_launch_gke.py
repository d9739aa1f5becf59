"""launch/gke: the manifest that comes out, what reaches the container, and what each exit code leads to."""

import json
import pathlib
import re
import subprocess
from typing import Any

import pytest
import yaml
from fake_cloud import HOSTILE, ROOT, recorded, recording_stubs, script

JOBSET = str(ROOT / "launch/gke/jobset.sh")
OPTIONS = ("--name=demo", "--image=region-docker.pkg.dev/p/r/selfplay_jax:1", "--bucket=gs://bucket")
CONFIG = ("--", "--config=configs/tpaw.py")


def jobset(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([JOBSET, *words], capture_output=True, text=True, env=env or None, timeout=60)


def rendered(*words: str) -> dict[str, Any]:
    done = jobset("render", *OPTIONS, *words)
    assert done.returncode == 0, done.stderr
    assert "@" not in re.sub(r"#.*", "", done.stdout)
    manifest: dict[str, Any] = yaml.safe_load(done.stdout)
    return manifest


def job_of(manifest: dict[str, Any]) -> dict[str, Any]:
    job: dict[str, Any] = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = job_of(manifest)["template"]["spec"]
    return pod


def as_kubernetes_expands(text: str, variables: dict[str, str]) -> str:
    """What a container gets of an argument: $$ is $, $(NAME) a variable where there is one."""
    return re.sub(
        r"\$(\$|\(([^)]*)\))",
        lambda match: "$" if match[1] == "$" else variables.get(match[2], match[0]),
        text,
    )


@pytest.mark.parametrize(
    ("accelerator", "label", "topology", "nodes", "chips"),
    [
        ("v5litepod-16", "tpu-v5-lite-podslice", "4x4", 4, 4),
        ("v5litepod-8", "tpu-v5-lite-podslice", "2x4", 1, 8),
        ("v6e-256", "tpu-v6e-slice", "16x16", 64, 4),
        ("v5p-16", "tpu-v5p-slice", "2x2x2", 2, 4),
        ("v4-32", "tpu-v4-podslice", "2x2x4", 4, 4),
    ],
)
def test_slices(accelerator: str, label: str, topology: str, nodes: int, chips: int) -> None:
    manifest = rendered(f"--accelerator-type={accelerator}", "--slices=2", *CONFIG)
    job, pod = job_of(manifest), pod_of(manifest)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    assert job["parallelism"] == job["completions"] == nodes and manifest["spec"]["replicatedJobs"][0]["replicas"] == 2
    resources = pod["containers"][0]["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": chips}


def test_manifest_as_asked_for() -> None:
    manifest = rendered("--spot", "--service-account=runner", "--grace=120", "--max-restarts=4", *CONFIG)
    pod = pod_of(manifest)
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and manifest["metadata"]["name"] == "demo"
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] == 4
    assert pod["terminationGracePeriodSeconds"] == 120 and pod["restartPolicy"] == "Never"
    assert pod["serviceAccountName"] == "runner" and pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"} in pod[
        "tolerations"
    ]
    container = pod["containers"][0]
    assert container["imagePullPolicy"] == "Always"
    assert container["securityContext"]["capabilities"] == {"add": ["SYS_RESOURCE"]}
    plain = pod_of(rendered(*CONFIG))
    assert "serviceAccountName" not in plain and len(plain["tolerations"]) == 1


@pytest.mark.parametrize(
    ("code", "disrupted", "action"),
    [
        (1, False, "FailJobSet"),
        (75, False, "RestartJobSetAndIgnoreMaxRestarts"),
        (75, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, True, "RestartJobSetAndIgnoreMaxRestarts"),
        (137, False, "RestartJobSet"),
        (76, False, "RestartJobSet"),
        (139, False, "RestartJobSet"),
    ],
)
def test_what_an_exit_code_leads_to(code: int, disrupted: bool, action: str) -> None:
    """The Job controller's and JobSet's rules, as their documentation has them, on our policies."""
    manifest = rendered(*CONFIG)
    job = job_of(manifest)
    assert job["backoffLimit"] == 0
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        exit_codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        if (exit_codes and code in exit_codes["values"]) or (disrupted and conditions):
            assert rule["action"] == "FailJob"
            reason, message = (
                "PodFailurePolicy",
                f"Container main failed with exit code {code} matching FailJob rule at index {index}",
            )
            break
    for rule in manifest["spec"]["failurePolicy"]["rules"]:
        patterns = rule.get("onJobFailureMessagePatterns", [""])
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            assert rule["action"] == action
            return
    assert action == "RestartJobSet"


def test_hostile_words_reach_the_container_as_they_are() -> None:
    args = [f"--config.model.path={HOSTILE}", "$(HF_TOKEN) $$(A) $", "line\nend\t: # [x] {y} & *z", "", "- 'é'", "yes"]
    manifest = rendered(
        f"--run-id={HOSTILE}", f"--env=NOTE={HOSTILE} $(HF_TOKEN)", "--secret=HF_TOKEN=hf:token", *CONFIG, *args
    )
    container = pod_of(manifest)["containers"][0]
    variables = {"HF_TOKEN": "sentinel", "A": "other", "id": "root"}
    got = [as_kubernetes_expands(arg, variables) for arg in container["args"]]
    assert got == [f"--workdir=gs://bucket/runs/{HOSTILE}", *CONFIG[1:], *args]
    note, token = container["env"]
    assert as_kubernetes_expands(note["value"], variables) == f"{HOSTILE} $(HF_TOKEN)"
    assert token == {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": {"name": "hf", "key": "token"}}}


@pytest.fixture
def stubs(tmp_path: pathlib.Path) -> dict[str, str]:
    return recording_stubs(tmp_path, "kubectl", "docker", "gcloud")


COMMANDS = [
    ("build", [["docker", "build"], ["docker", "push"]]),
    ("pool", [["gcloud", "container"]]),
    ("delete-pool", [["gcloud", "container"]]),
    ("delete-pool --slices=3", [["gcloud", "container"]] * 3),
    ("pool --slices=2", [["gcloud", "container"]] * 2),
    ("apply", [["kubectl", "--context=c"]]),
    ("status", [["kubectl", "--context=c"]] * 2),
    ("logs", [["kubectl", "--context=c"]]),
    ("stop", [["kubectl", "--context=c"]]),
]
PLACES = ("--context=c", "--cluster=k", "--location=us-west4", "--zone=us-west4-a", "--project=p")


@pytest.mark.parametrize(("command", "wanted"), COMMANDS)
def test_commands(stubs: dict[str, str], command: str, wanted: list[list[str]]) -> None:
    """Each runs what its dry run prints."""
    words = (*command.split(), *OPTIONS, *PLACES, f"--run-id={HOSTILE}", "--secret=HF_TOKEN=hf:token")
    dry = jobset(*words, "--dry-run", *CONFIG, **stubs)
    assert dry.returncode == 0 and not recorded(stubs), dry.stderr
    done = jobset(*words, *CONFIG, **stubs)
    assert done.returncode == 0, done.stderr
    made = recorded(stubs)
    assert [[call["name"], call["argv"][0]] for call in made] == wanted
    subprocess.run(["bash", "-euc", dry.stdout], env=stubs, check=True, timeout=60)
    assert recorded(stubs)[len(made) :] == made
    everything = done.stdout + done.stderr + dry.stdout + dry.stderr + json.dumps(made)
    assert "sentinel" not in everything


def test_apply_hands_over_the_manifest(stubs: dict[str, str]) -> None:
    assert jobset("apply", *OPTIONS, "--namespace=n", *CONFIG, **stubs).returncode == 0
    (call,) = recorded(stubs)
    assert call["argv"] == ["--namespace=n", "apply", "--filename=-"]
    assert yaml.safe_load(call["stdin"]) == rendered(*CONFIG)


def test_node_pool(stubs: dict[str, str]) -> None:
    assert jobset("pool", *OPTIONS, *PLACES, "--spot", "--accelerator-type=v6e-16", **stubs).returncode == 0
    words = {
        "--machine-type=ct6e-standard-4t",
        "--num-nodes=4",
        "--tpu-topology=4x4",
        "--spot",
        "--node-locations=us-west4-a",
    }
    assert words <= set(recorded(stubs)[0]["argv"])


def test_every_slice_has_a_pool(stubs: dict[str, str]) -> None:
    for command in ("pool", "delete-pool"):
        assert jobset(command, *OPTIONS, *PLACES, "--slices=2", **stubs).returncode == 0
    assert [call["argv"][2:4] for call in recorded(stubs)] == [
        ["create", "demo-0"],
        ["create", "demo-1"],
        ["delete", "demo-0"],
        ["delete", "demo-1"],
    ]


def test_a_pool_that_is_not_deleted_is_named_and_the_others_are(stubs: dict[str, str]) -> None:
    script(pathlib.Path(stubs["STUB_DIR"]) / "bin/gcloud", '#!/bin/sh\n[ "$4" != demo-0 ]\n')
    done = jobset("delete-pool", *OPTIONS, *PLACES, "--slices=3", **stubs)
    assert (
        done.returncode == 69 and "may go on costing money: demo-0;" in done.stderr and "delete demo-2" in done.stderr
    )


def test_stop_waits_for_the_saves(stubs: dict[str, str]) -> None:
    done = jobset("stop", *OPTIONS, **stubs)
    assert done.returncode == 0 and "until launch/gke/jobset.sh delete-pool" in done.stderr
    assert recorded(stubs)[0]["argv"] == ["delete", "jobset", "demo", "--cascade=foreground"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["render", "--name=Demo", *CONFIG], "is no resource name"),
        (["render", "--name=" + "x" * 41, *CONFIG], "at most 40 characters"),
        (["render", "--image=", *CONFIG], "--image is missing"),
        (["render", "--bucket=", *CONFIG], "say where the run lives"),
        (["render", "--env=WANDB_API_KEY=abc", *CONFIG], "use --secret"),
        (["render", "--secret=HF_TOKEN=abc", *CONFIG], "NAME_OF_THE_SECRET:KEY"),
        (["render", "--accelerator-type=v6e-17", *CONFIG], "come in 1, 4, 8, 16"),
        (["render", "--accelerator-type=v5p-24", *CONFIG], "has no usual topology"),
        (["render", "--slices=0", *CONFIG], "at least one"),
        (["delete-pool"], "--cluster is missing"),
        (["render", "--topology=3x3", *CONFIG], "does not divide into nodes of 4 chips"),
        (["render", *CONFIG, "bell\a"], "control characters"),
        (["apply"], "say what to run after --"),
        (["pool"], "--cluster is missing"),
        (["fly"], "unknown command"),
    ],
)
def test_wrong_options_are_one_sentence(stubs: dict[str, str], words: list[str], sentence: str) -> None:
    done = jobset(words[0], *OPTIONS, *words[1:], **stubs)
    assert done.returncode == 64 and sentence in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
    assert not recorded(stubs) and not done.stdout


def test_the_image_holds_what_a_run_needs_and_nothing_else() -> None:
    """What COPY names exists and is let through by the ignore file; the entry point is the program, not as root."""
    folder = ROOT / "launch/gke"
    lines = (folder / "Dockerfile").read_text().splitlines()
    sources = [word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]]
    let_through = {
        line[1:] for line in (folder / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    for source in sources:
        assert list(ROOT.glob(source)), source
        assert source.partition("/")[0] in let_through
    assert "USER selfplay" in lines
    assert not re.search(r"TOKEN|SECRET|API_KEY", "\n".join(lines))


def test_the_entry_point_hands_its_arguments_on(tmp_path: pathlib.Path) -> None:
    """Through the shell that raises the limit of locked memory, whether or not it may."""
    entry = json.loads((ROOT / "launch/gke/Dockerfile").read_text().splitlines()[-1].removeprefix("ENTRYPOINT "))
    assert entry[:4] == ["tini", "--", "sh", "-c"] and "ulimit -l 68719476736" in entry[4]
    script(tmp_path / "python", '#!/bin/sh\nprintf "%s\\0" "$@"\n')
    line = entry[4].replace("/app/.venv/bin/python", str(tmp_path / "python"))
    words = ["--config=c.py", HOSTILE, "", "$HOME"]
    done = subprocess.run(["sh", "-c", line, *entry[5:], *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr
    assert done.stdout.split("\0")[:-1] == ["-m", "selfplay_jax.main", *words]
