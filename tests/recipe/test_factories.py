"""Code named in a recipe is refused unless it is qatkit's own or allowed, and its arguments fit before it is called."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qatkit.errors import QatkitError
from qatkit.recipe import FactoryConfig
from qatkit.recipe.factories import build, check_arguments, resolve

MINE = """
    import functools, os, subprocess
    from collections import OrderedDict
    from collections.abc import Sequence
    from dataclasses import dataclass
    from typing import TYPE_CHECKING, Any, Literal

    from qatkit.errors import QatkitError
    from qatkit.spec import QuantSpec

    if TYPE_CHECKING:
        from nowhere import Thing

    def net(width: int, depth: int = 2, rate: float = 0.1, *, act: Literal["relu", "gelu"] = "relu"):
        return (width, depth, rate, act)

    def lists(hidden: Sequence[int] = (), names: list[str] | None = None, pair: tuple[int, float] = (1, 2.0)):
        return hidden

    def spec(weight: QuantSpec | None = None):
        return weight

    def free(size: int, **kwargs: Any):
        return kwargs

    def later(thing: "Thing", size: "int"):
        return thing

    def picky(channels: list[int], batch_size: int = 1):
        if not channels:
            raise QatkitError("[] makes no network", key="channels", advice="use [16]")
        raise ValueError("nothing works today")

    def broken():
        raise RuntimeError("a bug, not a mistake in the recipe")

    class Net:
        def __init__(self, width: int = 1):
            self.width = width
        def method(self):
            pass
        @classmethod
        def other(cls):
            pass

    class Callable:
        def __call__(self):
            pass

    instance = Callable()
    partial = functools.partial(net, 1)
    bound = Net().method
    builtin = len
    run = subprocess.run
    number = 3
    nameless = lambda: None
    nameless.__module__ = None
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two packages that a person could have: `mine`, to be allowed, and `theirs`, which marks that it was imported."""
    before = set(sys.modules)
    for package in ("mine", "theirs"):
        (tmp_path / package).mkdir()
    (tmp_path / "mine/__init__.py").write_text("from mine.nets import Net, net\n")
    (tmp_path / "mine/nets.py").write_text(textwrap.dedent(MINE))
    (tmp_path / "mine/exports.py").write_text("import theirs\nfrom theirs import theirs_net\n")
    (tmp_path / "mine/crashes.py").write_text("1 / 0\n")
    (tmp_path / "mine/needs.py").write_text("import a_package_that_nobody_has\n")
    (tmp_path / "mine/lazy.py").write_text("def __getattr__(name):\n    raise ImportError('no such library')\n")
    (tmp_path / "theirs/__init__.py").write_text("def theirs_net():\n    pass\n")
    (tmp_path / "theirs/boom.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("mine", "theirs"):
            del sys.modules[name]


def refusal(name: str, *allow: str) -> str:
    with pytest.raises(QatkitError) as caught:
        resolve(name, "model.factory", allow)
    message = str(caught.value)
    assert message.startswith("model.factory: ")
    assert name in message
    return message


# --- which code may be named


@pytest.mark.parametrize("name", ["qatkit.models:cnn", "qatkit.models.vision:cnn", "qatkit.models:vision.cnn"])
def test_qatkits_own_factories_need_no_permission(name: str) -> None:
    assert resolve(name, "model.factory").__name__ == "cnn"


@pytest.mark.parametrize(
    ("name", "allow"),
    [("mine:net", "mine"), ("mine.nets:net", "mine"), ("mine.nets:net", "mine.nets"), ("mine:Net", "mine")],
)
def test_an_allowed_package_gives_its_functions_and_classes(mine: None, name: str, allow: str) -> None:
    assert resolve(name, "model.factory", [allow]).__name__.lower() == "net"


@pytest.mark.parametrize("name", ["theirs.boom:x", "theirs.boom:x.y"])
@pytest.mark.parametrize("allow", [(), ("their",), ("theirs.boo",), ("theirs.boom.deeper",), ("",), ("mine",)])
def test_a_foreign_module_is_refused_before_it_is_imported(
    mine: None, tmp_path: Path, name: str, allow: tuple[str, ...]
) -> None:
    assert "outside qatkit" in (message := refusal(name, *allow))
    assert "--allow theirs" in message
    assert not (tmp_path / "ran").exists()
    assert "theirs" not in sys.modules


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("qatkit.models.vision:nn.Linear", "torch.nn"),
        ("qatkit.models.vision:nn.modules.torch.hub.load", "torch.nn"),
        ("qatkit.data.handwritten:torch.load", "torch"),
        ("qatkit.models.vision:Sequence", "collections.abc"),
        ("qatkit.data.datamodule:LightningDataModule", "lightning"),
        ("qatkit.data.datamodule:DataLoader", "torch.utils.data"),
    ],
)
def test_what_a_qatkit_module_imports_is_not_qatkits(name: str, owner: str) -> None:
    message = refusal(name)
    assert f"from '{owner}" in message
    assert "outside qatkit" in message


@pytest.mark.parametrize(
    "name",
    [
        "qatkit.cli.main:subprocess.run",
        "qatkit.recipe.loading:yaml.load",
        "qatkit.recipe.factories:resolve",  # would import what it is told to
        "qatkit.recipe.factories:build",
        "qatkit.pipeline.runner:run_stages",
        "qatkit.data.handwritten:QatkitError",
        "qatkit:models.cnn",
        "qatkit_evil:cnn",
        "qatkit.models_evil:cnn",
    ],
)
def test_only_the_factories_of_qatkit_are_open_to_a_recipe(name: str) -> None:
    assert "outside qatkit" in (message := refusal(name)) or "a factory in qatkit.models or qatkit.data" in message


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("mine.exports:theirs_net", "from 'theirs', outside qatkit"),
        ("mine.exports:theirs.theirs_net", "from 'theirs', outside qatkit"),
        ("mine.nets:subprocess.run", "from 'subprocess', outside qatkit"),
        ("mine.nets:os.system", "from 'os', outside qatkit"),
        ("mine.nets:run", "from 'subprocess', outside qatkit"),
        ("mine.nets:OrderedDict", "from 'collections', outside qatkit"),
        ("mine.nets:builtin", "of type builtin_function_or_method"),
        ("mine.nets:instance", "of type Callable"),
        ("mine.nets:partial", "of type partial"),
        ("mine.nets:bound", "of type method"),
        ("mine.nets:number", "of type int"),
        ("mine.nets:os", "of type module"),
        ("mine.nets:Net.method", "an attribute of another object"),
        ("mine.nets:Net.other", "an attribute of another object"),
        ("mine.nets:net.real", "an attribute of another object"),
        ("mine.nets:nameless", "the module that defines 'mine.nets:nameless' is unknown"),
    ],
)
def test_an_allowed_package_does_not_open_what_it_imports_or_makes(mine: None, name: str, part: str) -> None:
    assert part in refusal(name, "mine")


@pytest.mark.parametrize(
    "name",
    [
        *(
            "cnn",
            "qatkit.models.cnn",
            "qatkit.models:",
            ":cnn",
            "a:b:c",
            "..models:cnn",
            "qatkit.models:cnn()",
            "a b:c",
        ),
        *("", "qatkit.models:_private", "qatkit.models:cnn.__globals__", "qatkit.models:cnn\n", "qatkit/models:cnn"),
    ],
)
def test_a_name_that_is_not_module_and_callable_is_refused(name: str) -> None:
    with pytest.raises(QatkitError, match=r"model\.factory: .* is not module:callable; use the form qatkit.models:cnn"):
        resolve(name, "model.factory")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("qatkit.models:cn", ["qatkit.models has no 'cn'", "did you mean 'cnn'?"]),
        ("qatkit.models.visoin:cnn", ["there is no module 'qatkit.models.visoin'", "'qatkit.models.vision'?"]),
        ("mine.nets:Nte", ["mine.nets has no 'Nte'", "did you mean 'net'?"]),
        ("mine.net:net", ["there is no module 'mine.net'", "'mine.nets'?"]),
        ("mien:net", ["there is no module 'mien'", "'mine'?"]),
        ("mine.crashes:net", ["cannot be imported (ZeroDivisionError: division by zero)"]),
        ("mine.needs:net", ["needs 'a_package_that_nobody_has', which is not installed"]),
        ("mine.lazy:net", ["cannot be loaded (no such library)"]),
    ],
)
def test_code_that_is_not_there_is_named_with_what_is(mine: None, name: str, parts: list[str]) -> None:
    message = refusal(name, "mine", "mien")
    for part in parts:
        assert part in message


# --- arguments


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("net", {"width": 3, "depth": 1, "rate": 1, "act": "gelu"}),
        ("lists", {"hidden": [1, 2], "names": None, "pair": [1, 2]}),
        ("lists", {"names": []}),
        ("spec", {"weight": {"num_bits": 4}}),
        ("free", {"size": 1, "anything": {"x": [None]}}),
        ("later", {"thing": object, "size": 1}),
        ("Net", {}),
    ],
)
def test_arguments_that_fit_are_taken(mine: None, name: str, args: dict[str, Any]) -> None:
    checked = check_arguments(resolve(f"mine.nets:{name}", "model.factory", ["mine"]), args, "model.args")
    assert checked.keys() == args.keys()


@pytest.mark.parametrize(
    ("name", "args", "key", "part"),
    [
        ("net", {"widht": 3}, "model.args.widht", "net has no such argument; did you mean 'width'?"),
        ("net", {"width": 3, "q": 1}, "model.args.q", "use one of width, depth, rate, act"),
        ("net", {}, "model.args.width", "is missing, and net requires it; set the argument"),
        ("net", {"width": "abc"}, "model.args.width", "'abc' is not an integer"),
        ("net", {"width": True}, "model.args.width", "true is not an integer"),
        ("net", {"width": 3.5}, "model.args.width", "3.5 is not an integer"),
        ("net", {"width": None}, "model.args.width", "null is not an integer"),
        ("net", {"width": 1, "rate": "fast"}, "model.args.rate", "'fast' is not a number"),
        ("net", {"width": 1, "act": "relv"}, "model.args.act", "did you mean 'relu'?"),
        ("lists", {"hidden": "abc"}, "model.args.hidden", "'abc' is not a list"),
        ("lists", {"hidden": 8}, "model.args.hidden", "8 is not a list; use [8]"),
        ("lists", {"hidden": [8, "x"]}, "model.args.hidden[1]", "'x' is not an integer"),
        ("lists", {"names": [1]}, "model.args.names[0]", "1 is not text"),
        ("lists", {"pair": [1]}, "model.args.pair", "has 1 values; use 2"),
        ("spec", {"weight": {"num_bits": 9}}, "model.args.weight.num_bits", "9 is out of range"),
        ("spec", {"weight": {"bits": 4}}, "model.args.weight.bits", "did you mean 'num_bits'?"),
        ("free", {"size": "x"}, "model.args.size", "'x' is not an integer"),
        ("Net", {"wdth": 1}, "model.args.wdth", "Net has no such argument; did you mean 'width'?"),
        ("Net", {"width": "1"}, "model.args.width", "use 1"),
    ],
)
def test_an_argument_that_does_not_fit_is_refused_before_the_call(
    mine: None, name: str, args: dict[str, Any], key: str, part: str
) -> None:
    fn = resolve(f"mine.nets:{name}", "model.factory", ["mine"])
    with pytest.raises(QatkitError) as caught:
        check_arguments(fn, args, "model.args")
    assert str(caught.value).startswith(f"{key}: ")
    assert part in str(caught.value)


def test_arguments_that_qatkit_passes_must_exist_and_stay_its_own(mine: None) -> None:
    fn = resolve("mine.nets:picky", "data.factory", ["mine"])
    assert check_arguments(fn, {"channels": [1]}, "data.args", ["batch_size"]) == {"channels": [1]}
    with pytest.raises(
        QatkitError,
        match=r"data\.args\.batch_size: 4 would be overwritten, because qatkit sets .*; remove the argument",
    ):
        check_arguments(fn, {"channels": [1], "batch_size": 4}, "data.args", ["batch_size"])
    with pytest.raises(QatkitError, match=r"data\.args: picky has no argument 'seed', which qatkit passes"):
        check_arguments(fn, {"channels": [1]}, "data.args", ["batch_size", "seed"])


# --- building


def test_build_calls_the_factory_with_the_recipes_arguments_and_qatkits(mine: None) -> None:
    config = FactoryConfig("mine:net", {"width": 3, "rate": 1})
    built = build(config, "model", ["mine"], depth=5)
    assert built == (3, 5, 1.0, "relu")
    assert type(built[2]) is float


def test_build_makes_a_dataclass_where_the_factory_asks_for_one(mine: None) -> None:
    assert build(FactoryConfig("mine.nets:spec", {"weight": {"num_bits": 4}}), "model", ["mine"]).qmax == 7


@pytest.mark.parametrize(
    ("channels", "message"),
    [([], "model.args.channels: [] makes no network; use [16]"), ([1], "model.args: nothing works today")],
)
def test_a_value_that_the_factory_refuses_gets_its_key(mine: None, channels: list[int], message: str) -> None:
    with pytest.raises(QatkitError) as caught:
        build(FactoryConfig("mine.nets:picky", {"channels": channels}), "model", ["mine"])
    assert str(caught.value) == message


def test_a_bug_in_a_factory_keeps_its_own_traceback(mine: None) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        build(FactoryConfig("mine.nets:broken"), "model", ["mine"])
