"""InnerLoop under Lightning's default trainer, validation in inference mode included."""

import pytest
import torch
import torch.nn.functional as F

import fastkfo
from tests.batches import batch, learner

lightning = pytest.importorskip("lightning")


class Meta(lightning.LightningModule):
    """What a user writes."""

    def __init__(self, **options):
        super().__init__()
        ours = learner("cnn", "kron-psd", adapt_transform=True)
        self.inner_loop = fastkfo.InnerLoop(ours, F.cross_entropy, steps=2, **options)
        self.validated = []

    def training_step(self, tasks, index):
        return self.inner_loop(*tasks).loss.mean()

    def validation_step(self, tasks, index):
        self.in_inference_mode = torch.is_inference_mode_enabled()
        out = self.inner_loop(*tasks)
        assert not out.loss.requires_grad
        self.validated.append(out.loss)
        self.log("val_loss", out.loss.mean(), batch_size=len(out.loss))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def batches():
    return torch.utils.data.DataLoader([batch("cnn", 3)] * 2, batch_size=None)


@pytest.mark.parametrize("options", [{}, {"memory": "adjoint"}, {"chunk_size": 2}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_it_trains(options, tmp_path):
    module = Meta(**options)
    before = [p.detach().clone() for p in module.parameters()]
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=4, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=1,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, batches(), batches())
    assert trainer.global_step == 8
    assert all(loss.isfinite().all() for loss in module.validated)
    assert torch.stack(module.validated)[-1].mean() < torch.stack(module.validated)[0].mean()
    assert trainer.callback_metrics["val_loss"].isfinite()
    in_training = module.validated[-1]
    trainer.validate(module, batches(), verbose=False)
    assert module.in_inference_mode  # unlike validation within `fit`
    assert torch.equal(module.validated[-1], in_training)
    assert any(not torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True))
