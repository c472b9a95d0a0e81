"""What entropy_trl relies on in TRL, transformers and huggingface_hub: a release that breaks it fails here, by name."""

import atexit
import inspect
import re
from collections import defaultdict
from pathlib import Path

import huggingface_hub
import pytest
import torch
import trl
from huggingface_hub.utils import _http
from transformers.utils.hub import PushInProgress, hf_api
from trl import GRPOConfig, GRPOTrainer

import entropy_trl.trainer
from entropy_trl import CovGRPOTrainer, clipped_tokens, token_weights
from entropy_trl.trl_compat import forward_parameters


LOSS_TYPES = ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"]


#: Methods of TRL and transformers that are overridden or called, with the parameters that are relied on.
METHODS = {
    "_compute_loss": ("model", "inputs"),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep"),
    "_generate": ("prompts",),
    "_generate_and_score_completions": ("inputs",),
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "get_high_entropy_mask": (),
    "get_off_policy_mask": (),
    "get_gamma_weights": (),
    "_get_train_sampler": ("dataset",),
    "_save_checkpoint": ("model", "trial"),
    "_save": ("output_dir", "state_dict"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_best_model": (),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_rng_state": ("checkpoint",),
    "_run_epoch": (),
    "_get_output_dir": ("trial",),
    "_get_learning_rate": (),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_finish_current_push": (),
    "init_hf_repo": ("token",),
    "push_to_hub": ("commit_message", "blocking", "token", "revision"),
    "create_model_card": ("model_name", "dataset_name", "tags"),
    "prediction_step": (),
    "train": ("resume_from_checkpoint",),
}
#: Attributes of an instance, or of the class, that are read or set.
ATTRIBUTES = (
    "_step",
    "_buffered_inputs",
    "_last_loaded_step",
    "_metrics",
    "_logs",
    "_pending_extra_logs",
    "_pending_metrics",
    "_tokenizer",
    "_tag_names",
    "_name",
    "_paper",
)


@pytest.mark.parametrize("name", METHODS)
def test_the_methods_we_use_are_there(name):
    forward = name == "_get_per_token_logps_and_entropies"
    parameters = forward_parameters() if forward else list(inspect.signature(getattr(GRPOTrainer, name)).parameters)
    assert tuple(parameters[1 : len(METHODS[name]) + 1]) == METHODS[name]


def test_every_private_name_that_we_use_is_in_this_contract(make_trainer):
    trainer = make_trainer(GRPOTrainer, GRPOConfig)
    package = Path(entropy_trl.trainer.__file__).parent
    folders = ("loss", "rollout", "saving", "monitor")
    sources = [package / "trainer.py", *(path for folder in folders for path in (package / folder).glob("*.py"))]
    found = (re.findall(r"(?:self|trainer|super\(\))\.(_[a-z]\w*)", path.read_text()) for path in sources)
    used = {name for names in found for name in names}
    private = {name for name in used if hasattr(trainer, name)}
    assert {"_step", "_generate", "_get_output_dir"} <= private  # or the search finds nothing
    assert private <= {*METHODS, *ATTRIBUTES}


def test_the_attributes_we_use_mean_what_we_take_them_for(make_trainer):
    trainer = make_trainer(GRPOTrainer, GRPOConfig, max_steps=1, steps_per_generation=2)
    assert (trainer._step, trainer._buffered_inputs) == (0, None)
    for pending in (trainer._pending_extra_logs, trainer._pending_metrics):
        assert isinstance(pending, defaultdict) and not pending
    assert trainer._tokenizer.pad_token_id is not None
    trainer.train()
    assert trainer._step == 1 and len(trainer._buffered_inputs) == 2
    assert {"train", "eval"} <= trainer._metrics.keys()
    assert len(trainer._logs["advantages"]) == 16
    assert trainer._get_learning_rate() == pytest.approx(0.0)  # after the last step of a linear schedule
    assert Path(trainer._get_output_dir(trial=None)) == Path(trainer.args.output_dir)
    assert "self._last_loaded_step = -1" in inspect.getsource(GRPOTrainer.__init__)  # with vLLM only
    sampler = trainer._get_train_sampler(trainer.train_dataset)
    assert sampler.num_samples == len(trainer.train_dataset) and isinstance(sampler.generator, torch.Generator)


def test_generation_returns_what_dynamic_sampling_takes_apart(make_trainer):
    trainer = make_trainer(GRPOTrainer, GRPOConfig)
    trainer.model.train()
    rows = [trainer.train_dataset[0]] * 4
    prompts = [row["prompt"] for row in rows]
    prompt_ids, ids, tool_mask, completions, logps, fields, images, tool_images = trainer._generate(prompts)
    assert len(prompt_ids) == len(ids) == len(completions) == 4
    assert (tool_mask, logps, images) == (None, None, None)
    assert fields == {} and not any(tool_images)
    assert trainer._calculate_rewards(rows, prompts, completions, ids).shape == (4, 1)


def test_other_private_names_are_there():
    factory = _http._GLOBAL_CLIENT_FACTORY
    try:
        huggingface_hub.set_client_factory(_http.default_client_factory)
        assert _http._GLOBAL_CLIENT_FACTORY is _http.default_client_factory
    finally:
        huggingface_hub.set_client_factory(factory)
    assert callable(atexit._run_exitfuncs)
    assert PushInProgress().jobs == [] and PushInProgress().is_done()
    assert hasattr(hf_api(), "token")


def test_the_forward_takes_images():
    parameters = forward_parameters()
    assert parameters[:5] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep"]
    assert "pixel_values" in parameters and "completion_ids" not in parameters


def test_all_loss_types_are_known():
    documented = GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    assert all(f"'{loss_type}'" in documented or f"`{loss_type}`" in documented for loss_type in LOSS_TYPES), documented


class Recorder(dict):
    def __init__(self, inputs, events):
        super().__init__(inputs)
        self.events = events

    def __getitem__(self, key):
        self.events.append(key)
        return super().__getitem__(key)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_one_forward_and_then_the_advantages(make_trainer, loss_inputs, monkeypatch, loss_type):
    trainer = make_trainer(GRPOTrainer, GRPOConfig, loss_type=loss_type)
    logps, inputs = loss_inputs()
    events = []

    def forward(*args, **kwargs):
        events.append("forward")
        return logps, torch.ones_like(logps), None

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", forward)
    trainer._compute_loss(trainer.model, Recorder(inputs, events))
    assert events.count("forward") == 1
    assert events.index("forward") < events.index("advantages")


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_advantages_may_be_per_token(make_trainer, set_forward, loss_inputs, loss_type):
    trainer = make_trainer(GRPOTrainer, GRPOConfig, loss_type=loss_type)
    logps, inputs = loss_inputs()
    set_forward(logps)
    expanded = inputs | {"advantages": inputs["advantages"][:, None].expand(logps.shape)}
    results = []
    for each in (inputs, expanded):
        loss = trainer._compute_loss(trainer.model, each)
        results.append((loss.detach(), *torch.autograd.grad(loss, logps)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_token_weights_are_those_of_the_loss(make_trainer, set_forward, loss_inputs, loss_type, accumulation):
    # At ratio 1 and A = -1 every loss type's derivative by a token's log-prob is the token's weight.
    trainer = make_trainer(
        GRPOTrainer,
        GRPOConfig,
        loss_type=loss_type,
        gradient_accumulation_steps=accumulation,
        steps_per_generation=4,
        epsilon_high=2.0,
    )
    logps, inputs = loss_inputs(drift=0.0)
    inputs["advantages"] = -torch.ones_like(inputs["advantages"])
    set_forward(logps)
    trainer.model.train()
    (gradient,) = torch.autograd.grad(trainer._compute_loss(trainer.model, inputs), logps)
    weights = token_weights(
        loss_type,
        inputs["completion_mask"].bool(),
        accumulation_steps=accumulation,
        max_completion_length=trainer.max_completion_length,
        step_items=inputs["num_items_in_batch"] * accumulation / 4,
        dtype=torch.float64,
    )
    torch.testing.assert_close(weights, gradient, rtol=1e-6, atol=0)
    assert weights.count_nonzero() == inputs["completion_mask"].sum()


def test_unknown_loss_type_is_refused():
    with pytest.raises(ValueError, match="'new'"):
        token_weights("new", torch.ones(1, 1), accumulation_steps=1, max_completion_length=1, step_items=1)


@pytest.mark.parametrize(
    ("low", "high", "delta"),
    [(0.2, 0.28, None), (0.2, 0.28, 1.5), (0.2, 0.2, 1.1), (1.0, 1.0, None), (1.0, 1.0, 1.5), (1.0, 1.0, 3.0)],
)
def test_clipped_tokens_are_those_without_gradient(make_trainer, set_forward, loss_inputs, low, high, delta):
    trainer = make_trainer(GRPOTrainer, GRPOConfig, epsilon=low, epsilon_high=high, delta=delta)
    logps, inputs = loss_inputs(rows=16, length=20, drift=0.8)
    set_forward(logps)
    (gradient,) = torch.autograd.grad(trainer._compute_loss(trainer.model, inputs), logps)
    log_ratio = logps - inputs["old_per_token_logps"]
    clipped = clipped_tokens(log_ratio, inputs["advantages"][:, None], low, high, delta)
    mask = inputs["completion_mask"].bool()
    assert torch.equal((gradient == 0) & mask, clipped & mask)
    assert (clipped & mask).any()


def test_rows_keep_their_identity_through_shuffle_and_split(make_trainer):
    seen = []

    class Trainer(CovGRPOTrainer):
        def _compute_loss(self, model, inputs):
            seen.append((self.state.global_step, inputs["row_ids"].tolist()))
            return super()._compute_loss(model, inputs)

    make_trainer(Trainer, max_steps=2).train()
    assert sorted(seen[0][1] + seen[1][1]) == list(range(16))
    assert seen[0][1] != list(range(8))  # TRL shuffles, or the test shows nothing


def broken(events):
    """A stand-in for a future TRL's `_compute_loss` that meets the control with the given events."""

    def compute_loss(self, model, inputs):
        for event in events:
            if event == "forward":
                self._get_per_token_logps_and_entropies(model, None, None, 1)
            else:
                inputs["advantages"]
        return torch.zeros(())

    return compute_loss


def test_the_forward_gets_the_images_of_the_scored_rows(make_trainer, loss_inputs, monkeypatch):
    # A scoring pass of ours must hand TRL's forward pass what its own loss does.
    trainer = make_trainer()
    logps, inputs = loss_inputs()
    inputs |= {"pixel_values": torch.ones(4, 3), "num_images": [1, 1, 1, 1]}
    seen = []
    monkeypatch.setattr(
        GRPOTrainer,
        "_get_per_token_logps_and_entropies",
        lambda self, model, ids, mask, keep, **kwargs: seen.append((ids.shape, keep, kwargs)) or (logps, logps, None),
    )
    trainer._batches.score(trainer.model, inputs)
    ((shape, keep, kwargs),) = seen
    assert shape == (4, 8) and keep == 6
    assert kwargs.keys() == {"pixel_values", "num_images", "compute_entropy"}
    assert kwargs["pixel_values"] is inputs["pixel_values"]


@pytest.mark.parametrize(
    ("events", "message"),
    [
        ([], "without `_get_per_token_logps_and_entropies`"),
        (["advantages", "forward"], "before its forward pass"),
        (["forward"], "without reading the advantages"),
        (["forward", "forward", "advantages"], "second forward pass"),
    ],
)
def test_a_trl_that_differs_is_a_loud_error(make_trainer, set_forward, loss_inputs, monkeypatch, events, message):
    trainer = make_trainer()
    logps, inputs = loss_inputs()
    set_forward(logps)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", broken(events))
    trainer.model.train()
    with pytest.raises(RuntimeError, match=message) as error:
        trainer._compute_loss(trainer.model, inputs)
    assert trl.__version__ in str(error.value)
