"""The notebooks run from top to bottom in a fresh kernel; their own asserts check what they claim."""

import os
import pathlib
import re
import sys

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

NOTEBOOKS = pathlib.Path(__file__).resolve().parents[1] / "notebooks"


class ThisPython(AsyncKernelManager):
    """Starts kernels with the interpreter that runs the tests, whatever kernels the machine has registered."""

    @property
    def kernel_spec(self):
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name="this Python", language="python")


def execute(name, folder, **environment):
    """Runs a notebook with `folder` as its working directory and returns it with its outputs."""
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=500, resources=resources, kernel_manager_class=ThisPython)
    return client.execute(
        env={
            **os.environ,
            "PYTHONPATH": str(NOTEBOOKS.parent),
            "IPYTHONDIR": str(folder / ".ipython"),
            "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
            **environment,
        }
    )


def images(notebook):
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output for output in outputs if "image/png" in output.get("data", {})]


def test_losses(tmp_path):
    done = execute("losses.ipynb", tmp_path)
    assert len(images(done)) == 4


@pytest.mark.slow
def test_quickstart(tmp_path):
    done = execute("quickstart.ipynb", tmp_path)
    assert len(images(done)) == 1
    workdir = tmp_path / "runs/quickstart"
    assert (workdir / "report.html").is_file() and (workdir / "hf/final/model.safetensors").is_file()


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_what_is_committed_is_valid_and_names_no_machine(path):
    text = path.read_text()
    nbformat.validate(nbformat.reads(text, as_version=4))
    assert not re.search(r"/(home|root|work|tmp|Users|opt)/|site-packages|Traceback", text)
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (NOTEBOOKS / link).exists(), link
