"""Bad input: a clear error that says what, where and what to do, on all workers alike, within seconds."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import manyhands as mh
from manyhands.checkpoint.format import seal
from manyhands.cli import main as cli
from manyhands.comm.connect import thread_groups
from manyhands.comm.group import Group

SUPPORT = Path(__file__).resolve().parent / "support"
RECIPE = str(SUPPORT / "faulty.toml")
SECONDS = 20.0  # on a busy machine; it's a matter of milliseconds
SAMPLES = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


class Samples(torch.utils.data.Dataset[Tensor]):
    """64 samples [8]."""

    def __len__(self) -> int:
        return len(SAMPLES)

    def __getitem__(self, index: int) -> Tensor:
        return SAMPLES[index]


class LostSample(Samples):
    """A sample's file isn't there."""

    def __getitem__(self, index: int) -> Tensor:
        if index == LOST:
            return torch.load("/nowhere/sample.pt")
        return SAMPLES[index]


LOST = 29


class Poison(torch.autograd.Function):
    """Adds nothing to the loss, and no number to the parameter's gradient."""

    @staticmethod
    def forward(ctx: Any, param: Tensor) -> Tensor:
        ctx.save_for_backward(param)
        return param.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        poisoned = torch.zeros_like(ctx.saved_tensors[0])
        poisoned.view(-1)[3] = float("nan")
        return poisoned


class Sparse(nn.Module):
    """Its embedding asks for sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(10, 8, sparse=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embedding(torch.zeros(len(x), dtype=torch.long)))


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def other_weights() -> nn.Module:
    made = model()
    nn.init.zeros_(made[2].weight)
    return made


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def sgd(params: list[tuple[str, nn.Parameter]], lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=lr, momentum=0.9)


def recipe(**changes: Any) -> mh.Recipe:
    made: dict[str, Any] = {
        "model": model,
        "loss": loss,
        "optimizer": sgd,
        "data": Samples(),
        "batch": mh.Batch(global_size=8, micro_size=2),
    }
    return mh.Recipe(**{**made, **changes})


def on_all(work: Callable[[int, Group], Any], workers: int = 2) -> list[Any]:
    """What `work(rank, group)` gave or raised, by rank, in threads."""
    results: list[Any] = [None] * workers

    def run(rank: int, make: Callable[[], Group]) -> None:
        try:
            results[rank] = work(rank, make())
        except Exception as error:
            results[rank] = error

    makers = enumerate(thread_groups(workers, stall_seconds=10))
    threads = [threading.Thread(target=run, args=each, daemon=True) for each in makers]
    deadline = time.monotonic() + SECONDS
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), results
    return results


def trained(recipe: mh.Recipe, strategy: mh.Strategy, group: Group, steps: int = 2) -> str:
    with mh.Engine(recipe, strategy, group) as engine:
        for batch in engine.batches(steps):
            engine.step(batch)
        return engine.digest()


class Unknown(torch.optim.Optimizer):
    """Nobody knows what it does."""


class NaNLoss:
    """The loss of step 1, micro-batch 2 is not a number: the second one that worker 0 computes in that step."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        self.calls += 1
        return loss(model, batch) * (float("nan") if self.calls == 4 else 1.0)


ON_ALL: dict[str, tuple[Callable[[int], mh.Recipe], type[Exception], list[str]]] = {
    "optimizer: LBFGS": (
        lambda rank: recipe(optimizer=lambda named: torch.optim.LBFGS([param for _, param in named])),
        mh.ConfigError,
        ["torch.optim.lbfgs.LBFGS can't be used: it looks at all parameters together", "AdamW"],
    ),
    "optimizer: SparseAdam": (
        lambda rank: recipe(
            optimizer=lambda named: torch.optim.SparseAdam([p for _, p in named]), optimizer_kind="elementwise"
        ),
        mh.ConfigError,
        ["SparseAdam can't be used: it wants sparse gradients"],
    ),
    "optimizer: Muon for a bias": (
        lambda rank: recipe(optimizer=lambda named: torch.optim.Muon(named)),
        mh.ConfigError,
        ["torch.optim.Muon was given a parameter that is no matrix: 0.bias or 2.bias", "(8,)", "torch.optim.AdamW"],
    ),
    "optimizer: Muon for matrices only": (
        lambda rank: recipe(optimizer=lambda named: torch.optim.Muon([p for _, p in named if p.ndim == 2])),
        mh.ConfigError,
        ["leaves out 2 trainable parameter(s): 0.bias, 2.bias"],
    ),
    "optimizer: unknown": (
        lambda rank: recipe(optimizer=lambda named: Unknown(named, {"lr": 0.1})),
        mh.ConfigError,
        ["Unknown is not known", "optimizer_kind = 'elementwise'", "'per-parameter'"],
    ),
    "optimizer: unknown among several": (
        lambda rank: recipe(
            optimizer=lambda named: [torch.optim.SGD(named[1:], lr=0.1), Unknown(named[:1], {"lr": 0.1})]
        ),
        mh.ConfigError,
        ["Unknown is not known"],
    ),
    "optimizer: none": (
        lambda rank: recipe(optimizer=lambda named: []),
        mh.ConfigError,
        ["recipe.optimizer did not return an optimizer"],
    ),
    "optimizer: one is none": (
        lambda rank: recipe(optimizer=lambda named: [torch.optim.SGD(named, lr=0.1), "Muon"]),
        mh.ConfigError,
        ["recipe.optimizer did not return an optimizer", "a list of them", "'Muon'"],
    ),
    "optimizer: a parameter twice": (
        lambda rank: recipe(
            optimizer=lambda named: [torch.optim.SGD(named, lr=0.1), torch.optim.AdamW(named[2:3], lr=0.1)]
        ),
        mh.ConfigError,
        ["two of recipe.optimizer's optimizers have the parameter '2.weight'", "param groups 0 and 1"],
    ),
    "optimizer: kind": (
        lambda rank: recipe(optimizer_kind="matrix"),
        mh.ConfigError,
        ["recipe.optimizer_kind is not known", "elementwise, per-parameter"],
    ),
    "optimizer: leaves out": (
        lambda rank: recipe(optimizer=lambda named: torch.optim.SGD(named[1:], lr=0.1)),
        mh.ConfigError,
        ["leaves out 1 trainable parameter(s): 0.weight"],
    ),
    "model: not a model": (lambda rank: recipe(model=lambda: len), mh.ConfigError, ["did not return a model"]),
    "model: other weights": (
        lambda rank: recipe(model=other_weights if rank else model),
        mh.ConfigError,
        ["workers 0 and 1 don't have the same model: they differ in 2.weight", "(worker 0)", "(worker 1)"],
    ),
    "model: other shapes": (
        lambda rank: recipe(model=lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8 + rank))),
        mh.ConfigError,
        ["don't have the same model: they differ in 1.weight", "[8, 8]", "[9, 8]"],
    ),
    "recipes: seed": (
        lambda rank: recipe(seed=rank),
        mh.ConfigError,
        ["workers 0 and 1 don't have the same recipe: they differ in seed", "0 (worker 0)", "1 (worker 1)"],
    ),
    "recipes: batch": (
        lambda rank: recipe(batch=mh.Batch(global_size=8 + 8 * rank, micro_size=2)),
        mh.ConfigError,
        ["they differ in batch.global_size", "8 (worker 0)", "16 (worker 1)"],
    ),
    "recipes: lr": (
        lambda rank: recipe(optimizer=lambda named: sgd(named, 0.1 + rank)),
        mh.ConfigError,
        ["don't have the same optimizer: they differ in", "lr", "0.1 (worker 0)", "1.1 (worker 1)"],
    ),
    "loss: nothing": (lambda rank: recipe(loss=lambda *_: None), mh.ConfigError, ["did not return a loss", "None"]),
    "loss: not scalar": (
        lambda rank: recipe(loss=lambda model, batch: model(batch)),
        mh.ConfigError,
        ["did not return a loss", "a tensor of shape (2, 8)"],
    ),
    "gradient: sparse": (
        lambda rank: recipe(model=Sparse),
        mh.ConfigError,
        ["the gradient of 'embedding.weight' is sparse", "sparse=False"],
    ),
    "weight: zero": (
        lambda rank: recipe(loss=lambda model, batch: (model(batch).sum(), 0.0)),
        mh.NumericsError,
        ["the global batch has no weight", "step 0", "a positive sum"],
    ),
    "loss: NaN": (
        lambda rank: recipe(loss=NaNLoss() if rank == 0 else loss),
        mh.NumericsError,
        ["the loss of micro-batch 2 is nan", "step 1, samples 12 to 13", "no weight has been changed"],
    ),
    "data: empty": (lambda rank: recipe(data=[]), mh.DataError, ["recipe.data is empty"]),
}


@pytest.mark.parametrize("case", ON_ALL)
def test_all_workers_raise_the_same(case: str) -> None:
    make, kind, texts = ON_ALL[case]
    errors = on_all(lambda rank, group: trained(make(rank), mh.Strategy(), group))
    for error in errors:
        assert type(error) is kind, error
        for text in texts:
            assert text in str(error), error
    assert str(errors[0]) == str(errors[1])


def test_strategies_that_differ_are_named() -> None:
    for error in on_all(lambda rank, group: trained(recipe(), mh.Strategy(stage=("ddp", "zero1")[rank]), group)):
        assert isinstance(error, mh.ConfigError), error
        assert "don't have the same strategy: they differ in stage" in str(error)


def test_more_workers_than_micro_batches_are_refused() -> None:
    for error in on_all(lambda rank, group: trained(recipe(), mh.Strategy(), group), workers=5):
        assert isinstance(error, mh.ConfigError), error
        assert "5 workers are more than the step has micro-batches" in str(error)
        assert "at most 4 workers" in str(error)


@pytest.mark.parametrize("stage", ["ddp", "zero1", "zero2"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_gradient_that_is_not_finite_is_named_and_changes_nothing(stage: str, workers: int) -> None:
    def work(rank: int, group: Group) -> str:
        poisoned = False
        calls = 0

        def sometimes_poisoned(model: nn.Module, batch: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            return loss(model, batch) + (Poison.apply(model[2].weight) if poisoned and micro_batch() == 2 else 0.0)

        def micro_batch() -> int:
            return engine.my_micro_batches[(calls - 1) % len(engine.my_micro_batches)]

        with mh.Engine(recipe(loss=sometimes_poisoned), mh.Strategy(stage=stage), group) as engine:
            for batch in engine.batches(1):
                engine.step(batch)
            before, poisoned = engine.digest(), True
            with pytest.raises(mh.NumericsError) as caught:
                engine.step(next(engine.batches()))
            assert caught.value.what == "the gradient of '2.weight' is not finite in micro-batch 2"
            assert "step 1, samples 12 to 13" in str(caught.value.where)
            assert engine.digest() == before
            poisoned = False
            for batch in engine.batches(3):
                engine.step(batch)
            return engine.digest()

    undisturbed = on_all(lambda rank, group: trained(recipe(), mh.Strategy(), group, steps=3), workers=1)
    assert on_all(work, workers) == undisturbed * workers


def test_a_sample_that_is_not_there_is_named_to_all() -> None:
    errors = on_all(lambda rank, group: trained(recipe(data=LostSample()), mh.Strategy(), group, steps=8))
    reader = next(error for error in errors if isinstance(error, mh.DataError))
    assert f"recipe.data[{LOST}] raised FileNotFoundError" in str(reader)
    assert "/nowhere/sample.pt" in str(reader)
    assert "micro-batch" in str(reader.where)
    other = next(error for error in errors if error is not reader)
    assert isinstance(other, mh.WorkerError)
    assert f"raised DataError: recipe.data[{LOST}] raised FileNotFoundError" in str(other)


def test_workers_that_take_different_ways_are_told_apart() -> None:
    def work(rank: int, group: Group) -> None:
        with mh.Engine(recipe(), mh.Strategy(), group) as engine:
            if rank == 1:
                engine.digest()
            for batch in engine.batches(1):
                engine.step(batch)

    errors = on_all(work)
    assert any(isinstance(error, mh.InvariantError) for error in errors)
    for error in errors:  # who sees the other fail first says that
        assert isinstance(error, (mh.InvariantError, mh.WorkerError)), error
        assert "took different ways" in str(error)
    assert any("step 0 / digest" in str(error) for error in errors)


def test_a_worker_that_leaves_early_is_named() -> None:
    def work(rank: int, group: Group) -> None:
        engine = mh.Engine(recipe(), mh.Strategy(), group)
        if rank == 1:
            group.membership.leave()  # type: ignore[attr-defined]  # as a program does that ends without closing
        for batch in engine.batches(1 - rank):
            engine.step(batch)

    error = on_all(work)[0]
    assert isinstance(error, mh.WorkerError)
    assert error.rank == 1
    assert "worker 1 has left" in str(error)


# - The command line


def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> tuple[int, str]:
    """Exit code and output of a command that starts no workers."""
    monkeypatch.setattr(sys, "argv", ["manyhands", *map(str, arguments)])
    try:
        cli.main()
        code = 0
    except SystemExit as exit_:
        code = int(exit_.code or 0)
    out, err = capsys.readouterr()
    return code, out + err


REFUSED: dict[str, tuple[list[str], list[str]]] = {
    "unknown field": (["--set", "sead=3"], ["sead is not known", "--set sead=3", "did you mean 'seed'?"]),
    "wrong type": (["--set", "seed=x"], ["seed has a wrong value", "--set seed=x", "integer", "'x'"]),
    "batch": (
        ["--set", "batch.global_size=7"],
        ["batch.global_size can't be cut into micro-batches", "--set batch.global_size=7", "use global_size = 6 or 8"],
    ),
    "workers": (["--workers", "5"], ["5 workers are more than the step has micro-batches", "at most 4 workers"]),
    "no workers": (["--workers", "0"], ["0 is neither a whole number of at"]),
    "stage": (["--stage", "zero9"], ["strategy.stage is not known", "ddp, zero1, zero2", "did you mean 'zero3'?"]),
    "group": (["--group", "shared"], ["strategy.group is not known", "did you mean 'shared-memory'?"]),
    "a file as run_dir": (["--run-dir", RECIPE], ["not a run directory", RECIPE, "got: a file", "nothing was written"]),
    "a foreign run_dir": (["--run-dir", str(SUPPORT)], ["not a run directory", "a directory with", "__init__.py"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_workers_start(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options, texts = REFUSED[case]
    monkeypatch.chdir(tmp_path)
    code, output = told(capsys, monkeypatch, "train", RECIPE, *options)
    assert code == 2
    for text in texts:
        assert text in output, output
    assert "Traceback" not in output
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_or_script_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, output = told(capsys, monkeypatch, "train", SUPPORT / "fault.toml")
    assert code == 2
    assert f"there is no recipe {SUPPORT / 'fault.toml'}" in output
    assert "did you mean 'faulty.toml'?" in output
    code, output = told(capsys, monkeypatch, "run", "nowhere.py")
    assert code == 2
    assert "there is no such script" in output


MODULE = """
import os, torch
from torch import nn
import manyhands as mh

def corpus(kind):
    if kind == "file":
        return open("/nowhere/corpus.bin")
    raise mh.DataError("the corpus isn't there", where="/nowhere/corpus.bin", hint="run download.sh")

def model():
    return nn.Linear(8, 8 + int(os.environ["RANK"]))
"""


@pytest.mark.parametrize(
    ("changes", "code", "expected"),
    [
        pytest.param(
            ["data.path=own:corpus", "data.arguments.kind=data"],
            1,
            "the corpus isn't there\n  where: /nowhere/corpus.bin\n  what to do: run download.sh\n",
            id="DataError",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["data.path=own:corpus", "data.arguments.kind=file"],
            1,
            "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/corpus.bin'\n",
            id="FileNotFoundError",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["model.path=own:model", "strategy.units=[]"],
            2,
            "workers 0 and 1 don't have the same model: they differ in weight\n  expected: [8, 8] ",
            id="ConfigError",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_workers_raise_reaches_the_terminal_as_it_is(
    tmp_path: Path, changes: list[str], code: int, expected: str
) -> None:
    (tmp_path / "own.py").write_text(MODULE)
    for name in ("faulty.py", "faulty.toml"):
        (tmp_path / name).write_text((SUPPORT / name).read_text())
    options = [option for change in changes for option in ("--set", change)]
    command = ["train", "faulty.toml", "--workers", "2", "--run-dir", "run", *options]
    ended = subprocess.run(
        [sys.executable, "-m", "manyhands.cli.main", *command], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == code, ended.stderr
    assert expected in ended.stderr
    if "FileNotFoundError" in expected:  # Python's own: with the lines of the user's code
        assert "own.py" in ended.stderr
        assert "(raised by [data], faulty.toml:" in ended.stderr
        assert "/manyhands/" not in ended.stderr
        assert len(ended.stderr.splitlines()) < 10
    else:
        assert ended.stderr.startswith(expected)
        assert "Traceback" not in ended.stderr


# - Runs


class Differs:
    """From a step on, one parameter's gradient has another sign."""

    def __init__(self, step: int) -> None:
        self.step, self.calls = step, 0

    def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
        self.calls += 1
        out = model(batch)
        if (self.calls - 1) // 4 >= self.step:
            bias = model[2].bias
            out = out - bias.detach() + (2 * bias.detach() - bias)
        return out.square().mean()


def run_into(folder: Path, **changes: Any) -> Path:
    mh.train(recipe(**changes), steps=4, run_dir=folder, digest_every=1, show=False)
    return folder


def test_compare_says_where_runs_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, same = run_into(tmp_path / "one"), run_into(tmp_path / "same")
    other, seed = run_into(tmp_path / "other", loss=Differs(2)), run_into(tmp_path / "seed", seed=1)
    code, output = told(capsys, monkeypatch, "compare", one, same)
    assert (code, output.split(":")[0]) == (0, "equal")
    assert "after each of 4 steps" in output
    code, output = told(capsys, monkeypatch, "compare", one, other)
    assert code == 1
    assert "different: first after step 3 (the same after step 2)" in output
    assert "parameter '2.bias', block 0 (elements 0 to 7): the first of 1 blocks in 1 parameters" in output
    code, output = told(capsys, monkeypatch, "compare", "--json", one, other)
    found = json.loads(output)
    assert (code, found["equal"], found["step"], found["parameter"], found["block"]) == (1, False, 3, "2.bias", 0)
    code, output = told(capsys, monkeypatch, "compare", one, seed)
    assert code == 1
    assert "first after step 1" in output
    assert "recipe: seed is 0 in one and 1 in the other" in output
    code, output = told(capsys, monkeypatch, "compare", one, tmp_path)
    assert code == 2
    assert "this is not a run directory" in output
    code, output = told(capsys, monkeypatch, "compare", one, tmp_path / "nowhere")
    assert code == 2
    assert "there is no run directory here" in output


def test_another_recipe_does_not_go_on_with_a_run(tmp_path: Path) -> None:
    run_into(tmp_path / "run")
    before = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    with pytest.raises(mh.CheckpointError, match="of another recipe: seed differs") as caught:
        mh.train(recipe(seed=1), steps=6, run_dir=tmp_path / "run", show=False)
    assert caught.value.expected == "0 (saved)"
    assert caught.value.got == "1 (this recipe)"
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == before


def test_other_numerics_do_not_go_on_with_a_run_unless_accepted(tmp_path: Path) -> None:
    run_into(tmp_path / "run")
    (manifest,) = (tmp_path / "run" / "checkpoints").glob("*/manifest.json")
    saved = json.loads(manifest.read_text())
    saved["identity"]["torch"] = "1.0"
    manifest.write_text(seal(saved))
    with pytest.raises(mh.NumericsError, match="begun under other numerics: torch differs") as caught:
        mh.train(recipe(), steps=6, run_dir=tmp_path / "run", show=False)
    assert caught.value.expected == "1.0 (saved)"
    assert "--accept-new-numerics" in str(caught.value.hint)
    summary = mh.train(recipe(), steps=6, run_dir=tmp_path / "run", show=False, accept_new_numerics=True)
    assert summary.digest == mh.train(recipe(), steps=6, show=False).digest
