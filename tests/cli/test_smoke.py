"""The tiny policy: it answers any prompt in the form that the reward reads, and is right now and then."""

import runpy
from pathlib import Path

import torch
from conftest import untrained_policy

from entropy_trl.rewards import final_answer
from entropy_trl.smoke import byte_tokenizer, dapo_math_sample, tiny_math_policy


def test_tokenizer_writes_any_text():
    tokenizer = byte_tokenizer()
    for text in ("Answer: 7", "  two  spaces\n", "\\frac{1}{2} ≤ 数学 🙂"):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.encode())
        assert tokenizer.decode(ids) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "left"
    chat = [{"role": "user", "content": "1 + 1?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == (
        "[user]\n1 + 1?\n[assistant]\n"
    )


def test_policy_answers_with_digits_and_is_deterministic():
    model, tokenizer = tiny_math_policy()
    prompts = dapo_math_sample()["prompt"][:7]
    prompts.append([{"role": "user", "content": "What? " * 100 + prompts[0][0]["content"]}])  # longer than any it saw
    batch = tokenizer.apply_chat_template(
        prompts, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    torch.manual_seed(0)
    output = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=16, num_return_sequences=8)
    texts = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    digits = [final_answer(text) for text in texts if len(final_answer(text)) == 1 and final_answer(text).isdigit()]
    assert len(digits) >= 0.9 * len(texts)
    assert len(set(digits)) >= 8  # spread over the digits: some are right, most are wrong
    assert (output == tokenizer.eos_token_id).any(dim=1).float().mean() >= 0.9

    again, _ = tiny_math_policy()
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(parameter, other) for parameter, other in pairs)


def test_teaching_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    tiny_math_policy()
    assert torch.equal(torch.rand(1), expected)


def test_example_runs(tmp_path, monkeypatch, capsys):
    # The example as it stands but for the warm start, which takes 40 seconds.
    example = Path(__file__).parents[2] / "examples" / "countdown.py"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("entropy_trl.quickstart.warm_start_policy", untrained_policy)
    for control in ("kl_cov", "clip_cov", "none"):
        monkeypatch.setattr("sys.argv", ["countdown.py", "--control", control, "--rollouts", "2"])
        runpy.run_path(str(example), run_name="__main__")
        assert f"{control}: entropy" in capsys.readouterr().out
