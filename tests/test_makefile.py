"""What the Makefile promises: a list of its targets, a sentence where something is missing."""

import pytest

from tests.harness import HERE, NAME, copy_project, free_port, make, run


def test_make_alone_prints_targets_in_sections_each_with_a_sentence():
    lines = run("make", cwd=HERE).splitlines()
    targets = [line.split(maxsplit=2) for line in lines if line.startswith("  make ")]
    assert all(sentence[0].isupper() and len(sentence.split()) > 2 for _, _, sentence in targets)
    assert {"build", "run", "smoke", "test", "lint", "stop", "check"} <= {target for _, target, _ in targets}
    assert {line for line in lines if line and not line.startswith("  make ")} >= {"The container", "Development"}


def test_makefile_of_the_five_files_is_short():
    assert len((HERE / "Makefile").read_text().splitlines()) < 100


def test_labels_say_that_a_tree_is_dirty_and_nothing_of_a_commit_where_there_is_none(tmp_path):
    def labels() -> str:
        return make("--dry-run", "build", "ENGINE=true", folder=tmp_path)[1]

    copy_project(tmp_path)
    assert "image.revision" not in labels()
    run("git", "init", "--quiet", cwd=tmp_path)
    run("git", "add", "main.py", cwd=tmp_path)
    run("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message=a", cwd=tmp_path)
    revision = run("git", "rev-parse", "HEAD", cwd=tmp_path)
    assert f"image.revision={revision} " in labels()
    with open(tmp_path / "main.py", "a") as source:
        source.write("# edited\n")
    assert f"image.revision={revision}-dirty " in labels()
    assert "fatal" not in labels()


def test_edit_of_test_main_py_sets_nothing_up_again(tmp_path):
    copy_project(tmp_path)
    (tmp_path / "test_main.py").touch()
    assert "up to date" in make("--dry-run", ".venv/ready", folder=tmp_path)[1]
    (tmp_path / "requirements.txt").touch()
    assert "python3 -m venv .venv" in make("--dry-run", ".venv/ready", folder=tmp_path)[1]


def nothing_runs(target: str, engine: str, where: str = "") -> bool:
    status, output = make(target, f"ENGINE={engine}", "NAME=nothing-of-that-name")
    return (status, output.splitlines()[0]) == (2, f"Nothing runs{where}: `make run` starts it.")


@pytest.mark.contract
def test_make_run_without_an_engine_serves_on_this_host():
    for target in ("stop", "logs"):
        assert nothing_runs(target, "")
    port = f"PORT={free_port()}"
    status, output = make("run", "ENGINE=", "DRAIN_SECONDS=0", port)
    try:
        assert (status, "No container engine answers" in output) == (0, True), output
        assert make("smoke", port)[0] == 0
    finally:
        assert make("stop", "ENGINE=")[0] == 0


def test_make_run_insists_on_the_engine_that_it_is_told():
    status, output = make("run", "ENGINE=no-such-engine")
    assert status != 0
    assert "No container engine answers as no-such-engine: start Docker or Podman." in output


@pytest.mark.parametrize("port", ["abc", "0", "65536", ""])
def test_make_run_names_a_port_that_is_none(port):
    assert make("run", f"PORT={port}")[1].splitlines()[0] == f"PORT={port}: takes a port from 1 to 65535."


@pytest.mark.parametrize("target", ["stop", "logs"])
def test_make_says_that_nothing_runs(target):
    assert nothing_runs(target, "no-such-engine", " in no-such-engine as nothing-of-that-name")


@pytest.mark.parametrize("port", ["1", pytest.param("abc", marks=pytest.mark.check)])
def test_make_smoke_says_what_to_do_where_nothing_answers(port):
    status, output = make("smoke", f"PORT={port}")
    assert status != 0
    assert "`make run` starts the service" in output
    assert "Traceback" not in output


def test_make_run_shows_the_log_of_a_container_that_does_not_become_healthy(engine):
    flags = "RUN_FLAGS=--env DRAIN_SECONDS=abc"
    status, output = make(
        "run", f"ENGINE={engine}", f"IMAGE={NAME}", f"NAME={NAME}-broken", f"PORT={free_port()}", flags
    )
    run(engine, "rm", "--force", f"{NAME}-broken")
    assert status != 0
    assert "DRAIN_SECONDS=abc: Input should be a valid number" in output


@pytest.mark.contract
def test_make_run_and_smoke_end_with_every_check_passed(engine):
    arguments = (f"ENGINE={engine}", f"IMAGE={NAME}", f"NAME={NAME}-run", f"PORT={free_port()}")
    for _ in range(2):  # the second takes the place of the first
        status, output = make("run", *arguments)
        assert (status, "Documentation: http://127.0.0.1:" in output) == (0, True), output
    status, output = make("smoke", *arguments)
    assert (status, "passed" in output, "failed" in output) == (0, True, False)
    assert make("stop", *arguments)[0] == 0


def test_lock_is_what_the_head_of_main_py_asks_for(tmp_path):
    lock = tmp_path / "requirements.txt"
    lock.write_text((HERE / "requirements.txt").read_text())
    run("make", "lock", f"LOCK={lock}", cwd=HERE)
    assert lock.read_text() == (HERE / "requirements.txt").read_text(), "`make lock` brings them together"
