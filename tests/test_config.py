"""Round trips, strictness and error messages of configs."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openmythos.config import (
    ConfigError,
    apply_overrides,
    from_dict,
    kinds,
    require,
    require_int,
    require_number,
    to_dict,
)
from openmythos.files import (
    load_json,
    load_toml,
    save_json,
    save_toml,
    write_atomically,
)


@dataclass(frozen=True, kw_only=True)
class LTI:
    kind: Literal["lti"] = "lti"
    max_decay: float = 0.99
    method: Literal["zoh", "euler"] = "zoh"

    def __post_init__(self) -> None:
        require_number("max_decay", self.max_decay, above=0, below=1)


@dataclass(frozen=True, kw_only=True)
class Add:
    kind: Literal["add"] = "add"
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Concat:
    kind: Literal["concat"] = "concat"
    dim: int
    inner: Add = field(default_factory=lambda: Add(scale=2.0))


Injection = LTI | Add | Concat


@dataclass(frozen=True, kw_only=True)
class SwiGLU:
    kind: Literal["swiglu"] = "swiglu"
    expansion: float = 2.5


@dataclass(frozen=True, kw_only=True)
class MoE:
    kind: Literal["moe"] = "moe"
    num_experts: int = 8
    top_k: int = 2
    router: Injection = field(default_factory=LTI)

    def __post_init__(self) -> None:
        require_int("num_experts", self.num_experts, 1)
        require_int("top_k", self.top_k, 1)
        allowed = f"must be at most num_experts = {self.num_experts}"
        require(self.top_k <= self.num_experts, "top_k", self.top_k, allowed)


FeedForward = SwiGLU | MoE


@dataclass(frozen=True, kw_only=True)
class Model:
    dim: int = 64
    injection: Injection = field(default_factory=lambda: LTI(max_decay=0.5))
    feed_forward: FeedForward = field(default_factory=MoE)
    layers: tuple[FeedForward, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Run:
    name: str
    seed: int = 0
    learning_rate: float = 1e-3
    compile: bool = False
    bits: Literal[8, 16] = 16
    sizes: tuple[int, ...] = (1, 2)
    grid: tuple[tuple[float, ...], ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    model: Model = field(default_factory=Model)


RUN = Run(name="base")


def message(data: Any, cls: Any = Run) -> str:
    """The error message of a wrong config."""
    with pytest.raises(ConfigError) as caught:
        from_dict(cls, data)
    text = str(caught.value)
    assert "\n" not in text
    return text


def run_with(**model: Any) -> dict[str, Any]:
    return {"name": "n", "model": model}


int64s = st.integers(-(2**63), 2**63 - 1)
numbers = st.floats(allow_nan=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
adds = st.builds(Add, scale=numbers)
injections = st.one_of(
    st.builds(
        LTI,
        max_decay=st.floats(0, 1, exclude_min=True, exclude_max=True),
        method=st.sampled_from(["zoh", "euler"]),
    ),
    adds,
    st.builds(Concat, dim=int64s, inner=adds),
)
feed_forwards = st.one_of(
    st.builds(SwiGLU, expansion=numbers),
    st.builds(MoE, num_experts=st.integers(4, 99), top_k=st.integers(1, 4), router=injections),
)
models = st.builds(
    Model,
    dim=st.integers(-(2**63), 2**63 - 1),
    injection=injections,
    feed_forward=feed_forwards,
    layers=st.lists(feed_forwards, max_size=2).map(tuple),
)
runs = st.builds(
    Run,
    name=texts,
    seed=int64s,
    learning_rate=st.one_of(numbers, st.integers(-(2**53), 2**53)),
    compile=st.booleans(),
    bits=st.sampled_from([8, 16]),
    sizes=st.lists(int64s, max_size=3).map(tuple),
    grid=st.lists(st.lists(numbers, max_size=2).map(tuple), max_size=2).map(tuple),
    weights=st.dictionaries(texts, numbers, max_size=3),
    model=models,
)


class TestRoundTrip:
    @given(runs)
    def test_dict(self, run: Run) -> None:
        data = to_dict(run)
        assert from_dict(Run, data) == run
        assert json.loads(json.dumps(data)) == data

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(runs)
    def test_files(self, tmp_path: Path, run: Run) -> None:
        for save, load in ((save_toml, load_toml), (save_json, load_json)):
            save(run, tmp_path / "run")
            assert load(Run, tmp_path / "run") == run
        assert [path.name for path in tmp_path.iterdir()] == ["run"]

    @given(injections)
    def test_member_of_a_union_carries_its_kind(self, injection: LTI | Add | Concat) -> None:
        data = to_dict(injection)
        assert data["kind"] == injection.kind
        assert from_dict(Injection, data) == injection

    def test_built_values_have_the_annotated_types(self) -> None:
        run = from_dict(Run, {"name": "n", "learning_rate": 1, "sizes": [3], "weights": {"a": 1}})
        assert type(run.learning_rate) is float
        assert type(run.weights["a"]) is float
        assert run.sizes == (3,)

    def test_toml_is_readable(self) -> None:
        text = tomli_w.dumps(to_dict(RUN))
        assert 'name = "base"' in text
        assert '[model.injection]\nkind = "lti"\nmax_decay = 0.5\n' in text

    def test_a_config_that_would_not_load_is_not_saved(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"learning_rate = nan: must be a number"):
            save_json(Run(name="n", learning_rate=math.nan), tmp_path / "run.json")
        assert not list(tmp_path.iterdir())

    def test_a_class_that_changes_its_values_is_found_out(self) -> None:
        with pytest.raises(TypeError, match="Drifting: does not survive"):
            from_dict(Drifting, {})


@dataclass(frozen=True, kw_only=True)
class Drifting:
    width: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", self.width + 1)


@dataclass(frozen=True, kw_only=True)
class Undecided:
    width: int | None = None


class TestUnions:
    def test_kinds(self) -> None:
        assert kinds(Injection) == {"lti": LTI, "add": Add, "concat": Concat}
        assert kinds(LTI) == {"lti": LTI}

    @pytest.mark.parametrize("union", [Model, LTI | Model, LTI | LTI | Drifting, int | None])
    def test_kinds_refuses_untagged_classes(self, union: Any) -> None:
        with pytest.raises(TypeError, match="needs a kind of its own"):
            kinds(union)

    def test_none_is_not_a_config(self) -> None:
        with pytest.raises(TypeError, match=r"^width: a config cannot hold int \| None$"):
            from_dict(Undecided, {"width": 3})

    def test_missing_kind_goes_on_from_the_default_of_the_field(self) -> None:
        run = from_dict(Run, run_with(injection={"method": "euler"}, feed_forward={"top_k": 3}))
        assert run.model.injection == LTI(max_decay=0.5, method="euler")
        assert run.model.feed_forward == MoE(top_k=3)
        concat = from_dict(Injection, {"kind": "concat", "dim": 3, "inner": {}})
        assert concat == Concat(dim=3, inner=Add(scale=2.0))

    def test_named_kind_starts_from_its_own_defaults(self) -> None:
        for given_kind in ({"kind": "lti"}, "lti"):
            assert from_dict(Run, run_with(injection=given_kind)).model.injection == LTI()

    def test_bare_string_is_shorthand(self) -> None:
        run = from_dict(Run, run_with(injection="add", layers=["moe", {"kind": "swiglu"}]))
        assert run.model.injection == Add()
        assert run.model.layers == (MoE(), SwiGLU())
        assert from_dict(Add, "add") == Add()

    def test_missing_kind_without_default(self) -> None:
        assert message({"scale": 1.0}, Injection) == "kind: missing; known: add, concat, lti"
        text = message(run_with(layers=[{"top_k": 1}]))
        assert text == "model.layers[0].kind: missing; known: moe, swiglu"

    @pytest.mark.parametrize("value", [{"kind": "ltti"}, "ltti", "LTTI"])
    def test_unknown_kind(self, value: Any) -> None:
        kind = value if isinstance(value, str) else value["kind"]
        assert message(run_with(injection=value)) == (
            f"model.injection.kind = {kind!r}: unknown kind, did you mean 'lti'? "
            "known: add, concat, lti"
        )

    def test_unknown_kind_resembling_nothing(self) -> None:
        text = message(run_with(injection=7 * "z"))
        assert text.endswith("unknown kind; known: add, concat, lti")
        assert "unknown kind" in message(run_with(injection={"kind": ["lti"]}))


class TestStrictness:
    def test_unknown_key(self) -> None:
        assert message(run_with(injection={"max_decy": 0.9})) == (
            "model.injection.max_decy: unknown key, did you mean 'max_decay'? "
            "known: kind, max_decay, method"
        )
        assert message({"nam": "n"}).startswith("nam: unknown key, did you mean 'name'? known: b")

    def test_key_of_another_kind_is_unknown(self) -> None:
        text = message(run_with(injection={"kind": "add", "max_decay": 0.9}))
        assert text.startswith("model.injection.max_decay: unknown key")
        assert "kind, scale" in text

    def test_missing_fields_are_named(self) -> None:
        assert message({}) == "name: missing, must be given"
        text = message(run_with(injection="concat"))
        assert text == "model.injection.dim: missing, must be given"

    @pytest.mark.parametrize(
        ("key", "value", "wanted"),
        [
            ("name", 3, "must be a string"),
            ("seed", 2.0, "must be an integer"),
            ("seed", True, "must be an integer"),
            ("seed", "3", "must be an integer"),
            ("learning_rate", "fast", "must be a number"),
            ("learning_rate", False, "must be a number"),
            ("learning_rate", math.nan, "must be a number"),
            ("learning_rate", None, "must be a number"),
            ("compile", 1, "must be true or false"),
            ("bits", 9, "unknown choice; known: 8, 16"),
            ("bits", 16.0, "unknown choice, did you mean '16'? known: 8, 16"),
            ("sizes", 3, "must be a list"),
            ("sizes", "12", "must be a list"),
            ("weights", [1.0], "must be a table"),
            ("model", 3, "must be a table"),
            ("model", "small", "must be a table"),
        ],
    )
    def test_wrong_type(self, key: str, value: Any, wanted: str) -> None:
        assert message({"name": "n", key: value}) == f"{key} = {value!r}: {wanted}"

    def test_paths_into_containers(self) -> None:
        assert message({"name": "n", "sizes": [1, 2.5]}) == "sizes[1] = 2.5: must be an integer"
        assert message({"name": "n", "grid": [[], [0, "x"]]}).startswith("grid[1][1] = 'x': must")
        assert message({"name": "n", "weights": {"a": "x"}}).startswith("weights.a = 'x': must be")
        assert message({"name": "n", "weights": {1: 2.0}}).startswith("a key of weights = 1: must")
        assert message([]) == "config = []: must be a table"

    def test_number_too_large_for_a_float(self) -> None:
        assert message({"name": "n", "learning_rate": 10**400}).startswith("learning_rate: must be")

    def test_validation_errors_carry_the_path(self) -> None:
        assert message(run_with(feed_forward={"kind": "moe", "top_k": 9})) == (
            "model.feed_forward.top_k = 9: must be at most num_experts = 8"
        )
        text = message(run_with(layers=["swiglu", {"kind": "moe", "router": {"max_decay": 1}}]))
        assert text == (
            "model.layers[1].router.max_decay = 1.0: must be a number, above 0 and below 1"
        )

    def test_path_argument_comes_first(self) -> None:
        with pytest.raises(ConfigError, match=re.escape("arms[2].name = 3: must be a string")):
            from_dict(Run, {"name": 3}, path="arms[2]")


class TestRequire:
    def test_require(self) -> None:
        require(True, "top_k", 2, "anything")
        with pytest.raises(ConfigError, match=r"^mode = 'x': must be a or b$"):
            require(False, "mode", "x", "must be a or b")

    @pytest.mark.parametrize("value", [1, 8])
    def test_int_accepts(self, value: int) -> None:
        require_int("top_k", value, 1, 8)

    @pytest.mark.parametrize("value", [2.5, 2.0, True, "2", None, 0, 9])
    def test_int_refuses(self, value: object) -> None:
        allowed = "must be an integer, at least 1 and at most 8"
        with pytest.raises(ConfigError, match=f"^{re.escape(f'top_k = {value!r}: {allowed}')}$"):
            require_int("top_k", value, 1, 8)

    def test_int_bounds_are_optional(self) -> None:
        require_int("offset", -(10**30))
        with pytest.raises(ConfigError, match=r"^n = -1: must be an integer, at least 0$"):
            require_int("n", -1, minimum=0)
        with pytest.raises(ConfigError, match=r"^n = 'x': must be an integer$"):
            require_int("n", "x")

    @pytest.mark.parametrize("value", [0.5, 1, 10**400, math.inf])
    def test_number_accepts(self, value: float) -> None:
        require_number("scale", value, above=0, at_least=0.5)

    @pytest.mark.parametrize(
        ("value", "bounds"),
        [
            (math.nan, {}),
            (True, {}),
            ("1", {}),
            (0.0, {"above": 0}),
            (0.9, {"at_least": 1}),
            (1, {"below": 1}),
            (1.1, {"at_most": 1}),
        ],
    )
    def test_number_refuses(self, value: object, bounds: dict[str, float]) -> None:
        words = "".join(f", {name.replace('_', ' ')} {bound}" for name, bound in bounds.items())
        wanted = f"scale = {value!r}: must be a number{words}"
        with pytest.raises(ConfigError, match=f"^{re.escape(wanted)}$"):
            require_number("scale", value, **bounds)


class TestOverrides:
    def test_values(self) -> None:
        run = apply_overrides(
            RUN,
            [
                "seed=7",
                "learning_rate = 3e-4",
                "compile=true",
                "bits=8",
                "sizes=[4, 5]",
                "weights.a=1",
                'weights={"b c" = 2.0}',
                "weights.d=3",
                "model.injection.max_decay=0.25",
                "model.feed_forward.router.method=euler",
            ],
        )
        assert run == Run(
            name="base",
            seed=7,
            learning_rate=3e-4,
            compile=True,
            bits=8,
            sizes=(4, 5),
            weights={"b c": 2.0, "d": 3.0},
            model=Model(
                injection=LTI(max_decay=0.25), feed_forward=MoE(router=LTI(method="euler"))
            ),
        )
        assert Run(name="base") == RUN

    @pytest.mark.parametrize(
        ("text", "name"),
        [
            ("plain", "plain"),
            ('"quoted = yes"', "quoted = yes"),
            ("a=b", "a=b"),
            ("2024", "2024"),
            ("1e3", "1e3"),
            ("true", "true"),
            ("2024-01-01", "2024-01-01"),
            ("runs/a#b", "runs/a#b"),
            ("", ""),
            ("1\nseed = 2", "1\nseed = 2"),
        ],
    )
    def test_text_stays_text(self, text: str, name: str) -> None:
        assert apply_overrides(RUN, [f"name={text}"]) == replace(RUN, name=name)

    def test_no_overrides(self) -> None:
        assert apply_overrides(RUN, []) == RUN

    @pytest.mark.parametrize("path", ["model.injection", "model.injection.kind"])
    @pytest.mark.parametrize("kind", ["add", '"add"'])
    def test_another_kind_starts_from_its_defaults(self, path: str, kind: str) -> None:
        run = apply_overrides(RUN, ["model.injection.max_decay=0.1", f"{path}={kind}"])
        assert run.model.injection == Add()
        run = apply_overrides(RUN, [f"{path}={kind}", "model.injection.scale=3"])
        assert run.model.injection == Add(scale=3.0)
        with pytest.raises(ConfigError, match=r"^model.injection.max_decay: unknown key"):
            apply_overrides(RUN, [f"{path}={kind}", "model.injection.max_decay=0.1"])

    @pytest.mark.parametrize("override", ["model.injection=lti", "model.injection.kind=lti"])
    def test_same_kind_keeps_the_values(self, override: str) -> None:
        assert apply_overrides(RUN, [override]) == RUN

    def test_required_fields_of_the_new_kind_may_come_later(self) -> None:
        run = apply_overrides(
            RUN,
            ["model.injection=concat", "model.injection.inner.scale=4", "model.injection.dim=3"],
        )
        assert run.model.injection == Concat(dim=3, inner=Add(scale=4.0))
        with pytest.raises(ConfigError, match=r"^model.injection.dim: missing"):
            apply_overrides(RUN, ["model.injection=concat"])

    def test_only_the_result_is_validated(self) -> None:
        run = apply_overrides(
            RUN, ["model.feed_forward.top_k=12", "model.feed_forward.num_experts=16"]
        )
        assert run.model.feed_forward == MoE(num_experts=16, top_k=12)
        with pytest.raises(ConfigError, match=r"^model.feed_forward.top_k = 12: must be at most"):
            apply_overrides(RUN, ["model.feed_forward.top_k=12"])

    def test_inline_table_means_what_it_means_in_a_file(self) -> None:
        run = apply_overrides(RUN, ["model.injection={kind='add'}", "model.injection.scale=3"])
        assert run.model.injection == Add(scale=3.0)
        run = apply_overrides(run, ["model={dim=3}", "model.injection.method=euler"])
        assert run.model == Model(dim=3, injection=LTI(max_decay=0.5, method="euler"))

    @pytest.mark.parametrize(
        ("override", "wanted"),
        [
            ("seed", "override 'seed': must be written path.to.field=value"),
            ("sead=1", "sead: unknown key, did you mean 'seed'? known: bits, compile, "),
            ("model.injecton.kind=add", "model.injecton: unknown key, did you mean 'injection'?"),
            ("model.injection.max_decy=1", "model.injection.max_decy: unknown key, did you mean"),
            ("model.injection=ltti", "model.injection.kind = 'ltti': unknown kind, did you mean"),
            ("model.injection.kind=3", "model.injection.kind = 3: unknown kind; known: add, co"),
            (
                "model.injection=3",
                "model.injection = 3: must be a table or one of add, concat, lti",
            ),
            ("model=3", "model = 3: must be a table"),
            ("seed.high.low=1", "seed.high.low: seed has no keys of its own"),
            ("sizes.0=1", "sizes.0: sizes has no keys of its own"),
            ("model.injection.kind.x=1", "model.injection.kind.x: model.injection.kind has no"),
            ("seed=1.5", "seed = 1.5: must be an integer"),
            ("compile=True", "compile = 'True': must be true or false"),
            ("weights=3", "weights = 3: must be a table"),
            ("weights.a=x", "weights.a = 'x': must be a number"),
            ("=3", ": unknown key; known: "),
        ],
    )
    def test_errors(self, override: str, wanted: str) -> None:
        with pytest.raises(ConfigError, match=f"^{re.escape(wanted)}"):
            apply_overrides(RUN, [override])

    def test_a_key_called_kind_in_a_table_of_numbers(self) -> None:
        assert apply_overrides(RUN, ["weights.kind=1"]).weights == {"kind": 1.0}

    def test_type_of_the_result_stays(self) -> None:
        assert apply_overrides(LTI(), ["max_decay=0.2"]) == LTI(max_decay=0.2)
        with pytest.raises(ConfigError, match="unknown kind"):
            apply_overrides(LTI(), ["kind=add"])


class TestFiles:
    @pytest.mark.parametrize(
        ("load", "text", "position"),
        [
            (load_toml, "name = \n", "line 1, column 8"),
            (load_json, '{"name": }', "line 1 column 10"),
            (load_toml, "a = 1\na = 2\n", "line 2, column 6"),
            (load_json, '{"name": "a", "name": "b"}', "key 'name' is given twice"),
            (load_json, 100_000 * "[", "recursion"),
            (load_toml, b"name = '\xff'", "position 8"),
        ],
    )
    def test_malformed(self, tmp_path: Path, load: Any, text: str | bytes, position: str) -> None:
        path = tmp_path / "run.conf"
        write_atomically(path, text)
        with pytest.raises(ConfigError, match=r"run.conf: not valid (TOML|JSON): ") as caught:
            load(Run, path)
        assert position in str(caught.value)

    @pytest.mark.parametrize("load", [load_toml, load_json])
    def test_unreadable(self, tmp_path: Path, load: Any) -> None:
        with pytest.raises(ConfigError, match=r"none: cannot be read: No such file"):
            load(Run, tmp_path / "none")
        with pytest.raises(ConfigError, match=r"cannot be read: Is a directory"):
            load(Run, tmp_path)

    def test_invalid_content_names_file_and_field(self, tmp_path: Path) -> None:
        path = tmp_path / "run.toml"
        path.write_text('name = "n"\n[model]\ndim = "wide"\n')
        with pytest.raises(ConfigError, match=r"run.toml: model.dim = 'wide': must be an integer"):
            load_toml(Run, path)

    @pytest.mark.parametrize("broken", ["replace", "fsync"])
    def test_failed_write_keeps_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
    ) -> None:
        path = tmp_path / "run.toml"
        save_toml(RUN, path)
        old = path.read_bytes()

        def fail(*_: object) -> NoReturn:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, broken, fail)
            with pytest.raises(OSError, match="No space left"):
                save_toml(replace(RUN, seed=1), path)
        assert path.read_bytes() == old
        assert list(tmp_path.iterdir()) == [path]

    def test_interrupted_write_leaves_nothing_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def interrupt(*_: object) -> NoReturn:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(tmp_path / "state", b"new")
        assert not list(tmp_path.iterdir())

    def test_content_is_on_disk_before_the_rename(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[str] = []
        for name in ("fsync", "replace"):
            real = getattr(os, name)

            def record(*args: Any, name: str = name, real: Any = real) -> None:
                calls.append(name)
                real(*args)

            monkeypatch.setattr(os, name, record)
        write_atomically(tmp_path / "state", "text \u00e4\r\n")
        assert calls == ["fsync", "replace", "fsync"]
        assert (tmp_path / "state").read_bytes() == "text \u00e4\r\n".encode()

    def test_file_is_as_readable_as_any_other(self, tmp_path: Path) -> None:
        (tmp_path / "plain").write_text("x")
        write_atomically(tmp_path / "atomic", "x")
        modes = {path.stat().st_mode for path in tmp_path.iterdir()}
        assert len(modes) == 1
