"""torch's compiler is imported only by processes that compile."""

from __future__ import annotations

import subprocess
import sys

import pytest

TRAIN = """
import sys
import torch
from torch import nn
import manyhands as mh
from manyhands.models import bf16_products, compiling

bf16_products.bf16_instructions = lambda: ""

def is_loaded():
    return "torch._dynamo.eval_frame" in sys.modules

def train(transport="auto"):
    recipe = mh.Recipe(
        model=lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
        loss=lambda model, rows: model(rows.bfloat16()).float().square().mean(),
        optimizer=lambda params: [
            torch.optim.Muon([(n, p) for n, p in params if p.ndim == 2]),
            torch.optim.AdamW([(n, p) for n, p in params if p.ndim != 2]),
        ],
        schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
        data=[torch.full((8,), float(i)) for i in range(4)],
        batch=mh.Batch(global_size=4, micro_size=2),
        precision="bf16",
    )
    with mh.Engine(recipe, mh.Strategy(sharding="zero3", transport=transport)) as engine:
        for batch in engine.batches(2):
            engine.step(batch)
        return engine.digest()
"""


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", TRAIN + script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_training_does_not_import_the_compiler() -> None:
    """Nor does restarting torch.distributed, or inspecting all modules."""
    run(
        "import inspect, warnings\n"
        "train(); assert not is_loaded(), 'training'\n"
        "train('distributed'); train('distributed'); assert not is_loaded(), 'torch.distributed'\n"
        "[getattr(module, '__file__', None) or getattr(module, '__warningregistry__', None)"
        " for module in list(sys.modules.values())]\n"
        "inspect.getmodule(train); warnings.simplefilter('error'); assert not is_loaded(), 'inspecting'"
    )


@pytest.mark.slow
def test_the_digest_does_not_depend_on_the_import_of_the_compiler() -> None:
    run("mine = train(); assert not is_loaded();torch._dynamo.config; assert is_loaded(); assert train() == mine")


@pytest.mark.parametrize(
    "wants",
    [
        "import torch._dynamo.config as config; assert config.recompile_limit",
        pytest.param("assert torch.compiler.disable(train) is not train", marks=pytest.mark.slow),
        pytest.param("from torch._dynamo import optimize; assert callable(optimize)", marks=pytest.mark.slow),
        pytest.param("assert torch._dynamo.config.recompile_limit", marks=pytest.mark.slow),
        pytest.param("torch.compiler.reset()", marks=pytest.mark.slow),
        pytest.param("assert torch._dynamo.trace_rules.lookup", marks=pytest.mark.slow),
    ],
)
def test_code_that_uses_the_compiler_gets_the_real_one(wants: str) -> None:
    run(
        "train(); assert not is_loaded();"
        f"{wants}; assert is_loaded(); assert not isinstance(torch._dynamo, compiling._StandIn);"
        "assert sys.modules['torch._dynamo'] is torch._dynamo"
    )


@pytest.mark.slow
def test_disabled_functions_are_disabled_in_the_real_compiler() -> None:
    run(
        "train(); function = torch.optim.Optimizer.add_param_group.__wrapped__;"
        "assert getattr(function, '__dynamo_disable') is function;"
        "torch._dynamo.config; assert not hasattr(function, '__dynamo_disable');"
        "torch.optim.SGD([torch.ones(1)]); assert getattr(function, '__dynamo_disable') is not function"
    )


@pytest.mark.slow
def test_models_compile_themselves_where_products_are_in_fp32() -> None:
    run(
        "train()\n"
        "compiled = torch.compile(lambda x, w: torch.relu(x @ w).sin())\n"
        "x, w = torch.randn(8, 8).bfloat16(), torch.randn(8, 8).bfloat16().requires_grad_()\n"
        "with bf16_products.bf16_products_in_fp32():\n"
        "    result = compiled(x, w)\n"
        "    result.sum().backward()\n"
        "assert torch.allclose(result.float(), torch.relu(x.float() @ w.float()).sin(), atol=0.05)\n"
        "assert w.grad.isfinite().all()\n"
    )


@pytest.mark.slow
def test_a_compiler_that_is_imported_already_stays() -> None:
    run(
        "import torch._dynamo; real = sys.modules['torch._dynamo']; compiling.avoid_compiler_import();"
        "assert sys.modules['torch._dynamo'] is real"
    )
