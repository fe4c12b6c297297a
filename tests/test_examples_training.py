"""The examples that train: each learns something within seconds, and is short."""

import pytest

from tests.test_examples import EXAMPLES, load

NAMES = ("maml_kfo", "anil_kfo", "lightning_module")


@pytest.mark.parametrize(
    ("name", "iterations", "least"), [("maml_kfo", 12, 0.4), ("anil_kfo", 60, 0.45)]
)
def test_meta_kfo(name, iterations, least, capsys):
    assert load(name).main(iterations) > least
    text = capsys.readouterr().out
    assert "query loss" in text
    assert "accuracy on 200 tasks of unseen digits" in text


@pytest.mark.filterwarnings("ignore")
def test_under_lightning(tmp_path):
    pytest.importorskip("lightning")
    accuracy = load("lightning_module").main(
        2, 20, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    assert accuracy > 0.5


@pytest.mark.parametrize("name", NAMES)
def test_they_are_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80
