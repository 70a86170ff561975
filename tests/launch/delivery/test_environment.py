from __future__ import annotations

from smolrun.launch.delivery.environment import env_python, environment_name, own_dependencies


def test_the_order_of_lines_and_bounds_means_nothing() -> None:
    one = environment_name(["torch>=2.6,<2.14", "numpy >= 2"], "cpu")
    other = environment_name(["numpy>=2", "torch<2.14,>=2.6"], "cpu")
    assert one == other
    assert one.startswith("cpu-")


def test_everything_that_matters_changes_the_name() -> None:
    names = {
        environment_name(lines, torch)
        for lines in (["torch>=2.6"], ["torch>=2.7"], ["torch>=2.6; sys_platform == 'linux'"])
        for torch in ("auto", "cpu", "cuda")
    }
    assert len(names) == 9


def test_our_own_dependencies_have_no_extras() -> None:
    lines = own_dependencies()
    assert any(line.startswith("torch") for line in lines)
    assert not any("pytest" in line for line in lines)


def test_each_system_has_its_interpreter() -> None:
    assert (
        env_python("/w", "e", "linux") == env_python("/w", "e", "darwin") == "/w/envs/e/bin/python"
    )
    assert env_python("C:/w", "e", "windows") == "C:/w/envs/e/Scripts/python.exe"
