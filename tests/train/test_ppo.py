"""PPO: gradients against float64 maths written out here, the KL controller, and the stage from end to end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rollout_helpers import TEMPERATURE, make_source, perturb
from torch import Tensor
from training_helpers import FAST, call_main, chat_rows, write_jsonl

from model import BPETokenizer, HaoAIConfig, RewardModel, SmartHaoAI
from model.heads import ValueHead
from train.config import PPOConfig, PPOStageConfig, UsageError, parse_command_line
from train.log_probs import completion_log_probs
from train.metrics import read_jsonl
from train.rollout import REWARD, RolloutSource
from train.train_ppo import PPORollouts, main, ppo, ppo_loss


def by_hand(model: SmartHaoAI, ids: list[int], start: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, entropies and values (n,) of an answer in float64, alone in its row."""
    out = model(torch.tensor([ids[:-1]]), output_hidden_states=True)
    logs = (out.logits[0, start - 1 :] / TEMPERATURE).log_softmax(-1)
    states = out.hidden_states[0, start - 1 :]
    head = model.value_head
    assert head is not None and head.bias is not None
    values = states @ head.weight[0] + head.bias
    return logs.gather(1, torch.tensor(ids[start:])[:, None])[:, 0], -(logs.exp() * logs).sum(-1), values


def double_copy(model: SmartHaoAI) -> SmartHaoAI:
    """The model in float64, value head included, in evaluation."""
    copy = SmartHaoAI(model.config)
    copy.value_head = ValueHead(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.double().eval()


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_gradients_equal_float64_maths(kl: str, model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards the whole chain from rewards to gradients: KL penalty, GAE, whitening, both clips, entropy, weights of a step."""
    settings = PPOConfig(kl=kl, kl_coef=0.3, entropy_coef=0.05, gamma=0.97, lam=0.9, clip=0.1, value_clip=0.1, value_coef=0.4, epochs=1)
    source = make_source(PPORollouts, model, tiny_tokenizer, settings, batch_size=4)
    assert model.value_head is not None
    perturb(model.value_head, 0.3)
    reference = SmartHaoAI(model.config).train()  # other weights: the KL is not 0
    source.reference = lambda inputs: completion_log_probs(reference, inputs, TEMPERATURE).values.detach()
    batches = [source.next_batch(0.0), source.next_batch(0.0)]
    old, frozen = double_copy(model), reference.double().eval()

    # A step's distance away, so that some ratios and values are clipped.
    perturb(model, 0.02)
    moved = double_copy(model)
    terms = [ppo_loss(source, settings, TEMPERATURE)(model, batch) for batch in batches]
    tokens = sum(batch.weights["tokens"] for batch in batches)
    total = torch.stack([term.total / tokens for part in terms for term in part if not term.metric]).sum()
    total.backward()

    answers = []
    with torch.no_grad():
        for sample in source.samples:
            lp, _, values = by_hand(old, sample.ids, sample.start)
            logits = frozen(torch.tensor([sample.ids[:-1]])).logits[0, sample.start - 1 :] / TEMPERATURE
            d = lp - logits.log_softmax(-1).gather(1, torch.tensor(sample.ids[sample.start :])[:, None])[:, 0]
            rewards = -0.3 * {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[kl]
            rewards[-1] += sample.parts[REWARD]
            advantages, following, after = torch.zeros_like(values), torch.tensor(0.0), torch.tensor(0.0)
            for t in reversed(range(len(values))):
                following = rewards[t] + 0.97 * after - values[t] + 0.97 * 0.9 * following
                advantages[t], after = following, values[t]
            answers.append((sample, lp, values, advantages))
    every = torch.cat([advantages for *_, advantages in answers])
    expected, clipped = torch.zeros((), dtype=torch.float64), 0
    for sample, lp, values, advantages in answers:
        white = (advantages - every.mean()) / (every.var() + 1e-8).sqrt()
        new, entropy, now = by_hand(moved, sample.ids, sample.start)
        ratio, returns = (new - lp).exp(), advantages + values
        near = values + (now - values).clamp(-0.1, 0.1)
        policy = torch.maximum(-white * ratio, -white * ratio.clamp(0.9, 1.1))
        value = 0.5 * torch.maximum((now - returns) ** 2, (near - returns) ** 2)
        expected = expected + (policy + 0.4 * value - 0.05 * entropy).sum() / tokens
        clipped += int((ratio - 1).abs().gt(0.1).sum())
    expected.backward()
    assert 0 < clipped < tokens, "the test needs ratios on both sides of the clip"
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)
    theirs = dict(moved.named_parameters())
    for name, parameter in model.named_parameters():
        ours, wanted = parameter.grad, theirs[name].grad
        assert ours is not None and wanted is not None
        assert float((ours.double() - wanted).abs().max()) < 1e-4 * (float(wanted.abs().max()) + 1e-6), name


def test_adaptive_controller_follows_the_target(model: SmartHaoAI, tiny_tokenizer: BPETokenizer) -> None:
    """Guards the sign and the bounds of the controller, and that its weight is part of the saved state."""
    for distance, grows in ((3.0, True), (0.001, False)):
        settings = PPOConfig(kl_target=1.0, kl_coef=0.2, kl_horizon=80, epochs=1)
        source = make_source(PPORollouts, model, tiny_tokenizer, settings, batch_size=8)
        source.reference = lambda inputs, d=distance: completion_log_probs(model, inputs, TEMPERATURE).values.detach() - d
        source.next_batch(0.0)
        assert isinstance(source, PPORollouts)
        assert source.kl_coef == pytest.approx(0.2 * (1 + (0.2 if grows else -0.2) * 8 / 80), rel=1e-3)
        assert source.diagnostics["kl_coef"] == 0.2, "the log says what this rollout was penalised with"
        assert json.loads(json.dumps(source.state_dict()))["kl_coef"] == source.kl_coef


# ---------------------------------------------------------------- the stage


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_config: HaoAIConfig, tiny_tokenizer: BPETokenizer) -> Path:
    """A folder with a chat model, a reward model of its family, and prompts."""
    folder = tmp_path_factory.mktemp("ppo")
    torch.manual_seed(1)
    SmartHaoAI(tiny_config).save_pretrained(folder / "sft", tiny_tokenizer)
    reward = RewardModel.from_pretrained(folder / "sft")
    torch.nn.init.normal_(reward.score_head.weight, std=0.2)
    reward.save_pretrained(folder / "reward", tiny_tokenizer)
    write_jsonl(folder / "prompts.jsonl", chat_rows(30))
    return folder


def words(base: Path, out: Path, *more: str) -> list[str]:
    return [
        *FAST,
        f"model_dir={base / 'sft'}",
        f"data.prompt_file={base / 'prompts.jsonl'}",
        f"out_dir={out}",
        "data.max_length=96",
        "data.val_share=0.2",
        "rollout.prompts=6",
        "rollout.max_new_tokens=10",
        "train.batch_size=3",
        "train.accumulation_steps=2",
        "train.log_every=1",
        "train.max_steps=6",
        "train.checkpoint_every=3",
        *more,
    ]


def test_stage_with_reward_model_and_rules(base: Path, tmp_path: Path) -> None:
    """Guards the whole command: exact first update, diagnostics, plot, a finished model without its value head."""
    said: list[str] = []
    out = tmp_path / "ppo"
    chosen = words(base, out, f"reward_model_dir={base / 'reward'}", "rewards.format=0.5")
    assert ppo(parse_command_line(PPOStageConfig, [*chosen, "--dry-run"]), said.append) == 0
    assert not out.exists() and "for 6 steps" in said[-1]
    plan = "\n".join(map(str, said))
    answer = int(plan.split("6 steps of 6 x ")[1].split()[0])
    assert 10 < answer < 96, "answers with their prompts, not whole rows of data.max_length"
    policy, judging = SmartHaoAI.from_pretrained(base / "sft"), RewardModel.from_pretrained(base / "reward")
    memory = policy.config.account().training_bytes(-(-3 * answer // 96), 96) + 4 * (policy.num_parameters() + judging.num_parameters())
    assert f"memory     about {memory / 2**20:,.0f} MiB" in plan
    settings = parse_command_line(PPOStageConfig, chosen)
    assert ppo(settings, said.append) == 0
    before, first, *rows = read_jsonl(out / "metrics.jsonl")
    assert before["step"] == 0 and {"val_reward", "val_model", "val_format"} <= before.keys()
    assert (first["ratio"], first["kl"], first["update_kl"], first["clip_fraction"]) == (1.0, 0.0, 0.0, 0.0)
    for name in ("reward", "reward_model", "reward_format", "explained_variance", "entropy", "length", "value_loss", "kl_coef"):
        assert first[name] is not None, name
    assert {"val_reward", "val_model", "val_format"} <= rows[-1].keys()
    assert (out / "ppo.png").stat().st_size > 10_000
    assert SmartHaoAI.from_pretrained(out).value_head is None
    assert not any("value_head" in name for name in SmartHaoAI.from_pretrained(out).state_dict())
    assert any("the reward model" in str(line) and "0.5 x format" in str(line) for line in said)


@pytest.mark.parametrize("more", [[], ["lora.r=2", "train.lr=1e-3"]], ids=["whole", "lora"])
def test_resume_is_bit_exact(more: list[str], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards going on after a kill in the middle of a rollout: the buffer, the values and the controller are those of before."""
    common = ["rewards.variety=1", "rewards.format=1", "ppo.kl_target=0.5", "train.lr=1e-3", "train.checkpoint_every=2", *more]
    quiet: Any = lambda text: None  # noqa: E731
    assert ppo(parse_command_line(PPOStageConfig, words(base, tmp_path / "straight", *common)), quiet) == 0

    class Killed(Exception):
        pass

    original, calls = RolloutSource.note_update, []

    def dies(self: RolloutSource, *args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 10:  # in step 5; the last checkpoint is of step 4, the rollout of step 3
            raise Killed
        return original(self, *args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RolloutSource, "note_update", dies)
        ppo(parse_command_line(PPOStageConfig, words(base, tmp_path / "killed", *common)), quiet)
    assert ppo(parse_command_line(PPOStageConfig, words(base, tmp_path / "killed", *common, "--resume")), quiet) == 0
    one, two = (SmartHaoAI.from_pretrained(tmp_path / name).state_dict() for name in ("straight", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    start = SmartHaoAI.from_pretrained(base / "sft").state_dict()
    assert any(not torch.equal(one[name], start[name]) for name in start if name in one)
    ours, theirs = (read_jsonl(tmp_path / name / "metrics.jsonl") for name in ("straight", "killed"))
    for a, b in zip(ours, theirs, strict=True):
        assert all(a.get(name) == b.get(name) for name in ("step", "val_reward", "loss", "reward", "kl", "kl_coef", "explained_variance"))


def test_bad_input(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the messages: nothing to reward with, an unknown rule, no room for prompts, another vocabulary."""
    monkeypatch.chdir(tmp_path)
    for more, status, text in (
        ([], 2, "nothing says which answers are good"),
        (["rewards.polite=1"], 2, "rewards.polite"),
        (["rewards.format=1", "rollout.max_new_tokens=96"], 2, "rollout.max_new_tokens=96"),
        (["rewards.format=1", "rollout.max_new_tokens=90"], 1, "no prompt that can be used"),
        (["reward_model_dir=nowhere"], 1, "nowhere"),
    ):
        ended, _, error = call_main(main, words(base, tmp_path / "out", *more), capsys, monkeypatch)
        assert ended == status and text in error and error.count("\n") == 1, error
    other = BPETokenizer.train(["quite other words stand here, 完全不同"] * 9, vocab_size=300, progress=False)
    config = HaoAIConfig(vocab_size=other.vocab_size, n_layer=1, n_head=2, n_embd=16, intermediate_size=16)
    RewardModel(config).save_pretrained(tmp_path / "foreign", other)
    with pytest.raises(ValueError, match="another vocabulary"):
        ppo(parse_command_line(PPOStageConfig, words(base, tmp_path / "out", f"reward_model_dir={tmp_path / 'foreign'}")), print)
    with pytest.raises(UsageError, match="ppo.kl"):
        parse_command_line(PPOStageConfig, ["ppo.kl=k4"])
