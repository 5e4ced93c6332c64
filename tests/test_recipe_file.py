"""Recipe files: the recipes that are loaded from them, and the errors of wrong files. Real files, real imports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from manyhands.config import Strategy
from manyhands.documents.recipe_file import check_recipe_file, load_recipe
from manyhands.errors import ConfigError, DataError
from manyhands.weights import Weights

RECIPE = """\
name = "small"
seed = 3
precision = "bf16"
clip_norm = 1.0
steps = 20

[model]
path = "tiny:Net"
arguments = { width = 4 }

[loss]
path = "tiny:loss"

[data]
path = "tiny:Numbers"
arguments = { count = 32 }

[optimizer]
path = "torch.optim:AdamW"
arguments = { lr = 3e-4, weight_decay = 0.1 }

[batch]
global_size = 8
micro_size = 2
"""

MODULE = """\
import torch
from torch import nn
from manyhands.errors import DataError
from manyhands.weights import Weights

NUMBER = 3

class Net(nn.Module):
    def __init__(self, width, depth=1):
        super().__init__()
        if width < 1:
            raise ValueError("no width")
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

class Numbers:
    def __init__(self, count):
        if count == 0:
            raise DataError("there are no numbers")
        if count < 0:
            raise ZeroDivisionError("count")
        self.count = count
    def __len__(self):
        return self.count
    def __getitem__(self, index):
        return torch.full((4,), float(index))

def loss(model, batch, *, scale=1.0):
    return scale * batch.sum()

def sample(model, prompt):
    return prompt + type(model).__name__

def collate(samples):
    return torch.stack(samples) + 1

def no_dataset():
    return 3
"""


@pytest.fixture(autouse=True)
def _clean_imports() -> Iterator[None]:
    """Unload the modules of a test: every test has its own modules under the same names."""
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        file = getattr(sys.modules[name], "__file__", None) or ""
        if "pytest-" in file or name in ("tiny", "broken", "needy"):
            del sys.modules[name]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "tiny.py").write_text(MODULE)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    return tmp_path / "recipe.toml"


def edit(recipe: Path, old: str, new: str) -> Path:
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))
    return recipe


def problem(recipe: Path, *overrides: str, check_only: bool = False) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        (check_recipe_file if check_only else load_recipe)(recipe, overrides)
    return caught.value


def missing_parts(text: str, expected: list[str]) -> list[str]:
    """The expected parts that a message lacks. A line number must match completely: 1 is not in 12."""
    return [part for part in expected if (f"{part}\n" if ".toml:" in part else part) not in f"{text}\n"]


# - What is loaded from a file


def test_a_recipe_is_built(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    built = loaded.recipe
    assert (built.name, built.seed, built.precision, built.clip_norm) == ("small", 3, "bf16", 1.0)
    assert (built.compile, load_recipe(recipe, ["compile=true"]).recipe.compile) == (False, True)
    assert (built.batch.micro_batches, built.batch.virtual_workers) == (4, 4)
    assert built.source == str(recipe)
    assert (loaded.steps, loaded.strategy) == (20, Strategy())
    assert (built.schedule, built.collate, built.sample) == (None, None, None)
    model = built.model()
    assert model.layers[0].weight.shape == (4, 4)  # type: ignore[index, union-attr]
    assert built.loss(model, torch.ones(2)) == 2.0
    assert len(built.data) == 32
    optimizer = built.optimizer(list(model.named_parameters()))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(3e-4, 0.1)]


def test_optional_tables_are_loaded(recipe: Path) -> None:
    with recipe.open("a") as file:
        file.write(
            """
[schedule]
path = "torch.optim.lr_scheduler:CosineAnnealingLR"
arguments = { T_max = 20 }
[sample]
path = "tiny:sample"
arguments.prompt = "a "
[collate]
path = "tiny:collate"
[strategy]
sharding = "ddp"
units = ["layers.0"]
stall_seconds = 5
"""
        )
    loaded = load_recipe(recipe)
    built, model = loaded.recipe, loaded.recipe.model()
    assert built.schedule is not None
    assert built.sample is not None
    assert built.collate is not None
    schedule = built.schedule(built.optimizer(list(model.named_parameters())))
    assert schedule.T_max == 20  # type: ignore[attr-defined]
    assert built.sample(model) == "a Net"
    assert built.collate([torch.zeros(1), torch.ones(1)]).tolist() == [[1.0], [2.0]]
    assert loaded.strategy == Strategy(sharding="ddp", units=("layers.0",), stall_seconds=5)


def test_weights_are_a_path_or_a_table(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_recipe(recipe).recipe.weights is None
    edit(recipe, "steps = 20\n", 'steps = 20\nweights = "pretrained/small"\n')
    assert load_recipe(recipe).recipe.weights == Weights(path=recipe.parent / "pretrained" / "small")
    (recipe.parent / "elsewhere").mkdir()
    monkeypatch.chdir(recipe.parent / "elsewhere")
    assert load_recipe(recipe, ["weights=here"]).recipe.weights == Weights(path=recipe.parent / "elsewhere" / "here")
    edit(recipe, 'weights = "pretrained/small"\n', "")
    table = """\
[weights]
path = "/pretrained"
rename = { '^' = 'model.', '(q|v)' = '\\1_' }
allow_missing = ["head.*"]
[batch]"""
    loaded = load_recipe(edit(recipe, "[batch]", table), ["weights.ignore=['old.*']"])
    expected = Weights(
        path="/pretrained", rename={"^": "model.", "(q|v)": r"\1_"}, allow_missing=["head.*"], ignore=["old.*"]
    )
    assert loaded.recipe.weights == expected
    assert loaded.settings["weights"]["path"] == "/pretrained"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("weights = 3", ["weights has a wrong value", "recipe.toml:5", "3"]),
        ('weights = ""', ["weights.path is not a path", "recipe.toml:5", "a folder or a file"]),
        ('[weights]\nallow_missing = ["a"]', ["weights.path is missing", "recipe.toml:5"]),
        (
            '[weights]\npath = "a"\nignored = []',
            ["weights.ignored is not known", "mean 'ignore'?", "recipe.toml:7"],
        ),
        (
            '[weights]\npath = "a"\nrename = {"(" = ""}',
            ["an invalid pattern or replacement", "missing )", "recipe.toml:7"],
        ),
    ],
)
def test_wrong_weights_are_reported_with_their_line(recipe: Path, text: str, expected: list[str]) -> None:
    message = str(problem(edit(recipe, "steps = 20\n", f"{text}\n"), check_only=True))
    assert missing_parts(message, expected) == [], message


def test_the_default_name_is_the_name_of_the_file(recipe: Path) -> None:
    assert load_recipe(edit(recipe, 'name = "small"\n', "")).recipe.name == "recipe"


def test_a_group_with_a_path_has_its_own_optimizer(recipe: Path) -> None:
    edit(
        recipe,
        "[batch]",
        """\
[[optimizer.groups]]
match = ["layers.*"]
dimensions = 2
path = "torch.optim:Muon"
arguments = { lr = 0.02, ns_coefficients = [3.4, -4.7, 2.0] }
[[optimizer.groups]]
match = ["*"]
dimensions = 1
arguments = { weight_decay = 0.0 }
[batch]""",
    )
    loaded = load_recipe(recipe)
    named_params = list(loaded.recipe.model().named_parameters())
    rest, muon = loaded.recipe.optimizer(named_params)
    assert isinstance(muon, torch.optim.Muon)
    assert [(group["param_names"], group["lr"]) for group in muon.param_groups] == [(["layers.0.weight"], 0.02)]
    assert isinstance(rest, torch.optim.AdamW)
    assert [(group["param_names"], group["weight_decay"]) for group in rest.param_groups] == [
        (["layers.0.bias", "norm.weight", "norm.bias"], 0.0)
    ]


def test_a_parameter_belongs_to_the_first_group_that_matches(recipe: Path) -> None:
    edit(
        recipe,
        "[batch]",
        """\
[[optimizer.groups]]
match = ["*.bias"]
arguments = { weight_decay = 0.0 }
[[optimizer.groups]]
match = ["norm.*"]
arguments = { lr = 1.0 }
[batch]""",
    )
    built = load_recipe(recipe).recipe
    optimizer = built.optimizer(list(built.model().named_parameters()))
    found = [(group["param_names"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    assert found == [
        (["layers.0.weight"], 3e-4, 0.1),
        (["layers.0.bias", "norm.bias"], 3e-4, 0.0),
        (["norm.weight"], 1.0, 0.1),
    ]


def test_the_folder_stays_first_on_the_path(recipe: Path) -> None:
    load_recipe(recipe)
    load_recipe(recipe)
    assert sys.path[0] == str(recipe.parent)
    assert sys.path.count(str(recipe.parent)) == 1


def test_check_imports_neither_torch_nor_the_users_modules(recipe: Path) -> None:
    tiny = recipe.with_name("tiny.py")
    tiny.write_text(f"raise SystemExit('imported')\n{tiny.read_text()}".replace("from __future__", "# from __future__"))
    code = (
        "import sys; from manyhands.documents.recipe_file import check_recipe_file; "
        f"schema = check_recipe_file({str(recipe)!r}, ['strategy.sharding=zero1']); "
        "sys.exit('torch' in sys.modules or 'tiny' in sys.modules or schema.strategy.build().sharding != 'zero1')"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=240).returncode == 0


def test_settings_are_the_recipe_as_used(recipe: Path) -> None:
    settings = load_recipe(recipe, ["seed=8", "model.arguments.depth=2", 'name=a "b" ü😀']).settings
    assert settings["seed"] == 8
    assert settings["model"]["arguments"]["depth"] == 2
    assert settings["name"] == 'a "b" ü😀'
    assert settings["strategy"]["sharding"] == Strategy.sharding
    assert json.loads(json.dumps(settings)) == settings


# - Overrides


def test_overrides_change_values(recipe: Path) -> None:
    given = [
        "optimizer.arguments.lr=1e-3",
        "batch.micro_size=4",
        "seed = 5",
        "name=plain text",
        "strategy.overlap=False",
    ]
    loaded = load_recipe(recipe, given)
    built = loaded.recipe
    assert (built.seed, built.name, built.batch.micro_size, loaded.strategy.overlap) == (5, "plain text", 4, False)
    assert loaded.settings["optimizer"]["arguments"] == {"lr": 1e-3, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("written", "value"),
    [(".5", 0.5), ("true", True), ("True", True), ("1_000", 1000), ("[1, 2]", [1, 2]), ("{a = 1}", {"a": 1}), ("", "")],
)
def test_an_override_is_a_toml_value_or_a_string(recipe: Path, written: str, value: object) -> None:
    assert check_recipe_file(recipe, [f"model.arguments.x={written}"]).model.arguments["x"] == value


def test_an_override_can_change_a_group(recipe: Path) -> None:
    edit(recipe, "[batch]", '[[optimizer.groups]]\nmatch = ["*"]\n[batch]')
    checked = check_recipe_file(recipe, ["optimizer.groups.0.arguments.lr=1"])
    assert checked.optimizer.groups[0].arguments == {"lr": 1}
    assert "there is no optimizer.groups.1.match" in str(problem(recipe, "optimizer.groups.1.match=[]"))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sed=3", ["sed is not known", "--set sed=3", "did you mean 'seed'?"]),
        ("optimzer.arguments.lr=1", ["optimzer is not known", "--set optimzer", "did you mean 'optimizer'?"]),
        ("batch.micro_sise=1", ["batch.micro_sise is not known", "did you mean 'micro_size'?"]),
        ("batch.micro_size=3", ["can't be divided", "a multiple of 3"]),
        ("seed.x=1", ["there is no seed.x", "seed = 3"]),
        ("seed", ["can't be parsed", "key=value"]),
        ("=3", ["can't be parsed"]),
        ("precision=fp8", ["precision has an unknown value", "--set precision=fp8", "'fp8'", "fp32"]),
        ("schedule.arguments.T_max=3", ["schedule.path is missing", "--set schedule"]),
    ],
)
def test_a_wrong_override_is_reported(recipe: Path, override: str, expected: list[str]) -> None:
    text = str(problem(recipe, override, check_only=True))
    assert missing_parts(text, expected) == []


# - Errors in the form of a file: (text, its replacement, expected parts of the message)

WRONG_FORM = [
    ("clip_norm", "clip_nrm", ["recipe.toml:4", "clip_nrm is not known", "did you mean 'clip_norm'?", "1.0"]),
    (
        "width = 4 }",
        "width = 4 }\nsteps = 3",
        ["recipe.toml:10", "model.steps is not known", "above the first [table]"],
    ),
    ("[batch]", "lr = 1\n[batch]", ["recipe.toml:22", "optimizer.lr is not known", "go into optimizer.arguments"]),
    ("seed = 3", 'seed = "3"', ["recipe.toml:2", "seed has a wrong value", "a valid integer", "'3'"]),
    ("seed = 3", "seed = -3", ["recipe.toml:2", "seed is out of range", "at least 0", "-3"]),
    ("seed = 3", "seed = true", ["recipe.toml:2", "seed has a wrong value", "a valid integer", "True"]),
    ('"bf16"', '"bf61"', ["recipe.toml:3", "precision has an unknown value", "'bf61'", "did you mean 'bf16'?"]),
    ("steps = 20", "steps = 0", ["recipe.toml:5", "steps has a wrong value", "greater than or equal to 1"]),
    ('"tiny:Net"', '"tiny.Net"', ["recipe.toml:8", "model.path has a wrong value", "module:attribute", "tiny.Net"]),
    (
        '[loss]\npath = "tiny:loss"',
        'loss = "tiny:loss"',
        ["recipe.toml:11", "model.loss is not known", "[loss] is a separate table", "loss is missing"],
    ),
    ("{ width = 4 }", "4", ["recipe.toml:9", "model.arguments has a wrong value", "a table", "4"]),
    ("{ width = 4 }", "{ a = [1, {b = 2000-01-01}] }", ["recipe.toml:9", "model.arguments.a.1.b", "a string, number"]),
    ("micro_size = 2\n", "", ["recipe.toml:22", "batch.micro_size is missing", "batch.micro_size = ..."]),
    ('[loss]\npath = "tiny:loss"\n', "", ["recipe.toml:1", "loss is missing", "a table, [loss]"]),
    (
        "global_size = 8",
        "global_size = 7",
        ["recipe.toml:23", "batch.global_size can't be divided", "a multiple of 2", "7"],
    ),
    (
        "micro_size = 2",
        "micro_size = 2\nvirtual_workers = 3",
        ["recipe.toml:25", "batch.virtual_workers", "a divisor of 4"],
    ),
    (
        "[batch]",
        '[strategy]\nsharding = "zero7"\n[batch]',
        ["recipe.toml:23", "strategy.sharding has an unknown value", "zero7"],
    ),
    (
        "[batch]",
        "[strategy]\nunits = 3\n[batch]",
        ["recipe.toml:23", "strategy.units has a wrong value", "an array"],
    ),
    ("[batch]", "[[optimizer.groups]]\nmatch = []\n[batch]", ["recipe.toml:23", "optimizer.groups.0.match"]),
    (
        "seed = 3",
        'optimizer_kind = "matrix"',
        ["recipe.toml:2", "optimizer_kind has an unknown value", "per-parameter"],
    ),
    (
        "[batch]",
        "[[optimizer.groups]]\nmatch = ['*']\npath = 'Muon'\n[batch]",
        ["recipe.toml:24", "optimizer.groups.0.path has a wrong value", "module:attribute"],
    ),
    (
        "[batch]",
        "[[optimizer.groups]]\nmatch = [\n  '*',  # all\n]\n[[optimizer.groups]]\nmatch = ['*']\nargs = {}\n[batch]",
        ["recipe.toml:28", "optimizer.groups.1.args is not known", "did you mean 'arguments'?"],
    ),
]


@pytest.mark.parametrize(("old", "new", "expected"), WRONG_FORM)
def test_a_wrong_form_is_reported_with_its_line(recipe: Path, old: str, new: str, expected: list[str]) -> None:
    text = str(problem(edit(recipe, old, new), check_only=True))
    assert missing_parts(text, expected) == []
    assert "pydantic" not in text


def test_all_problems_come_in_one_error(recipe: Path) -> None:
    edit(recipe, "seed = 3", "sede = 3")
    edit(recipe, "bf16", "fp16")
    edit(recipe, "global_size = 8", "global_size = 0")
    text = str(problem(recipe, "batch=3", "nonsense", "steps=few"))
    assert text.startswith("5 problems in ")  # the override replaces the file's [batch]
    places = ["recipe.toml:2", "recipe.toml:3", "--set batch=3", "--set nonsense", "--set steps=few"]
    assert missing_parts(text, places) == []


def test_lines_after_text_that_looks_like_toml(recipe: Path) -> None:
    tricky = 'name = """\n[model]\nsteps = 1\n"""\nthreads_per_worker = 0\n'
    text = str(problem(edit(recipe, 'name = "small"\n', tricky)))
    assert "recipe.toml:5" in text
    assert "threads_per_worker is out of range" in text


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("seed = 3", "seed = ", 2),
        ("[loss]", "[loss", 11),
        ("[batch]", "[data]", 22),
        ("micro_size = 2\n", 'x = """', 24),
    ],
)
def test_a_syntax_error_is_reported_with_its_line(recipe: Path, old: str, new: str, line: int) -> None:
    text = str(problem(edit(recipe, old, new), check_only=True))
    assert "is not TOML" in text
    assert f"recipe.toml:{line}\n" in text


def test_a_file_that_is_not_utf8_is_reported(recipe: Path) -> None:
    recipe.write_bytes(b"seed = 1\nname = '\xff'\n")
    text = str(problem(recipe))
    assert "is not UTF-8" in text
    assert "recipe.toml:2" in text


def test_a_missing_file_is_reported_with_recipes_nearby(recipe: Path) -> None:
    recipe.with_name("pyproject.toml").write_text("[project]\n")
    text = str(problem(recipe.with_name("recip.toml")))
    assert "there is no recipe" in text
    assert "did you mean 'recipe.toml'?" in text
    assert "known: recipe.toml" in str(problem(recipe.with_name("zzz")))
    assert "pyproject" not in str(problem(recipe.with_name("project.toml")))
    assert f"recipes in this folder: {recipe}" in str(problem(recipe.parent))
    (recipe.parent / "manifest.json").write_text("{}")
    assert "a run directory, and the recipe comes first" in str(problem(recipe.parent))
    assert "there is no recipe" in str(problem(recipe.parent / "nowhere" / "recipe.toml"))


# - Errors in what a file names

WRONG_NAMES = [
    ('"tiny:Net"', '"tinny:Net"', ["recipe.toml:8", "model.path: there is no module tinny", "did you mean 'tiny'?"]),
    ('"tiny:Net"', '"tiny:Nett"', ["recipe.toml:8", "model.path: tiny has no Nett", "did you mean 'Net'?"]),
    ('"tiny:Net"', '"tiny.part:Net"', ["recipe.toml:8", "there is no module tiny.part"]),
    ('"tiny:Net"', '"tiny:NUMBER"', ["recipe.toml:8", "tiny:NUMBER can't be called"]),
    ("torch.optim:AdamW", "torch.optim:AdmaW", ["recipe.toml:19", "optimizer.path", "did you mean 'AdamW'?"]),
    ("torch.optim:AdamW", "torch.optm:AdamW", ["recipe.toml:19", "no module torch.optm", "did you mean 'optim'?"]),
    ("width = 4", "widht = 4", ["recipe.toml:9", "model.arguments.widht", "did you mean 'width'?", "(width, depth=1)"]),
    ("{ width = 4 }", "{}", ["recipe.toml:9", "model.arguments don't fit", "missing a required argument: 'width'"]),
    ('"tiny:loss"', '"tiny:loss"\narguments = { scal = 2 }', ["recipe.toml:13", "takes no scal", "'scale'"]),
    (
        '"tiny:loss"',
        '"tiny:loss"\narguments = { batch = 2 }',
        ["recipe.toml:13", "multiple values for argument 'batch'"],
    ),
    ('"tiny:loss"', '"tiny:Numbers"', ["recipe.toml:11", "loss.arguments don't fit", "too many positional arguments"]),
    ("lr = 3e-4", "learn = 3e-4", ["recipe.toml:20", "optimizer.arguments.learn: torch.optim:AdamW takes no learn"]),
    (
        "[batch]",
        "[[optimizer.groups]]\nmatch = ['*']\npath = 'torch.optim:Mion'\n[batch]",
        ["recipe.toml:24", "optimizer.groups.0.path: torch.optim has no Mion", "did you mean 'Muon'?"],
    ),
    (
        "[batch]",
        "[[optimizer.groups]]\nmatch = ['*']\npath = 'torch.optim:Muon'\narguments = { betas = 1 }\n[batch]",
        ["recipe.toml:25", "optimizer.groups.0.arguments.betas: torch.optim:Muon takes no betas", "momentum"],
    ),
    (
        "[batch]",
        "[[optimizer.groups]]\nmatch = ['*']\narguments.weight_decy = 0\n[batch]",
        ["recipe.toml:24", "optimizer.groups.0.arguments.weight_decy", "did you mean 'weight_decay'?"],
    ),
    ('"tiny:Numbers"\narguments = { count = 32 }', '"tiny:no_dataset"', ["recipe.toml:14", "data is not a data set"]),
]


@pytest.mark.parametrize(("old", "new", "expected"), WRONG_NAMES)
def test_a_wrong_name_is_reported_with_its_line(recipe: Path, old: str, new: str, expected: list[str]) -> None:
    edit(recipe, old, new)
    if (old, new) in [each[:2] for each in WRONG_NAMES[:3]]:  # these are found without importing anything
        assert missing_parts(str(problem(recipe, check_only=True)), expected) == []
    else:
        check_recipe_file(recipe)
    text = str(problem(recipe))
    assert missing_parts(text, expected) == []


WRITTEN = """
import os.path as paths, tiny
from tiny import Net as Other
if True:
    A = 1
for B in ():
    pass
try:
    class C: ...
except ValueError as error: ...
with open(__file__) as D:
    E: int = 2
def F(): global G; G = 1
(H := 3)
"""


def test_names_are_looked_for_without_importing_the_module(recipe: Path) -> None:
    recipe.with_name("written.py").write_text(WRITTEN + "raise SystemExit('imported')")
    recipe.with_name("folder").mkdir()
    recipe.with_name("folder").joinpath("__init__.py").write_text("raise SystemExit('imported')")
    for known in ("paths", "tiny", "Other", "A", "B", "C", "C.x", "D", "E", "F", "G", "H", "__name__"):
        check_recipe_file(recipe, [f"model.path=written:{known}"])
    for path in ("folder:anything", "folder.part:x", "tests_of_nobody_else:x.y", "torch.no_such_part:x"):
        if path.startswith("tests_of"):
            recipe.with_name("tests_of_nobody_else.py").write_text("def __getattr__(name): ...")
        check_recipe_file(recipe, [f"model.path={path}"])
    for wrong, message in (
        ("written:Missing", "model.path: written has no Missing"),
        ("written:path", "did you mean 'paths'?"),
        ("writen:A", "did you mean 'written'?"),
        ("nowhere.at.all:A", "there is no module nowhere"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)) as caught:
            check_recipe_file(recipe, [f"model.path={wrong}"])
        assert "--set model.path" in str(caught.value)
    recipe.with_name("unfinished.py").write_text("def half(:\n")
    with pytest.raises(ConfigError, match=r"module unfinished can't be imported[\s\S]*unfinished.py, line 1"):
        check_recipe_file(recipe, ["model.path=unfinished:half"])


def test_a_wrong_name_is_reported_by_the_command_before_torch_is_imported(recipe: Path) -> None:
    program = "import sys; from manyhands.cli.main import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    command = [sys.executable, "-c", program, "train", str(edit(recipe, "tiny:Net", "tinny:Net"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=recipe.parent, timeout=240)
    assert (done.returncode, done.stdout) == (2, "False\n")
    assert "did you mean 'tiny'?" in done.stderr
    assert not recipe.with_name("runs").exists()


def test_all_wrong_names_come_in_one_error(recipe: Path) -> None:
    edit(recipe, "tiny:Net", "tiny:Ned")
    edit(recipe, "count", "cuont")
    text = str(problem(recipe))
    assert text.startswith("3 problems in ")  # Numbers also lacks its count
    assert "tiny has no Ned" in text
    assert "takes no cuont" in text


def test_a_module_that_raises_is_reported(recipe: Path) -> None:
    recipe.with_name("broken.py").write_text("x = 1\ny = x / 0\n")
    text = str(problem(edit(recipe, "tiny:Net", "broken:Net")))
    assert "model.path: module broken can't be imported" in text
    assert "ZeroDivisionError" in text
    assert "broken.py:2" in text


def test_a_module_whose_import_is_missing_is_reported(recipe: Path) -> None:
    recipe.with_name("needy.py").write_text("\nimport not_there_at_all\n")
    text = str(problem(edit(recipe, "tiny:Net", "needy:Net")))
    assert "module needy can't be imported" in text
    assert "No module named 'not_there_at_all'" in text
    assert "needy.py:2" in text


def test_a_module_of_the_same_name_from_elsewhere_is_refused(recipe: Path, tmp_path: Path) -> None:
    load_recipe(recipe)
    other = tmp_path / "other"
    other.mkdir()
    (other / "tiny.py").write_text(MODULE)
    (other / "recipe.toml").write_text(RECIPE)
    text = str(problem(other / "recipe.toml"))
    assert "another module tiny is already imported" in text
    assert str(other / "tiny.py") in text


def test_a_pattern_that_matches_no_parameter_is_reported(recipe: Path) -> None:
    edit(recipe, "[batch]", '[[optimizer.groups]]\nmatch = ["*.bias", "nrom.*", "zz"]\n[batch]')
    built = load_recipe(recipe).recipe
    with pytest.raises(ConfigError, match="2 problems") as caught:
        built.optimizer(list(built.model().named_parameters()))
    text = str(caught.value)
    expected = [
        "recipe.toml:23",
        "optimizer.groups.0.match: 'nrom.*' matches no parameter",
        "did you mean 'norm'?",
        "'zz'",
    ]
    assert missing_parts(text, expected) == []


def test_errors_of_user_code_are_raised_with_a_note(recipe: Path) -> None:
    with pytest.raises(DataError, match=r"^there are no numbers$"):
        load_recipe(recipe, ["data.arguments.count=0"])
    with pytest.raises(ZeroDivisionError) as data:
        load_recipe(recipe, ["data.arguments.count=-1"])
    assert [note for note in data.value.__notes__ if "[data]" in note and "recipe.toml:14" in note]
    built = load_recipe(recipe, ["model.arguments.width=0"]).recipe
    with pytest.raises(ValueError, match="no width") as model:
        built.model()
    assert [note for note in model.value.__notes__ if "[model]" in note and "recipe.toml:7" in note]
