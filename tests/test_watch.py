"""What `make watch` promises: an edit is served, even after one that cannot start."""

import os
import shutil
import subprocess

from tests.harness import HERE, NAME, Container, answers, free_port, frozen, run, wait_until

WATCH = ["docker", "compose", "--file", "deploy/watch.yaml"]


def test_watch_serves_an_edit_even_after_one_that_cannot_start_and_builds_a_changed_lock_anew(deployed, tmp_path):
    for name in ("Dockerfile", "requirements.txt", ".dockerignore"):
        shutil.copy2(HERE / name, tmp_path)
    shutil.copy2(frozen(), tmp_path)
    shutil.copytree(HERE / "deploy", tmp_path / "deploy", symlinks=True)
    port, name, lock = str(free_port()), f"{NAME}-watch", tmp_path / "requirements.txt"
    environment = os.environ | {"NAME": name, "IMAGE": name, "PORT": port}
    url = f"http://127.0.0.1:{port}"

    def built() -> str:
        """The image that runs, or nothing while one container takes another's place."""
        ids = run("docker", "ps", "--quiet", f"--filter=name={name}-watch-service").split()
        return Container("docker", ids[0]).inspect("Image") if ids else ""

    def served() -> bool:
        return answers(url, "/openapi.json", "Read the item")

    def logs() -> str:
        return run(*WATCH, "logs", cwd=tmp_path, env=environment)

    with subprocess.Popen([*WATCH, "up", "--build", "--watch"], cwd=tmp_path, env=environment) as watch:
        try:
            wait_until(lambda: answers(url), 120)
            first = built()
            edited = tmp_path / "main.py"
            text = edited.read_text()
            edited.write_text("import nonsense\n" + text)
            wait_until(lambda: "No module named 'nonsense'" in logs())
            edited.write_text(text.replace("Read an item", "Read the item"))
            seconds = wait_until(served)
            print(f"an edit of main.py is served after {seconds:.1f} s")
            assert built() == first
            lock.write_text(lock.read_text() + "# changed\n")
            wait_until(lambda: built() not in {"", first} and served(), 300)
        finally:
            watch.terminate()
            run(*WATCH, "down", "--rmi", "all", "--timeout", "0", cwd=tmp_path, env=environment)
