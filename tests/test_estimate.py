"""training/estimate.py against the arrays that training really holds."""

import conftest
import numpy as np
import pytest

from training import estimate, flags, run
from training.estimate import check_memory, least_bytes, released_hparams

SIZES = {"n_vocab": 257, "n_ctx": 32, "n_embd": 24, "n_head": 3, "n_layer": 2}
ADAMW = SIZES | {"optimizer": "adamw", "ema": 0.0}


@pytest.mark.parametrize("optimizer, ema", [("adamw", 0.0), ("adamw", 0.9), ("muon", 0.0)])
def test_the_least_memory_is_that_of_the_arrays(optimizer, ema):
    """Exactly AdamW's. Muon keeps Adam's two moments for what is no matrix of a block."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    train_jax = pytest.importorskip("train_jax", reason="optax is not installed")
    typed = SIZES | {"recipe": "shakespeare-cpu", "optimizer": optimizer, "ema": ema}
    trainer = train_jax.JaxTrainer(flags.choose(typed, "cpu"))
    _, params = trainer.new_model(257)
    n_params = sum(x.size for x in jax.tree.leaves(params))
    moments = trainer.moment_shapes(params).values()
    held = 2 * 4 * n_params + 4 * sum(int(np.prod(shape)) for shape, _ in moments if shape)
    least = least_bytes(SIZES, SIZES | {"optimizer": optimizer, "ema": ema})
    assert least == held if optimizer == "adamw" else held / 1.5 < least < held


def test_a_model_that_does_not_fit_is_rejected_with_a_remedy_that_does(monkeypatch):
    large = released_hparams("1558M")
    free = 10 * 10**9
    monkeypatch.setattr(estimate, "free_bytes", lambda: free)
    words = (
        "training takes at least 24.9 GB of memory, for the parameters, gradients and moments, "
        "but only 10.0 GB are free; "
    )
    with pytest.raises(ValueError, match=words + "--lora_rank 8 takes about 6.2 GB"):
        check_memory(large, ADAMW | {"init_from": "1558M"}, "cpu")
    with pytest.raises(ValueError, match=words + "train a smaller model"):
        check_memory(large, ADAMW, "cpu")
    check_memory(large, ADAMW | {"init_from": "1558M", "lora_rank": 8}, "cpu")
    check_memory(released_hparams("124M"), ADAMW, "cpu")
    check_memory(large, ADAMW, "gpu")  # it has memory of its own
    free = None  # nobody says
    check_memory(large, ADAMW, "cpu")


def test_a_released_model_that_does_not_fit_is_not_downloaded(tmp_path, monkeypatch):
    def find_model(*args):
        raise AssertionError("it was looked for")

    monkeypatch.setattr(estimate, "free_bytes", lambda: 10**9)
    monkeypatch.setattr(run, "find_model", find_model)
    (tmp_path / "text").write_text("Some words.\n" * 99)
    args = ["--init_from", "124M", "--data", tmp_path / "text", "--out", tmp_path / "out"]
    code, out, err = conftest.call_trainer(*args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: training takes at least 2.0 GB of memory")
    assert not (tmp_path / "out").exists()
