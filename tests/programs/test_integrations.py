"""slide_torch.integrations under the trainers themselves; each is optional."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from frozen_names import members
from helpers import python_path
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from slide_torch import LSHLinear, LSHOptions, convert_
from slide_torch.optim import Adam

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

CLASSES, D = 200, 16
OPTIONS = LSHOptions(budget=8, tail=16, K=3, L=8, rehash_every=5)

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]


def assert_equal(a, b):
    """Bit for bit, in nested dicts and lists too."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a.keys() - {"upkeep_seconds"}:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_equal(one, other)
    else:
        assert a == b


# --- lightning --------------------------------------------------------------------------------------

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def lightning_run(
    package, path, *, epochs, sparse=True, callback=True, resume=None, training_step=None
):
    """A trained module and its trainer; batches are shuffled, and dropout draws random numbers."""
    lightning = pytest.importorskip(package)
    from slide_torch.integrations.lightning import LSHCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Dropout(0.1)
            self.head = LSHLinear(D, CLASSES, options=OPTIONS, sparse=sparse)
            self.norms = []

        def training_step(self, batch, _):
            return F.cross_entropy(self.head(self.dropout(batch[0])), batch[1])

        def validation_step(self, batch, _):
            self.log("accuracy", (self.head(batch[0]).argmax(1) == batch[1]).float().mean())

        def configure_optimizers(self):
            return Adam(self.parameters(), lr=0.05)

        def on_before_zero_grad(self, _):
            grads = [p.grad.coalesce().values() if sparse else p.grad for p in self.parameters()
                     if p.grad is not None]  # fmt: skip
            if grads:
                self.norms.append(torch.cat([g.flatten() for g in grads]).norm().item())

    torch.manual_seed(3)
    centers = F.normalize(torch.randn(CLASSES, D), dim=1) * 4
    y = torch.arange(256) % CLASSES
    data = TensorDataset(centers[y] + 0.1 * torch.randn(256, D), y)
    model = Module()
    if training_step is not None:
        model.training_step = training_step.__get__(model)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        gradient_clip_val=0.5,
        log_every_n_steps=4,
        callbacks=[LSHCallback(every=4, k=5)] if callback else [],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
    )
    loader = DataLoader(data, batch_size=32, shuffle=True)
    trainer.fit(model, loader, DataLoader(data, batch_size=128), ckpt_path=resume)
    return model, trainer


def states(model, trainer):
    return model.state_dict(), trainer.optimizers[0].state_dict(), model.head.stats()


@pytest.mark.parametrize("package", PACKAGES)
def test_lightning_clips_and_logs(package, tmp_path):
    model, trainer = lightning_run(package, tmp_path, epochs=2)
    assert len(model.norms) >= 14 and max(model.norms) < 0.51
    logged = trainer.callback_metrics
    assert 0 < logged["lsh/head/recall@5"] <= 1 and 0 < logged["lsh/head/softmax_mass"] <= 1
    assert logged["lsh/head/steps"] == 16
    assert {f"lsh/head/{name}" for name in model.head.stats()} <= logged.keys()
    assert not model.head._forward_hooks and "clip_grad_by_norm" not in vars(
        trainer.precision_plugin
    )


def test_lightning_fails_without(tmp_path):
    """What the callback is for: should torch clip row-sparse gradients some day, it may go."""
    with pytest.raises((NotImplementedError, RuntimeError)):
        lightning_run(PACKAGES[0], tmp_path, epochs=1, callback=False)


def test_lightning_training_is_the_same(tmp_path):
    """With dense gradients, which Lightning itself clips."""
    runs = [
        lightning_run(
            PACKAGES[0], tmp_path / str(callback), epochs=2, sparse=False, callback=callback
        )
        for callback in (False, True)
    ]
    assert_equal(*(states(*run) for run in runs))


@pytest.mark.parametrize("package", PACKAGES)
def test_lightning_resumes(package, tmp_path):
    whole = lightning_run(package, tmp_path / "whole", epochs=4)
    lightning_run(package, tmp_path / "part", epochs=2)
    (checkpoint,) = (tmp_path / "part").rglob("*.ckpt")
    resumed = lightning_run(package, tmp_path / "rest", epochs=4, resume=checkpoint)
    assert_equal(states(*whole), states(*resumed))
    assert whole[0].head.stats()["rehashes"] > 2


def test_lightning_warns_of_a_checkpoint_without_sampler(tmp_path):
    lightning_run(PACKAGES[0], tmp_path, epochs=1, sparse=False, callback=False)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    with pytest.warns(UserWarning, match="LSHCallback: the checkpoint has no sampler state"):
        model, _ = lightning_run(PACKAGES[0], tmp_path, epochs=2, sparse=False, resume=checkpoint)
    assert model.head.stats()["steps"] == 8  # of the second epoch


def test_lightning_after_an_error(tmp_path):
    """The trainer and the model are left as they were."""
    seen = []

    def wrong_input(self, batch, _):
        seen.append((self, self.trainer.precision_plugin))
        assert self.head._forward_hooks and "clip_grad_by_norm" in vars(seen[0][1])
        raise KeyError("wrong")

    with pytest.raises(KeyError, match="wrong"):
        lightning_run(PACKAGES[0], tmp_path, epochs=1, training_step=wrong_input)
    ((model, plugin),) = seen
    assert not model.head._forward_hooks and "clip_grad_by_norm" not in vars(plugin)


@pytest.mark.parametrize("name", ["every", "k", "rows"])
def test_lightning_checks_arguments(name):
    pytest.importorskip(PACKAGES[0])
    from slide_torch.integrations.lightning import LSHCallback

    with pytest.raises(
        ValueError, match=f"LSHCallback: {name}: expected an int of at least 1, got 0"
    ):
        LSHCallback(**{name: 0})


# --- transformers -----------------------------------------------------------------------------------


def transformers_run(path, *, steps, tie=False, ours=True, resume=None):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from slide_torch.integrations.transformers import LSHTrainer

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=CLASSES, n_positions=16, n_embd=D, n_layer=1, n_head=2,
        tie_word_embeddings=tie, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    convert_(model, lambda _, name: name == "lm_head", options=OPTIONS, sparse=True)
    starts = torch.randint(CLASSES, (64, 1))
    rows = [{"input_ids": r, "labels": r} for r in (starts + torch.arange(12)) % CLASSES]
    arguments = transformers.TrainingArguments(
        output_dir=str(path),
        max_steps=steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to=[],
        save_steps=6,
        disable_tqdm=True,
        logging_steps=1,
    )
    optimizer = Adam(model.parameters(), lr=1e-2)
    trainer = (LSHTrainer if ours else transformers.Trainer)(
        model=model, args=arguments, train_dataset=rows, optimizers=(optimizer, None)
    )
    norms = []
    optimizer.register_step_pre_hook(lambda *_: norms.append(norm_of(model)))
    trainer.train(resume_from_checkpoint=resume)
    return trainer, norms


def norm_of(model):
    grads = [p.grad.coalesce().values() if p.grad.is_sparse else p.grad for p in model.parameters()]
    return torch.cat([g.flatten() for g in grads]).norm().item()


@pytest.mark.parametrize("tie", [False, True])
def test_transformers_resumes_and_clips(tie, tmp_path):
    """Dropout draws random numbers; the checkpoint is in the middle of an epoch."""
    whole, norms = transformers_run(tmp_path / "whole", steps=10, tie=tie)
    assert len(norms) == 10 and max(norms) < 0.51
    logged = [entry["grad_norm"] for entry in whole.state.log_history if "grad_norm" in entry]
    assert len(logged) == 10 and max(logged) > 0.51
    (checkpoint,) = (tmp_path / "whole").glob("checkpoint-6")
    resumed, norms_of_rest = transformers_run(
        tmp_path / "rest", steps=10, tie=tie, resume=str(checkpoint)
    )
    assert norms_of_rest == norms[6:]
    states = [
        (t.model.state_dict(), t.optimizer.state_dict(), t.model.lm_head.stats())
        for t in (whole, resumed)
    ]
    assert_equal(*states)
    assert states[0][2]["rehashes"] > 2


def test_transformers_fails_without(tmp_path):
    with pytest.raises((NotImplementedError, RuntimeError)):
        transformers_run(tmp_path, steps=1, ours=False)


def test_transformers_warns_of_a_checkpoint_without_sampler(tmp_path):
    transformers_run(tmp_path, steps=6)
    checkpoint = tmp_path / "checkpoint-6"
    (checkpoint / "sampler_state.pt").unlink()
    with pytest.warns(UserWarning, match="LSHTrainer: .* has no sampler_state.pt"):
        trainer, _ = transformers_run(tmp_path, steps=8, resume=str(checkpoint))
    assert trainer.model.lm_head.stats()["steps"] == 4  # two of two batches each


# --- imports ----------------------------------------------------------------------------------------

MODULES = {
    "lightning": ("lightning", "pytorch_lightning"),
    "transformers": ("transformers",),
}


def in_new_python(program):
    found = subprocess.run(
        [sys.executable, "-c", program], env=python_path(), capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    return found.stdout.strip()


def test_slide_torch_imports_no_integration():
    program = "import sys, json, slide_torch; print(json.dumps(list(sys.modules)))"
    loaded = json.loads(in_new_python(program))
    assert "slide_torch.tuning.probe" in loaded
    assert not {"slide_torch.integrations", "lightning", "pytorch_lightning", "transformers"} & {
        *loaded
    }


@pytest.mark.parametrize("name", MODULES)
def test_an_absent_package_is_named(name, monkeypatch):
    for package in MODULES[name]:
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}.pytorch", None)
    monkeypatch.delitem(sys.modules, f"slide_torch.integrations.{name}", raising=False)
    message = rf"slide_torch\.integrations\.{name}: expected the package .*: install .* pip install {name}"
    with pytest.raises(ImportError, match=message):
        importlib.import_module(f"slide_torch.integrations.{name}")


def test_the_package_in_use_gives_the_callback():
    program = """
import sys, pytorch_lightning
from slide_torch.integrations.lightning import LSHCallback
print(issubclass(LSHCallback, pytorch_lightning.Callback), "lightning.pytorch" in sys.modules)
"""
    pytest.importorskip("pytorch_lightning")
    assert in_new_python(program) == "True False"


def test_public_signatures():
    """They are not in frozen.json, as the packages may be absent where it is written."""
    pytest.importorskip("lightning")
    pytest.importorskip("transformers")
    from slide_torch.integrations import lightning, transformers

    assert (lightning.__all__, transformers.__all__) == (
        ["LSHCallback"],
        ["LSHTrainer", "LSHTrainerMixin"],
    )
    assert members(lightning.LSHCallback)[""] == "(*, every=100, k=10, rows=16)"
