"""A control of the user's own: by dotted path, as an instance, and every way in which it can be wrong."""

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import yaml
from conftest import untrained_policy
from prepared_python import prepared_python
from test_rivals import logged

from entropy_trl import EntropyControl, KLCov, TokenEdit, build_control
from entropy_trl.cli import parse_train_args, train_main
from entropy_trl.dotted_path import MOVED


EXAMPLE = "examples.own_control.SpareTheSure"


@dataclass(frozen=True)
class Halve(EntropyControl):
    """At the top of a module: can be stored and made again."""

    share: float = 0.5
    floor: float = 0.0

    def edit(self, batch, selected):
        return TokenEdit(advantages=(batch.advantages * self.share).expand_as(batch.logps))


class Plain(EntropyControl):
    """Not a dataclass."""

    def edit(self, batch, selected):
        return TokenEdit()


@dataclass(frozen=True)
class WithoutEdit(EntropyControl):
    share: float = 0.5


@dataclass(frozen=True)
class NotAControl:
    share: float = 0.5


@dataclass(frozen=True)
class Demanding(EntropyControl):
    share: float

    def edit(self, batch, selected):
        return TokenEdit()


def halve(share):
    """A function in the place of a class."""


@dataclass(frozen=True)
class Stricter(KLCov):
    """Derived from a control of ours: its fields, and one more."""

    only_positive: bool = True


class Outer:
    @dataclass(frozen=True)
    class Inner(EntropyControl):
        def edit(self, batch, selected):
            return TokenEdit()


@pytest.fixture
def in_repository(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def module(folder, name, source):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(source)


SOURCE = """
from dataclasses import dataclass
from entropy_trl import EntropyControl, TokenEdit

@dataclass(frozen=True)
class Scale(EntropyControl):
    factor: float = 2.0

    def edit(self, batch, selected):
        return TokenEdit(advantages=(batch.advantages * self.factor).expand_as(batch.logps))
"""


# By dotted path


def test_from_a_file_in_the_current_folder(tmp_path, monkeypatch, make_config):
    module(tmp_path, "own_control_in_folder", SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    config = make_config(
        entropy_control="own_control_in_folder.Scale", entropy_control_kwargs={"factor": "3e-1"}, max_steps=1
    )
    control = config.make_entropy_control()
    assert type(control).__name__ == "Scale" and control.factor == 0.3


def test_from_an_installed_package(tmp_path, monkeypatch, make_config):
    module(tmp_path / "site" / "own_package" / "controls", "scaling", SOURCE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    config = make_config(entropy_control="own_package.controls.scaling.Scale")
    assert config.make_entropy_control().factor == 2.0


def test_the_example_on_the_command_line(in_repository, tmp_path):
    arguments = ["--config", "configs/quickstart/grpo.yaml", "--entropy_control", EXAMPLE, "--max_steps", "16"]
    arguments += ["--entropy_control_kwargs", '{"probability": 0.1}', "--output_dir", str(tmp_path / "out")]
    arguments += ["--model_factory", "conftest.untrained_policy", "--reward_funcs", "conftest.digit_reward"]
    assert train_main([*arguments, "--disable_tqdm", "true"]) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert all(0 < log["entropy_control/spared"] < 1 for log in history if "loss" in log)


def test_the_example_in_a_chain_on_the_command_line(in_repository):
    kwargs = {"clip_cov": {"fraction": 0.01}, EXAMPLE: {"probability": 0.8}}
    arguments = ["--config", "configs/quickstart/grpo.yaml", "--entropy_control", f"clip_cov+{EXAMPLE}"]
    _, args, _, _ = parse_train_args([*arguments, "--entropy_control_kwargs", json.dumps(kwargs)])
    chain = args.make_entropy_control()
    assert [type(part).__name__ for part in chain.controls.values()] == ["ClipCov", "SpareTheSure"]
    assert chain.controls[EXAMPLE].probability == 0.8


def test_the_example_takes_out_what_it_says(in_repository, make_trainer, set_forward, loss_inputs):
    logps, inputs = loss_inputs(rows=8, length=12, drift=0.1)
    gradients = []
    for probability in (0.2, 0.999999):
        trainer = make_trainer(entropy_control=EXAMPLE, entropy_control_kwargs={"probability": probability})
        set_forward(logps)
        trainer.model.train()
        gradients += torch.autograd.grad(trainer._compute_loss(trainer.model, inputs), logps)
    sure = (inputs["old_per_token_logps"].exp() > 0.2) & (inputs["advantages"] > 0)[:, None]
    sure &= inputs["completion_mask"].bool()
    assert sure.sum() > 3 and (gradients[1][sure] != 0).any()
    assert torch.equal(gradients[0], gradients[1].masked_fill(sure, 0.0))


def test_the_example_is_20_lines(request):
    source = (request.config.rootpath / "examples" / "own_control.py").read_text()
    body = source[source.index("@dataclass") : source.index("def main")]
    assert len(body.strip().splitlines()) <= 20


def test_in_a_new_process(tmp_path, request):
    """As a user runs it: another folder, no test in `sys.path`, and the mistake in one line."""
    module(tmp_path, "mine", SOURCE)
    settings = yaml.safe_load((request.config.rootpath / "configs/quickstart/grpo.yaml").read_text())
    factories = {"model_factory": "factories.policy", "reward_funcs": ["factories.reward"]}
    settings |= {"entropy_control": "mine.Scale", "max_steps": 8, "save_strategy": "no", "output_dir": "out"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings | factories))
    module(
        tmp_path,
        "factories",
        "from entropy_trl.quickstart.task import build_model, build_tokenizer\n"
        "def policy():\n    return build_model(seed=0), build_tokenizer()\n"
        "def reward(completions, **kwargs):\n    return [float(len(c)) for c in completions]\n",
    )
    command = [prepared_python(), str(request.config.rootpath / "train.py"), "--config", "run.yaml"]
    environment = os.environ | {"PYTHONPATH": str(request.config.rootpath / "src"), "OMP_NUM_THREADS": "1"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 240}
    done = subprocess.run(command, check=False, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    done = subprocess.run([*command, "--entropy_control", "mine.Scael"], check=False, **options)
    assert done.returncode == 2
    assert "'mine.Scael' is not a dataclass" in done.stderr.splitlines()[-1]


# As an instance


def test_an_instance_trains_and_is_stored_by_name(make_trainer):
    runs = []
    for control in (Halve(share=0.25), Halve(share=1.0), None):
        trainer = make_trainer(entropy_control=control, epsilon=0.2)
        trainer.train()
        runs.append(trainer)
    assert runs[0].entropy_control == Halve(share=0.25)
    assert runs[0].args.entropy_control == f"{__name__}.Halve"
    assert runs[0].args.entropy_control_kwargs == {"share": 0.25, "floor": 0.0}
    assert logged(runs[0])[0]["grad_norm"] == pytest.approx(0.25 * logged(runs[1])[0]["grad_norm"], rel=1e-4)
    # With a factor of 1 it is plain GRPO.
    weights = zip(runs[1].model.parameters(), runs[2].model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


@pytest.mark.parametrize("control", [Halve(share=0.25), Stricter(fraction=0.1, only_positive=False)])
def test_an_instance_survives_json(make_config, control):
    stored = json.loads(make_config(entropy_control=control).to_json_string())
    keys = ("entropy_control", "entropy_control_kwargs")
    assert make_config(**{key: stored[key] for key in keys}).make_entropy_control() == control


def test_an_instance_takes_no_more_hyper_parameters(make_config):
    with pytest.raises(ValueError, match="is an instance"):
        make_config(entropy_control=Halve(), entropy_control_kwargs={"share": 0.1})


def test_the_example_with_its_instance(tmp_path, monkeypatch, request, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("entropy_trl.quickstart.warm_start_policy", untrained_policy)
    monkeypatch.setattr("sys.argv", ["own_control.py", "--rollouts", "2"])
    runpy.run_path(str(request.config.rootpath / "examples" / "own_control.py"), run_name="__main__")
    assert "of the tokens spared" in capsys.readouterr().out


# What is wrong is said


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("Halve", ["Unknown `entropy_control` 'Halve'", "dotted path"]),
        ("no_such_package.Halve", ["there is no module 'no_such_package'"]),
        ("entropy_trl.no_such_module.Halve", ["there is no module 'entropy_trl.no_such_module'"]),
        ("entropy_trl.script_args.Halve", ["no module 'entropy_trl.script_args' any more", "cli.train_arguments'"]),
        ("entropy_trl.types.Halve", ["there is no module 'entropy_trl.types' any more", "'entropy_trl.tokens.types'"]),
        (f"{__name__}.Missing", ["'test_own_control.Missing' is not a dataclass", "has None there"]),
        (f"{__name__}.halve", ["is not a dataclass", "has <function halve"]),
        (f"{__name__}.NotAControl", ["derives from `entropy_trl.EntropyControl`"]),
        (f"{__name__}.Plain", ["is not a dataclass"]),
        (f"{__name__}.WithoutEdit", ["must define `edit`"]),
        (f"{__name__}.Outer.Inner", ["there is no module 'test_own_control.Outer'"]),
        (f"{__name__}.Demanding", ["must give 'share'"]),
        ("", ["Unknown `entropy_control` ''"]),
        (".Halve", ["Unknown `entropy_control` '.Halve'"]),
    ],
)
def test_a_path_that_leads_to_no_control(make_config, path, words):
    with pytest.raises(ValueError) as error:
        make_config(entropy_control=path)
    for word in words:
        assert word in str(error.value)


def test_a_field_that_it_has_not(make_config):
    with pytest.raises(ValueError, match=r"'shrae' for 'test_own_control.Halve' \(did you mean 'share'\?\)"):
        make_config(entropy_control=f"{__name__}.Halve", entropy_control_kwargs={"shrae": 0.1})
    with pytest.raises(ValueError, match="'share' must be a number, got 'half'"):
        make_config(entropy_control=f"{__name__}.Halve", entropy_control_kwargs={"share": "half"})
    assert build_control(f"{__name__}.Demanding", {"share": 0.5}) == Demanding(0.5)


def test_the_former_name_of_a_module_leads_to_its_new_one(tmp_path, monkeypatch, make_config):
    module(tmp_path, "own_control_of_old", "from entropy_trl.types import TokenBatch\n" + SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"needs 'entropy_trl.types'.*Import 'entropy_trl.tokens.types' instead"):
        make_config(entropy_control="own_control_of_old.Scale")
    for former, now in MOVED.items():
        assert importlib.util.find_spec(former) is None
        assert importlib.util.find_spec(now) is not None


def test_a_module_that_fails_by_itself_says_so(tmp_path, monkeypatch, make_config):
    module(tmp_path, "own_control_broken", "import a_package_that_is_not_there\n" + SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        make_config(entropy_control="own_control_broken.Scale")


def test_instances_that_cannot_be_stored(make_config):
    @dataclass(frozen=True)
    class Local(EntropyControl):
        def edit(self, batch, selected):
            return TokenEdit()

    for control in (Local(), Plain()):
        with pytest.raises(ValueError, match="must be a dataclass at the top level of a module"):
            make_config(entropy_control=control)
    with pytest.raises(ValueError, match="no module"):
        make_config(entropy_control=Outer.Inner())


def test_a_class_is_not_an_instance(make_config):
    with pytest.raises(ValueError, match="entropy_control"):
        make_config(entropy_control=Halve)
