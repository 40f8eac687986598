"""Loading: each wrong value with its file, line, what is allowed and the nearest key; and hostile files."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chipmunk import config
from chipmunk.config import Config, ConfigError

YAML = "my.yml:{}: not valid YAML:"


def errors(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.parse(text, "my.yml")
    return str(caught.value).splitlines()


def outcome(text: str) -> Config | ConfigError:
    try:
        return config.parse(text)
    except ConfigError as error:
        return error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mlp:\n  top_kesy: 0.3\n", "my.yml:2: mlp.top_kesy is not a known key; the nearest is mlp.top_keys"),
        ("\nattention:\n  a: 1\n", "my.yml:2: attention is not a known key; the nearest is attn"),
        ("atn: {}", "my.yml:1: atn is not a known key; the nearest is attn"),
        (
            "top_keys: 0.3",
            "my.yml:1: top_keys belongs into a section: mlp.top_keys or attn.top_keys",
        ),
        (
            "mlp.top_keys: 0.3",
            "my.yml:1: mlp.top_keys belongs into a section: write 'top_keys' indented below 'mlp:'",
        ),
        ("mlp: {chunk_size_1: 8}", "my.yml:1: mlp.chunk_size_1 is not a known key; there is patchify.chunk_size_1"),
        (
            "patchify: {zzz: 8}",
            "my.yml:1: patchify.zzz is not a known key; known are is_enabled, chunk_size_1, chunk_size_2",
        ),
        (
            "mlp:\n\n  top_keys: 30",
            "my.yml:3: mlp.top_keys is 30; it must be a number from 0 to 1 (30 % is written 0.3)",
        ),
        ("mlp: {top_keys: 101}", "my.yml:1: mlp.top_keys is 101; it must be a number from 0 to 1"),
        ("mlp: {top_keys: -0.1}", "my.yml:1: mlp.top_keys is -0.1; it must be a number from 0 to 1"),
        ("mlp: {top_keys: .nan}", "my.yml:1: mlp.top_keys is NaN; it must be a number from 0 to 1"),
        (
            "mlp: {top_keys: 1e-1}",
            'my.yml:1: mlp.top_keys is "1e-1"; it must be a number from 0 to 1 (YAML reads 1e-1 as text: write 0.1)',
        ),
        ("mlp: {top_keys: ~}", "my.yml:1: mlp.top_keys is null; it must be a number from 0 to 1"),
        ("mlp: {top_keys: true}", "my.yml:1: mlp.top_keys is true; it must be a number from 0 to 1"),
        ("mlp: {bm: 128.0}", "my.yml:1: mlp.bm is 128.0; it must be a whole number, 1 or more"),
        ("mlp: {bm: 64}", "my.yml:1: mlp.mbm is 128; it must divide mlp.bm, which is 64"),
        ("mlp:\n  bm: 128\n  mbm: 96", "my.yml:3: mlp.mbm is 96; it must divide mlp.bm, which is 128"),
        ("attn: {is_enabled: 1}", "my.yml:1: attn.is_enabled is 1; it must be true or false"),
        (
            "attn: {full_step_schedule: 10}",
            "my.yml:1: attn.full_step_schedule is 10; "
            "it must be a list or !!set of steps counted from 0, such as [0, 1, 10, 40], or null",
        ),
        (
            "attn:\n  full_step_schedule:\n    - 0\n    - yes",
            "my.yml:2: attn.full_step_schedule is [0, true]; "
            "it must be a list or !!set of steps counted from 0, such as [0, 1, 10, 40], or null",
        ),
        ("attn: 3", "my.yml:1: attn is 3; it must be a section with keys such as is_enabled"),
        ("implementation: Triton", 'my.yml:1: implementation is "Triton"; it must be auto, reference or triton'),
        ("compile: maybe", 'my.yml:1: compile is "maybe"; it must be auto, true or false'),
        ("mlp:\n  is_fp8: true", "my.yml:2: mlp.is_fp8 is true; FP8 does not exist yet: set is_fp8 to false"),
        (
            "step_caching: {keep: 50}",
            "my.yml:1: step_caching.keep is 50; it must be a number above 0 and up to 1, or null (50 % is written 0.5)",
        ),
        (
            "offloading: {mlp.out_cache: true}",
            "my.yml:1: offloading.mlp.out_cache is true; "
            "offloading does not exist yet: set it to false, or global_disable_offloading to true",
        ),
        ("attn:\n  mbm: 1\n  mbm: 1\n", "my.yml:3: attn.mbm is given twice; the first one is on line 2"),
        ("mlp: {}\n\nmlp: {}\n", "my.yml:3: mlp is given twice; the first one is on line 1"),
    ],
)
def test_a_wrong_value_says_where_what_and_what_is_allowed(text: str, message: str) -> None:
    assert errors(text) == [message]


def test_all_errors_come_at_once_in_the_order_of_the_file() -> None:
    text = "steps: 0\nmlp:\n  top_keys: 2\n  top_kyes: .2\n  top_keys: .2\nattn: []\n"
    assert [line.split(" is ")[0] for line in errors(text)] == [
        "my.yml:1: steps",
        "my.yml:4: mlp.top_kyes",
        "my.yml:5: mlp.top_keys",
        "my.yml:6: attn",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "my.yml:1: expected sections such as 'mlp:' and 'attn:', found a list"),
        ("just words", "my.yml:1: expected sections such as 'mlp:' and 'attn:', found a single value"),
        (
            "\nsteps: !!python/object/apply:os.system ['touch hacked']",
            "my.yml:2: a value of the kind !!python/object/apply:os.system is not allowed here",
        ),
        ("!!python/name:os.system", "my.yml:1: expected sections such as 'mlp:' and 'attn:', found a single value"),
        ("steps: !mine 3", "my.yml:1: a value of the kind !mine is not allowed here"),
        ("steps: 2026-99-99", "my.yml:1: a value of the kind !!timestamp is not allowed here"),
        ("1: 2", "my.yml:1: '1' is no key: a key must be a word"),
        ("on: 2", "my.yml:1: 'on' is no key: a key must be a word"),
        ("mlp: {? [a]: 1}", "my.yml:1: a key must be a word, not a list"),
        ("base: &b {bm: 1}\nmlp: {<<: *b}", "my.yml:2: merging with << is not supported: write the keys out"),
        ("a: 1\n---\na: 1", f"{YAML.format(2)} expected a single document in the stream but found another document"),
        (
            "mlp:\n\ttop_keys: 1",
            f"{YAML.format(2)} while scanning for the next token found character '\\t' that cannot start any token",
        ),
        ("mlp: \x00", f"{YAML.format(1)} special characters are not allowed"),
        ("mlp: *nowhere", f"{YAML.format(1)} found undefined alias 'nowhere'"),
        ("mlp: &m [*m]", "my.yml:1: the file refers to itself or holds more than 2,000 values"),
        ("[" * 500, "my.yml: the file is nested too deeply"),
        ("a" * 70_000, "my.yml: the file is larger than 64 KiB, so it is no configuration"),
    ],
)
def test_files_that_are_no_configuration(text: str, message: str) -> None:
    assert errors(text) == [message]


def test_an_alias_bomb_ends_at_once() -> None:
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    assert "holds more than 2,000 values" in errors(bomb)[0]


def test_a_number_of_thousands_of_digits_is_an_error_or_a_number() -> None:
    found = outcome("steps: " + "9" * 5000)
    assert "not valid YAML" in str(found) if isinstance(found, ConfigError) else found.steps


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(ConfigError) as caught:
            config.load(path)
        return str(caught.value).replace(str(tmp_path), "")

    assert message(tmp_path / "none.yml") == (
        "/none.yml: cannot be read: No such file or directory; write one with: chipmunk config init"
    )
    assert message(tmp_path) == ": cannot be read: Is a directory"
    (tmp_path / "latin.yml").write_bytes(b"mlp: {}\n# caf\xe9\n")
    assert message(tmp_path / "latin.yml") == "/latin.yml:2: the file is not UTF-8 text: save it as UTF-8"
    (tmp_path / "big.yml").write_bytes(b"#" * 70_000)
    assert "larger than 64 KiB" in message(tmp_path / "big.yml")


def test_windows_files_load_and_keep_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "windows.yml"
    path.write_bytes(b"\xef\xbb\xbfmlp:\r\n  top_keys: 0.5\r\n")
    assert config.load(path).mlp.top_keys == 0.5
    path.write_bytes(b"\xef\xbb\xbfmlp:\r\n  bm: 128\r\n  top_keys: 5\r\n")
    with pytest.raises(ConfigError, match=r"windows\.yml:3: mlp\.top_keys is 5;"):
        config.load(path)


def test_errors_survive_a_process_boundary() -> None:
    with pytest.raises(ConfigError) as caught:
        config.parse("mlp: 1\nattn: 1")
    copy = pickle.loads(pickle.dumps(caught.value))
    assert copy.problems == caught.value.problems
    assert [problem.line for problem in copy.problems] == [1, 2]


def test_where_the_configuration_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, repository, named = tmp_path / "here", tmp_path / "repository", tmp_path / "named.yml"
    here.mkdir()
    repository.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.delenv("CHIPMUNK_CONFIG", raising=False)
    assert config.find() is None
    assert config.find(repository) is None
    (repository / config.FILE_NAME).touch()
    assert config.find() is None
    assert config.find(repository) == repository / config.FILE_NAME
    (here / config.FILE_NAME).touch()
    assert config.find(repository) == here / config.FILE_NAME
    monkeypatch.setenv("CHIPMUNK_CONFIG", str(named))
    assert config.find(repository) == named


@settings(deadline=None)
@given(st.text(alphabet="mlpatn:_ \n-[]{}!&*,.?<>|'\"#0123e\t~%@`", max_size=60))
def test_any_text_is_a_configuration_or_a_clear_error(text: str) -> None:
    found = outcome(text)
    assert isinstance(found, Config) or all(problem.message for problem in found.problems)
