"""Under trainers that know nothing of this package; each is optional."""

import math
import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from slide_torch import LSHLinear, LSHOptions, SampledLogits, clip_grad_norm_, convert_
from slide_torch.optim import Adam

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CLASSES, D = 200, 16
OPTIONS = LSHOptions(budget=8, tail=16, K=3, L=8, rehash_every=10)


def problem(rows=512):
    """Classes that are directions: learnable in a few epochs."""
    torch.manual_seed(3)
    torch.set_num_threads(1)
    centers = F.normalize(torch.randn(CLASSES, D), dim=1) * 4
    y = torch.arange(rows) % CLASSES
    return centers[y] + 0.1 * torch.randn(rows, D), y


def accuracy(model, x, y):
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == y).float().mean().item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("sparse", [False, True])
def test_lightning(sparse, tmp_path):
    lightning = pytest.importorskip("lightning")
    x, y = problem()

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.head = LSHLinear(D, CLASSES, options=OPTIONS, sparse=sparse)

        def training_step(self, batch, _):
            return F.cross_entropy(self.head(batch[0]), batch[1])

        def validation_step(self, batch, _):
            logits = self.head(batch[0])
            assert type(logits) is torch.Tensor  # Lightning puts modules in eval mode here
            self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):
            return Adam(self.parameters(), lr=0.05)

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, **_):
            clip_grad_norm_(self.parameters(), gradient_clip_val)

    model = Module()
    loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=12,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=5.0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(model, loader, DataLoader(TensorDataset(x, y), batch_size=128))
    assert accuracy(model.head, x, y) > 0.9
    assert trainer.callback_metrics["accuracy"] > 0.8
    assert model.head.stats()["steps"] == 12 * 8
    saved = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=False)["state_dict"]
    assert set(saved) == {"head.weight", "head.bias"}


def tiny_gpt2(transformers, tie):
    config = transformers.GPT2Config(
        vocab_size=CLASSES, n_positions=16, n_embd=D, n_layer=1, n_head=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=tie,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize("tie", [False, True])
def test_transformers_model(tie):
    """With every class active the loss of the swapped head, shifted and masked inside the model, is that
    of the old one."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = tiny_gpt2(transformers, tie)
    tokens = torch.randint(CLASSES, (3, 10))
    labels = tokens.masked_fill(torch.rand(3, 10) < 0.3, -100)
    expected = model(input_ids=tokens, labels=labels)
    expected.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    convert_(model, lambda _, name: name == "lm_head", options=LSHOptions(budget=CLASSES))
    assert isinstance(model.lm_head, LSHLinear)
    assert (model.lm_head.weight is model.transformer.wte.weight) == tie
    found = model.train()(input_ids=tokens, labels=labels)
    assert isinstance(found.logits, SampledLogits) and found.logits.shape == (3, 10, CLASSES)
    torch.testing.assert_close(found.loss, expected.loss)
    found.loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], msg=name, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tie", [False, True])
def test_transformers_trainer(tie, tmp_path):
    """A cyclic language, learnt; evaluated exactly; saved and loaded by a model without our layer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = tiny_gpt2(transformers, tie)
    convert_(model, lambda _, name: name == "lm_head", options=OPTIONS)
    starts = torch.randint(CLASSES, (128, 1))
    rows = [{"input_ids": r, "labels": r} for r in (starts + torch.arange(12)) % CLASSES]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=12,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=2e-2,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows
    )
    before = trainer.evaluate()["eval_loss"]
    assert before == pytest.approx(math.log(CLASSES), rel=0.2)
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.7 * before
    assert model.lm_head.stats()["steps"] == 12 * 8 and model.lm_head.stats()["rehashes"] > 2
    trainer.save_model(str(tmp_path / "saved"))
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "saved").eval()
    assert type(loaded.lm_head) is nn.Linear
    tokens = rows[0]["input_ids"].unsqueeze(0)
    torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize("sparse", [False, True])
def test_accelerate(sparse):
    accelerate = pytest.importorskip("accelerate")
    x, y = problem()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = nn.Sequential(LSHLinear(D, CLASSES, options=OPTIONS, sparse=sparse))
    optimizer = Adam(model.parameters(), lr=0.05)
    loader = DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for _ in range(12):
        for batch_x, batch_y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(F.cross_entropy(model(batch_x), batch_y))
                if accelerator.sync_gradients:
                    clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad()
    assert accuracy(model, x, y) > 0.9
    assert accelerator.unwrap_model(model)[0].stats()["steps"] == 12 * 16


def test_skorch():
    skorch = pytest.importorskip("skorch")
    x, y = problem()

    class Net(skorch.NeuralNetClassifier):
        # its own get_loss takes predictions as probabilities, and validates with softmax outputs
        def get_loss(self, y_pred, y_true, X=None, training=False):
            return F.cross_entropy(y_pred, y_true)

    net = Net(
        LSHLinear,
        module__in_features=D,
        module__out_features=CLASSES,
        module__options=OPTIONS,
        criterion=nn.CrossEntropyLoss,
        optimizer=Adam,
        lr=0.05,
        batch_size=64,
        max_epochs=12,
        train_split=None,
        verbose=0,
    )
    net.fit(x, y)
    assert (net.predict(x) == y.numpy()).mean() > 0.9
    assert net.history[-1]["train_loss"] < net.history[0]["train_loss"]
