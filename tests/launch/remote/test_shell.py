from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smolrun.launch.remote.shell import (
    PROBE,
    Shell,
    command,
    environment_input,
    posix,
    script,
    which_shell,
)

TELL = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ.get('A'), os.getcwd()]))"
needs_sh = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX sh")
# What a file system and execve can bear at all.
words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)

one_line = words.filter(lambda text: not set(text) & set("\r\n"))


def through_sh(line: str, login_shell: str = "sh", data: bytes = b"") -> list[object]:
    done = subprocess.run([login_shell, "-c", line], input=data, capture_output=True, timeout=20)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_sh
@settings(max_examples=60, deadline=None)
@given(st.lists(words, max_size=4), one_line)
def test_sh_hands_on_exactly_what_was_given(arguments: list[str], value: str):
    line = command(Shell.POSIX, [sys.executable, "-I", "-c", TELL, *arguments], env={"A": value})
    first = environment_input(Shell.POSIX, {"A": value})
    assert through_sh(line, data=first)[:2] == [arguments, value]


@needs_sh
@pytest.mark.parametrize("name", ["it's", 'a "b"', "$HOME", "-n", "a\nb", "~", "*", "ä", "a\\b"])
def test_sh_goes_to_any_folder(tmp_path, name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CDPATH", str(tmp_path))
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    line = command(Shell.POSIX, [sys.executable, "-c", TELL], cwd=name)
    assert through_sh(line)[2] == str(tmp_path / name)


def test_csh_finds_no_history_in_a_line():
    assert script("echo a!b") == r"exec sh -c 'echo a'\!'b'"


@needs_sh
def test_the_line_becomes_the_command_itself():
    # One process less to end: sh puts the command in its own place.
    done = subprocess.run(
        ["sh", "-c", f"echo $$; {script('echo $$')}"], capture_output=True, text=True
    )
    first, second = done.stdout.split()
    assert first == second


@needs_sh
def test_a_folder_that_is_not_there_ends_the_line():
    line = command(Shell.POSIX, ["echo", "went on"], cwd="/no/such/folder")
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stdout == ""


@pytest.mark.parametrize("argv", [[], [""], ["-rf"], ["a\0b"], ["a", "b\0"]])
def test_what_is_no_command_is_refused(argv: list[str]):
    for shell in Shell:
        with pytest.raises(ValueError, match=r"no command|cannot be quoted"):
            command(shell, argv)


@pytest.mark.parametrize("name", ["", "1A", "A B", "A=B", "A;rm", "Ä", "A\n"])
def test_what_is_no_variable_is_refused(name: str):
    for shell in Shell:
        with pytest.raises(ValueError, match="name of a variable"):
            command(shell, ["a"], env={name: "x"})


@pytest.mark.parametrize(
    ("output", "shell"),
    [
        ("smolrun-probe %OS%\n", Shell.POSIX),
        ("welcome to mini2!\nsmolrun-probe %OS%\n", Shell.POSIX),
        ("motd without an end smolrun-probe %OS%\n", Shell.POSIX),
        ("smolrun-probe Windows_NT\r\n", Shell.CMD),
        ("\x1b[2Jsmolrun-probe\r\n%OS%\r\n", Shell.POWERSHELL),
        ("smolrun-probe\n%OS%\n", Shell.POWERSHELL),
        ("", None),
        ("This account is currently not available.\n", None),
    ],
)
def test_which_shell(output: str, shell: Shell | None):
    assert which_shell(output) is shell


@needs_sh
def test_the_probe_in_the_shell_of_this_machine():
    done = subprocess.run(["sh", "-c", PROBE], capture_output=True, text=True, check=True)
    assert which_shell(done.stdout) is Shell.POSIX


# --- not run: the rules of cmd.exe and PowerShell, as they are documented -------------------------


def as_cmd_reads(line: str) -> str:
    """What cmd.exe hands on of a line without quotes of its own: carets gone, nothing expanded."""
    out, rest = "", iter(line)
    for char in rest:
        assert char not in '()%!"<>&|', f"{char} would mean something"
        out += next(rest) if char == "^" else char
    return out


def as_c_runtime_splits(text: str) -> list[str]:
    """How a Windows program takes its line apart: Microsoft, "Parsing C command-line arguments"."""
    arguments, current, is_quoted, is_open, i = [], "", False, False, 0
    while i < len(text):
        slashes = len(text[i:]) - len(text[i:].lstrip("\\"))
        i += slashes
        if i < len(text) and text[i] == '"':
            current += "\\" * (slashes // 2)
            is_open = True
            if slashes % 2:
                current += '"'
            else:
                is_quoted = not is_quoted
            i += 1
            continue
        current += "\\" * slashes
        if i < len(text):
            if text[i] in " \t" and not is_quoted:
                if current or is_open:
                    arguments.append(current)
                current, is_open = "", False
            else:
                current += text[i]
            i += 1
    return [*arguments, current] if current or is_open else arguments


lines = st.text(st.characters(exclude_characters="\0\r\n", exclude_categories=["Cs"]), max_size=30)


@given(st.lists(lines, max_size=4))
def test_cmd_and_the_program_see_what_was_given(arguments: list[str]):
    line = command(Shell.CMD, ["C:/Python 3/python.exe", *arguments])
    assert as_c_runtime_splits(as_cmd_reads(line)) == ["C:\\Python 3\\python.exe", *arguments]


def test_cmd_sets_variables_and_goes_to_the_folder():
    line = command(Shell.CMD, ["py", "-c", "1"], env={"A": "50%&x"}, cwd="C:/a b")
    assert line == 'set A=50^%^&x&& cd /d ^"C:\\a b^"&& py -c 1'


def test_powershell():
    line = command(Shell.POWERSHELL, ["C:/it's/py.exe", "a b", "$x"], env={"A": "1"}, cwd="C:/w")
    assert line == (
        "$env:A = '1'; Set-Location -LiteralPath 'C:/w'; "
        "& 'C:/it''s/py.exe' 'a b' '$x'; exit $LASTEXITCODE"
    )


@given(lines.filter(lambda text: '"' not in text))
def test_powershell_has_no_way_out_of_its_quotes(text: str):
    line = command(Shell.POWERSHELL, ["py", text])
    inside = line.removeprefix("& 'py' '").removesuffix("'; exit $LASTEXITCODE")
    for quote in "'\u2018\u2019\u201a\u201b":
        inside = inside.replace(quote * 2, "")
        assert quote not in inside


@pytest.mark.parametrize("text", ["a\nb", "a\rb"])
def test_windows_shells_refuse_what_they_cannot_be_told(text: str):
    for shell in (Shell.CMD, Shell.POWERSHELL):
        with pytest.raises(ValueError, match="cannot be quoted"):
            command(shell, ["py", text])
    with pytest.raises(ValueError, match="cannot be quoted"):
        command(Shell.POWERSHELL, ["py", 'a"b'])


def test_posix_can_be_part_of_a_longer_piece():
    assert posix(["a b", "c"], env={"A": "x y"}, cwd="d") == (
        "IFS= read -r A && export A && CDPATH= cd -- d && 'a b' c"
    )


@needs_sh
def test_the_value_of_a_variable_is_in_stdin_and_the_rest_of_it_is_the_commands():
    env = {"URL": "https://me:secret@index", "B": " b\\n "}
    line = command(Shell.POSIX, ["sh", "-c", 'printf "%s|%s|" "$URL" "$B"; cat'], env=env)
    assert "secret" not in line
    data = environment_input(Shell.POSIX, env) + b"more\nlines\n"
    done = subprocess.run(["sh", "-c", line], input=data, capture_output=True, timeout=20)
    assert done.stdout.decode() == "https://me:secret@index| b\\n |more\nlines\n"


@pytest.mark.parametrize("value", ["a\nb", "a\rb", "a\0b"])
def test_the_value_of_a_variable_is_one_line_and_no_error_shows_it(value: str):
    for shell in Shell:
        with pytest.raises(ValueError, match="variable A") as raised:
            command(shell, ["a"], env={"A": value})
        assert value not in str(raised.value)
