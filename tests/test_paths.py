"""Paths follow the XDG rules, are never made up, and what is created is private."""

from __future__ import annotations

import os
import pwd
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from myllm import paths
from myllm.errors import CannotCreateError, ConfigError

FOLDERS: list[tuple[Callable[[Mapping[str, str]], Path], str, str]] = [
    (lambda environ: Path(paths.config_path(environ)), "XDG_CONFIG_HOME", ".config/myllm/config.toml"),
    (paths.data_dir, "XDG_DATA_HOME", ".local/share/myllm"),
    (paths.cache_dir, "XDG_CACHE_HOME", ".cache/myllm"),
    (paths.state_dir, "XDG_STATE_HOME", ".local/state/myllm"),
]
each_folder = pytest.mark.parametrize(("folder", "variable", "default"), FOLDERS)


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user that the password database does not know, as in `docker run --user 12345`."""

    def unknown(uid: int) -> pwd.struct_passwd:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)


@each_folder
def test_a_set_variable_names_the_folder(
    folder: Callable[[Mapping[str, str]], Path], variable: str, default: str
) -> None:
    found = folder({"HOME": "/home/me", variable: "/elsewhere"})
    assert found == Path("/elsewhere/myllm", *Path(default).parts[Path(default).parts.index("myllm") + 1 :])


@each_folder
@pytest.mark.parametrize("value", [None, "", "relative/path"])
def test_without_an_absolute_variable_the_folder_is_under_home(
    folder: Callable[[Mapping[str, str]], Path], variable: str, default: str, value: str | None
) -> None:
    environ = {"HOME": "/home/me"} | ({} if value is None else {variable: value})
    assert folder(environ) == Path("/home/me") / default


@pytest.mark.parametrize("environ", [{}, {"HOME": ""}, {"HOME": "here"}])
def test_without_home_the_password_database_is_asked(
    environ: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = pwd.struct_passwd(("me", "x", 1, 1, "", "/home/entry", "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: entry)
    assert paths.data_dir(environ) == Path("/home/entry/.local/share/myllm")


@each_folder
@pytest.mark.usefixtures("homeless")
def test_no_home_at_all_is_a_configuration_error_that_names_what_to_set(
    folder: Callable[[Mapping[str, str]], Path], variable: str, default: str
) -> None:
    with pytest.raises(ConfigError, match=f"set HOME, or {variable}") as error:
        folder({})
    assert error.value.exit_status == 78


@each_folder
@pytest.mark.usefixtures("homeless")
def test_a_set_variable_is_enough_without_a_home(
    folder: Callable[[Mapping[str, str]], Path], variable: str, default: str
) -> None:
    assert folder({variable: "/given"}).is_relative_to("/given/myllm")


def test_the_socket_folder_is_the_sessions_own_or_in_the_state_folder() -> None:
    assert paths.runtime_folder({"XDG_RUNTIME_DIR": "/run/user/1"}) == "/run/user/1/myllm"
    assert paths.runtime_folder({"HOME": "/home/me"}) == "/home/me/.local/state/myllm/run"


def test_naming_a_folder_creates_nothing(home: Path) -> None:
    for folder, _, _ in FOLDERS:
        folder(os.environ)
    paths.runtime_folder()
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_created_folders_are_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        made = paths.make_private(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (made, made.parent)] == [0o700, 0o700]


def test_a_folder_that_exists_keeps_its_mode(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    assert paths.make_private(tmp_path) == tmp_path
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_a_file_in_the_way_and_a_folder_that_refuses_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    for blocked in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(CannotCreateError, match="cannot be created") as error:
            paths.make_private(blocked)
        assert error.value.exit_status == 73

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "mkdir", refuse)  # as root, no mode refuses
    with pytest.raises(CannotCreateError, match="Permission denied"):
        paths.make_private(tmp_path / "new")
