"""The notebook, on a toy model and without Colab: every cell runs, and a second run goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest
from test_trainer import config_for
from toys import write_model_folder

from pmd_jax import settings
from pmd_jax.policy.sharding import MeshConfig

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "experiments" / "colab.ipynb"


def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def parameters(book):
    [cell] = [c for c in book.cells if "parameters" in c.metadata.get("tags", [])]
    return cell


def executed(folder, steps, check):
    """The notebook after a run to `steps`, and after `check`, a last cell."""
    book = notebook()
    cell = parameters(book)
    changed = {
        "CONFIG": str(folder / "toy.json"),
        "NAME": "toy",
        "RUNS": str(folder / "runs"),
        "OVERRIDES": [f"--config.steps={steps}"],
    }
    cell.source += "".join(f"\n{name} = {value!r}" for name, value in changed.items())
    book.cells.append(nbformat.v4.new_code_cell(check))
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(book, timeout=1200, resources=where).execute()
    return book


def texts(book):
    return "".join(
        output.get("text", "") or output.get("data", {}).get("text/html", "")
        for cell in book.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )


def test_the_notebook_is_stored_without_outputs_and_has_one_cell_of_parameters():
    book = notebook()
    nbformat.validate(book)
    assert not [c for c in book.cells if c.get("outputs") or c.get("execution_count")]
    names = {line.partition(" = ")[0] for line in parameters(book).source.splitlines()}
    assert names == {"REPO", "CONFIG", "NAME", "OVERRIDES", "RUNS", "DRIVE"}


def test_the_stop_button_lets_a_run_save_once():
    """It interrupts the kernel's whole process group; the program is told by the cell alone."""
    child = (
        "import signal, time\n"
        "told = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: told.append(1))\n"
        "print('ready', flush=True)\n"
        "until = time.monotonic() + 90\n"
        "while not told and time.monotonic() < until: time.sleep(0.01)\n"
        "time.sleep(0.2)\n"
        "print('saved', len(told))"
    )
    [source] = [c.source for c in notebook().cells if "def sh(" in c.source]
    helper = source.partition("\nif COLAB")[0]
    kernel = subprocess.Popen(
        [sys.executable, "-u", "-c", f"{helper}\nsh(sys.executable, '-c', {child!r})"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert kernel.stdout.readline() == "ready\n"
    os.killpg(kernel.pid, signal.SIGINT)
    output, errors = kernel.communicate(timeout=60)
    assert output.strip() == "saved 1" and "KeyboardInterrupt" in errors


@pytest.mark.slow
def test_the_notebook_trains_shows_exports_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "1")
    model = write_model_folder(tmp_path / "toy")
    config = config_for(model, tmp_path, steps=1, mesh=MeshConfig(data=-1, fsdp=1))
    (tmp_path / "toy.json").write_text(json.dumps(settings.to_dict(config)))
    fetch = (
        "from urllib.request import urlopen\n"
        "page = urlopen(f'http://127.0.0.1:{server.server_port}/report.html').read()\n"
        "print('served', b'id=\"memory\"' in page, len(run.metrics))"
    )
    first = executed(tmp_path, 1, fetch)
    text = texts(first)
    assert "step 1/1" in text and "/report.html" in text and "served True 1" in text
    figures = [
        output
        for cell in first.cells
        for output in cell.get("outputs", [])
        if "application/vnd.plotly.v1+json" in output.get("data", {})
    ]
    assert len(figures) == 2
    exported = tmp_path / "runs" / "toy-hf"
    assert {"config.json", "tokenizer.json"} <= {file.name for file in exported.iterdir()}
    assert list(exported.glob("*.safetensors"))
    again = texts(executed(tmp_path, 2, fetch))
    assert "step 1/2" not in again and "step 2/2" in again and "served True 2" in again
    lines = (tmp_path / "runs" / "toy" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1]
