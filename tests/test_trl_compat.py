"""What bridges the versions of TRL: a fused LM head without Triton, and what a version is refused or warned for."""

import configparser
import warnings
from pathlib import Path

import pytest
import torch
import trl
from packaging.requirements import Requirement
from packaging.version import Version
from trl import GRPOConfig, GRPOTrainer

from entropy_trl import CovGRPOConfig, trl_compat
from entropy_trl.trl_compat import TESTED, PlainLogProbs, adapt_trl, completion_ends


def test_the_tested_range_is_the_required_one():
    config = configparser.ConfigParser()
    config.read(Path(__file__).parent.parent / "setup.cfg")
    lines = config["options"]["install_requires"].split("\n")
    (requirement,) = [Requirement(line) for line in lines if line.startswith("trl")]
    assert requirement.specifier == TESTED
    assert requirement.specifier.contains(trl.__version__)


@pytest.mark.parametrize(
    ("version", "warns"),
    [("1.12.9", True), ("1.13.0", False), ("1.16.3", False), ("1.17.0.dev0", True), ("1.17", True)],
)
def test_an_untested_version_is_warned_of(monkeypatch, version, warns):
    monkeypatch.setattr(trl_compat, "installed", Version(version))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapt_trl()
    assert ["tested range" in str(warning.message) for warning in caught] == [True] * warns


@pytest.mark.parametrize(("version", "refused"), [("1.13.0", True), ("1.14.0", False)])
def test_a_fused_loss_that_no_control_can_reach_is_refused(monkeypatch, make_config, version, refused):
    monkeypatch.setattr(trl_compat, "installed", Version(version))
    make_config(CovGRPOConfig, use_liger_kernel=True, entropy_control=None)  # stock TRL
    if refused:
        with pytest.raises(ValueError, match="would not act"):
            make_config(CovGRPOConfig, use_liger_kernel=True)
    else:
        make_config(CovGRPOConfig, use_liger_kernel=True)


@pytest.mark.parametrize(("version", "listed"), [("1.13.0", False), ("1.14.0", True)])
def test_the_ends_of_a_completion(monkeypatch, make_trainer, version, listed):
    trainer = make_trainer(GRPOTrainer, GRPOConfig)
    tokenizer = trainer._tokenizer
    ends = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert completion_ends(trainer) == ends  # with the installed version
    other = max(ends) + 1
    monkeypatch.setattr(trl_compat, "installed", Version(version))
    trainer.eos_token_ids = [tokenizer.eos_token_id, other]  # as a generation configuration with two of them
    assert completion_ends(trainer) == ends | ({other} if listed else set())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("softcap", "scale", "temperature"), [(None, 1.0, 1.0), (None, 0.5, 0.7), (3.0, 2.0, 1.3)])
def test_plain_log_probabilities(softcap, scale, temperature, bias):
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator).requires_grad_()  # noqa: E731
    hidden, weight, head_bias = normal(5, 8), normal(11, 8), normal(11) if bias else None
    leaves = [leaf for leaf in (hidden, weight, head_bias) if leaf is not None]
    targets = torch.arange(5) * 2
    logps, entropy, *others = PlainLogProbs(None).apply(
        hidden, weight, head_bias, targets, temperature, 4, softcap, scale, ("log_probs", "entropy")
    )
    assert others == [None, None, None]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = (exact[0] @ exact[1].T + (exact[2] if bias else 0)) * scale
    logits = logits if softcap is None else softcap * (logits / softcap).tanh()
    expected = torch.distributions.Categorical(logits=logits / temperature)
    torch.testing.assert_close(logps.double(), expected.log_prob(targets), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), expected.entropy(), rtol=1e-5, atol=1e-6)
    weights = torch.arange(1.0, 6.0)
    found = torch.autograd.grad((weights * (logps + 2 * entropy)).sum(), leaves)
    right = torch.autograd.grad((weights * (expected.log_prob(targets) + 2 * expected.entropy())).sum(), exact)
    for each, other in zip(found, right, strict=True):
        torch.testing.assert_close(each.double(), other, rtol=1e-4, atol=1e-5)


def test_other_outputs_are_left_to_trls_kernel():
    class Kernel:
        apply = staticmethod(lambda *args: args)

    arguments = (torch.ones(1, 2), torch.ones(3, 2), None, torch.zeros(1), 1.0, 4, None, 1.0, ("is_top1",))
    assert PlainLogProbs(Kernel).apply(*arguments) == arguments
