"""A plain torch module gets a run's weights and buffers, bit for bit, and a model that doesn't fit is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manyhands as mh
from support.exporting import STEPS, FrozenStem, Trained, assert_same
from support.models import PartlyUsed, conv_recipe, gpt_recipe, partly_used_recipe


class Unsaved(PartlyUsed):
    """Tied and scalar tensors, a buffer that is not persistent, and an extra state. Each forward changes the buffer."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.again = self.always
        self.note = "built"

    def forward(self, tokens: Tensor) -> Tensor:
        self.table.add_(1)
        return super().forward(tokens) * self.scale

    def get_extra_state(self) -> Any:
        return {"note": "trained"}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return {**super().state_dict(*args, **options), "computed": torch.zeros(1)}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_module_has_the_trained_bits(precision: str, tmp_path: Path) -> None:
    """Tied, frozen and unused tensors, buffers of all kinds, from several workers, in the dtypes of training."""
    for number, recipe in enumerate((gpt_recipe(precision), conv_recipe(precision, model=FrozenStem))):
        trained = Trained(recipe, tmp_path / str(number), workers=1 + 2 * number, sharding="zero3")
        before = torch.get_rng_state()
        loaded = mh.load_model(trained.checkpoint, recipe)
        assert torch.equal(before, torch.get_rng_state())
        assert not any(module.training for module in loaded.modules())
        if number:
            own = trained.own
        else:
            own = {key: trained.full[key].to(value.dtype) for key, value in loaded.state_dict().items()}
        assert_same(dict(loaded.state_dict()), own)
        given = recipe.model()
        params = list(given.parameters())
        assert mh.load_model(trained.checkpoint, given, dtype="fp32") is given
        assert all(one is other for one, other in zip(params, given.parameters(), strict=True))
        trainable = {name for name, param in given.named_parameters() if param.requires_grad}
        state = dict(given.state_dict())
        for name in trainable:
            assert state[name].dtype == torch.float32
            assert torch.equal(state[name], trained.full[name])


def test_what_the_state_dict_leaves_out_is_loaded_too(tmp_path: Path) -> None:
    recipe = partly_used_recipe("fp32", model=Unsaved)
    with mh.Engine(recipe) as engine:
        for batch in engine.batches(STEPS):
            engine.step(batch)
        checkpoint = engine.save(tmp_path)
        table = engine.model.table.clone()  # type: ignore[operator, union-attr]
    loaded: Any = mh.load_model(checkpoint, Unsaved)
    assert torch.equal(loaded.table, table)
    assert not torch.equal(loaded.table, Unsaved().table)
    assert loaded.note == "trained"
    assert loaded.again.weight is loaded.always.weight


class Strided(nn.Module):
    """A parameter whose memory isn't contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 8).t())


def strided_recipe(model: Any = Strided) -> mh.Recipe:
    return mh.Recipe(
        model=model,
        loss=lambda model, batch: (batch @ model.weight).square().mean() + model.weight.sum(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        data=list(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))),
        batch=mh.Batch(global_size=4, micro_size=2),
    )


def test_a_parameter_with_strides_is_filled(tmp_path: Path) -> None:
    recipe = strided_recipe(lambda: nn.Linear(3, 8, bias=False))
    trained = Trained(recipe, tmp_path)
    loaded: Any = mh.load_model(trained.checkpoint, Strided())
    assert torch.equal(loaded.weight, trained.full["weight"])
    assert loaded.weight.stride() == (1, 8)


def test_the_checkpoint_is_chosen(tmp_path: Path) -> None:
    """By step, as the best of one or of several figures, and with all errors of that choice."""
    losses = iter([4.0, 2.0, 3.0, 5.0])
    recipe = mh.Recipe(
        model=lambda: nn.Linear(8, 1),
        loss=lambda model, batch: model(batch).square().mean() if model.training else torch.tensor(next(values)),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        data=list(torch.randn(8, 8, generator=torch.Generator().manual_seed(0))),
        batch=mh.Batch(global_size=4, micro_size=2),
        validation=mh.Validation(data=[torch.zeros(8)], batch=1, every="1 steps"),
    )
    values = iter([0.0, *losses])  # the first one is the trial before the first step
    kept = ["validation.loss:min", "validation.loss:max"]
    mh.train(recipe, steps=4, run_dir=tmp_path / "two", checkpoint_every=1, keep_best=kept, show=False)
    saved = {step: mh.load_model(tmp_path / "two", recipe, step=step).state_dict() for step in (2, 4)}
    assert not torch.equal(saved[2]["weight"], saved[4]["weight"])
    for weights, step in (("trained", 4), ("best:validation.loss:min", 2), ("best:validation.loss:max", 4)):
        assert_same(dict(mh.load_model(tmp_path / "two", recipe, weights=weights).state_dict()), dict(saved[step]))
    exported = mh.export(tmp_path / "two", tmp_path / "out", weights="best:validation.loss:min")
    assert (exported.step, mh.export(tmp_path / "two", tmp_path / "at-2", step=2).digest) == (2, exported.digest)
    for wrong, match in (
        ({"weights": "best"}, "for several figures"),
        ({"weights": "best:validation.loss"}, "no best checkpoint for validation.loss\n"),
        ({"weights": "latest"}, "no such weights"),
        ({"weights": "best:validation.loss:min", "step": 2}, "both a step and the best"),
        ({"step": 9}, "no checkpoint of step 9"),
    ):
        with pytest.raises(mh.ConfigError, match=match):
            mh.load_model(tmp_path / "two", recipe, **wrong)  # type: ignore[arg-type]
    values = iter([0.0, 4.0, 2.0, 3.0, 5.0])
    mh.train(recipe, steps=4, run_dir=tmp_path / "one", keep_best=kept[0], show=False)
    assert mh.export(tmp_path / "one", tmp_path / "best", weights="best").digest == exported.digest
    values = iter([0.0, 4.0])
    mh.train(recipe, steps=1, run_dir=tmp_path / "none", show=False)
    with pytest.raises(mh.ConfigError, match="kept no best checkpoint"):
        mh.load_model(tmp_path / "none", recipe, weights="best")


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    recipe = strided_recipe(lambda: nn.Linear(3, 8, bias=False))
    checkpoint = Trained(recipe, tmp_path / "checkpoints").checkpoint
    with torch.device("meta"):
        on_meta = nn.Linear(3, 8, bias=False)
    for model, match in (
        (lambda: nn.Linear(3, 8), "bias: not in the checkpoint"),
        (nn.Linear(4, 8, bias=False), r"weight: expected \[8, 3\], got \[8, 4\]"),
        (nn.Sequential, "weight: not in the model"),
        (lambda: None, "did not return a model"),
        ("torch.nn:Linear", "needs the model"),
        (on_meta, "no memory"),
    ):
        with pytest.raises(mh.ConfigError, match=match):
            mh.load_model(checkpoint, model)  # type: ignore[arg-type]


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    recipe = strided_recipe(lambda: nn.Linear(3, 8, bias=False))
    checkpoint = Trained(recipe, tmp_path).checkpoint
    (file,) = checkpoint.glob("worker-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(mh.CheckpointError, match="is damaged"):
        mh.load_model(checkpoint, recipe)
