"""Ways in which a job's code depends on other code. In each case, `OLD` becomes `NEW` somewhere.

A case has a name, the lines that the script contains for it, the function of its job as an expression, and files beside
the script. `CASE` stands for its name, so that the cases don't share modules.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple


class Case(NamedTuple):
    """One way. `files` maps names to contents."""

    name: str
    script: str
    function: str
    files: Mapping[str, str] = MappingProxyType({})


ADDS = """
class Adds:
    def __init__(self):
        self.state = {1, "a", "b", "c"}

    def __call__(self, value):
        return self.plus(value)

    def plus(self, value):
        return f"{value} OLD"
"""

FUNCTION = """
def plus(value):
    return f"{value} OLD"
"""

REPORTED = [
    Case("class_of_module", "from CASE_m import Adds as CASE", "lambda x: CASE()(x)", {"CASE_m.py": ADDS}),
    Case("callable_instance", "from CASE_m import Adds as CASE", "CASE()", {"CASE_m.py": ADDS}),
    Case("bound_method", "from CASE_m import Adds as CASE", "CASE().plus", {"CASE_m.py": ADDS}),
    Case(
        "base_class",
        "from CASE_m import Below as CASE",
        "CASE()",
        {"CASE_m.py": "from CASE_n import Adds\nclass Below(Adds):\n    pass\n", "CASE_n.py": ADDS},
    ),
    Case(
        "cached_function",
        "from CASE_m import plus as CASE",
        "lambda x: CASE(x)",
        {"CASE_m.py": "import functools\n@functools.cache" + FUNCTION},
    ),
    Case(
        "attribute_of_package",
        "import CASE_p.sub",
        "lambda x: CASE_p.sub.plus(x)",
        {"CASE_p/__init__.py": "", "CASE_p/sub.py": FUNCTION},
    ),
    Case(
        "module_of_module",
        "import CASE_m",
        "lambda x: CASE_m.through(x)",
        {"CASE_m.py": "import CASE_n\ndef through(x):\n    return CASE_n.plus(x)\n", "CASE_n.py": FUNCTION},
    ),
    Case(
        "import_inside",
        "def CASE(x):\n    from CASE_p import sub\n    return sub.plus(x)",
        "CASE",
        {"CASE_p/__init__.py": "", "CASE_p/sub.py": FUNCTION},
    ),
]

IMPORTS = [
    Case("imported_as", "def CASE(x):\n    import CASE_m as m\n    return m.plus(x)", "CASE", {"CASE_m.py": FUNCTION}),
    Case(
        "package_init",
        "def CASE(x):\n    import CASE_p.sub\n    return CASE_p.sub.plus(x)",
        "CASE",
        {
            "CASE_p/__init__.py": "WORD = 'OLD'\n",
            "CASE_p/sub.py": "import CASE_p\ndef plus(x):\n    return f'{x} {CASE_p.WORD}'\n",
        },
    ),
    Case(
        "star_import",
        "from CASE_m import *",
        "lambda x: plus_CASE(x)",
        {"CASE_m.py": FUNCTION.replace("plus", "plus_CASE")},
    ),
    Case(
        "star_in_module",
        "import CASE_m",
        "lambda x: CASE_m.plus(x)",
        {"CASE_m.py": "from CASE_n import *\n", "CASE_n.py": FUNCTION},
    ),
    Case(
        "star_of_package",
        "import CASE_m",
        "lambda x: CASE_m.sub.plus(x)",
        {
            "CASE_m.py": "from CASE_p import *\n",
            "CASE_p/__init__.py": "__all__ = ['sub']\n",
            "CASE_p/sub.py": FUNCTION,
        },
    ),
    Case(
        "relative_import",
        "import CASE_p.sub",
        "lambda x: CASE_p.sub.through(x)",
        {
            "CASE_p/__init__.py": "",
            "CASE_p/sub.py": "def through(x):\n    from .deep import low\n    return low.plus(x)\n",
            "CASE_p/deep/__init__.py": "",
            "CASE_p/deep/low.py": FUNCTION,
        },
    ),
    Case(
        "conditional_import",
        "import CASE_m",
        "lambda x: CASE_m.plus(x)",
        {
            "CASE_m.py": "try:\n    from CASE_n import plus\nexcept ImportError:\n    plus = str\n",
            "CASE_n.py": FUNCTION,
        },
    ),
    Case(
        "import_module",
        "import importlib\ndef CASE(x):\n    return importlib.import_module('CASE_m').plus(x)",
        "CASE",
        {"CASE_m.py": FUNCTION},
    ),
    Case(
        "computed_import",
        "import importlib\ndef CASE(x):\n    return importlib.import_module('CASE_' + 'mn'[0:1]).plus(x)",
        "lambda x: CASE(x)",
        {"CASE_m.py": FUNCTION},
    ),
    Case(
        "computed_in_module",
        "import CASE_p",
        "lambda x: CASE_p.through(x, 'sub')",
        {
            "CASE_p/__init__.py": "from importlib import import_module\n"
            "def through(x, name):\n    return import_module(f'{__name__}.{name}').plus(x)\n",
            "CASE_p/sub.py": FUNCTION,
        },
    ),
    Case("namespace_package", "import CASE_p.sub", "lambda x: CASE_p.sub.plus(x)", {"CASE_p/sub.py": FUNCTION}),
    Case(
        "evaluated", "from CASE_m import *\ndef CASE(x):\n    return eval('plus(x)')", "CASE", {"CASE_m.py": FUNCTION}
    ),
    Case(
        "subclasses",
        "import CASE_m",
        "lambda x: CASE_m.Base.find(x)",
        {
            "CASE_m.py": "class Base:\n    @classmethod\n    def find(cls, x):\n"
            "        return [sub()(x) for sub in cls.__subclasses__()]\nfrom CASE_n import Adds\n",
            "CASE_n.py": "from CASE_m import Base\n" + ADDS.replace("Adds", "Adds(Base)"),
        },
    ),
]

FUNCTIONS = [
    Case(
        "default",
        "from CASE_m import f as CASE",
        "CASE",
        {"CASE_m.py": "def f(x, word=('OLD',)):\n    return x, word\n"},
    ),
    Case(
        "nested",
        "from CASE_m import f as CASE",
        "CASE()",
        {"CASE_m.py": "def f():\n    def inner(x):\n        return x, 'OLD'\n    return inner\n"},
    ),
    Case(
        "closure_over_instance",
        "from CASE_m import Adds\ndef CASE(adds):\n    return lambda x: adds(x)",
        "CASE(Adds())",
        {"CASE_m.py": ADDS},
    ),
    Case(
        "decorator_of_library",
        "from CASE_m import f as CASE",
        "lambda x: CASE(x).__enter__()",
        {"CASE_m.py": "from contextlib import contextmanager\n@contextmanager\ndef f(x):\n    yield f'{x} OLD'\n"},
    ),
    Case(
        "decorator_of_module",
        "from CASE_m import f as CASE",
        "CASE",
        {
            "CASE_m.py": "from CASE_n import deco\n@deco\ndef f(x):\n    return x\n",
            "CASE_n.py": "import functools\ndef deco(f):\n    @functools.wraps(f)\n"
            "    def wrapper(x):\n        return f(x), 'OLD'\n    return wrapper\n",
        },
    ),
    Case(
        "singledispatch",
        "import functools\n@functools.singledispatch\ndef CASE(x):\n    return x\n"
        "@CASE.register\ndef _(x: int):\n    return x, 'OLD'",
        "CASE",
    ),
    Case(
        "singledispatch_of_module",
        "from CASE_m import f as CASE",
        "lambda x: CASE(x)",
        {
            "CASE_m.py": "import functools\n@functools.singledispatch\ndef f(x):\n    return x\nimport CASE_n\n",
            "CASE_n.py": "from CASE_m import f\n@f.register(int)\ndef _(x):\n    return x, 'OLD'\n",
        },
    ),
    Case(
        "registry",
        "from CASE_m import KNOWN as CASE\nimport CASE_n",
        "lambda x: CASE['plus'](x)",
        {
            "CASE_m.py": "KNOWN = {}\ndef known(f):\n    KNOWN[f.__name__] = f\n    return f\n",
            "CASE_n.py": "from CASE_m import known\n@known" + FUNCTION,
        },
    ),
    Case(
        "cached_in_script",
        "import functools\n@functools.cache\ndef CASE(x):\n    return CASE(x - 1) if x else 'OLD'",
        "CASE",
    ),
    Case("attribute_of_function", "def CASE(x):\n    return x, CASE.word\nCASE.word = 'OLD'", "CASE"),
    Case("bound_to_builtin", "", "{1: 'OLD'}.get"),
    Case("bound_dunder", "", "('OLD', 1).__contains__"),
    Case("itemgetter", "import operator", "operator.itemgetter('OLD')"),
    Case(
        "replaced",
        "import CASE_m\nCASE_m.plus = lambda x: (x, 'OLD')",
        "lambda x: CASE_m.plus(x)",
        {"CASE_m.py": FUNCTION},
    ),
    Case(
        "handled_exceptions",
        "if 'OLD' == 'O' 'LD':\n    def CASE(x):\n"
        "        try:\n            y = int(x)\n            z = hex(y)\n"
        "        except TypeError:\n            z = None\n        return z\n"
        "else:\n    def CASE(x):\n"
        "        try:\n            y = int(x)\n        except TypeError:\n            z = None\n"
        "        else:\n            z = hex(y)\n        return z",
        "CASE",
    ),
    Case("star_argument", "CASE = (lambda x: x) if 'OLD' == 'O' 'LD' else (lambda *x: x)", "lambda x: CASE(x)"),
    Case(
        "holds_a_lock",
        "from CASE_m import plus as CASE",
        "CASE",
        {
            "CASE_m.py": "import threading\nLOCK = [threading.Lock(), 'OLD']\n"
            "def plus(x):\n    with LOCK[0]:\n        return x, LOCK[1]\n"
        },
    ),
]

CLASSES = [
    Case(
        "class_attribute",
        "from CASE_m import C as CASE",
        "lambda x: CASE.word",
        {"CASE_m.py": "class C:\n    word = 'OLD'\n"},
    ),
    Case(
        "dataclass_default",
        "from CASE_m import C as CASE",
        "lambda x: CASE(x)",
        {"CASE_m.py": "import dataclasses\n@dataclasses.dataclass\nclass C:\n    x: int\n    word: str = 'OLD'\n"},
    ),
    Case(
        "dataclass_factory",
        "from CASE_m import C as CASE",
        "lambda x: CASE()",
        {
            "CASE_m.py": "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass C:\n"
            "    words: list = dataclasses.field(default_factory=lambda: ['OLD'])\n"
        },
    ),
    Case(
        "made_dataclass",
        "import dataclasses\nCASE = dataclasses.make_dataclass('CASE', [('word', str, 'OLD')])",
        "lambda x: CASE()",
    ),
    Case(
        "named_tuple",
        "from CASE_m import C as CASE",
        "lambda x: CASE(x)",
        {"CASE_m.py": "from typing import NamedTuple\nclass C(NamedTuple):\n    x: int\n    word: str = 'OLD'\n"},
    ),
    Case(
        "enum",
        "from CASE_m import C as CASE",
        "lambda x: CASE.word.value",
        {"CASE_m.py": "import enum\nclass C(enum.Enum):\n    word = 'OLD'\n"},
    ),
    Case(
        "method_of_enum",
        "from CASE_m import C\nCASE = C.one",
        "lambda x: CASE.plus()",
        {"CASE_m.py": "import enum\nclass C(enum.IntEnum):\n    one = 1\n    def plus(self):\n        return 'OLD'\n"},
    ),
    Case(
        "metaclass",
        "from CASE_m import C as CASE",
        "lambda x: CASE.plus(x)",
        {
            "CASE_m.py": "class Meta(type):\n    def plus(cls, x):\n        return x, 'OLD'\n"
            "class C(metaclass=Meta):\n    pass\n"
        },
    ),
    Case(
        "nested_class",
        "from CASE_m import C as CASE",
        "lambda x: CASE.Inner().plus(x)",
        {"CASE_m.py": "class C:\n" + textwrap.indent(ADDS.replace("Adds", "Inner"), "    ")},
    ),
    Case(
        "property",
        "from CASE_m import C as CASE",
        "lambda x: CASE().word",
        {"CASE_m.py": "class C:\n    @property\n    def word(self):\n        return 'OLD'\n"},
    ),
    Case(
        "cached_property",
        "import functools\nclass CASE:\n    @functools.cached_property\n    def word(self):\n        return 'OLD'",
        "lambda x: CASE().word",
    ),
    Case(
        "partialmethod",
        "import functools\nclass CASE:\n    def two(self, x, word):\n        return x, word\n"
        "    one = functools.partialmethod(two, word='OLD')",
        "CASE().one",
    ),
    Case(
        "singledispatchmethod",
        "import functools\nclass CASE:\n    @functools.singledispatchmethod\n"
        "    def f(self, x):\n        return x, 'OLD'",
        "lambda x: CASE().f(x)",
    ),
    Case(
        "descriptor",
        "from CASE_m import C as CASE",
        "lambda x: CASE().word",
        {
            "CASE_m.py": "class D:\n    def __get__(self, instance, owner):\n        return 'OLD'\n"
            "class C:\n    word = D()\n"
        },
    ),
    Case(
        "generic",
        "import typing\nT_CASE = typing.TypeVar('T_CASE')\nclass CASE(typing.Generic[T_CASE]):\n    word = 'OLD'",
        "lambda x: CASE().word",
    ),
    Case(
        "cached_method",
        "from CASE_m import C as CASE",
        "lambda x: CASE().f(x)",
        {
            "CASE_m.py": "import functools\nclass C:\n"
            "    @functools.lru_cache\n    def f(self, x):\n        return x, 'OLD'\n"
        },
    ),
    Case(
        "slots",
        "from CASE_m import C\nCASE = C('OLD')",
        "lambda x: CASE.word",
        {"CASE_m.py": "class C:\n    __slots__ = ('word',)\n    def __init__(self, word):\n        self.word = word\n"},
    ),
    Case(
        "dict_with_missing",
        "from CASE_m import D\nCASE = D(a=1)",
        "CASE.__getitem__",
        {"CASE_m.py": "class D(dict):\n    def __missing__(self, key):\n        return 'OLD'\n"},
    ),
    Case("default_factory", "import collections\nCASE = collections.defaultdict(lambda: 'OLD')", "lambda x: CASE[x]"),
    Case(
        "subclass_of_str",
        "from CASE_m import S\nCASE = S('a')",
        "lambda x: CASE.plus()",
        {"CASE_m.py": "class S(str):\n    def plus(self):\n        return self + 'OLD'\n"},
    ),
    Case(
        "abstract_base",
        "from CASE_m import C as CASE",
        "CASE()",
        {
            "CASE_m.py": "import abc\nclass B(abc.ABC):\n    @abc.abstractmethod\n    def word(self): ...\n"
            "    def __call__(self, x):\n        return x, self.word()\n"
            "class C(B):\n    def word(self):\n        return super().__class__ and 'OLD'\n"
        },
    ),
    Case(
        "pydantic",
        "import pydantic\nclass CASE(pydantic.BaseModel):\n    word: str = 'OLD'",
        "lambda x: CASE().word",
    ),
]

CASES = [*REPORTED, *IMPORTS, *FUNCTIONS, *CLASSES]

HEAD = "import json, os, signal, sys\nimport manyhands as mh\nfunctions = {}\n"


def write_script(folder: Path, cases: list[Case], end: str, change: Callable[[str], str] = str) -> None:
    """Write the cases' files and `job.py`, which puts their functions into `functions`, and then does `end`."""
    lines = [HEAD]
    for case in cases:
        for name, text in case.files.items():
            path = folder / name.replace("CASE", case.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(change(text.replace("CASE", case.name)))
        lines.append(f"{case.script}\nfunctions['CASE'] = {case.function}\n".replace("CASE", case.name))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "job.py").write_text(change("\n".join([*lines, end])))
