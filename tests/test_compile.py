"""Compiled blocks: one digest for any workers and shardings, and the same code for a shape in every worker."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import manyhands as mh
from manyhands.errors import CheckpointError, ConfigError
from manyhands.launching.launcher import run_workers
from manyhands.models import compiling as compiled
from manyhands.models.compiling import CompiledModules
from oracle import oracle_run
from support.compiled_models import UNITS, WIDTH, Mix, Stack, compiled_recipe
from support.compiled_worker import STEPS, WAYS
from support.models import ConvNet, conv_recipe
from support.training import train_with_engine

WORKER = Path(__file__).parent / "support" / "compiled_worker.py"
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch hides it
SHARDED = mh.Strategy(sharding="zero3", transport="distributed", units=UNITS)  # everything is gathered, from itself


class CompiledByHand(Stack):
    """The blocks compiled as a user of plain PyTorch would, each shape separately."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.forward = torch.compile(block.forward, dynamic=False)


def num_graphs() -> int:
    """The number of graphs that this process has compiled."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def trained(strategy: mh.Strategy | None = None, precision: str = "fp32") -> str:
    """The digest of one worker in this process."""
    return train_with_engine(compiled_recipe(precision), strategy or mh.Strategy(), steps=STEPS).digest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "ways"),
    [
        (2, ["ddp", "zero3, process"]),
        *(pytest.param(workers, [*WAYS], marks=pytest.mark.slow) for workers in (1, 2, 3)),
    ],
)
def test_compiled_blocks_have_the_same_bits_with_any_workers_and_sharding(
    workers: int, ways: list[str], tmp_path: Path
) -> None:
    precisions = ["fp32"] if len(ways) < len(WAYS) else ["fp32", "bf16"]
    paths = [str(WORKER.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    run_workers(
        [sys.executable, str(WORKER), str(tmp_path), ";".join(precisions), ";".join(ways)],
        workers=workers,
        environment={"PYTHONPATH": os.pathsep.join(paths)},
        log_dir=tmp_path,
    )
    alone = {precision: trained(precision=precision) for precision in precisions}
    expected = {f"{way}, {precision}": alone[precision] for precision in precisions for way in ways}
    for rank in range(workers):
        assert json.loads((tmp_path / f"worker-{rank}.json").read_text()) == expected, f"worker {rank}"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_digest_is_that_of_plain_pytorch_compiled_by_hand(precision: str) -> None:
    assert oracle_run(compiled_recipe(precision, model=CompiledByHand), STEPS).digests[-1] == trained(
        precision=precision
    )


@pytest.mark.slow
def test_code_compiled_by_each_worker_has_the_same_bits(tmp_path: Path) -> None:
    script = tmp_path / "anew.py"
    script.write_text(
        "import os, sys\n"
        f"os.environ['TORCHINDUCTOR_CACHE_DIR'] = {str(tmp_path)!r} + '/' + os.environ['RANK']\n"
        f"sys.argv[1:] = [{str(tmp_path)!r}, 'fp32', 'ddp;zero3']\n"
        f"exec(compile(open({str(WORKER)!r}).read(), {str(WORKER)!r}, 'exec'))\n"
    )
    run_workers(
        [sys.executable, str(script)], workers=2, environment={"PYTHONPATH": str(WORKER.parents[1])}, log_dir=tmp_path
    )
    found = [json.loads((tmp_path / f"worker-{rank}.json").read_text()) for rank in range(2)]
    assert {digest for digests in found for digest in digests.values()} == {trained()}


def test_sharded_parameters_are_unsharded_without_recompiling() -> None:
    with mh.Engine(compiled_recipe(), SHARDED) as engine:
        counts = []
        for batch in engine.batches(STEPS):
            engine.step(batch)
            counts.append(num_graphs())
        with engine.evaluating() as model:
            model.eval()(torch.zeros(1, 4, dtype=torch.int64))  # another shape
        assert num_graphs() == counts[0]
    assert counts == [counts[0]] * STEPS


def test_shardings_of_one_worker_have_one_digest() -> None:
    assert trained() == trained(SHARDED)


def test_a_model_keeps_its_names_and_forwards() -> None:
    plain = Stack()
    with mh.Engine(compiled_recipe(), SHARDED) as engine:
        model = engine.model
        assert list(engine.full_state_dict()) == list(plain.state_dict())
        assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert not any("forward" in vars(module) for module in model.modules())


def test_one_shape_too_many_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiled._TRACING, "recompile_limit", 1)
    torch._dynamo.reset()
    model = nn.Sequential(Mix())
    modules = CompiledModules(model, ["0"])
    with torch.no_grad(), modules.computing():
        model[0](torch.zeros(1, 2, WIDTH), 1.0)
        with pytest.raises(ConfigError, match="would have to be compiled for one more input shape"):
            model[0](torch.zeros(1, 3, WIDTH), 1.0)
    assert model[0](torch.zeros(1, 3, WIDTH), 1.0).shape == (1, 3, WIDTH)  # outside of steps nothing is compiled


class Borrows(Stack):
    """A block that calls another block which is not its submodule."""

    def __init__(self) -> None:
        super().__init__()
        other = self.blocks[1]
        self.blocks[0].forward = lambda x, scale: x + other(x, scale)


def test_a_sharded_module_used_from_compiled_code_is_refused() -> None:
    with pytest.raises(ConfigError, match="uses a module outside of it"):
        train_with_engine(compiled_recipe(model=Borrows), SHARDED, steps=1)


class Nested(nn.Module):
    """Containers in containers, torch's own layers, and one module in two places."""

    def __init__(self) -> None:
        super().__init__()
        shared = Mix()
        self.layers = nn.ModuleList([nn.ModuleList([Mix(), shared]), nn.ModuleList([nn.Linear(2, 2), shared])])
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_the_compiled_modules_depend_on_the_model_alone() -> None:
    model = Nested()
    modules = CompiledModules(model, ["layers.0", "layers.1", "stem.0", "stem.1"])
    assert modules.names == ("layers.0.0", "layers.0.1")
    assert modules.around(("stem", "layers.0.0.mix", "layers.0.0")) == ("stem", "layers.0.0")
    modules.refuse_inside(("layers",), "")  # around all of them
    modules.refuse_inside(("layers.*",), "")  # whole ones, whatever else
    with pytest.raises(ConfigError, match="inside a compiled module"):
        modules.refuse_inside(("layers.0.0", "*.mix"), "")
    modules.undo()
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_without_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="finds nothing to compile") as caught:
        mh.Engine(conv_recipe(model=ConvNet, compile=True))
    assert "no such container" in str(caught.value)


def test_recomputing_a_part_of_a_compiled_block_is_refused() -> None:
    with pytest.raises(ConfigError, match="inside a compiled module") as caught:
        mh.Engine(compiled_recipe(), mh.Strategy(activation_checkpointing=("blocks.*.mix",)))
    assert "name 'blocks.0'" in str(caught.value)


def test_a_missing_compiler_is_an_error_before_training() -> None:
    other = torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with other, pytest.raises(ConfigError, match=r"needs a working C\+\+ compiler"):
        mh.Engine(compiled_recipe())


def test_compiled_and_plain_runs_are_two_recipes(tmp_path: Path) -> None:
    plain = compiled_recipe(compile=False)
    train_with_engine(plain, mh.Strategy(), steps=1, save=tmp_path)
    with pytest.raises(CheckpointError, match="another recipe: compile differs"):
        train_with_engine(compiled_recipe(), mh.Strategy(), steps=2, load=next(tmp_path.glob("step-*")))


def test_the_identity_names_the_compiler_and_its_settings() -> None:
    before = compiled.compiler_identity(True)
    assert before["compiler"]
    assert before["compiler_vectors"]
    with torch._inductor.config.patch({"cpp.enable_floating_point_contract_flag": "fast"}):
        after = compiled.compiler_identity(True)
    assert {name for name in before if before[name] != after[name]} == {"compiler_settings"}


def test_compile_is_on_or_off_and_for_the_cpu() -> None:
    with pytest.raises(ConfigError, match=r"recipe\.compile has the wrong type"):
        compiled_recipe(compile="yes")
    with pytest.raises(ConfigError, match=r"recipe\.compile is supported on the CPU only"):
        compiled_recipe(device="cuda")
