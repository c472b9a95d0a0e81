"""The notebooks in examples/: clean as committed, and each run from top to bottom by the interpreter of the tests."""

import json
import os
import re
import shutil
import sys
import tempfile
from io import StringIO
from pathlib import Path

import pytest


nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
from jupyter_client.kernelspec import KernelSpec  # noqa: E402
from jupyter_client.manager import AsyncKernelManager  # noqa: E402
from traitlets.config import Config  # noqa: E402

from entropy_trl.analysis import fit_law, law_points, predict_early, read_run  # noqa: E402
from entropy_trl.analysis.covariance.records import read_records  # noqa: E402


ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
TRAIN, LAW = EXAMPLES / "qwen2_5_cov_grpo.ipynb", EXAMPLES / "entropy_law.ipynb"

ROLLOUTS = 24


class Executed:
    """A notebook after it ran: what its cells, by id, have printed and shown."""

    def __init__(self, notebook, folder):
        self.folder = folder
        self.cells = {cell.id: cell for cell in notebook.cells}

    def outputs(self, cell, kind="display"):
        return [output for output in self.cells[cell].outputs if output.output_type.startswith(kind)]

    def printed(self, cell, stream="stdout"):
        return "".join(output.text for output in self.outputs(cell, "stream") if output.name == stream)

    def shown(self, cell, mime="text/plain"):
        """What the last expression of a cell gave."""
        (output,) = self.outputs(cell, "execute_result")
        return output.data[mime]

    def images(self, cell):
        return [output.data["image/png"] for output in self.outputs(cell)]


class ThisInterpreter(AsyncKernelManager):
    """Starts the interpreter of the tests, whichever kernels are installed for the user."""

    kernel_spec = KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])


def run(path, folder, **parameters):
    """Runs a copy of a notebook in a folder, with its data beside it, and parameters set as papermill sets them."""
    shutil.copytree(EXAMPLES / "data", folder / "data")
    notebook = nbformat.read(path, as_version=4)
    (at,) = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    unknown = [name for name in parameters if not re.search(rf"^{name} = ", notebook.cells[at].source, re.MULTILINE)]
    assert not unknown
    if parameters:
        values = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(values, metadata={"tags": ["injected-parameters"]}))
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT / "src"),
        "IPYTHONDIR": str(folder / "ipython"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # a kernel's own, if nothing else is asked for
    }
    # Sockets in a folder need no free ports, but their names have to be short.
    with tempfile.TemporaryDirectory(prefix="nb") as sockets:
        connection = {"transport": "ipc", "ip": f"{sockets}/kernel", "connection_file": f"{sockets}/kernel.json"}
        nbclient.NotebookClient(
            notebook,
            kernel_manager_class=ThisInterpreter,
            config=Config({"KernelManager": connection}),
            resources={"metadata": {"path": str(folder)}},
            timeout=500,
        ).execute(env=environment)
    executed = Executed(notebook, folder)
    for name, cell in executed.cells.items():
        if cell.cell_type == "code":
            assert cell.execution_count is not None, name
            assert "Traceback" not in executed.printed(name, "stderr"), executed.printed(name, "stderr")
    return executed


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) >= (4, 5)  # from which cells have ids
    assert json.loads(path.read_text())["cells"][0]["id"]
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert notebook.metadata.kernelspec.name == "python3"
    (parameters,) = [cell for cell in notebook.cells if cell.metadata.get("tags") == ["parameters"]]
    for cell in notebook.cells:
        assert set(cell.metadata) == ({"tags"} if cell is parameters else set()), cell.id
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_a_notebook_names_exists(path):
    """Files that its text links to, configurations and documents, and the options of its commands."""
    text = "\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text):
        assert (EXAMPLES / link).exists(), link
    for name in re.findall(r"(?:configs|docs)/[\w./-]+\w", text):
        assert (ROOT / name).exists(), name


# The training


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The embedded task, from a shorter warm-up."""
    folder = tmp_path_factory.mktemp("train")
    return run(TRAIN, folder, EMBEDDED=True, ROLLOUTS=ROLLOUTS, WARM_UP_STEPS=200, OUTPUT_DIR="out")


@pytest.fixture(scope="module")
def trained_runs(trained):
    return {name: read_run(trained.folder / "out" / name) for name in ("grpo", "kl_cov")}


def test_both_runs_are_whole(trained, trained_runs):
    for name, of_run in trained_runs.items():
        entropy = of_run.series("entropy")
        assert entropy.steps.tolist() == list(range(8, 8 * ROLLOUTS + 1, 8))
        lines = re.findall(r"rollout +(\d+)  entropy ([\d.]+) nats  reward ([\d.]+)", trained.printed(name))
        assert [int(line[0]) for line in lines] == list(range(1, ROLLOUTS + 1))
        assert [float(line[1]) for line in lines] == pytest.approx(entropy.values, abs=5e-4)
        adapter = json.loads((trained.folder / "out" / name / "adapter_config.json").read_text())
        assert (adapter["peft_type"], adapter["base_model_name_or_path"]) == ("LORA", "out/base")


def test_entropy_falls_with_grpo_and_less_with_kl_cov(trained_runs):
    entropy = {name: of_run.series("entropy").values for name, of_run in trained_runs.items()}
    start, end = ({name: values[at].mean() for name, values in entropy.items()} for at in (slice(1), slice(-3, None)))
    assert start["grpo"] == pytest.approx(start["kl_cov"], rel=0.05)
    assert end["grpo"] < 0.7 * start["grpo"]
    assert end["kl_cov"] > 1.3 * end["grpo"]


def test_only_kl_cov_restrains_tokens(trained):
    records = {name: read_records(trained.folder / "out" / name) for name in ("grpo", "kl_cov")}
    steps = [1 + 8 * (ROLLOUTS // 5) * i for i in range(6)]
    for name, of_run in records.items():
        assert [record.step for record in of_run] == steps
        assert [record.control for record in of_run] == [None if name == "grpo" else name] * len(steps)
    assert not any(record.table("selected")["selected"].any() for record in records["grpo"])
    # floor(0.1 N) of each update
    chosen = [record.table("selected")["selected"] for record in records["kl_cov"]]
    assert [int(of_step.sum()) for of_step in chosen] == [len(of_step) // 10 for of_step in chosen]
    counts = [f"{sum(map(function, chosen)):,}" for function in (sum, len)]
    assert trained.printed("tokens") == f"{counts[0]} of {counts[1]} recorded tokens were restrained by kl_cov.\n"
    assert "keyness" in trained.shown("tokens")
    html = trained.shown("completion", "text/html")
    assert "restrained by the control" in html and re.search(r'class="[pn]\d s"', html)


def test_curves_and_law_are_those_of_the_logs(trained, trained_runs):
    for cell in ("curves", "law"):
        assert len(trained.images(cell)) == 1
    last = trained.shown("last")
    law = trained.shown("law")
    for of_run in trained_runs.values():
        for metric in ("entropy", "reward", "diversity/distinct_correct", "diversity/solved"):
            assert f"{of_run.series(metric).values[-2:].mean():.3f}" in last
        points = law_points(of_run)
        fit = fit_law(points.entropy, points.reward)
        assert points.reward_metric == "reward"
        for value in (fit.a, fit.b, fit.r2, fit.ceiling, fit.inference().ceiling.low):
            assert f"{value:.3f}" in law
    assert "5.654" in trained.shown("table-1")


def test_report_is_written(trained):
    report = trained.folder / "out" / "report" / "report.html"
    assert repr(Path("out/report/report.html")) in trained.shown("report")
    assert "GRPO and KL-Cov" in report.read_text()
    assert {run["name"] for run in json.loads(report.with_suffix(".json").read_text())["runs"]} == {"grpo", "kl_cov"}


def test_nothing_is_pushed_unasked(trained):
    assert trained.cells["push"].outputs == []


@pytest.mark.slow
def test_own_model_and_data(tmp_path):
    """The other case of the notebook, whose model and data are elsewhere: here a tiny model and a file."""
    from entropy_trl.smoke import tiny_math_policy

    model, tokenizer = tiny_math_policy()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    problem = """Let $x = {}$ and $y = {}$ be integers. Compute the sum $x + y$.

Remember to put your answer on its own line after "Answer:"."""
    rows = [
        {"prompt": [{"role": "user", "content": problem.format(x, y)}], "answer": str(x + y)}
        for x in range(8)
        for y in range(10 - x)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    executed = run(
        TRAIN,
        tmp_path,
        MODEL=str(tmp_path / "model"),
        DATASET=str(tmp_path / "rows.jsonl"),
        MAX_COMPLETION_LENGTH=12,
        ROLLOUTS=3,
    )
    assert executed.printed("case").startswith(f"{len(rows)} prompts")
    folder = tmp_path / "runs" / "notebook"
    for name in ("grpo", "kl_cov"):
        assert 0.02 < read_run(folder / name).series("reward").values.mean() < 0.3  # it guesses digits
    chosen = [record.table("selected")["selected"] for record in read_records(folder / "kl_cov")]
    assert [int(of_step.sum()) for of_step in chosen] == [max(1, int(2e-3 * len(of_step))) for of_step in chosen]
    assert (folder / "report" / "report.html").exists()


# The law


@pytest.fixture(scope="module")
def law(tmp_path_factory):
    return run(LAW, tmp_path_factory.mktemp("law"))


@pytest.fixture(scope="module")
def law_runs():
    return {path.stem: read_run(path) for path in sorted((EXAMPLES / "data").glob("*.jsonl"))}


def test_the_data_are_small_and_known(law_runs):
    assert sum(path.stat().st_size for path in (EXAMPLES / "data").iterdir()) < 150_000
    assert list(law_runs) == [f"{method}-seed{seed}" for method in ("clip_cov", "grpo") for seed in range(3)]
    for of_run in law_runs.values():
        assert of_run.series("entropy").steps.tolist() == list(range(8, 961, 8))
        assert of_run.series("held_out/avg@16").steps.tolist() == list(range(0, 961, 96))


def test_fits_are_those_of_least_squares(law, law_runs):
    shown = law.shown("fit")
    for of_run in law_runs.values():
        h, r = of_run.series("held_out/entropy").values, of_run.series("held_out/avg@16").values
        slope, intercept = np.polyfit(np.exp(h), r, 1)
        for value in (-slope, intercept, slope + intercept):
            assert f"{value:.3f}" in shown
    assert all(len(law.images(cell)) == 1 for cell in ("figure", "sizes-figure"))


def test_formats_give_one_fit(law):
    ours, verl, *notes = law.printed("formats").splitlines()
    assert ours.startswith("trainer_state.json: entropy, reward: 120 points")
    assert verl.startswith("verl.csv: actor/entropy, critic/score/mean: 120 points")
    assert ours.split("points")[1] == verl.split("points")[1]
    assert any("the law is about validation accuracy" in note for note in notes)
    assert sum("verl" in note for note in notes) == 1  # of its wrong entropies


def test_what_the_text_says_of_these_runs(law, law_runs):
    """Ceilings of runs that keep their entropy are less certain; early prediction is good for GRPO, else not."""
    width, gain, still = {"grpo": [], "clip_cov": []}, {"grpo": [], "clip_cov": []}, {}
    for name, of_run in law_runs.items():
        points = law_points(of_run)
        fit = fit_law(points.entropy, points.reward)
        ceiling = fit.inference().ceiling
        assert f"{ceiling.low:.3f}" in law.shown("fit") and f"{ceiling.high:.3f}" in law.shown("fit")
        width[of_run.group].append(ceiling.high - ceiling.low)
        early = predict_early(points.entropy, points.reward, points.steps, fraction=0.4)
        assert f"{early.rmse:.3f}" in law.shown("early")
        gain[of_run.group].append(early.unchanged_rmse - early.rmse)
        half = len(points.reward) // 2
        still[name] = (points.entropy[half:].max() - points.entropy[half:].min(), np.ptp(points.reward[half:]))
    assert np.mean(width["clip_cov"]) > 2 * np.mean(width["grpo"])
    assert min(gain["grpo"]) > 0 > np.mean(gain["clip_cov"])
    assert all(entropy < 0.06 and reward > 0.02 for name, (entropy, reward) in still.items() if "clip" in name)
    assert "not distinguishable" in law.shown("forms")


def test_32b_is_not_where_the_small_models_point(law):
    shown = pd.read_fwf(StringIO(law.shown("sizes")), index_col=0)
    assert shown.loc["b", "predicted"] == pytest.approx(0.810, abs=1e-3)
    assert shown.loc["ceiling", "predicted"] == pytest.approx(0.504, abs=1e-3)
    assert shown.loc["ceiling", "read off"] == pytest.approx(0.454, abs=1e-3)
