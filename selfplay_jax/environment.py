"""What the environment tells of the job that a process belongs to; jax.distributed has the rest from there too."""

import importlib.util
import os
import pathlib
import re
import urllib.request


def processes() -> int:
    """How many processes the environment tells of: Cloud TPU or GKE (hosts x slices), Slurm, Open MPI; else 1."""
    slices = int(os.environ.get("MEGASCALE_NUM_SLICES") or 1)
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if hosts:
        return len(hosts.split(",")) * slices
    if "SLURM_STEP_NODELIST" in os.environ and "SLURM_PROCID" in os.environ:
        return int(os.environ.get("SLURM_NTASKS") or 1)
    if "OMPI_COMM_WORLD_SIZE" in os.environ:
        return int(os.environ["OMPI_COMM_WORLD_SIZE"])
    if not _has_tpus() or "TPU_SKIP_MDS_QUERY" in os.environ:
        return 1
    return tpu_vm_hosts(os.environ.get("GCE_METADATA_IP", "metadata.google.internal"))


def _has_tpus() -> bool:
    chips = [*pathlib.Path("/dev").glob("accel*"), *pathlib.Path("/dev").glob("vfio/[0-9]*")]
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def tpu_vm_hosts(server: str) -> int:
    """How many hosts the slices of a Cloud TPU VM have together, from its metadata server; 1 where that is silent."""

    def attribute(name: str) -> str:
        url = f"http://{server}/computeMetadata/v1/instance/attributes/{name}"
        request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.read().decode())

    try:
        hosts = len(attribute("worker-network-endpoints").split(","))
        slices = re.search(r"^MEGASCALE_NUM_SLICES: *'?(\d+)", attribute("tpu-env"), re.MULTILINE)
    except OSError:
        return 1
    return hosts * (int(slices.group(1)) if slices else 1)
