"""TRL's trainers on saved patched checkpoints and on adapters: what is loaded, what is the reference, what is saved."""

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.trainer.utils import create_model_from_path

import attnswap
from attnswap import AttnSwapConfig
from tests.helpers.patched_models import move_away
from tests.helpers.tiny_models import tiny

LORA = {"r": 2, "target_modules": ["q_proj"]}
WORDS = [f"w{i}" for i in range(90)]
TEXTS = [" ".join(WORDS[(7 * i + j) % 90] for j in range(8)) for i in range(4)]
DATA = {
    SFTTrainer: {"text": TEXTS},
    DPOTrainer: {"prompt": TEXTS, "chosen": TEXTS[::-1], "rejected": TEXTS},
    GRPOTrainer: {"prompt": TEXTS},
    RewardTrainer: {"chosen": TEXTS[::-1], "rejected": TEXTS},
}
CONFIGS = {SFTTrainer: SFTConfig, DPOTrainer: DPOConfig, GRPOTrainer: GRPOConfig, RewardTrainer: RewardConfig}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of a base and of a patched checkpoint, with a tokenizer of whole words."""
    path = tmp_path_factory.mktemp("models")
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, **special)
    model = tiny("llama")
    for name in ("base", "patched"):
        model.save_pretrained(path / name)
        tokenizer.save_pretrained(path / name)
        if name == "base":
            attnswap.patch(model, {"softpick": [0, 1], "ssmax": [2, 3]}, ramp=0.5)
            move_away(model, 20)
            model.save_pretrained(path / "patched")
    return path


def trainer(kind, model, folder, out, **options):
    """Returns a trainer of two steps."""
    own = {"num_generations": 2, "max_completion_length": 3, "beta": 0.1} if kind is GRPOTrainer else {}
    config = CONFIGS[kind](
        output_dir=str(out), max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True, bf16=False,
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True, **own,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "base")
    if kind is GRPOTrainer:
        options["reward_funcs"] = lambda completions, **_: [float(len(text) % 3) for text in completions]
    return kind(model, args=config, train_dataset=Dataset.from_dict(DATA[kind]), processing_class=tokenizer, **options)


def logits(model, tokens):
    with torch.no_grad():
        return model.eval()(tokens.clamp(max=90)).logits


def test_a_patched_checkpoint_by_path(folder, tokens):
    found = create_model_from_path(str(folder / "patched"), device_map=None)
    right = AutoModelForCausalLM.from_pretrained(folder / "patched")
    assert type(found) is type(right)
    assert torch.equal(logits(found, tokens), logits(right, tokens))


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(SFTTrainer, marks=pytest.mark.slow),
        DPOTrainer,
        pytest.param(GRPOTrainer, marks=pytest.mark.slow),
        pytest.param(RewardTrainer, marks=pytest.mark.slow),
    ],
)
def test_training_a_patched_checkpoint_by_path(kind, folder, tokens, tmp_path):
    started = trainer(kind, str(folder / "patched"), folder, tmp_path)
    if getattr(started, "ref_model", None) is not None:
        assert torch.equal(logits(started.ref_model, tokens), logits(started.model, tokens))
    started.train()
    started.save_model(tmp_path / "saved")
    auto = AutoModelForSequenceClassification if kind is RewardTrainer else AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path / "saved")
    assert attnswap.describe(again).patched_layers == [0, 1]
    assert (logits(again, tokens) - logits(started.model, tokens)).abs().max() <= 1e-6


def test_the_reference_of_an_adapter_is_the_adapter(folder, tokens, tmp_path):
    """Where lambda has been raised since the adapter was made, too."""
    config = AttnSwapConfig(swap="softpick", ramp=0.0, task_type="CAUSAL_LM", **LORA)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), config)
    attnswap.set_ramp(model.get_base_model(), 1.0)
    policy = logits(model, tokens)
    started = trainer(DPOTrainer, model, folder, tmp_path)
    started.train()
    trained = logits(model, tokens)
    model.set_adapter("ref")
    assert torch.equal(logits(model, tokens), policy)
    assert not torch.equal(trained, policy)


def test_a_reward_model_with_an_adapter(folder, tokens, tmp_path):
    """Its head has one row, and starts at random in every process that loads the base."""
    started = trainer(
        RewardTrainer,
        str(folder / "base"),
        folder,
        tmp_path,
        peft_config=AttnSwapConfig(swap="ssmax", task_type="SEQ_CLS", **LORA),
    )
    started.train()
    started.save_model(tmp_path / "saved")
    base = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1)
    again = PeftModel.from_pretrained(base, tmp_path / "saved")
    assert (logits(again, tokens) - logits(started.model, tokens)).abs().max() <= 1e-6
